"""A request's body: read within its limit, decompressed within its limit, parsed strictly."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import re
import reprlib
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import orjson

from serve.api.wire import Receive
from serve.errors import Cancelled, DeadlineExceeded, InvalidInput, Overloaded, PayloadTooLarge, UnsupportedMedia

# `curl -d` says form-urlencoded and tritonclient says nothing: both send JSON.
_READABLE_TYPES = frozenset(
    (b"", b"application/json", b"application/octet-stream", b"application/x-www-form-urlencoded", b"text/plain", b"*/*")
)
_WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_INLINE_BYTES = 256 * 1024
_DEEPEST = 32
# The parser lets nothing else run: as many as these take it a twentieth of a second, on top of what numbers take.
_MOST_PARTS = 1_000_000
_MOST_KEYS = 100_000
# A quote that ends a key stands before a colon. In a string it follows a backslash, and only counts too much.
_KEY = re.compile(rb'"[ \t\r\n]*:')
# Possessive: a string of many escapes would have it keep a way back for each.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)

Result = TypeVar("Result")


def check_media_type(headers: dict[bytes, bytes]) -> None:
    """Refuse a body that says it is neither JSON nor bytes.

    Raises:
        UnsupportedMedia: Its content type is another one.
    """
    declared = headers.get(b"content-type")
    if declared is None or declared == b"application/json":
        return
    kind, _, options = declared.partition(b";")
    kind = kind.strip().lower()
    if kind not in _READABLE_TYPES and not (kind.startswith(b"application/") and kind.endswith(b"+json")):
        raise UnsupportedMedia(
            f"{kind.decode('latin-1')!r} is not understood here; send application/json", place="header content-type"
        )
    charset = options.lower().replace(b" ", b"").replace(b'"', b"")
    if b"charset=" in charset and b"charset=utf-8" not in charset and b"charset=us-ascii" not in charset:
        raise UnsupportedMedia("the charset of JSON is utf-8", place="header content-type")


def read_length(value: bytes) -> int | None:
    """Return a header's number of bytes, or None where it is none that fits in 64 bits."""
    return int(value) if len(value) < 20 and value.isdigit() else None


class Uploads:
    """Bounds the bytes of the bodies that are arriving: they count for no queue yet, and their clients may be slow.

    Args:
        max_bytes: What all of them together may have sent; a body that arrives in one piece is not counted.
        within_s: Seconds in which each of them must have arrived, so that none holds its room for good.
    """

    def __init__(self, max_bytes: int, *, within_s: float) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self.within_s = within_s

    def take(self, size: int) -> None:
        """Count bytes that arrived.

        Raises:
            Overloaded: They would be too many; nothing is counted then.
        """
        if self._bytes + size > self._max_bytes:
            raise Overloaded(
                f"requests of {self._bytes} bytes are arriving, and at most {self._max_bytes} may", retry_after_s=1.0
            )
        self._bytes += size

    def give_back(self, size: int) -> None:
        """Take bytes out of the count."""
        self._bytes -= size


async def read_body(headers: dict[bytes, bytes], receive: Receive, *, limit: int, uploads: Uploads) -> bytes:
    """Return the body, decompressed.

    Args:
        limit: Bytes that it may have, compressed and decompressed.
        uploads: What it counts for while it arrives.

    Raises:
        PayloadTooLarge: It has more; where its length is declared, before any of it is read.
        UnsupportedMedia: Its encoding is not gzip, deflate or identity.
        InvalidInput: It does not decompress, or its declared length is no number.
        Cancelled: The client left while sending it.
        Overloaded: `uploads` is full.
        DeadlineExceeded: It has not arrived in the time that `uploads` allows.
    """
    declared = headers.get(b"content-length")
    if declared is not None:
        length = read_length(declared)
        if length is None:
            raise InvalidInput(f"{declared.decode('latin-1')!r:.40} is not a length", place="header content-length")
        if length > limit:
            raise _too_large(length, limit)
    message = await receive()
    if message["type"] != "http.request":
        raise Cancelled("the client left while sending its request")
    body: bytes = message.get("body", b"")
    if message.get("more_body", False):
        try:
            async with asyncio.timeout(uploads.within_s):
                body = await _read_rest(body, receive, limit, uploads)
        except TimeoutError as error:
            raise DeadlineExceeded(f"the body had not arrived after {uploads.within_s:g} s") from error
    elif len(body) > limit:
        raise _too_large(len(body), limit)
    encoding = headers.get(b"content-encoding")
    return body if encoding is None else await _decoded(body, encoding, limit)


async def _read_rest(first: bytes, receive: Receive, limit: int, uploads: Uploads) -> bytes:
    parts, part, size, taken, more = [first], first, len(first), 0, True
    try:
        while more:
            if size > limit:
                raise _too_large(size, limit)
            uploads.take(len(part))
            taken += len(part)
            message = await receive()
            if message["type"] != "http.request":
                raise Cancelled("the client left while sending its request")
            part = message.get("body", b"")
            parts.append(part)
            size += len(part)
            more = message.get("more_body", False)
    finally:
        uploads.give_back(taken)
    if size > limit:
        raise _too_large(size, limit)
    return b"".join(parts)


def _too_large(size: int, limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"{size} bytes or more, and a request may have {limit}", place="body")


async def _decoded(body: bytes, encoding: bytes, limit: int) -> bytes:
    name = encoding.decode("latin-1").strip().lower()
    if name == "identity":
        return body
    if name not in _WINDOW_BITS:
        raise UnsupportedMedia(f"{name!r} is not one of gzip, deflate, identity", place="header content-encoding")
    if len(body) <= _INLINE_BYTES:
        return decompress(body, name, limit=limit)
    return await asyncio.to_thread(decompress, body, name, limit=limit)


def decompress(body: bytes, encoding: str, *, limit: int) -> bytes:
    """Return a gzip or deflate (zlib, RFC 9110) body decompressed.

    Raises:
        PayloadTooLarge: It expands to more than `limit` bytes; no more than that is ever held.
        InvalidInput: It is damaged, cut short, or followed by something else.
    """
    expander = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        expanded = expander.decompress(body, limit + 1)
    except zlib.error as error:
        raise InvalidInput(f"is not {encoding}: {error}", place="body") from error
    if len(expanded) > limit:
        raise PayloadTooLarge(f"expands to more than the {limit} bytes that a request may have", place="body")
    if not expander.eof or expander.unused_data:
        what = "ends early" if not expander.eof else "is followed by other bytes"
        raise InvalidInput(f"the {encoding} stream {what}", place="body")
    return expanded


def compress(body: bytes, encoding: str) -> bytes:
    """Return a body as gzip or deflate, fast rather than small."""
    packer = zlib.compressobj(1, zlib.DEFLATED, _WINDOW_BITS[encoding])
    return packer.compress(body) + packer.flush()


def asked_encoding(headers: dict[bytes, bytes]) -> str | None:
    """Return the coding that the client asks the answer to have.

    Libraries list every coding they can read on each request; that is no wish. One coding alone is.
    """
    accepted = headers.get(b"accept-encoding")
    if accepted is None or b"," in accepted:
        return None
    name = accepted.decode("latin-1").strip().lower()
    return name if name in _WINDOW_BITS else None


async def read_apart(read: Callable[[bytes], Result], body: bytes) -> Result:
    """Return what a body says; one that is large is read beside the event loop, which goes on with other requests."""
    return read(body) if len(body) <= _INLINE_BYTES else await asyncio.to_thread(read, body)


def parse_object(raw: bytes | memoryview) -> dict[str, Any]:
    """Parse a JSON object strictly.

    Raises:
        PayloadTooLarge: It has more lists, objects, strings or keys than a request needs; nothing is parsed then.
        InvalidInput: It is empty, no JSON (NaN and Infinity are none), no UTF-8, nested too deeply, no object, or a key
            stands twice.
    """
    if not raw:
        raise InvalidInput("is empty; a JSON object belongs here", place="body")
    if len(raw) > _INLINE_BYTES:
        raw = bytes(raw)
        _check_parts(raw)
    document = _parsed(raw)
    if type(document) is not dict:
        raise InvalidInput(f"must be a JSON object, not {json_type(document)}", place="body")
    keys = _count_keys(document, 0)
    if sum(1 for _ in itertools.islice(_KEY.finditer(raw), keys + 1)) != keys:
        _refuse_duplicates(raw)
    return document


def _check_parts(raw: bytes) -> None:
    """Refuse a body of too many parts, counted without parsing it; what stands in strings counts for nothing."""
    quotes, lists, objects, colons = map(raw.count, (b'"', b"[", b"{", b":"))
    if quotes // 2 + lists + objects <= _MOST_PARTS and colons + objects <= _MOST_KEYS:
        return
    parts = keys = place = 0
    for string in itertools.chain(_STRING.finditer(raw), (None,)):
        end = len(raw) if string is None else string.start()
        objects = raw.count(b"{", place, end)
        parts += raw.count(b"[", place, end) + objects + 1
        keys += raw.count(b":", place, end) + objects
        if parts > _MOST_PARTS + 1:
            raise PayloadTooLarge(
                f"has more than {_MOST_PARTS} lists, objects and strings; send tensors flat, or as binary data",
                place="body",
            )
        if keys > _MOST_KEYS:
            raise PayloadTooLarge(f"has more than {_MOST_KEYS} keys and objects", place="body")
        if string is not None:
            place = string.end()


def _parsed(raw: bytes | memoryview) -> Any:
    # A million new lists have the collector look at all of them several times; none of them is garbage yet.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"is not valid JSON: {error}", place="body") from error
    finally:
        if was_enabled:
            gc.enable()


def _count_keys(value: dict[str, Any], depth: int) -> int:
    """Count the keys of an object and of the objects in it; may leave some out, which only costs the exact check."""
    if depth > _DEEPEST:
        raise InvalidInput(f"is nested more than {_DEEPEST} levels deep", place="body")
    count = len(value)
    for inner in value.values():
        kind = type(inner)
        if kind is dict:
            count += _count_keys(inner, depth + 1)
        elif kind is list and inner and type(inner[0]) is dict:
            for element in inner:
                if type(element) is dict:
                    count += _count_keys(element, depth + 1)
    return count


def _refuse_duplicates(raw: bytes | memoryview) -> None:
    def unique(pairs: list[tuple[str, Any]]) -> None:
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidInput(f"the key {key[:80]!r} stands twice in one object", place="body")
            seen.add(key)

    def number(_: str) -> None:
        """Let other threads have their turns: without this Python would parse all of them in one."""

    try:
        json.loads(bytes(raw), object_pairs_hook=unique, parse_int=number, parse_float=number)
    except (RecursionError, ValueError) as error:
        raise InvalidInput("is nested too deeply", place="body") from error


_JSON_TYPES = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}


def json_type(value: object) -> str:
    """Return what JSON calls a parsed value, with its article."""
    return _JSON_TYPES.get(type(value), "a number")


_BRIEF = reprlib.Repr()
_BRIEF.maxlist = _BRIEF.maxdict = 16
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 100


def quoted(value: object) -> str:
    """Return a parsed value as an error shows it; no more of a long one is looked at than that."""
    return _BRIEF.repr(value)[:60]
