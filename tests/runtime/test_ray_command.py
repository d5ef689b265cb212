"""Ray's command as the image has it; that its nodes fork their workers is seen on a cluster (tests/cluster)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMMAND = [sys.executable, "-c", "from serve.runtime.ray_command import main; main()"]


def ray(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(
        [*COMMAND, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_it_is_rays_own():
    assert ", version 2.60" in ray("--version").stdout


def test_a_setting_that_is_wrong_is_told_in_a_line_and_leaves_nothing(tmp_path: Path):
    before = set(Path("/tmp").glob("rh-*"))
    told = ray("start", "--head", "--block", ROUNDHOUSE_LOG_LEVL="debug")
    assert told.returncode == 1
    assert told.stderr.startswith("ray: ROUNDHOUSE_LOG_LEVL")
    assert "Traceback" not in told.stderr
    assert set(Path("/tmp").glob("rh-*")) <= before
