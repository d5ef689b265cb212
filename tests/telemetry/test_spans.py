"""A request's phases follow each other without a gap, whatever way it went, and none of its content is told unasked."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.telemetry.passage import Passage
from serve.telemetry.spans import Span, count_of, spans_of
from serve.telemetry.tracing import BatchTrace, RequestRecord, RequestTrace

PHASES = ("read", "queue", "compute", "respond")


def traced(**moments: Any) -> Passage:
    passage = Passage()
    for name, value in moments.items():
        setattr(passage, name, value)
    passage.trace = RequestTrace(b"t" * 16, b"p" * 8, b"", is_sampled=True)
    return passage


def record(passage: Passage, *, has_content: bool = False, **headers: bytes) -> RequestRecord:
    scope = {"method": "POST", "path": "/v2/models/m/infer", "server": ("127.0.0.1", 8000), "scheme": "http"}
    told = {name.replace("_", "-").encode(): value for name, value in headers.items()}
    return RequestRecord(passage, scope, told, "/v2/models/{model}/infer", {}, has_content)


def request_of(passage: Passage, **options: Any) -> tuple[Span, dict[str, Span]]:
    first, *rest = spans_of(record(passage, **options))
    return first, {span.name: span for span in rest}


@given(
    steps=st.lists(st.floats(0.0, 5.0), min_size=4, max_size=4),
    reached=st.integers(0, 3),
    prepares=st.booleans(),
    first_part=st.booleans(),
    outcome=st.sampled_from(["ok", "overloaded", "prediction_failed", "client_closed_request"]),
)
def test_phases_follow_each_other_and_add_up(
    steps: list[float], reached: int, prepares: bool, first_part: bool, outcome: str
):
    began, *later = itertools.accumulate([100.0, *steps])
    arrived, launched, answered, ended = later
    passage = traced(began=began, ended=ended, outcome=outcome)
    if reached > 0:
        passage.arrived = arrived
    if reached > 1:
        passage.launched = launched
    if reached > 2:
        passage.answered = answered
    if reached > 0 and prepares:
        passage.was_prepared(arrived, launched)
    if reached > 1 and first_part:
        passage.first_part = launched
    request, *children = spans_of(record(passage))
    phases = [span for span in children if span.parent_id == request.span_id]
    assert [span.name for span in phases] == (
        [] if not reached else [name for name in PHASES if name != "compute" or reached > 1]
    )
    if phases:
        assert (phases[0].began, phases[-1].ended) == (request.began, request.ended)
        assert all(before.ended == after.began for before, after in itertools.pairwise(phases))
    ids = {span.span_id for span in (request, *children)}
    assert len(ids) == 1 + len(children) == count_of(record(passage))
    assert all(span.parent_id in ids for span in children)
    assert {span.trace_id for span in children} <= {request.trace_id}
    errors = [event for span in (request, *children) for event in span.events if event[0] == "exception"]
    assert len(errors) == (outcome in ("overloaded", "prediction_failed"))


def test_a_request_speaks_the_conventions_of_http():
    passage = traced(began=1.0, arrived=2.0, launched=3.0, answered=4.0, ended=5.0, status=200)
    request, phases = request_of(passage, user_agent=b"curl/8", x_request_id=b"abc")
    assert (request.name, request.kind) == ("POST /v2/models/{model}/infer", "server")
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": "/v2/models/{model}/infer",
        "http.response.status_code": 200,
        "url.path": "/v2/models/m/infer",
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "server.address": "127.0.0.1",
        "server.port": 8000,
        "user_agent.original": "curl/8",
        "roundhouse.request_id": "abc",
    }
    assert request.error is None
    assert set(phases) == set(PHASES)


@pytest.mark.parametrize(
    ("status", "outcome", "is_error"),
    [
        (200, "ok", False),
        (400, "invalid_value", False),
        (429, "overloaded", False),
        (500, "prediction_failed", True),
        (200, "prediction_failed", True),
        (0, "client_closed_request", False),
    ],
)
def test_only_faults_of_ours_are_errors(status: int, outcome: str, is_error: bool):
    request, _ = request_of(traced(began=1.0, ended=2.0, status=status, outcome=outcome))
    assert (request.error is not None) == is_error
    assert request.attributes.get("error.type", "ok") == outcome


def test_an_error_is_told_where_it_happened_and_its_words_only_if_asked():
    moments = {"began": 1.0, "arrived": 2.0, "launched": 3.0, "answered": 4.0, "ended": 5.0}
    passage = traced(**moments, outcome="prediction_failed", message="cannot divide secret by 0", status=500)
    request, phases = request_of(passage)
    assert phases["compute"].events == [("exception", 4.0, {"exception.type": "prediction_failed"})]
    assert phases["compute"].error == request.error == "prediction_failed"
    assert request.events == []
    assert "secret" not in str(list(spans_of(record(passage))))
    _, told = request_of(passage, has_content=True)
    assert told["compute"].events[0][2]["exception.message"] == "cannot divide secret by 0"


def test_a_language_model_has_the_name_that_its_conventions_want():
    passage = traced(began=1.0, arrived=2.0, launched=3.0, first_part=3.5, answered=4.0, ended=5.0)
    passage.tell({"gen_ai.operation.name": "chat", "gen_ai.request.model": "m"})
    _, phases = request_of(passage)
    assert phases["chat m"].attributes["roundhouse.phase"] == "compute"
    assert phases["chat m"].events == [("first_token", 3.5, {})]


def test_a_batch_is_a_trace_of_its_own_and_both_ends_know_each_other():
    members = [traced(began=1.0, arrived=2.0, launched=3.0, answered=4.0, ended=5.0) for _ in range(2)]
    batch = BatchTrace("m", [member.trace for member in members if member.trace is not None], 3)
    batch.ran(3.0, 4.0, cost=12, error=ValueError("no"))
    (span,) = spans_of(batch)
    assert (span.parent_id, span.error) == (b"", "ValueError")
    assert span.attributes["roundhouse.batch.size"] == 3
    assert span.attributes["roundhouse.batch.cost"] == 12
    for member in members:
        request, phases = request_of(member)
        assert (request.trace_id, request.span_id) in span.links
        assert phases["compute"].links == [(span.trace_id, span.span_id)]


def test_what_a_gateway_sends_is_between_its_span_and_the_replicas():
    passage = traced(began=1.0, ended=5.0, status=200)
    assert passage.trace is not None
    lost = passage.trace.attempt()
    lost.status = 503
    lost.end()
    passage.trace.attempt().status = 200
    request, *attempts = spans_of(record(passage))
    assert [span.kind for span in attempts] == ["client", "client"]
    assert [span.error for span in attempts] == ["503", None]
    assert all(span.parent_id == request.span_id for span in attempts)
