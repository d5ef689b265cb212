"""A process's numbers in memory that other processes can read: recording one is an addition, and nothing is ever sent.

A page is a file mapped into the process that owns it. It outlives its process, and the next one of the same model goes
on counting in it, so that sums over a folder never fall and dead processes leave no heap of files. The owner holds a
lock on the file, which the system lets go of however the process ends: by it a reader tells whether a gauge holds. A
child that the owner forked holds the lock as well, until it ends too.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import mmap
import os
import struct
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.telemetry.instruments import ROLES, Instrument
from serve.telemetry.traceparent import TraceIds

#: Time, value, trace id, span id, and the time again: a reader that finds two times came in the middle of a write.
EXEMPLAR = struct.Struct("=dd16s8sd")
_DOUBLE_BYTES = 8
_SUFFIX = ".page"
_Key = tuple[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each number of a role's page is.

    Args:
        slots: Instrument's name and label values -> index of its first number. A histogram has one number a bucket,
            not cumulated, and then the sum of what was observed. Number 0 is the owner's process id.
        exemplars: The same -> offset in bytes of its first bucket's exemplar.
        size_bytes: Of the page.
        fingerprint: Differs where any of this does.
    """

    slots: Mapping[_Key, int]
    exemplars: Mapping[_Key, int]
    size_bytes: int
    fingerprint: str


@functools.cache
def layout_of(role: str) -> Layout:
    """Return the layout of a role's pages."""
    slots: dict[_Key, int] = {}
    exemplars: dict[_Key, int] = {}
    end = 1
    kept = 0
    for instrument in ROLES[role]:
        for values in instrument.series():
            slots[instrument.name, values] = end
            end += len(instrument.bounds) + 2 if instrument.kind == "histogram" else 1
    offset = end * _DOUBLE_BYTES
    for instrument in ROLES[role]:
        for values in instrument.series() if instrument.exemplars else ():
            exemplars[instrument.name, values] = offset + kept
            kept += (len(instrument.bounds) + 1) * EXEMPLAR.size
    told = repr((slots, exemplars, [one.bounds for one in ROLES[role]]))
    return Layout(slots, exemplars, offset + kept, hashlib.sha256(told.encode()).hexdigest()[:12])


class Counter:
    """A number that only grows; one thread adds to it."""

    __slots__ = ("_slot", "_values")

    def __init__(self, values: memoryview[float], slot: int) -> None:
        self._values = values
        self._slot = slot

    def add(self, amount: float = 1.0) -> None:
        """Add an amount of at least 0."""
        self._values[self._slot] += amount


class Gauge:
    """A number as it is now."""

    __slots__ = ("_slot", "_values")

    def __init__(self, values: memoryview[float], slot: int) -> None:
        self._values = values
        self._slot = slot

    def set(self, value: float) -> None:
        """Replace it."""
        self._values[self._slot] = value


class Histogram:
    """Numbers counted by size; one thread observes."""

    __slots__ = ("_bounds", "_exemplars", "_first", "_memory", "_sum", "_values")

    def __init__(
        self,
        memory: mmap.mmap | bytearray,
        values: memoryview[float],
        slot: int,
        bounds: tuple[float, ...],
        exemplars: int,
    ) -> None:
        self._memory = memory
        self._values = values
        self._first = slot
        self._sum = slot + len(bounds) + 1
        self._bounds = bounds
        self._exemplars = exemplars

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, or as many equal ones as `times` says."""
        values = self._values
        values[self._first + bisect_left(self._bounds, value)] += times
        values[self._sum] += value * times

    def observe_traced(self, value: float, trace: TraceIds) -> None:
        """Count a value, and keep the trace that it belongs to as its bucket's exemplar."""
        self.observe(value)
        now = time.time()
        at = self._exemplars + bisect_left(self._bounds, value) * EXEMPLAR.size
        self._memory[at : at + EXEMPLAR.size] = EXEMPLAR.pack(now, value, trace.trace_id, trace.span_id, now)


class Page:
    """The numbers of one process about one model.

    Args:
        role: Of `serve.telemetry.instruments.ROLES`.
        memory: Of the role's layout's size.
        file: What it is mapped from; kept open, because its lock says that the page has an owner.
    """

    def __init__(self, role: str, memory: mmap.mmap | bytearray, file: int | None = None) -> None:
        self._role = role
        self._layout = layout_of(role)
        self._memory = memory
        self._file = file
        numbers = memoryview(memory)[: self._layout.size_bytes // _DOUBLE_BYTES * _DOUBLE_BYTES]
        self._values = numbers.cast("B").cast("d")

    @classmethod
    def private(cls, role: str) -> Page:
        """Return a page that no other process sees."""
        return cls(role, bytearray(layout_of(role).size_bytes))

    @classmethod
    def claim(cls, folder: Path, *, role: str, model: str) -> Page:
        """Return a page of a folder: one that a dead process of the same role and model left, or a new one.

        Raises:
            OSError: The folder cannot be made or written, or is full.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            number = 0
            while True:
                file = os.open(folder / _name(role, model, number), os.O_RDWR | os.O_CREAT, 0o600)
                try:
                    if _lock(file, fcntl.LOCK_EX):
                        return cls._own(role, file)
                except BaseException:
                    os.close(file)
                    raise
                os.close(file)
                number += 1

    @classmethod
    def _own(cls, role: str, file: int) -> Page:
        size = layout_of(role).size_bytes
        # Written, not only extended: memory mapped from a file system that is full kills the process that touches it.
        missing = size - os.fstat(file).st_size
        if missing > 0:
            os.pwrite(file, bytes(missing), size - missing)
        if os.fstat(file).st_size != size:
            raise OSError("a page of the metrics could not be written whole")
        page = cls(role, mmap.mmap(file, size), file)
        for instrument in ROLES[role]:
            if instrument.kind == "gauge":
                for gauge in page.gauges(instrument).values():
                    gauge.set(0.0)
        page._values[0] = float(os.getpid())
        return page

    def counters(self, instrument: Instrument) -> dict[tuple[str, ...], Counter]:
        """Return a counter's series by the values of its labels."""
        return {values: Counter(self._values, slot) for values, slot in self._slots(instrument)}

    def gauges(self, instrument: Instrument) -> dict[tuple[str, ...], Gauge]:
        """Return a gauge's series by the values of its labels."""
        return {values: Gauge(self._values, slot) for values, slot in self._slots(instrument)}

    def histograms(self, instrument: Instrument) -> dict[tuple[str, ...], Histogram]:
        """Return a histogram's series by the values of its labels."""
        kept = self._layout.exemplars
        return {
            values: Histogram(
                self._memory, self._values, slot, instrument.bounds, kept.get((instrument.name, values), 0)
            )
            for values, slot in self._slots(instrument)
        }

    def _slots(self, instrument: Instrument) -> Iterator[tuple[tuple[str, ...], int]]:
        for values in instrument.series():
            yield values, self._layout.slots[instrument.name, values]

    def reading(self, model: str) -> Reading:
        """Return the page as it is now."""
        return Reading(self._role, model, int(self._values[0]), self._file is not None, bytes(self._memory))

    def release(self) -> None:
        """Leave the page to the next process of its model; what is recorded afterwards is nobody's."""
        if self._file is not None:
            # The mapping holds a duplicate of the file, and with it the lock.
            fcntl.flock(self._file, fcntl.LOCK_UN)
            os.close(self._file)
            self._file = None


@dataclass(frozen=True, slots=True)
class Reading:
    """A page as it was when it was read.

    Args:
        pid: The owner's, or the last one's.
        is_alive: Whether it has an owner.
        content: The page.
    """

    role: str
    model: str
    pid: int
    is_alive: bool
    content: bytes

    def numbers(self, instrument: Instrument, values: tuple[str, ...]) -> Sequence[float]:
        """Return the numbers of one series: one, or of a histogram its buckets' counts, not cumulated, and the sum."""
        slot = layout_of(self.role).slots[instrument.name, values]
        count = len(instrument.bounds) + 2 if instrument.kind == "histogram" else 1
        return struct.unpack_from(f"={count}d", self.content, slot * _DOUBLE_BYTES)

    def exemplars(self, instrument: Instrument, values: tuple[str, ...]) -> Iterator[tuple[Any, ...] | None]:
        """Yield (time, value, trace id, span id) of each bucket, or None where it has none."""
        offset = layout_of(self.role).exemplars[instrument.name, values]
        for index in range(len(instrument.bounds) + 1):
            begun, *told, ended = EXEMPLAR.unpack_from(self.content, offset + index * EXEMPLAR.size)
            yield (begun, *told) if begun == ended and begun else None


def read_folder(folder: Path) -> list[Reading]:
    """Return what the processes of a node have recorded, dead ones included; pages of another layout are left out."""
    readings = []
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        role, model, fingerprint, _ = path.name.removesuffix(_SUFFIX).split(".")
        if role in ROLES and fingerprint == layout_of(role).fingerprint:
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                content = file.read()
                if len(content) == layout_of(role).size_bytes:
                    (pid,) = struct.unpack_from("=d", content)
                    readings.append(Reading(role, model, int(pid), not _lock(file.fileno(), fcntl.LOCK_SH), content))
    return readings


def _name(role: str, model: str, number: int) -> str:
    return f"{role}.{model}.{layout_of(role).fingerprint}.{number}{_SUFFIX}"


def _lock(file: int, kind: int) -> bool:
    """Return whether the lock could be had: fcntl.LOCK_EX to own it, LOCK_SH to look, which keeps no reader out."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
