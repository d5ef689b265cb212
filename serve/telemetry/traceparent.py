"""The trace that a request says it belongs to, and what it says besides, read from its headers and written to them."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple
from urllib.parse import unquote

# W3C Trace Context, level 1: all zeros is no identifier, and `ff` no version; a later version may go on after a dash.
_HEADER = re.compile(
    rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL
)
_SAMPLED = 1
_LONGEST_VALUE = 256
_MOST_ENTRIES = 64


class TraceIds(NamedTuple):
    """A trace, 16 bytes, and a span in it, 8."""

    trace_id: bytes
    span_id: bytes


class Parent(NamedTuple):
    """The caller's span, and whether the caller records it."""

    trace_id: bytes
    span_id: bytes
    is_sampled: bool


def read_parent(header: bytes | None) -> Parent | None:
    """Return what a `traceparent` header says, or None where there is none or it is malformed."""
    found = _HEADER.fullmatch(header) if header is not None else None
    if found is None:
        return None
    version, trace_id, span_id, flags, rest = found.groups()
    if rest is not None and version == b"00":
        return None
    sampled = bool(int(flags, 16) & _SAMPLED)
    return Parent(bytes.fromhex(trace_id.decode()), bytes.fromhex(span_id.decode()), sampled)


def sampled_trace(header: bytes | None) -> TraceIds | None:
    """Return the trace of a `traceparent` header, or None where there is none, it is malformed or it is not sampled."""
    parent = read_parent(header)
    return TraceIds(parent.trace_id, parent.span_id) if parent is not None and parent.is_sampled else None


def write_parent(trace_id: bytes, span_id: bytes, *, is_sampled: bool) -> bytes:
    """Return the `traceparent` header that names a span as the parent."""
    return b"00-%b-%b-%02x" % (trace_id.hex().encode(), span_id.hex().encode(), _SAMPLED if is_sampled else 0)


def read_baggage(header: bytes | None, allowed: Collection[str]) -> dict[str, str]:
    """Return the allowed entries of a `baggage` header (W3C Baggage, section 3.3); what is malformed is left out.

    Values are cut at 256 characters, and only the first 64 entries are looked at.
    """
    if header is None or not allowed:
        return {}
    found: dict[str, str] = {}
    for entry in header.decode("latin-1").split(",")[:_MOST_ENTRIES]:
        key, is_pair, value = entry.partition(";")[0].partition("=")
        key = key.strip()
        if is_pair and key in allowed:
            found[key] = unquote(value.strip(), errors="replace")[:_LONGEST_VALUE]
    return found
