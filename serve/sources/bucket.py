"""Prefixes of S3 and Google Cloud Storage buckets, through fsspec, whose s3fs and gcsfs are extras."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from serve.errors import SourceError
from serve.settings import Settings
from serve.sources.parse import Source
from serve.sources.store import (
    Broken,
    Digest,
    GaveUp,
    Meter,
    Wanted,
    cached,
    drop_superseded,
    gather,
    key_part,
    persist,
    recall,
    remember,
    safe_path,
    size_of,
)

_BLOCK = 8 * 2**20
_MD5 = re.compile(r"[0-9a-f]{32}")
_EXTRAS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}


@dataclass(frozen=True, slots=True)
class _Object:
    """One object of a listing.

    Args:
        path: Bucket and key.
        name: Its path below the prefix.
        size: In bytes.
        etag: What changes when its content does.
        md5: Of its content, where the listing has it.
        generation: Google's number of this content.
    """

    path: str
    name: str
    size: int
    etag: str
    md5: str | None
    generation: str | None


def fetch_bucket(source: Source, settings: Settings, progress: Callable[[int, int], None]) -> Path:
    """Return the folder of a prefix, or the file where the source names one object.

    What the prefix holds is listed each time, and a listing not seen before is a new folder; where the store cannot be
    reached, the last one is taken if it is cached.

    Raises:
        SourceError: There is no such prefix, access is denied, an extra is not installed, or it could not be had.
    """
    host = urlsplit(settings.s3_endpoint).netloc if settings.s3_endpoint and source.scheme == "s3" else "public"
    shelf = f"{source.scheme}/{key_part(host)}/{key_part(f'{source.root}/{source.path}')}"
    pointer = settings.cache_dir / shelf / "last"
    if settings.offline:
        known = recall(pointer)
        return _named(cached(settings, f"{shelf}/{known or 'never'}") or Path(), source)
    try:
        store, objects = _list(source, settings)
    except GaveUp:
        known = recall(pointer)
        if known is None or not (settings.cache_dir / shelf / known).is_dir():
            raise
        return _named(settings.cache_dir / shelf / known, source)
    state = hashlib.sha256(json.dumps([[o.path, o.etag, o.size] for o in objects]).encode()).hexdigest()[:40]
    key = f"{shelf}/{state}"
    folder = cached(settings, key)
    if folder is None:
        wanted = [_wanted(store, one, source, settings) for one in objects]
        folder = gather(settings, key, wanted, Meter(progress, total=sum(one.size for one in objects)))
        drop_superseded(folder)
    remember(pointer, state)
    return _named(folder, source)


def _named(folder: Path, source: Source) -> Path:
    single = folder / source.path.rpartition("/")[2]
    return single if source.path and [single] == list(folder.iterdir()) and single.is_file() else folder


def _store(scheme: str, settings: Settings, *, anonymous: bool = False) -> Any:
    module, extra = _EXTRAS[scheme]
    if importlib.util.find_spec(module) is None:
        raise SourceError(f"takes {module}, which is not installed; try: pip install 'roundhouse-serve[{extra}]'")
    import fsspec

    fresh: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "gs":
        store = fsspec.filesystem("gs", **fresh, **({"token": "anon"} if anonymous else {}))
    else:
        timeouts = {"connect_timeout": settings.download_timeout_s, "read_timeout": settings.download_timeout_s}
        # A server of one's own seldom has a host name for each bucket.
        style = {"s3": {"addressing_style": "path"}} if settings.s3_endpoint else {}
        store = fsspec.filesystem(
            "s3",
            anon=anonymous,
            endpoint_url=settings.s3_endpoint,
            config_kwargs={"retries": {"total_max_attempts": 1}, **timeouts, **style},
            **fresh,
        )
    store.retries = 1
    return store


def _list(source: Source, settings: Settings) -> tuple[Any, list[_Object]]:
    found: list[tuple[Any, list[_Object]]] = []

    def ask() -> None:
        store = _store(source.scheme, settings)
        try:
            infos = store.find(f"{source.root}/{source.path}", detail=True)
        except Exception as error:
            if type(error).__name__ != "NoCredentialsError":
                raise _explained(error, source) from error
            store = _store(source.scheme, settings, anonymous=True)
            try:
                infos = store.find(f"{source.root}/{source.path}", detail=True)
            except Exception as second:
                raise _explained(second, source) from second
        found.append((store, _objects(infos, source)))

    persist(ask, reached=lambda: 0, meter=Meter(lambda *_: None), settings=settings)
    return found[-1]


def _objects(infos: dict[str, dict[str, Any]], source: Source) -> list[_Object]:
    whole = f"{source.root}/{source.path}".rstrip("/")
    objects = []
    for path, info in sorted(infos.items()):
        if info["type"] != "file" or path.endswith("/"):
            continue
        name = path.removeprefix(f"{whole}/") if path != whole else path.rpartition("/")[2]
        etag = str(info.get("ETag") or info.get("etag") or "").strip('"')
        md5 = base64.b64decode(info["md5Hash"]).hex() if info.get("md5Hash") else None
        if source.scheme == "s3" and _MD5.fullmatch(etag):
            md5 = etag
        objects.append(_Object(path, name, int(info["size"]), etag, md5, info.get("generation")))
    if not objects:
        raise SourceError("nothing is there; are the bucket and the prefix right?")
    return objects


def _explained(error: Exception, source: Source) -> Exception:
    # botocore, aiohttp, google.auth and s3fs each have their own classes, and their lost connections no common one.
    if isinstance(error, FileNotFoundError):
        return SourceError(f"nothing is there, or it changed meanwhile; are the bucket and the prefix right? ({error})")
    if isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError":
        return SourceError(
            f"access to {source.root} is denied; are the credentials in the environment right? ({error})"
        )
    return Broken(f"the store of {source.root} cannot be reached: {error or type(error).__name__}")


def _wanted(store: Any, one: _Object, source: Source, settings: Settings) -> Wanted:
    def fill(part: Path, meter: Meter) -> None:
        resumed = size_of(part) > 0
        meter.add(size_of(part))
        while True:
            persist(
                lambda: _continue(store, one, source, part, meter),
                reached=lambda: size_of(part),
                meter=meter,
                settings=settings,
            )
            if _is_right(store, one, source, part):
                return
            meter.add(-size_of(part))
            part.unlink()
            if not resumed:
                raise SourceError(
                    f"{one.path} changed while it was read, or what came is not what was stored; try again"
                )
            resumed = False

    return Wanted(safe_path(one.name), one.size, fill)


def _continue(store: Any, one: _Object, source: Source, part: Path, meter: Meter) -> None:
    if size_of(part) > one.size:
        meter.add(-size_of(part))
        part.unlink()
    with part.open("ab") as file:
        while (start := file.tell()) < one.size:
            end = min(start + _BLOCK, one.size)
            version = {"generation": one.generation} if one.generation else {}
            try:
                block = store.cat_file(one.path, start=start, end=end, **version)
            except Exception as error:
                raise _explained(error, source) from error
            if len(block) != end - start:
                raise Broken(f"{one.path}: {len(block)} bytes came where {end - start} were asked for")
            file.write(block)
            file.flush()
            meter.add(len(block))


def _is_right(store: Any, one: _Object, source: Source, part: Path) -> bool:
    if one.md5 and Digest("md5", one.md5).of(part) == one.md5:
        return True
    if one.md5 and not (source.scheme == "s3" and _has_other_etag(store, one, source)):
        return False
    # An object stored in parts has no hash of the whole: it must still be the one that was listed.
    try:
        now = store.info(one.path)
    except Exception as error:
        raise _explained(error, source) from error
    return (str(now.get("ETag") or now.get("etag") or "").strip('"'), int(now["size"])) == (one.etag, one.size)


def _has_other_etag(store: Any, one: _Object, source: Source) -> bool:
    # With keys of a key service or of the client's own, the ETag looks like an MD5 and is none.
    bucket, _, key = one.path.partition("/")
    try:
        head = store.call_s3("head_object", Bucket=bucket, Key=key)
    except Exception as error:
        raise _explained(error, source) from error
    return str(head.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in head
