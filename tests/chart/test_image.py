"""What the Containerfile says of the image, without building it."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
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


def built(folder: Path, *words: str) -> list[str]:
    """Return the build arguments of `make image`, which is not run."""
    command = ["make", "--dry-run", "--directory", str(folder), "image", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return re.findall(r"--build-arg (\S+)", done.stdout.replace("\\\n", " "))


def test_the_image_is_built_with_what_its_labels_say(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    base = re.findall(r"^ARG BASE=(.*)$", FILE, re.MULTILINE)[0]
    assert built(tmp_path) == [f"BASE={base}", f"VERSION={version}"]

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", "-C", str(tmp_path), *who, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        git(*words)
    commit = git("rev-parse", "HEAD")
    assert built(tmp_path)[2:] == [f"REVISION={commit}"]
    (tmp_path / "pyproject.toml").write_text('version = "7.8.9"\n')
    source = "https://example.org/code"
    assert built(tmp_path, f"SOURCE={source}")[1:] == ["VERSION=7.8.9", f"REVISION={commit}-dirty", f"SOURCE={source}"]
