"""What the Containerfile says of the image, without building it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import yaml

from tests.chart.rendering import CHART, ROOT

FILE = (ROOT / "Containerfile").read_text()
FINAL = FILE.rpartition("\nFROM ")[2]

#: Of python:3.12-slim-bookworm, and of Debian with python3-venv.
INSTALLERS = [
    "local/bin/pip",
    "local/bin/pip3.12",
    "local/lib/python3.12/ensurepip/_bundled/pip-25.0.1-py3-none-any.whl",
    "local/lib/python3.12/ensurepip/__init__.py",
    "local/lib/python3.12/site-packages/pip/__init__.py",
    "local/lib/python3.12/site-packages/pip-25.0.1.dist-info/METADATA",
    "lib/python3/dist-packages/pip/_vendor/pip/x.py",
    "lib/python3.11/ensurepip/__init__.py",
    "share/python-wheels/pip-23.0.1-py3-none-any.whl",
]
OTHERS = [
    "local/bin/python3.12",
    "local/lib/python3.12/site-packages/README.txt",
    "local/lib/python3.12/pipes.py",
    "bin/pipe-viewer",
    "lib/python3/dist-packages/pipdeptree.py",
]


def test_no_installer_of_the_base_is_left(tmp_path: Path) -> None:
    for name in (*INSTALLERS, *OTHERS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    [command] = re.findall(r"^RUN (find /usr (?:.*\\\n)*.*)$", FINAL, re.MULTILINE)
    subprocess.run(["/bin/sh", "-c", command.replace("/usr", str(tmp_path), 1)], check=True, timeout=30)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(OTHERS)


def test_the_labels_that_change_with_each_build_cost_no_layer() -> None:
    labels, after = re.split(r"^ARG VERSION=(?:.*)$", FINAL, maxsplit=1, flags=re.MULTILINE)
    assert not re.findall(r"^(?:COPY|RUN) ", after, re.MULTILINE)
    assert "image.title" in labels
    for part in ("version", "revision", "source"):
        assert f'org.opencontainers.image.{part}="${{{part.upper()}}}"' in after


def test_the_image_says_the_version_of_the_chart() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert re.findall(r"^ARG VERSION=(.*)$", FINAL, re.MULTILINE) == [chart["appVersion"]]
