"""What a running platform leaves on disk, so that `status`, `predict` and `down` find it without starting Ray."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from serve.errors import SpecError
from serve.settings import Settings


@dataclass(frozen=True, slots=True)
class Running:
    """One running `roundhouse up`.

    Args:
        created: The process's start, Unix seconds, so that a reused pid is not mistaken for it.
        url: Where it answers.
        file: The declaration it follows.
        logs: Folder of Ray's and the replicas' logs.
    """

    pid: int
    created: float
    url: str
    file: str
    logs: str


def _path(settings: Settings, port: int) -> Path:
    return settings.state_dir / f"platform-{port}.json"


def claim(settings: Settings) -> None:
    """Make the folder of this word, before anything is started.

    Raises:
        SpecError: It cannot be written.
    """
    try:
        settings.state_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=settings.state_dir):
            pass
    except OSError as error:
        raise SpecError(f"ROUNDHOUSE_STATE_DIR: {settings.state_dir} cannot be written: {error.strerror}") from error


def write(settings: Settings, running: Running) -> None:
    """Leave word of this platform, in one rename."""
    path = _path(settings, settings.port)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(running)))
    partial.replace(path)


def remove(settings: Settings) -> None:
    """Take the word back, where it is this process's."""
    running = read(settings, settings.port)
    if running is not None and running.pid == os.getpid():
        _path(settings, settings.port).unlink(missing_ok=True)


def read(settings: Settings, port: int) -> Running | None:
    """Return the platform that runs on a port, or None; word of one that is dead is removed."""
    path = _path(settings, port)
    try:
        running = Running(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        path.unlink(missing_ok=True)
        return None
    try:
        if abs(psutil.Process(running.pid).create_time() - running.created) < 1:
            return running
    except psutil.NoSuchProcess:
        pass
    path.unlink(missing_ok=True)
    return None


def stop(running: Running) -> None:
    """Ask a platform to drain and end, and wait for it; its longest deadline bounds that."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(running.pid)
        process.send_signal(signal.SIGTERM)
        while process.status() != psutil.STATUS_ZOMBIE:  # its own parent has yet to notice
            with contextlib.suppress(psutil.TimeoutExpired):
                process.wait(timeout=0.2)
