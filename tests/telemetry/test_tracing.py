"""Who is recorded is decided as the caller, chance and the end of the request say, and never in crowds at the end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.telemetry.passage import Passage
from serve.telemetry.traceparent import read_parent
from serve.telemetry.tracing import Record, RequestRecord, Sampling, Tracer

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SCOPE: dict[str, Any] = {"method": "POST", "path": "/infer"}


def tracer(sampling: Sampling, **options: Any) -> tuple[Tracer, list[Record]]:
    taken: list[Record] = []
    return Tracer(sampling, taken.append, **options), taken


def ask(
    one: Tracer,
    header: str | None = None,
    *,
    seconds: float = 0.1,
    status: int = 200,
    outcome: str = "ok",
    at: float = 7.0,
) -> Passage:
    headers = {} if header is None else {b"traceparent": header.encode()}
    passage = Passage()
    passage.trace = one.begin(headers)
    passage.began, passage.ended, passage.status, passage.outcome = at - seconds, at, status, outcome
    one.end(passage, SCOPE, headers, "/infer")
    return passage


def test_chance_decides_where_the_caller_says_nothing():
    always, taken = tracer(Sampling(ratio=1))
    never, none = tracer(Sampling(ratio=0))
    for _ in range(20):
        ask(always)
        ask(never)
    assert len(taken) == 20
    assert none == []
    ids = {(record.passage.trace.trace_id, record.passage.trace.span_id) for record in taken}  # type: ignore[union-attr]
    assert len(ids) == 20


def test_about_the_ratio_is_recorded():
    one, taken = tracer(Sampling(ratio=0.3))
    for _ in range(2000):
        ask(one)
    assert 400 < len(taken) < 800


@pytest.mark.parametrize("ratio", [0, 1])
def test_the_caller_decides_where_it_says(ratio: float):
    one, taken = tracer(Sampling(ratio=ratio))
    assert ask(one, f"00-{TRACE}-{SPAN}-00").trace is None
    trace = ask(one, f"00-{TRACE}-{SPAN}-01").trace
    assert trace is not None
    assert (trace.trace_id.hex(), trace.parent_id.hex()) == (TRACE, SPAN)
    assert trace.span_id.hex() != SPAN
    assert len(taken) == 1


def test_a_malformed_header_begins_a_trace():
    one, taken = tracer(Sampling(ratio=1))
    trace = ask(one, "00-nonsense").trace
    assert trace is not None
    assert trace.parent_id == b""
    assert len(taken) == 1


def test_what_was_slow_or_failed_is_kept_at_its_end():
    one, taken = tracer(Sampling(ratio=0, slow_s=0.5))
    assert ask(one, seconds=0.4).trace is None
    assert ask(one, seconds=0.6).trace is not None
    assert ask(one, status=429).trace is None
    kept = ask(one, f"00-{TRACE}-{SPAN}-00", status=500).trace
    assert kept is not None
    assert (kept.trace_id.hex(), kept.parent_id.hex()) == (TRACE, SPAN)
    assert ask(one, outcome="internal_error").trace is not None  # a stream that failed under way
    assert ask(one, outcome="client_closed_request").trace is None
    assert len(taken) == 3
    other, none = tracer(Sampling(ratio=0, errors=False))
    ask(other, status=503)
    assert none == []


def test_a_crowd_of_failures_is_kept_in_part():
    one, taken = tracer(Sampling(ratio=0))
    for number in range(100):
        ask(one, status=503, at=7.0 + number / 200)
    assert len(taken) == 10
    ask(one, status=503, at=8.0)
    assert len(taken) == 11


def test_what_is_passed_on_has_identifiers_whether_it_is_recorded_or_not():
    one, taken = tracer(Sampling(ratio=0), passes_on=True)
    passage = Passage()
    passage.trace = trace = one.begin({})
    assert trace is not None
    attempt = trace.attempt()
    told = read_parent(trace.header_of(attempt))
    assert told == (trace.trace_id, attempt.span_id, False)
    one.end(passage, SCOPE, {}, "/infer")
    assert taken == []
    assert passage.trace is None


@pytest.mark.parametrize("flag", [0, 1])
def test_where_nothing_is_sent_from_here_the_callers_word_is_passed_on(flag: int):
    one, taken = tracer(Sampling(ratio=0, follow=False, errors=False), passes_on=True)
    headers = {b"traceparent": f"00-{TRACE}-{SPAN}-0{flag}".encode()}
    passage = Passage()
    passage.trace = trace = one.begin(headers)
    assert trace is not None
    told = read_parent(trace.header_of(trace.attempt()))
    assert told is not None
    assert told.is_sampled == bool(flag)
    one.end(passage, SCOPE, headers, "/infer")
    assert taken == []


def test_baggage_is_told_as_far_as_it_is_allowed():
    taken: list[Any] = []
    one = Tracer(Sampling(ratio=1, baggage=frozenset({"tenant"})), taken.append)
    passage = Passage()
    headers = {b"baggage": b"user=ann, tenant=a%20b;ttl=3,broken"}
    passage.trace = one.begin(headers)
    one.end(passage, SCOPE, headers, "/infer")
    assert taken[0].baggage == {"tenant": "a b"}


def test_a_batch_links_the_recorded_among_its_items():
    one, taken = tracer(Sampling(ratio=1), model="m")
    first, second, unrecorded = Passage(), Passage(), Passage()
    first.trace, second.trace = one.begin({}), one.begin({})
    assert one.batch([unrecorded, None]) is None
    batch = one.batch([first, second, first, unrecorded])
    assert batch is not None
    assert first.trace is not None
    assert second.trace is not None
    assert batch.members == [first.trace.ids, second.trace.ids]
    assert batch.size == 4
    assert first.trace.batches == second.trace.batches == [batch]
    one.end_batch(batch)
    assert taken == [batch]


@given(header=st.binary(max_size=120), ratio=st.sampled_from([0.0, 1.0]))
def test_no_header_breaks_it(header: bytes, ratio: float):
    taken: list[Record] = []
    one = Tracer(Sampling(ratio=ratio, baggage=frozenset({"a"})), taken.append)
    headers = {b"traceparent": header, b"tracestate": header, b"baggage": header}
    passage = Passage()
    passage.trace = one.begin(headers)
    one.end(passage, SCOPE, headers, "/infer")
    assert all(isinstance(record, RequestRecord) for record in taken)
