"""What replicas print and log, line by line on this process's output: Ray leaves it in files that a pod's log lacks."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_POLL_S = 0.5
_LONGEST_LINE = 16 * 1024
_MOST_A_POLL = 1024 * 1024
#: Where Ray puts a session's logs.
FOLDER = Path("/tmp/ray/session_latest/logs")  # noqa: S108 - Ray's choice
# Printed output and tracebacks; then what goes through Ray Serve's logger.
_FILES = ("worker-*.out", "worker-*.err", "serve/replica_*.log", "serve/controller_*.log")
_ACTOR = re.compile(rb":actor_name:(?:ServeReplica:(?:model-)?([^:]+):|(SERVE_CONTROLLER))")
_RAYS_OWN = re.compile(rb":(job_id|actor_name|task_name):")
_REPLICA = re.compile(r"replica_(?:model-)?(.+)_(?:model|gateway)_[^_]+\.log$")


class _File:
    """One file: how far it was read, and whose lines it has."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0
        self._rest = b""
        named = _REPLICA.match(path.name)
        self._whose = named[1] if named else "ray"

    def lines(self) -> Iterator[str]:
        """Yield the whole lines that were added, each with whose it is."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                added = file.read(_MOST_A_POLL)
        except FileNotFoundError:
            return
        self._at += len(added)
        *whole, self._rest = (self._rest + added).split(b"\n")
        if len(self._rest) > _LONGEST_LINE:
            whole.append(self._rest)
            self._rest = b""
        for line in whole:
            if _RAYS_OWN.match(line):
                named = _ACTOR.match(line)
                if named:
                    self._whose = "controller" if named[2] else named[1].decode(errors="replace")
            elif line:
                yield f"{self._whose} | {line.decode(errors='replace')}"


class Follower:
    """The lines that replicas add to the files of a folder.

    Args:
        folder: Where Ray puts a session's logs; it may not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Path, _File] = {}

    def poll(self) -> Iterator[str]:
        """Yield what was added since the last call, as `<model> | <line>`; a file's lines keep their order."""
        for pattern in _FILES:
            for path in sorted(self._folder.glob(pattern)):
                file = self._files.setdefault(path.resolve(), _File(path))
                yield from file.lines()


def follow(folder: Path, *, write: Callable[[str], None]) -> None:
    """Write what replicas add, until the process ends."""
    follower = Follower(folder)
    while True:
        for line in follower.poll():
            write(line)
        time.sleep(_POLL_S)
