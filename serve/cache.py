"""A folder that appears whole or not at all, so that processes can share downloaded and converted models."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from serve.errors import RoundhouseError


class CacheFull(RoundhouseError):
    """The cache's folder has no room; the message names it."""


def build_once(cache_dir: Path, key: str, build: Callable[[Path], None]) -> Path:
    """Return `cache_dir/key`, calling `build(folder)` first if no process has completed it.

    `build` fills a private folder beside the final one, which is renamed into place when `build` returns; a process
    that dies in between leaves nothing that looks complete, and the next caller removes what it left. Concurrent
    callers of one key wait for the first.

    Args:
        cache_dir: Made if absent.
        key: A relative path of safe names, one for each distinct content.
        build: Fills the folder it is given; whatever it raises is passed on and the folder removed.

    Raises:
        CacheFull: The disk is full, or a quota is used up.
    """
    final = cache_dir / key
    if final.is_dir():
        return final
    try:
        return _build(final, build)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free_mb = shutil.disk_usage(cache_dir).free / 1e6
        raise CacheFull(
            f"the cache {cache_dir} is full: {free_mb:.0f} MB were left when {key} was removed again; "
            "make it larger, or remove what no model needs"
        ) from error


def _build(final: Path, build: Callable[[Path], None]) -> Path:
    final.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(final.parent / f".{final.name}.lock"):
        if final.is_dir():
            return final
        _remove_abandoned(final)
        partial = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        try:
            build(partial)
            partial.chmod(0o755)
            _write_through(partial)
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return final


def _write_through(folder: Path) -> None:
    """Have the disk hold what the folder holds, so that a rename which survives a power loss names whole files."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _remove_abandoned(final: Path) -> None:
    # Who holds the lock is the only builder, so that every other private folder of this key is a dead process's.
    private = re.compile(rf"\.{re.escape(final.name)}\.[a-z0-9_]{{8}}")
    for folder in final.parent.iterdir():
        if private.fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)
