"""What every download shares: safe names, progress, retries, resumable partial files, and one moment of appearing."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from filelock import FileLock, Timeout

from serve.cache import build_once
from serve.errors import SourceError
from serve.settings import Settings

#: Files that one source may have.
MAX_FILES = 50_000

_STREAMS = 4
_REPORT_EVERY_S = 0.1
_LONGEST_WAIT_S = 30.0
_MIB = 2**20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Broken(Exception):
    """A try of a download that ended early, and that another try may mend."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class GaveUp(SourceError):
    """No try of a bounded number got through."""


class Stopped(Exception):
    """Another file of the same source failed, so that this one need not go on."""


def safe_path(name: str) -> PurePosixPath:
    """Return a remote name as a relative path that stays in the folder it is joined to.

    Raises:
        SourceError: It is absolute, climbs with `..`, or has a part that no file system should be given.
    """
    parts = name.split("/")
    if (
        not name.isprintable()
        or "\\" in name
        or len(name.encode()) > 1024
        or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts)
    ):
        raise SourceError(f"{name!r} is not a name that a file of a model may have; nothing was kept")
    return PurePosixPath(name)


def key_part(text: str) -> str:
    """Return a name for one level of the cache, readable, and different for different texts."""
    readable = re.sub(r"[^A-Za-z0-9_.-]", "-", text).lstrip(".")[:60]
    return readable if readable == text else f"{readable}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True, slots=True)
class Digest:
    """What a file's content must hash to.

    Args:
        kind: `sha256`, `md5`, or `git`: a git blob's SHA-1.
        hexdigest: In small hexadecimal digits.
    """

    kind: Literal["sha256", "md5", "git"]
    hexdigest: str

    def of(self, file: Path) -> str:
        """Return the file's hash of this kind."""
        hasher: Any
        if self.kind == "git":
            hasher = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
        else:
            hasher = hashlib.new(self.kind, usedforsecurity=self.kind == "sha256")
        with file.open("rb") as opened:
            while block := opened.read(_MIB):
                hasher.update(block)
        return str(hasher.hexdigest())


class Meter:
    """Counts bytes over the threads of one fetch, reports them now and then, and stops them all when one fails."""

    def __init__(self, report: Callable[[int, int], None], *, total: int = 0) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._done, self._total, self._reported_at = 0, total, 0.0

    def expect(self, total: int) -> None:
        """Set the bytes that there will be in all."""
        with self._lock:
            self._total = total

    def add(self, count: int) -> None:
        """Count bytes, fewer than none where a file begins anew. Raises `Stopped`."""
        if self._stop.is_set():
            raise Stopped
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._reported_at >= _REPORT_EVERY_S:
                self._reported_at = now
                self._report(self._done, self._total)

    def finish(self) -> None:
        """Report the last count."""
        with self._lock:
            self._report(self._done, self._total or self._done)

    def stop(self) -> None:
        """Make every thread's next `add` or `pause` raise `Stopped`."""
        self._stop.set()

    def pause(self, seconds: float) -> None:
        """Wait. Raises `Stopped`."""
        if self._stop.wait(seconds):
            raise Stopped


def size_of(file: Path) -> int:
    """Return a file's size in bytes, 0 where it is not there."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def persist(attempt: Callable[[], None], *, reached: Callable[[], int], meter: Meter, settings: Settings) -> None:
    """Call `attempt` until it returns, waiting longer after each `Broken`.

    Args:
        reached: Bytes there are so far; a try that brings a MiB more than any before it starts the count of tries anew,
            so that a long download over a bad line ends.

    Raises:
        GaveUp: `settings.download_attempts` tries in a row brought nothing.
    """
    failures, furthest = 0, reached()
    while True:
        try:
            return attempt()
        except Broken as broken:
            if reached() >= furthest + _MIB:
                failures, furthest = 0, reached()
            failures += 1
            if failures >= settings.download_attempts:
                raise GaveUp(f"gave up after {failures} tries: {broken}") from broken
            wait_s = settings.download_backoff_s * 2 ** (failures - 1) * random.uniform(0.5, 1.0)
            meter.pause(min(_LONGEST_WAIT_S, max(wait_s, broken.retry_after_s or 0.0)))


@dataclass(frozen=True, slots=True)
class Wanted:
    """One file of a download.

    Args:
        path: Where it goes in the finished folder.
        size: In bytes; None where nothing tells before it is asked for.
        fill: Called with a partial file, perhaps begun by another process; returns when that is complete and verified.
    """

    path: PurePosixPath
    size: int | None
    fill: Callable[[Path, Meter], None]


def cached(settings: Settings, key: str) -> Path | None:
    """Return the folder of a key if it is complete.

    Raises:
        SourceError: It is not, and `settings.offline` forbids the network.
    """
    folder = settings.cache_dir / key
    if folder.is_dir():
        return folder
    if settings.offline:
        raise SourceError(f"is not in the cache, {settings.cache_dir}, and offline is set; fetch it once while online")
    return None


def gather(
    settings: Settings,
    key: str,
    wanted: Sequence[Wanted],
    meter: Meter,
    place: Callable[[Sequence[Path], Path], None] | None = None,
) -> Path:
    """Return `settings.cache_dir/key`, downloading its files first if no process has.

    Partial files stay beside the folder, under its lock, for whoever comes next; they are removed where the disk is
    full or where the complete files are refused.

    Args:
        place: Called with the verified files, in the order of `wanted`, and the folder to fill; the default moves each
            to its path.

    Raises:
        SourceError: A file could not be had, or there is no room.
    """
    _refuse_conflicts(wanted)
    folder = settings.cache_dir / key
    partials = folder.parent / f".{folder.name}.partial"

    def build(into: Path) -> None:
        partials.mkdir(exist_ok=True)
        try:
            have = sum(file.stat().st_size for file in partials.iterdir())
            need_room(partials, sum(one.size or 0 for one in wanted) - have)
            files = _fill_all(partials, wanted, meter)
            _place(files, into, wanted, place, partials)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            shutil.rmtree(partials, ignore_errors=True)
            raise SourceError(
                f"no room in {settings.cache_dir}: {error.strerror}; free some, or set cache_dir"
            ) from error
        shutil.rmtree(partials, ignore_errors=True)
        meter.finish()

    return build_once(settings.cache_dir, key, build)


def _place(
    files: Sequence[Path],
    into: Path,
    wanted: Sequence[Wanted],
    place: Callable[[Sequence[Path], Path], None] | None,
    partials: Path,
) -> None:
    if place is None:
        for file, one in zip(files, wanted, strict=True):
            target = into / one.path
            target.parent.mkdir(parents=True, exist_ok=True)
            file.rename(target)
        return
    try:
        place(files, into)
    except SourceError:
        shutil.rmtree(partials, ignore_errors=True)
        raise


def _refuse_conflicts(wanted: Sequence[Wanted]) -> None:
    if len(wanted) > MAX_FILES:
        raise SourceError(f"has {len(wanted)} files, more than {MAX_FILES}; name the model's own folder")
    paths = {one.path for one in wanted}
    if len(paths) < len(wanted):
        raise SourceError("lists one file twice; nothing was kept")
    for path in paths:
        for parent in path.parents:
            if parent in paths:
                raise SourceError(f"has {str(parent)!r} both as a file and as a folder; rename one of them")


def need_room(folder: Path, size: int) -> None:
    """Raise the `OSError` of a full disk where `size` bytes do not fit, before any of them is written."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(errno.ENOSPC, f"it takes {size / 1e9:.2f} GB more and {free / 1e9:.2f} GB are free")


def _fill_all(partials: Path, wanted: Sequence[Wanted], meter: Meter) -> list[Path]:
    def fill(one: Wanted) -> Path:
        name = hashlib.sha256(str(one.path).encode()).hexdigest()[:32]
        part, whole = partials / f"{name}.part", partials / f"{name}.whole"
        if whole.exists():
            meter.add(whole.stat().st_size)
            return whole
        one.fill(part, meter)
        with part.open("rb") as opened:
            os.fsync(opened.fileno())
        return part.rename(whole)

    with ThreadPoolExecutor(_STREAMS, thread_name_prefix="fetch") as pool:
        futures = [pool.submit(fill, one) for one in wanted]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            failed = [error for f in futures if f.done() and not f.cancelled() and (error := f.exception())]
            if failed or not all(f.done() for f in futures):
                meter.stop()
                pool.shutdown(cancel_futures=True)
    for error in failed:
        raise error
    return [future.result() for future in futures]


def remember(pointer: Path, text: str) -> None:
    """Write what a name that may change stood for, so that an offline fetch finds it; a read-only cache is left."""
    try:
        if pointer.is_file() and pointer.read_text() == text:
            return
        pointer.parent.mkdir(parents=True, exist_ok=True)
        draft = pointer.with_name(f".{pointer.name}.{os.getpid()}.{threading.get_ident()}")
        draft.write_text(text)
        draft.replace(pointer)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise


def recall(pointer: Path) -> str | None:
    """Return what `remember` wrote, or None."""
    try:
        return pointer.read_text()
    except FileNotFoundError:
        return None


def drop_superseded(folder: Path) -> None:
    """Remove the partial files beside `folder` that belong to other states of its source and that nobody is filling."""
    for partials in folder.parent.glob(".*.partial"):
        lock = FileLock(partials.with_suffix(".lock"), timeout=0)
        try:
            with lock:
                shutil.rmtree(partials, ignore_errors=True)
        except (Timeout, OSError):
            continue
