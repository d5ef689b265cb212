"""What a record looks like as spans: names and attributes of OpenTelemetry's semantic conventions, decided purely."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from serve.telemetry.passage import Passage
from serve.telemetry.traceparent import TraceIds
from serve.telemetry.tracing import Attempt, BatchTrace, Record, RequestRecord, RequestTrace

_LONGEST_STRING = 256
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(slots=True)
class Span:
    """A span as it is exported; times are of `time.monotonic`, seconds.

    Args:
        parent_id: Empty where it is the root of its trace.
        events: Name, time and attributes.
        error: What its status says; None where it is unset.
    """

    name: str
    kind: Literal["internal", "server", "client"]
    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    began: float
    ended: float
    attributes: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    events: list[tuple[str, float, Mapping[str, Any]]] = field(default_factory=list)
    links: list[TraceIds] = field(default_factory=list)
    error: str | None = None
    state: bytes = b""


def spans_of(record: Record) -> Iterator[Span]:
    """Yield the spans of a record: a request's own before its phases and what it was passed on as."""
    if isinstance(record, BatchTrace):
        yield _batch(record)
        return
    passage = record.passage
    trace = passage.trace
    if trace is None:
        return
    yield _request(record, trace)
    yield from _phases(record, trace)
    for attempt in trace.attempts:
        yield _attempt(record, trace, attempt)


def count_of(record: Record) -> int:
    """Return how many spans a record has."""
    if isinstance(record, BatchTrace):
        return 1
    passage = record.passage
    attempts = len(passage.trace.attempts) if passage.trace is not None else 0
    return 1 + attempts + len(_moments(passage)) + (passage.prepare_began > 0)


def _batch(batch: BatchTrace) -> Span:
    attributes: dict[str, Any] = {"roundhouse.model": batch.model, "roundhouse.batch.size": batch.size}
    if batch.cost is not None:
        attributes["roundhouse.batch.cost"] = batch.cost
    if batch.error:
        attributes["error.type"] = batch.error
    return Span(
        f"batch {batch.model}",
        "internal",
        *batch.ids,
        b"",
        batch.began,
        batch.ended,
        attributes,
        links=batch.members,
        error=batch.error or None,
    )


def _request(record: RequestRecord, trace: RequestTrace) -> Span:
    passage, scope = record.passage, record.scope
    attributes: dict[str, Any] = {
        "http.request.method": scope["method"],
        "http.route": record.route,
        "url.path": scope["path"][:_LONGEST_STRING],
        "url.scheme": scope.get("scheme", "http"),
        "network.protocol.version": scope.get("http_version", "1.1"),
    }
    if passage.status:
        attributes["http.response.status_code"] = passage.status
    if passage.outcome != "ok":
        attributes["error.type"] = passage.outcome
    if passage.model:
        attributes["roundhouse.model"] = passage.model
    server = scope.get("server")
    if server:
        attributes["server.address"], attributes["server.port"] = server
    _take(attributes, "user_agent.original", record.headers.get(b"user-agent"))
    _take(attributes, "roundhouse.request_id", record.headers.get(b"x-request-id"))
    for key, value in record.baggage.items():
        attributes[f"baggage.{key}"] = value
    is_early = not passage.arrived and passage.outcome not in ("ok", "client_closed_request") and not trace.attempts
    return Span(
        f"{scope['method']} {record.route}",
        "server",
        trace.trace_id,
        trace.span_id,
        trace.parent_id,
        passage.began,
        passage.ended,
        attributes,
        [("exception", passage.ended, _exception(record))] if is_early else [],
        error=passage.outcome if passage.is_fault else None,
        state=trace.state,
    )


def _take(attributes: dict[str, Any], name: str, value: bytes | None) -> None:
    if value:
        attributes[name] = value.decode("latin-1")[:_LONGEST_STRING]


def _moments(passage: Passage) -> list[tuple[str, float, float]]:
    """Return the phases that follow each other from the request's beginning to its end; none where it did not queue."""
    if not passage.arrived:
        return []
    phases = [("read", passage.began, passage.arrived)]
    answered = passage.answered or passage.ended
    phases.append(("queue", passage.arrived, passage.launched or answered))
    if passage.launched:
        phases.append(("compute", passage.launched, answered))
    phases.append(("respond", answered, passage.ended))
    return phases


def _phases(record: RequestRecord, trace: RequestTrace) -> Iterator[Span]:
    passage = record.passage
    moments = _moments(passage)
    failed = _failed_phase(passage)
    for name, began, ended in moments:
        span = Span(name, "internal", trace.trace_id, random.randbytes(8), trace.span_id, began, ended)
        if name == "compute":
            _tell_details(span, passage)
            span.links = [batch.ids for batch in trace.batches]
            if passage.first_part:
                span.events.append(("first_token", passage.first_part, _NOTHING))
        if name == failed:
            span.error = passage.outcome
            span.events.append(("exception", ended, _exception(record)))
        yield span
        if name == "queue" and passage.prepare_began:
            yield Span(
                "prepare",
                "internal",
                trace.trace_id,
                random.randbytes(8),
                span.span_id,
                passage.prepare_began,
                passage.prepared,
            )


def _tell_details(span: Span, passage: Passage) -> None:
    """Have the span of the model's work tell of it; that of a language model has the name that its conventions want."""
    if not passage.details:
        return
    span.attributes = passage.details
    operation = passage.details.get("gen_ai.operation.name")
    if operation is not None:
        span.name = f"{operation} {passage.details['gen_ai.request.model']}"
        span.attributes = passage.details | {"roundhouse.phase": "compute"}


def _exception(record: RequestRecord) -> Mapping[str, Any]:
    passage = record.passage
    told = {"exception.type": passage.outcome}
    return told | {"exception.message": passage.message} if record.has_content else told


def _failed_phase(passage: Passage) -> str:
    """Return in which phase a request failed, "" where none or before the first."""
    if passage.outcome in ("ok", "client_closed_request") or not passage.arrived:
        return ""
    return "compute" if passage.launched else "queue"


def _attempt(record: RequestRecord, trace: RequestTrace, attempt: Attempt) -> Span:
    attributes: dict[str, Any] = {"http.request.method": record.scope["method"]}
    if attempt.status:
        attributes["http.response.status_code"] = attempt.status
    if attempt.status >= 400:
        attributes["error.type"] = str(attempt.status)
    return Span(
        record.scope["method"],
        "client",
        trace.trace_id,
        attempt.span_id,
        trace.span_id,
        attempt.began,
        attempt.ended or record.passage.ended,
        attributes,
        error=str(attempt.status) if attempt.status >= 400 else None,
    )
