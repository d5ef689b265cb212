"""What runs within a span of ours, for code that traces itself with OpenTelemetry's SDK."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from opentelemetry.context import attach, detach
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from serve.telemetry.traceparent import TraceIds

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


@contextlib.contextmanager
def within(ids: TraceIds) -> Iterator[None]:
    """Have spans that the block begins, in its thread, be children of a span of ours."""
    trace_id, span_id = ids
    context = SpanContext(int.from_bytes(trace_id), int.from_bytes(span_id), is_remote=False, trace_flags=_SAMPLED)
    token = attach(set_span_in_context(NonRecordingSpan(context)))
    try:
        yield
    finally:
        detach(token)
