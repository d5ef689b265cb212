from __future__ import annotations

import gzip

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from loadtests.observe.page import served
from loadtests.observe.traces import Span, Traces, tree

TRACE = "0af7651916cd43dd8448eb211c80319c"


def export(*spans: tuple[str, str, str], failed: bool = False) -> bytes:
    """Return an OTLP export of spans: own identifier, parent's, name."""
    request = ExportTraceServiceRequest()
    resource = request.resource_spans.add()
    attribute = resource.resource.attributes.add()
    attribute.key, attribute.value.string_value = "service.name", "roundhouse"
    scope = resource.scope_spans.add()
    for number, (own, parent, name) in enumerate(spans):
        span = scope.spans.add(name=name, trace_id=bytes.fromhex(TRACE), span_id=bytes.fromhex(own))
        span.parent_span_id = bytes.fromhex(parent)
        span.start_time_unix_nano, span.end_time_unix_nano = number * 10**6, 10**7
        if failed:
            span.status.code = Status.STATUS_CODE_ERROR
        told = span.attributes.add()
        told.key, told.value.int_value = "tokens", 7
    return request.SerializeToString()


def span(own: str, parent: str, start: int) -> Span:
    return Span("t", own, parent, own, "", start, start + 1, False, "")


def test_a_trace_is_a_tree_in_which_children_follow_their_parents_in_time():
    spans = [span("c", "a", 3), span("b", "a", 2), span("d", "b", 4), span("a", "elsewhere", 1)]
    assert [(depth, each.own) for depth, each in tree(spans)] == [(0, "a"), (1, "b"), (2, "d"), (1, "c")]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), unique_by=lambda pair: pair[0]))
def test_no_span_is_lost_or_told_twice(pairs: list[tuple[int, int]]):
    spans = [span(str(own), str(min(own - 1, parent)), own) for own, parent in pairs]
    assert sorted(each.own for _, each in tree(spans)) == sorted(each.own for each in spans)


def test_spans_come_in_over_http_and_are_shown(tmp_path):
    traces = Traces()
    with served(tmp_path, 0, traces) as url:
        assert "No span has come" in httpx.get(f"{url}traces").text
        body = export(
            ("00f067aa0ba902b7", "", "POST /v1/<embeddings>"), ("00f067aa0ba902b8", "00f067aa0ba902b7", "queue")
        )
        packed = {"Content-Encoding": "gzip"}
        assert httpx.post(f"{url}v1/traces", content=gzip.compress(body), headers=packed).status_code == 200
        listing = httpx.get(f"{url}traces").text
        assert f"/traces/{TRACE}" in listing
        assert "2 spans" in listing
        one = httpx.get(f"{url}traces/{TRACE}").text
        assert "POST /v1/&lt;embeddings&gt;" in one
        assert one.index("queue") > one.index("POST")
        assert "tokens=7" in one
        assert "No span of this trace" in httpx.get(f"{url}traces/{'0' * 32}").text


def test_a_failed_span_is_seen_from_outside(tmp_path):
    traces = Traces()
    traces.add(export(("00f067aa0ba902b7", "", "GET /"), failed=True))
    assert "failed" in traces.page()


@pytest.mark.parametrize("body", [b"not protobuf", b"\xff" * 20])
def test_what_is_no_export_is_refused_and_changes_nothing(tmp_path, body: bytes):
    with served(tmp_path, 0, Traces()) as url:
        assert httpx.post(f"{url}v1/traces", content=body).status_code == 400
        assert "No span has come" in httpx.get(f"{url}traces").text


def test_only_the_newest_traces_are_kept():
    traces = Traces()
    first = export(("00f067aa0ba902b7", "", "first"))
    traces.add(first)
    for number in range(500):
        traces.add(first.replace(bytes.fromhex(TRACE), number.to_bytes(16, "big")))
    assert TRACE not in traces.page()
