"""What is sent is what OpenTelemetry's own encoder would have sent for the same spans."""

from __future__ import annotations

import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from serve.telemetry.otlp import request_of
from serve.telemetry.spans import Span
from serve.telemetry.traceparent import TraceIds

RESOURCE = {"service.name": "roundhouse", "host.name": "a"}
SCOPE = ("roundhouse", "1.0")
OFFSET_NS = 1_700_000_000_000_000_000
KINDS = {"internal": SpanKind.INTERNAL, "server": SpanKind.SERVER, "client": SpanKind.CLIENT}

names = st.text(string.ascii_lowercase + "._", min_size=1, max_size=12)
trace_ids = st.binary(min_size=16, max_size=16).filter(any)
span_ids = st.binary(min_size=8, max_size=8).filter(any)
moments = st.floats(0, 1e6)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values = st.one_of(
    words,
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.lists(words, max_size=3),
    st.lists(st.integers(0, 9), max_size=3),
)
attributes = st.dictionaries(names, values, max_size=4)
spans = st.builds(
    Span,
    words,
    st.sampled_from(sorted(KINDS)),
    trace_ids,
    span_ids,
    st.one_of(st.just(b""), span_ids),
    moments,
    moments,
    attributes,
    st.lists(st.tuples(names, moments, attributes), max_size=2),
    st.lists(st.builds(TraceIds, trace_ids, span_ids), max_size=3),
    st.one_of(st.none(), words),
    st.sampled_from([b"", b"vendor=1", b"a=b,c=d"]),
)


def as_the_sdk_has_it(span: Span) -> ReadableSpan:
    def context(trace_id: bytes, span_id: bytes, state: TraceState | None = None) -> SpanContext:
        ids = int.from_bytes(trace_id), int.from_bytes(span_id)
        return SpanContext(*ids, is_remote=False, trace_flags=TraceFlags(1), trace_state=state)

    def ns(at: float) -> int:
        return int(at * 1e9) + OFFSET_NS

    state = TraceState.from_header([span.state.decode()]) if span.state else None
    return ReadableSpan(
        span.name,
        context=context(span.trace_id, span.span_id, state),
        parent=context(span.trace_id, span.parent_id) if span.parent_id else None,
        resource=Resource(RESOURCE),
        attributes=span.attributes,
        events=[Event(name, dict(told), ns(at)) for name, at, told in span.events],
        links=[Link(context(*ids)) for ids in span.links],
        kind=KINDS[span.kind],
        status=Status(StatusCode.UNSET) if span.error is None else Status(StatusCode.ERROR, span.error),
        start_time=ns(span.began),
        end_time=ns(span.ended),
        instrumentation_scope=InstrumentationScope(*SCOPE),
    )


def sent(told: list[Span]) -> Any:
    sent = request_of(told, offset_ns=OFFSET_NS, resource=RESOURCE, scope=SCOPE)
    return ExportTraceServiceRequest.FromString(sent)


@given(st.lists(spans, min_size=1, max_size=4))
def test_a_request_is_that_of_the_sdk(told: list[Span]):
    expected = encode_spans([as_the_sdk_has_it(span) for span in told])
    for message in expected.resource_spans[0].scope_spans[0].spans:
        if not message.status.code:
            message.ClearField("status")  # theirs holds an empty one where nothing is said
    assert sent(told) == expected


def attribute(value: Any) -> Any:
    span = Span("a", "internal", b"t" * 16, b"s" * 8, b"", 1.0, 2.0, {"told": value})
    return sent([span]).resource_spans[0].scope_spans[0].spans[0].attributes[0].value


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**30])
def test_a_number_that_is_too_large_is_told_as_text(value: int):
    assert attribute(value).string_value == str(value)


def test_text_that_is_no_unicode_is_told_with_a_mark():
    assert attribute("a\ud800b").string_value == "a?b"


def test_bytes_are_bytes():
    assert attribute(b"\xff").bytes_value == b"\xff"
