"""A source URI becomes a verified local folder, and what only one scheme needs is imported for that scheme only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from serve.errors import SourceError
from serve.settings import Settings
from serve.sources.parse import Source, parse_source
from serve.spec import ModelSpec

__all__ = ["Source", "fetch", "parse_source"]


def fetch(
    spec: ModelSpec, *, settings: Settings, base_dir: Path, progress: Callable[[int, int], None] = lambda *_: None
) -> Path:
    """Return the local folder of a model's source, or the file where the source names a single file; blocks.

    What is downloaded appears in `settings.cache_dir` whole and verified, or not at all, and a broken download goes on
    where it stopped; processes that fetch the same source wait for the first. See docs/sources.md.

    Args:
        spec: Its `source`, `sha256`, `revision` and `task` are read.
        settings: Cache folder, offline mode, endpoints, allowed hosts and bounds.
        base_dir: What a relative `file:` path is relative to: the declaration's folder.
        progress: Called with (bytes done, bytes in all or 0 where unknown), one call at a time, on any thread. What it
            raises stops the download, which a later call goes on with.

    Raises:
        SourceError: The files could not be had; the message names the source and the likely fix.
    """
    source = parse_source(spec.source)
    try:
        return _fetch(source, spec, settings, base_dir, progress)
    except SourceError as error:
        raise SourceError(f"{source}: {error}") from error
    except OSError as error:
        raise SourceError(f"{source}: {error.strerror or error}: {error.filename or settings.cache_dir}") from error


def _fetch(
    source: Source, spec: ModelSpec, settings: Settings, base_dir: Path, progress: Callable[[int, int], None]
) -> Path:
    if source.scheme == "package":
        from serve.sources.local import find_package

        return find_package(source)
    if source.scheme == "file":
        from serve.sources.local import find_file

        return find_file(source, base_dir)
    if source.scheme == "hf":
        from serve.sources.hub import fetch_hub

        return fetch_hub(source, spec, settings, progress)
    if source.scheme == "https":
        from serve.sources.web import fetch_web

        return fetch_web(source, spec, settings, progress)
    from serve.sources.bucket import fetch_bucket

    return fetch_bucket(source, settings, progress)
