"""A trace is taken from the header only where the header is right and the trace is recorded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.telemetry.traceparent import sampled_trace

TRACE = b"4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = b"00f067aa0ba902b7"


@given(
    trace=st.binary(min_size=16, max_size=16).filter(any),
    span=st.binary(min_size=8, max_size=8).filter(any),
    flags=st.integers(0, 255),
)
def test_a_sampled_trace_is_read_back(trace: bytes, span: bytes, flags: int):
    found = sampled_trace(f"00-{trace.hex()}-{span.hex()}-{flags:02x}".encode())
    assert found == ((trace, span) if flags & 1 else None)


@given(st.binary(max_size=80))
def test_anything_else_is_no_trace(header: bytes):
    assert sampled_trace(header) is None


@pytest.mark.parametrize(
    "header",
    [
        None,
        b"",
        b"00-" + TRACE + b"-" + SPAN,
        b"00-" + TRACE + b"-" + SPAN + b"-01-more",
        b"00-" + TRACE + b"-" + SPAN + b"-01more",
        b"01-" + TRACE + b"-" + SPAN + b"-01more",
        b"ff-" + TRACE + b"-" + SPAN + b"-01",
        b"00-" + TRACE.upper() + b"-" + SPAN + b"-01",
        b"00-" + b"0" * 32 + b"-" + SPAN + b"-01",
        b"00-" + TRACE + b"-" + b"0" * 16 + b"-01",
        b"00_" + TRACE + b"-" + SPAN + b"-01",
        b"00-" + TRACE[:-1] + b" -" + SPAN + b"-01",
        b"00-" + TRACE + b"-" + SPAN + b"-01\n",
    ],
)
def test_a_wrong_header_is_no_trace(header: bytes | None):
    assert sampled_trace(header) is None


def test_a_later_version_may_say_more():
    assert sampled_trace(b"cc-" + TRACE + b"-" + SPAN + b"-01-what the future will be like") is not None
