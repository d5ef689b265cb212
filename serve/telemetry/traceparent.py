"""The trace that a request says it belongs to, read from its header."""

from __future__ import annotations

import re
from typing import NamedTuple

# W3C Trace Context, level 1: all zeros is no identifier, and `ff` no version; a later version may go on after a dash.
_HEADER = re.compile(
    rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL
)
_SAMPLED = 1


class TraceIds(NamedTuple):
    """A trace, 16 bytes, and the caller's span in it, 8."""

    trace_id: bytes
    span_id: bytes


def sampled_trace(header: bytes | None) -> TraceIds | None:
    """Return the trace of a `traceparent` header, or None where there is none, it is malformed or it is not sampled."""
    found = _HEADER.fullmatch(header) if header is not None else None
    if found is None:
        return None
    version, trace_id, span_id, flags, rest = found.groups()
    if not int(flags, 16) & _SAMPLED or (rest is not None and version == b"00"):
        return None
    return TraceIds(bytes.fromhex(trace_id.decode()), bytes.fromhex(span_id.decode()))
