"""An environment of its own for each peer, so that no peer's pins weigh on another's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORK = ROOT / "loadtests" / ".work"
_REQUIREMENTS = Path(__file__).parent / "requirements"


def python_of(name: str) -> Path:
    """Return the interpreter of the environment of `requirements/<name>.txt`, made first if it is not up to date.

    The files pin everything (`uv pip compile NAME.in`), so that nothing is resolved here; uv links what environments
    share from its cache, torch above all.
    """
    requirements = _REQUIREMENTS / f"{name}.txt"
    folder = WORK / "environments" / name
    python = folder / "bin" / "python"
    stamp = folder / "requirements.txt"
    if python.exists() and stamp.exists() and stamp.read_bytes() == requirements.read_bytes():
        return python
    print(f"Setting up {name}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    uv = _uv()
    _run([uv, "venv", "--quiet", "--python", sys.executable, folder])
    _run([uv, "pip", "install", "--quiet", "--no-deps", "--python", python, "-r", requirements])
    shutil.copy(requirements, stamp)
    return python


def _uv() -> Path:
    """Return the project's installer, or one of our own, of the same pinned version."""
    for folder in (ROOT / ".tools", WORK / "tools"):
        if (folder / "bin" / "uv").exists():
            return folder / "bin" / "uv"
    tools = WORK / "tools"
    _run([sys.executable, "-m", "venv", tools])
    pip = [tools / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "--require-hashes", "-r", ROOT / "lock" / "uv.txt"])
    return tools / "bin" / "uv"


def _run(command: list[str | Path]) -> None:
    subprocess.run([str(part) for part in command], check=True)
