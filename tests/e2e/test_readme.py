"""The README's commands, run against the platform that `make serve` would have started."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.running import ROOT, Running

pytestmark = pytest.mark.e2e
README = (ROOT / "README.md").read_text()
# `make` itself is how these tests are run and how the platform of this test was started.
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.S)
    for line in block.splitlines()
    if line and not line.startswith("make ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_works(catalog: Running, command: str):
    line = command.replace("http://127.0.0.1:8000", catalog.url).replace("curl ", "curl -sS --fail-with-body ")
    line = line.replace(".venv/bin/roundhouse", str(Path(sys.executable).with_name("roundhouse")))
    done = subprocess.run(
        line, shell=True, capture_output=True, text=True, timeout=120, cwd=ROOT, env=catalog.environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, flags=re.S))
def test_a_snippet_works(catalog: Running, code: str):
    code = code.replace("127.0.0.1:8000", catalog.url.removeprefix("http://"))  # tritonclient takes no scheme
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
