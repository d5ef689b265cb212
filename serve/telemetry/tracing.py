"""Which requests are recorded, and under which identifiers; what it costs the others is a look at one header.

A request is sampled at its head: as its caller says, or by chance where no caller says anything. It may be kept at its
end besides, for being slow or for failing by our fault. One that its caller gave a name, an `x-request-id`, is recorded
for whoever asks this node about it. Nothing is sent from here: records go to a sink that never waits.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.telemetry.passage import Passage
from serve.telemetry.traceparent import Parent, TraceIds, read_baggage, read_parent, write_parent

# What fails or is slow comes in crowds when the platform is in trouble, and then tracing must not add to it.
_KEPT_A_SECOND = 10
# Some proxies name every request, and what a node remembers is looked at by people.
_NAMED_A_SECOND = 20
_NO_PARENT = b""


@dataclass(frozen=True, slots=True)
class Sampling:
    """What is recorded.

    Args:
        ratio: Share of the requests without a caller's decision that are.
        follow: Whether the caller's decision is followed; without it no request is sampled at its head.
        slow_s: A request that took longer is kept at its end; None keeps none for that.
        errors: Whether one that failed by our fault is: with status 500 and above, or after its answer began.
        baggage: Keys of the caller's baggage that spans may hold.
        content: Whether spans may hold what clients sent and what errors say of it.
    """

    ratio: float = 0.01
    follow: bool = True
    slow_s: float | None = None
    errors: bool = True
    baggage: frozenset[str] = frozenset()
    content: bool = False


class RequestTrace:
    """A request's own span in its trace.

    Attributes:
        trace_id, span_id: 16 and 8 bytes.
        parent_id: The caller's span; empty where there is none.
        state: The caller's `tracestate`.
        is_sampled: Whether it goes to the collector; one that does not may still be kept at its end.
        is_named: Whether this node remembers it.
        tells_sampled: What it says where it is passed on: its caller's word, where nothing is sent from here.
        batches: The batches that its items ran in.
        attempts: What a gateway sent for it.
    """

    __slots__ = (
        "attempts",
        "batches",
        "is_named",
        "is_sampled",
        "parent_id",
        "span_id",
        "state",
        "tells_sampled",
        "trace_id",
    )

    def __init__(
        self, trace_id: bytes, parent_id: bytes, state: bytes, *, is_sampled: bool, is_named: bool = False
    ) -> None:
        self.trace_id = trace_id
        self.span_id = random.randbytes(8)
        self.parent_id = parent_id
        self.state = state
        self.is_sampled = is_sampled
        self.is_named = is_named
        self.tells_sampled = is_sampled
        self.batches: list[BatchTrace] = []
        self.attempts: list[Attempt] = []

    @classmethod
    def below(
        cls, parent: Parent | None, headers: Mapping[bytes, bytes], *, is_sampled: bool, is_named: bool = False
    ) -> RequestTrace:
        """Return the trace of a request below its caller's span, or where there is none, one that begins here."""
        if parent is None:
            return cls(random.randbytes(16), _NO_PARENT, b"", is_sampled=is_sampled, is_named=is_named)
        state = headers.get(b"tracestate", b"")
        trace = cls(parent.trace_id, parent.span_id, state, is_sampled=is_sampled, is_named=is_named)
        trace.tells_sampled = parent.is_sampled
        return trace

    @property
    def ids(self) -> TraceIds:
        """The trace and its span in it."""
        return TraceIds(self.trace_id, self.span_id)

    def attempt(self) -> Attempt:
        """Note that the request is passed on now."""
        attempt = Attempt(random.randbytes(8))
        self.attempts.append(attempt)
        return attempt

    def header_of(self, attempt: Attempt) -> bytes:
        """Return the `traceparent` of a request that is passed on."""
        return write_parent(self.trace_id, attempt.span_id, is_sampled=self.tells_sampled)


class Attempt:
    """A request on its way from a gateway to a replica and back."""

    __slots__ = ("began", "ended", "span_id", "status")

    def __init__(self, span_id: bytes) -> None:
        self.span_id = span_id
        self.began = time.monotonic()
        self.ended = 0.0
        self.status = 0

    def end(self) -> None:
        """Note that the answer's end is there."""
        self.ended = time.monotonic()


class BatchTrace:
    """One call of the model for the items of several requests: a trace of its own, linked with those of its members.

    Attributes:
        ids: Its own.
        members: The requests of it that go to the collector.
        began, ended: Of `time.monotonic`.
        size: Items in it, those of requests that are not recorded included.
        cost: What it cost as it was computed, or None where no cost is known.
        error: The type of what the model raised, or "".
    """

    __slots__ = ("began", "cost", "ended", "error", "ids", "members", "model", "size")

    def __init__(self, model: str, members: Sequence[RequestTrace], size: int) -> None:
        self.ids = TraceIds(random.randbytes(16), random.randbytes(8))
        self.model = model
        self.members = [member.ids for member in members if member.is_sampled]
        self.size = size
        self.cost: float | None = None
        self.error = ""
        self.began = self.ended = 0.0
        for member in members:
            member.batches.append(self)

    def ran(self, began: float, ended: float, *, cost: float | None, error: Exception | None) -> None:
        """Note how it went."""
        self.began, self.ended, self.cost = began, ended, cost
        self.error = "" if error is None else type(error).__name__


@dataclass(slots=True)
class RequestRecord:
    """A request that has ended, with what its span is made from.

    Args:
        scope: ASGI's.
        headers: Of the request, names in lower case.
        route: The path with placeholders.
        baggage: What of the caller's may be told.
        has_content: Whether what the error said may be.
    """

    passage: Passage
    scope: Mapping[str, Any]
    headers: Mapping[bytes, bytes]
    route: str
    baggage: Mapping[str, str]
    has_content: bool

    @property
    def is_sampled(self) -> bool:
        """Whether it goes to the collector."""
        return self.passage.trace is not None and self.passage.trace.is_sampled


Record = RequestRecord | BatchTrace


class Tracer:
    """Decides which requests are recorded, and hands records on; to be used from one event loop.

    Args:
        sink: Takes a record without waiting.
        model: Whose batches these are; empty in a gateway.
        passes_on: Whether requests are passed on, so that one needs identifiers whether it is recorded or not.
    """

    def __init__(
        self, sampling: Sampling, sink: Callable[[Record], None], *, model: str = "", passes_on: bool = False
    ) -> None:
        self.sampling = sampling
        #: What the model computes now, where the collector gets it; read on the model's thread.
        self.running: BatchTrace | None = None
        self._sink = sink
        self._model = model
        self._passes_on = passes_on
        self._ratio = sampling.ratio
        self._slow_s = float("inf") if sampling.slow_s is None else sampling.slow_s
        self._keeps_faults = sampling.errors
        self._kept = _Allowance(_KEPT_A_SECOND)
        self._named = _Allowance(_NAMED_A_SECOND)
        self._follow = sampling.follow

    def begin(self, headers: Mapping[bytes, bytes]) -> RequestTrace | None:
        """Return the trace of a request that is recorded, or passed on, from here; None of any other."""
        header = headers.get(b"traceparent")
        parent = None if header is None else read_parent(header)
        is_sampled = random.random() < self._ratio if parent is None else parent.is_sampled and self._follow
        is_named = b"x-request-id" in headers and self._named.take(time.monotonic())
        if not (is_sampled or is_named or self._passes_on):
            return None
        return RequestTrace.below(parent, headers, is_sampled=is_sampled, is_named=is_named)

    def end(self, passage: Passage, scope: Mapping[str, Any], headers: Mapping[bytes, bytes], route: str) -> None:
        """Take a request that has ended; `passage.trace` is then that of a recorded one, or None."""
        trace = passage.trace
        if trace is None or not trace.is_sampled:
            is_slow = passage.ended - passage.began > self._slow_s
            is_kept = (is_slow or (self._keeps_faults and passage.is_fault)) and self._kept.take(passage.ended)
            if not is_kept and (trace is None or not trace.is_named):
                passage.trace = None
                return
            if trace is None:
                parent = read_parent(headers.get(b"traceparent"))
                passage.trace = trace = RequestTrace.below(parent, headers, is_sampled=True)
            trace.is_sampled = is_kept
        baggage = read_baggage(headers.get(b"baggage"), self.sampling.baggage)
        self._sink(RequestRecord(passage, scope, headers, route, baggage, self.sampling.content))

    def batch(self, passages: Sequence[Passage | None]) -> BatchTrace | None:
        """Return the trace of a batch that begins now, or None where none of its requests is recorded.

        Args:
            passages: One an item; items of one request have the same.
        """
        traces = {passage.trace: None for passage in passages if passage is not None and passage.trace is not None}
        members = [trace for trace in traces if trace.is_sampled or trace.is_named]
        batch = BatchTrace(self._model, members, len(passages)) if members else None
        self.running = batch if batch is not None and batch.members else None
        return batch

    def end_batch(self, batch: BatchTrace) -> None:
        """Take a batch that has run."""
        if batch.members:
            self._sink(batch)


class _Allowance:
    """So many a second."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._second = 0
        self._taken = 0

    def take(self, now: float) -> bool:
        """Return whether another one may be had."""
        if int(now) != self._second:
            self._second, self._taken = int(now), 0
        self._taken += 1
        return self._taken <= self._most
