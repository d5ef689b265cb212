"""Our spans in the words of OpenTelemetry's SDK, whose exporters know how they travel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from opentelemetry.context import attach, detach
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from serve.telemetry.spans import Span
from serve.telemetry.traceparent import TraceIds

_KINDS = {"internal": SpanKind.INTERNAL, "server": SpanKind.SERVER, "client": SpanKind.CLIENT}
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_UNSET = Status(StatusCode.UNSET)


@contextlib.contextmanager
def within(ids: TraceIds) -> Iterator[None]:
    """Have spans that the block begins, in its thread, be children of a span of ours."""
    token = attach(set_span_in_context(NonRecordingSpan(_context(*ids))))
    try:
        yield
    finally:
        detach(token)


def readable(span: Span, offset_ns: int, resource: Resource, scope: InstrumentationScope) -> ReadableSpan:
    """Return a span as the SDK's exporters take it.

    Args:
        offset_ns: Unix time less `time.monotonic_ns`.
    """
    return ReadableSpan(
        span.name,
        context=_context(span.trace_id, span.span_id, _state(span.state)),
        parent=_context(span.trace_id, span.parent_id) if span.parent_id else None,
        resource=resource,
        attributes=span.attributes,
        events=[Event(name, dict(told), _ns(at, offset_ns)) for name, at, told in span.events],
        links=[Link(_context(*ids)) for ids in span.links],
        kind=_KINDS[span.kind],
        status=_UNSET if span.error is None else Status(StatusCode.ERROR, span.error),
        start_time=_ns(span.began, offset_ns),
        end_time=_ns(span.ended, offset_ns),
        instrumentation_scope=scope,
    )


def _ns(at: float, offset_ns: int) -> int:
    return int(at * 1e9) + offset_ns


def _context(trace_id: bytes, span_id: bytes, state: TraceState | None = None) -> SpanContext:
    return SpanContext(
        int.from_bytes(trace_id), int.from_bytes(span_id), is_remote=False, trace_flags=_SAMPLED, trace_state=state
    )


def _state(header: bytes) -> TraceState | None:
    return TraceState.from_header([header.decode("latin-1")]) if header else None
