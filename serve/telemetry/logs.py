"""The log of a process: what any code tells through `logging`, written where nobody waits for it.

A line that is written while a request is answered has the request's identifiers. Finding them costs a request that
writes none one `REQUEST.set`: they are read from its headers when a line is made.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TextIO

from serve.telemetry.lines import LONGEST_ID, LONGEST_LINE, Event, Render, as_plain, clean, fields_of
from serve.telemetry.traceparent import sampled_trace

#: The headers of the request that this code runs for, by name, and how it goes: whatever has `model` and `trace`.
Request = tuple[Mapping[bytes, bytes], object]
REQUEST: ContextVar[Request | None] = ContextVar("request", default=None)

ACCESS = "roundhouse.access"

# Events that wait to be written; lines of the access log leave room for what went wrong.
_MOST_WAITING = 8192
_MOST_ACCESS_WAITING = 4096
_AT_ONCE = 256
_TELL_DROPS_S = 10.0
_CLOSE_S = 2.0
_FILE_BYTES = 64 * 2**20

# Libraries that tell of each step; nobody asks for these with a level for the models.
_CHATTY = (
    "asyncio", "botocore", "filelock", "fsspec", "h5py", "httpcore", "httpx", "huggingface_hub", "kubernetes",
    "matplotlib", "numba", "PIL", "s3fs", "urllib3", "uvicorn",
)  # fmt: skip
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"asctime", "message", "taskName"}


def request_fields(request: Request | None) -> dict[str, str]:
    """Return what a line has of the request it is about: `model` where a gateway found it, and its identifiers."""
    if request is None:
        return {}
    headers, passage = request
    found: dict[str, str] = {}
    if model := getattr(passage, "model", ""):
        found["model"] = clean(model)
    if request_id := headers.get(b"x-request-id"):
        found["request_id"] = clean(request_id.decode("latin-1"), LONGEST_ID)
    trace = getattr(passage, "trace", None) or sampled_trace(headers.get(b"traceparent"))
    if trace is not None:
        found["trace_id"], found["span_id"] = trace.trace_id.hex(), trace.span_id.hex()
    return found


class Writer:
    """Writes lines on a thread of its own: `put` never waits, and what is told faster than written is dropped.

    Args:
        render: Makes a line of an event.
        write: Takes lines, each with its end; an OSError loses them, which is counted as well.
        about: Fields of every event: whose process it is.
        clock: Seconds.
    """

    def __init__(
        self,
        render: Render,
        write: Callable[[str], None],
        *,
        about: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._render = render
        self._write = write
        self._about = {key: clean(value) for key, value in about.items() if value}
        self._clock = clock
        self._waiting: SimpleQueue[tuple[Event, Request | None] | threading.Event] = SimpleQueue()
        self._lock = threading.Lock()
        self._dropped = 0
        self._told_at = -_TELL_DROPS_S
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def put(self, event: Event, request: Request | None, *, most_waiting: int = _MOST_WAITING) -> None:
        """Have an event written, unless as many wait."""
        if self._waiting.qsize() >= most_waiting:
            self.drop(1)
        else:
            self._waiting.put((event, request))

    def drop(self, count: int) -> None:
        """Count events that are not written; the log tells how many once it can."""
        with self._lock:
            self._dropped += count

    def flush(self, timeout_s: float = _CLOSE_S) -> bool:
        """Wait until what was put before is written; return whether it is."""
        written = threading.Event()
        self._waiting.put(written)
        return written.wait(timeout_s)

    def _run(self) -> None:
        while True:
            batch = [self._waiting.get(), *self._more()]
            self._write_out([self._line(*each) for each in batch if isinstance(each, tuple)])
            self._tell_drops()
            for each in batch:
                if isinstance(each, threading.Event):
                    each.set()

    def _more(self) -> Iterator[tuple[Event, Request | None] | threading.Event]:
        with contextlib.suppress(Empty):
            for _ in range(_AT_ONCE):
                yield self._waiting.get_nowait()

    def _line(self, event: Event, request: Request | None) -> str:
        about = self._about
        try:
            about = about | request_fields(request)
            line = self._render(as_plain(event, about))
            if len(line) <= LONGEST_LINE:
                return line
            left_out = {"left_out": f"fields and stack, {len(line)} characters in all"}
        except Exception as error:  # whatever a line is made of, those after it are written
            about, left_out = self._about, {"left_out": f"fields and stack: {type(error).__name__}"}
        told = Event(event.at, event.level, event.logger, event.message, left_out)
        return self._render(as_plain(told, about))

    def _write_out(self, lines: list[str]) -> None:
        if lines:
            try:
                self._write("\n".join(lines) + "\n")
            except (OSError, ValueError):  # the disk is full, or the reader has left
                self.drop(len(lines))

    def _tell_drops(self) -> None:
        if not self._dropped or (self._waiting.qsize() and self._clock() - self._told_at < _TELL_DROPS_S):
            return
        with self._lock:
            count, self._dropped = self._dropped, 0
        message = f"{count} line{'' if count == 1 else 's'} dropped: more was told than could be written"
        event = Event(time.time(), logging.WARNING, __name__, message, {"dropped": count})
        try:
            self._write(self._line(event, None) + "\n")
            self._told_at = self._clock()
        except (OSError, ValueError):
            self.drop(count)


class LogHandler(logging.Handler):
    """Hands what is logged to a Writer, with the request that it is about."""

    def __init__(self, writer: Writer) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        """Queue one record; its message and fields are read now, as they may change."""
        try:
            message = record.getMessage()
        except Exception as error:  # `%d` of a text, or an argument without a text
            message = f"{record.msg!s:.200} (its arguments do not fit: {type(error).__name__})"
        given = {key: value for key, value in vars(record).items() if key not in _STANDARD and key[0] != "_"}
        event = Event(
            record.created,
            record.levelno,
            str(record.name),
            clean(message),
            fields_of(given) if given else {},
            record.exc_info[1] if record.exc_info else None,
        )
        most = _MOST_ACCESS_WAITING if record.name == ACCESS else _MOST_WAITING
        self._writer.put(event, REQUEST.get(), most_waiting=most)


class Log:
    """The log of this process, taken over from `logging`'s root; one at a time. Use: `close()`, or a `with` block.

    Args:
        render: Makes a line of an event.
        write: Takes lines, each with its end.
        level: Least severe line, of the settings.
        about: Fields of every line: `model`, `revision`, `replica`, `component`.
    """

    def __init__(
        self, render: Render, write: Callable[[str], None], *, level: str, about: Mapping[str, str] | None = None
    ) -> None:
        self._writer = Writer(render, write, about=about or {})
        self._handler = LogHandler(self._writer)
        root = logging.getLogger()
        self._level_before = root.level
        root.addHandler(self._handler)
        root.setLevel(level.upper())
        for name in _CHATTY:
            logging.getLogger(name).setLevel(max(logging.WARNING, root.level))

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def flush(self) -> None:
        """Wait, two seconds at most, until what was told is written."""
        self._writer.flush()

    def close(self) -> None:
        """Write what waits and leave `logging` as it was."""
        root = logging.getLogger()
        root.removeHandler(self._handler)
        root.setLevel(self._level_before)
        self.flush()


def to_stream(stream: TextIO) -> Callable[[str], None]:
    """Return what writes lines to a stream at once, from any thread."""
    lock = threading.Lock()

    def write(lines: str) -> None:
        with lock:
            stream.write(lines)
            stream.flush()

    return write


class LogFile:
    """A file that begins anew at a size; the one before is kept as `NAME.1`.

    Raises OSError where it cannot be opened.

    Args:
        most_bytes: Of one file.
    """

    def __init__(self, path: Path, *, most_bytes: int = _FILE_BYTES) -> None:
        self._path = path
        self._most_bytes = most_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self) -> None:
        self._file = self._path.open("ab", buffering=0)
        self._bytes = self._file.seek(0, os.SEEK_END)

    def __call__(self, lines: str) -> None:
        """Write lines."""
        data = lines.encode()
        if self._bytes and self._bytes + len(data) > self._most_bytes:
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
            self._file.close()
            self._open()
        self._file.write(data)
        self._bytes += len(data)


def access(fields: Mapping[str, Any]) -> None:
    """Log one request to the access log: its `method`, `route` and `status` first, which make its message."""
    logger = logging.getLogger(ACCESS)
    words = f"{fields['method']} {fields['route'] or '(no route)'} {fields['status']}"
    # Not `logger.info`, which would look up who calls.
    logger.handle(logger.makeRecord(ACCESS, logging.INFO, "", 0, words, (), None, extra=dict(fields)))
