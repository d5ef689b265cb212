"""What replicas print and log, line by line on this process's output: Ray leaves it in files that a pod's log lacks."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from serve.telemetry.lines import Event, as_json, as_plain, clean, parsed

_POLL_S = 0.5
# Longer ones that are printed are parted; events are never as long.
_LONGEST_PRINTED, _LONGEST_EVENT = 16 * 1024, 1024 * 1024
_MOST_A_POLL = 1024 * 1024
#: Where Ray puts a session's logs.
FOLDER = Path("/tmp/ray/session_latest/logs")  # noqa: S108 - Ray's choice
#: Events of our own processes, each line in its final form.
EVENTS = "roundhouse/*.log"
# Printed output and tracebacks; then what goes through Ray Serve's logger.
_PRINTED = ("worker-*.out", "worker-*.err", "serve/replica_*.log", "serve/controller_*.log")
_ACTOR = re.compile(rb":actor_name:(?:ServeReplica:(model-)?([^:]+):|(SERVE_CONTROLLER))")
_RAYS_OWN = re.compile(rb":(job_id|actor_name|task_name):")
_REPLICA = re.compile(r"replica_(model-)?(.+)_(?:model|gateway)_[^_]+\.log$")
_TEXT = re.compile(r"(?P<model>.+?) \| (?P<time>\S+) (?P<level>[A-Z]+) (?P<message>.*)")
_SERIOUS = frozenset({"warning", "error", "critical"})
_LEVELS = {b"DEBUG": 10, b"INFO": 20, b"WARNING": 30, b"ERROR": 40, b"CRITICAL": 50}


class _Whose(NamedTuple):
    """Whose lines they are: a model's, or those of a part of the platform."""

    name: str
    is_model: bool = False


class _File:
    """One file: how far it was read, and whose lines it has; one that is put aside at a size is read to its end."""

    def __init__(self, path: Path, *, longest: int) -> None:
        self._path = path
        self._longest = longest
        self._inode = 0
        self._at = 0
        self._rest = b""
        named = _REPLICA.match(path.name)
        self.whose = _Whose(named[2], bool(named[1])) if named else _Whose("ray")

    def lines(self) -> Iterator[bytes]:
        """Yield the whole lines that were added, without those in which Ray names a file's actor."""
        *whole, self._rest = (self._rest + self._added()).split(b"\n")
        if len(self._rest) > self._longest:
            whole.append(self._rest)
            self._rest = b""
        for line in whole:
            if _RAYS_OWN.match(line):
                named = _ACTOR.match(line)
                if named:
                    name = "controller" if named[3] else named[2].decode(errors="replace")
                    self.whose = _Whose(name, bool(named[1]))
            elif line:
                yield line

    def _added(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                before = self._end_of_the_one_before() if self._inode not in (0, inode) else b""
                if self._inode != inode:
                    self._inode, self._at = inode, 0
                file.seek(self._at)
                added = file.read(_MOST_A_POLL)
        except FileNotFoundError:
            return b""
        self._at += len(added)
        return before + added

    def _end_of_the_one_before(self) -> bytes:
        try:
            with self._path.with_name(f"{self._path.name}.1").open("rb") as file:
                if os.fstat(file.fileno()).st_ino != self._inode:
                    return b""
                file.seek(self._at)
                return file.read()
        except FileNotFoundError:
            return b""


class Follower:
    """The lines that our processes and the models in them add to the files of a folder.

    Args:
        folder: Where Ray puts a session's logs; it may not be there yet.
        log_format: `json` makes each printed line the message of an event; `text` puts `<model> | ` before it.
        clock: Unix time, seconds, of a printed line that has none.
    """

    def __init__(self, folder: Path, *, log_format: str, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._log_format = log_format
        self._clock = clock
        self._files: dict[Path, _File] = {}

    def poll(self) -> Iterator[str]:
        """Yield what was added since the last call; a file's lines keep their order."""
        for pattern in _PRINTED:
            for file in self._matching(pattern, _LONGEST_PRINTED):
                for line in file.lines():
                    yield self._printed(line, file.whose)
        yield from self.events()

    def events(self) -> Iterator[str]:
        """Yield what our own processes added since the last call, and nothing printed."""
        for file in self._matching(EVENTS, _LONGEST_EVENT):
            for line in file.lines():
                yield line.decode(errors="replace")

    def _matching(self, pattern: str, longest: int) -> Iterator[_File]:
        for path in sorted(self._folder.glob(pattern)):
            yield self._files.setdefault(path.resolve(), _File(path, longest=longest))

    def _printed(self, line: bytes, whose: _Whose) -> str:
        text = line.decode(errors="replace")
        if self._log_format == "text":
            return f"{whose.name} | {text}"
        level = _LEVELS.get(line.partition(b" ")[0], logging.INFO)
        about = {"model" if whose.is_model else "component": clean(whose.name)}
        return as_json(as_plain(Event(self._clock(), level, "output", clean(text), {}), about))


def serious(line: str) -> dict[str, Any] | None:
    """Return the event of a line of `Follower.events` where it is a warning or worse, else None."""
    event = parsed(line)
    if event is None and (found := _TEXT.fullmatch(line)):
        event = found.groupdict() | {"level": found["level"].lower()}
    return event if event is not None and event.get("level") in _SERIOUS else None


def follow(folder: Path, *, log_format: str, write: Callable[[str], None]) -> None:
    """Write what is added, until the process ends."""
    follower = Follower(folder, log_format=log_format)
    while True:
        for line in follower.poll():
            write(line)
        time.sleep(_POLL_S)
