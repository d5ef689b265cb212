"""One file or archive over `https:`, which its declared hash vouches for wherever it comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from serve.errors import SourceError
from serve.settings import Settings
from serve.sources.archive import is_archive, unpack
from serve.sources.guard import Reach
from serve.sources.parse import Source
from serve.sources.store import Digest, Meter, Wanted, cached, gather, key_part, safe_path
from serve.sources.transfer import Client, download
from serve.spec import ModelSpec


def fetch_web(source: Source, spec: ModelSpec, settings: Settings, progress: Callable[[int, int], None]) -> Path:
    """Return the file, or the folder of an archive: the one folder at its top where there is nothing else.

    Raises:
        SourceError: It could not be had, does not match `spec.sha256`, or is an archive that is refused.
    """
    if spec.sha256 is None:
        raise SourceError("takes sha256, that of the file; run sha256sum on it and declare that")
    name = safe_path(unquote(source.path.rpartition("/")[2]))
    key = f"https/{spec.sha256}-{key_part(str(name))}"
    folder = cached(settings, key) or _download(source, spec.sha256, name, key, settings, progress)
    return _top(folder) if is_archive(name) else folder / name


def _download(
    source: Source,
    sha256: str,
    name: PurePosixPath,
    key: str,
    settings: Settings,
    progress: Callable[[int, int], None],
) -> Path:
    client = Client(settings, Reach(settings.allowed_hosts))
    url = f"https://{source.root}{source.path}{'?' if source.query else ''}{source.query}"

    def fill(part: Path, meter: Meter) -> None:
        download(
            client,
            url,
            part,
            digest=Digest("sha256", sha256),
            size=None,
            limit=settings.max_unpacked_bytes,
            meter=meter,
            sole=True,
        )

    def expand(files: Sequence[Path], folder: Path) -> None:
        unpack(
            files[0],
            folder,
            name=name,
            max_bytes=settings.max_unpacked_bytes,
            max_ratio=settings.max_unpacked_ratio,
        )

    return gather(settings, key, [Wanted(name, None, fill)], Meter(progress), expand if is_archive(name) else None)


def _top(folder: Path) -> Path:
    entries = list(folder.iterdir())
    return entries[0] if len(entries) == 1 and entries[0].is_dir() and not entries[0].is_symlink() else folder
