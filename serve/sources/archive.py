"""Unpacking of archives from strangers: every name, link, kind and size is judged before or while it is written."""

from __future__ import annotations

import errno
import gzip
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from serve.errors import SourceError
from serve.sources.store import MAX_FILES, safe_path

_BLOCK = 2**20
#: Longest header of a tar member, which is read in one piece.
_MAX_READ = 16 * 2**20
_MAX_LINK = 1024
#: What any archive may expand to, however small it is: names and padding compress well.
_ALWAYS = 16 * 2**20
_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    gzip.BadGzipFile,
    struct.error,
    EOFError,
    NotImplementedError,
    ValueError,
    RuntimeError,
    LookupError,
)


def is_archive(name: PurePosixPath) -> bool:
    """Tell whether a file of this name is unpacked: .tar, .tar.gz, .tgz or .zip."""
    return name.name.lower().endswith((".tar", ".tar.gz", ".tgz", ".zip"))


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    kind: Literal["file", "folder", "symlink", "hardlink"]
    link: str = ""
    content: IO[bytes] | None = None


class _Budget:
    """Bytes that an archive may still expand to."""

    def __init__(self, size: int, *, max_bytes: int, max_ratio: float) -> None:
        self._allowed = min(max_bytes, max(int(size * max_ratio), _ALWAYS))
        self._used = 0
        self.refusal = SourceError(
            f"the archive of {size} bytes expands past {self._allowed}; if that is right, raise "
            f"ROUNDHOUSE_MAX_UNPACKED_{'BYTES' if self._allowed == max_bytes else 'RATIO'}"
        )

    def spend(self, count: int) -> None:
        self._used += count
        self.check(self._used)

    def check(self, position: int) -> None:
        if position > self._allowed:
            raise self.refusal


class _Bounded:
    """The unpacked bytes of a tar, as far as the budget allows and never many in one piece."""

    def __init__(self, stream: IO[bytes], budget: _Budget) -> None:
        self._stream, self._budget = stream, budget

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_READ:
            raise SourceError(f"the archive has a header of {size} bytes; it is damaged or made to harm")
        data = self._stream.read(size)
        self._budget.check(self._stream.tell())
        return data

    def seek(self, position: int, whence: int = 0) -> int:
        # To skip is to expand too.
        self._budget.check(position)
        return self._stream.seek(position, whence)

    def tell(self) -> int:
        return self._stream.tell()


def unpack(archive: Path, folder: Path, *, name: PurePosixPath, max_bytes: int, max_ratio: float) -> None:
    """Unpack into an empty folder; modes and owners are not kept.

    Args:
        name: Its name, whose ending says what it is.
        max_bytes: Bytes it may expand to.
        max_ratio: Times its own size that it may expand to.

    Raises:
        SourceError: It is damaged, expands too far, or holds a name or link that leaves the folder, a device or a pipe.
    """
    budget = _Budget(archive.stat().st_size, max_bytes=max_bytes, max_ratio=max_ratio)
    entries = _zip_entries if name.name.lower().endswith(".zip") else _tar_entries
    links: list[tuple[PurePosixPath, _Entry]] = []
    try:
        for count, entry in enumerate(entries(archive, budget), start=1):
            if count > MAX_FILES:
                raise SourceError(f"the archive holds more than {MAX_FILES} files")
            path = safe_path(entry.name.removeprefix("./").rstrip("/"))
            if entry.kind in ("symlink", "hardlink"):
                links.append((path, entry))
            else:
                _write(folder / path, entry, budget)
    except FileExistsError as error:
        raise SourceError(f"the archive holds {Path(error.filename).relative_to(folder)} twice") from error
    except NotADirectoryError as error:
        raise SourceError(f"the archive puts {Path(error.filename).relative_to(folder)} below a file") from error
    except _DAMAGED as error:
        raise SourceError(f"{name} is damaged or is not what its name says: {error or type(error).__name__}") from error
    except OSError as error:
        # What the standard library raises of its own for data it cannot read, and for a place before the file's start.
        if error.errno not in (None, errno.EINVAL):
            raise
        raise SourceError(f"{name} is damaged: {error}") from error
    # Links come last, so that nothing was written through one.
    for path, entry in links:
        _link(folder, path, entry)
    for path, _ in links:
        _check_link(folder, path)


def _write(target: Path, entry: _Entry, budget: _Budget) -> None:
    if entry.kind == "folder":
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:
        while entry.content is not None and (block := entry.content.read(_BLOCK)):
            budget.spend(len(block))
            file.write(block)


def _link(folder: Path, path: PurePosixPath, entry: _Entry) -> None:
    base = PurePosixPath() if entry.kind == "hardlink" else path.parent
    target = _inside(base, entry.link)
    refusal = SourceError(f"the archive's link {path} to {entry.link!r} leaves it or has no file to lead to")
    if target is None or any((folder / parent).is_symlink() for parent in path.parents):
        raise refusal
    place = folder / path
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if entry.kind == "symlink":
            place.symlink_to(entry.link)
        elif stat.S_ISREG((folder / target).lstat().st_mode) and (folder / target).resolve().is_relative_to(
            folder.resolve()
        ):
            place.hardlink_to(folder / target)
        else:
            raise refusal
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        raise refusal from error


def _inside(base: PurePosixPath, link: str) -> PurePosixPath | None:
    parts = list(base.parts)
    if not link or link.startswith("/") or "\x00" in link or len(link) > _MAX_LINK:
        return None
    for part in link.split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return PurePosixPath(*parts)


def _check_link(folder: Path, path: PurePosixPath) -> None:
    try:
        real = (folder / path).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise SourceError(f"the archive's link {path} leads nowhere") from error
    if not real.is_relative_to(folder.resolve()):
        raise SourceError(f"the archive's link {path} leaves it")


def _tar_entries(archive: Path, budget: _Budget) -> Iterator[_Entry]:
    with archive.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream: IO[bytes] = gzip.GzipFile(fileobj=raw) if zipped else raw  # type: ignore[assignment]
        tar = tarfile.open(fileobj=_Bounded(stream, budget), mode="r:")  # type: ignore[call-overload]  # noqa: SIM115
        for member in tar:
            if member.name in (".", "./", ""):
                continue
            if member.isdir():
                yield _Entry(member.name, "folder")
            elif member.issym():
                yield _Entry(member.name, "symlink", member.linkname)
            elif member.islnk():
                yield _Entry(member.name, "hardlink", member.linkname.removeprefix("./"))
            elif member.isreg():
                yield _Entry(member.name, "file", content=tar.extractfile(member))
            else:
                raise SourceError(
                    f"the archive holds {member.name!r}, a device or a pipe; a model is files and folders"
                )


def _zip_entries(archive: Path, budget: _Budget) -> Iterator[_Entry]:
    with zipfile.ZipFile(archive) as zipped:
        for info in zipped.infolist():
            mode = info.external_attr >> 16
            if info.flag_bits & 1:
                raise SourceError(f"the archive's {info.filename!r} is encrypted; pack it without a password")
            if info.is_dir():
                yield _Entry(info.filename, "folder")
            elif stat.S_ISLNK(mode):
                with zipped.open(info) as content:
                    link = content.read(_MAX_LINK + 1)
                budget.spend(len(link))
                yield _Entry(info.filename, "symlink", link.decode(errors="replace"))
            elif stat.S_IFMT(mode) in (0, stat.S_IFREG):
                with zipped.open(info) as content:
                    yield _Entry(info.filename, "file", content=content)
            else:
                raise SourceError(
                    f"the archive holds {info.filename!r}, a device or a pipe; a model is files and folders"
                )
