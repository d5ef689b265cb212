"""What each part of the platform records, as verbs of its own, on the page of its process."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from serve.spec import Objectives
from serve.telemetry import instruments as named
from serve.telemetry.page import Gauge, Page
from serve.telemetry.traceparent import TraceIds

logger = logging.getLogger(__name__)


class WorkMetrics:
    """What a queue and its model do; `batch` from one thread, all else from one thread.

    Args:
        kind: `item` or `stream`.
    """

    def __init__(self, page: Page, kind: str) -> None:
        self._queued = page.gauges(named.QUEUE_DEPTH)[(kind,)]
        self._queued_bytes = page.gauges(named.QUEUE_SIZE)[(kind,)]
        self._running = page.gauges(named.RUNNING)[(kind,)]
        self._size = page.histograms(named.BATCH_SIZE)[(kind,)]
        self._seconds = page.histograms(named.BATCH_DURATION)[(kind,)]
        self._asked = page.counters(named.COST_ASKED)[()]
        self._computed = page.counters(named.COST_COMPUTED)[()]
        self._rejected = page.counters(named.REJECTED)
        self._dropped = page.counters(named.DROPPED)
        phases = page.histograms(named.PHASE_DURATION)
        self._prepare, self._queue, self._compute = (phases[(name,)] for name in ("prepare", "queue", "compute"))
        self._first = page.histograms(named.TIME_TO_FIRST_TOKEN)[()]
        self._gap = page.histograms(named.INTER_TOKEN_LATENCY)[()]
        self._tokens = page.counters(named.TOKENS)

    @classmethod
    def private(cls, kind: str) -> WorkMetrics:
        """Return metrics that nobody reads."""
        return cls(Page.private("replica"), kind)

    def holds(self, queued: int, queued_bytes: int, running: int) -> None:
        """Say what waits and what runs; from any thread."""
        self._queued.set(queued)
        self._queued_bytes.set(queued_bytes)
        self._running.set(running)

    def batch(self, size: int, seconds: float) -> None:
        """Count a batch or a step that has run."""
        self._size.observe(size)
        self._seconds.observe(seconds)

    def cost(self, asked: float, computed: float) -> None:
        """Count what a batch cost, and what its items alone would have."""
        self._asked.add(asked)
        self._computed.add(computed)

    def answered(self, *, prepare_s: float, queue_s: float, compute_s: float) -> None:
        """Count where an answered request's time went."""
        self._prepare.observe(prepare_s)
        self._queue.observe(queue_s)
        self._compute.observe(compute_s)

    def rejected(self, reason: str, count: int) -> None:
        """Count what was not let in."""
        self._rejected[(reason,)].add(count)

    def dropped(self, reason: str, *, queued: int = 0, running: int = 0) -> None:
        """Count what was given up."""
        self._dropped[reason, "queued"].add(queued)
        self._dropped[reason, "running"].add(running)

    def first_part(self, seconds: float, tokens: int) -> None:
        """Count a stream's first part, `seconds` after it was queued."""
        self._first.observe(seconds)
        self._tokens[("output",)].add(tokens)

    def next_part(self, seconds: float, tokens: int) -> None:
        """Count a further part, `seconds` after the one before."""
        if tokens:
            self._gap.observe(seconds / tokens, tokens)
            self._tokens[("output",)].add(tokens)

    def prompt(self, tokens: int) -> None:
        """Count the tokens of a prompt."""
        self._tokens[("input",)].add(tokens)


class ObjectiveMetrics:
    """Which requests keep what a model promises; nothing is promised before `promise`.

    Args:
        target: The gauges of what is promised, by objective; a gateway has none.
    """

    def __init__(self, page: Page, *, target: Mapping[tuple[str, ...], Gauge] | None = None) -> None:
        counts = page.counters(named.OBJECTIVE_REQUESTS)
        self._answered, self._failed = counts["availability", "met"], counts["availability", "missed"]
        self._in_time, self._late = counts["latency", "met"], counts["latency", "missed"]
        self._target = target or {}
        self._latency_s: float | None = None

    def promise(self, objectives: Objectives) -> None:
        """Take over what is declared; from any thread."""
        latency_ms = objectives.latency_ms
        self._latency_s = None if latency_ms is None else latency_ms / 1000
        told = {
            "availability": objectives.availability,
            "latency": 0.0 if latency_ms is None else objectives.latency_ratio,
        }
        for (objective,), gauge in self._target.items():
            gauge.set(told[objective])

    def answered(self, seconds: float) -> None:
        """Count a request that was answered, after so long."""
        self._answered.add()
        latency_s = self._latency_s
        if latency_s is not None:
            (self._in_time if seconds <= latency_s else self._late).add()

    def failed(self, outcome: str) -> None:
        """Count a request that was not, unless that was its caller's own doing."""
        if outcome in named.FAULTS:
            self._failed.add()


class RequestMetrics:
    """What an application counts of each request, by protocol, outcome and status."""

    def __init__(self, page: Page, requests: named.Instrument, duration: named.Instrument) -> None:
        self._requests = page.counters(requests)
        self._duration = page.histograms(duration)

    def ended(self, protocol: str, outcome: str, seconds: float, trace: TraceIds | None) -> None:
        """Count a request that has ended; a trace becomes the exemplar."""
        self._requests[protocol, outcome].add()
        duration = self._duration[protocol, "ok" if outcome == "ok" else "error"]
        if trace is None:
            duration.observe(seconds)
        else:
            duration.observe_traced(seconds, trace)


class LoadMetrics:
    """How a model loads and which phase it is in."""

    def __init__(self, page: Page) -> None:
        self._phase = page.gauges(named.MODEL_PHASE)
        self._seconds = page.histograms(named.LOAD_PHASE_DURATION)
        self._starts = page.counters(named.COLD_STARTS)[()]
        self._start_s = page.histograms(named.COLD_START_DURATION)[()]
        self._failures = page.counters(named.LOAD_FAILURES)

    def entered(self, phase: str) -> None:
        """Say which phase the model is in."""
        for name, gauge in self._phase.items():
            gauge.set(name == (phase,))

    def spent(self, phase: str, seconds: float) -> None:
        """Count how long a phase of the load took."""
        if (phase,) in self._seconds:
            self._seconds[(phase,)].observe(seconds)

    def loaded(self, seconds: float) -> None:
        """Count a load that succeeded."""
        self._starts.add()
        self._start_s.observe(seconds)

    def failed(self, reason: str) -> None:
        """Count a load that failed: at the `source`, or in the `model`."""
        self._failures[(reason,)].add()


class ReplicaMetrics:
    """What a replica records of its model.

    Args:
        items, streams: Of its Batcher and its Stepper.
        requests, objectives, load: Of its application and its Host.
    """

    def __init__(self, page: Page) -> None:
        self._page = page
        self.items = WorkMetrics(page, "item")
        self.streams = WorkMetrics(page, "stream")
        self.requests = RequestMetrics(page, named.REQUESTS, named.REQUEST_DURATION)
        self.objectives = ObjectiveMetrics(page, target=page.gauges(named.OBJECTIVE_TARGET))
        self.load = LoadMetrics(page)
        phases = page.histograms(named.PHASE_DURATION)
        self._read, self._respond = phases[("read",)], phases[("respond",)]

    @classmethod
    def of(cls, model: str, *, folder: Path | None) -> ReplicaMetrics:
        """Return the metrics of a replica in this process; without a folder, or where it fails, nobody reads them."""
        return cls(_page(folder, "replica", model))

    def passed(self, *, read_s: float, respond_s: float) -> None:
        """Count the time of an answered request outside of the model's queue."""
        self._read.observe(read_s)
        self._respond.observe(respond_s)

    def release(self) -> None:
        """Leave the page to the next replica of the model."""
        self._page.release()


class SpanMetrics:
    """What became of a process's spans; from one thread."""

    def __init__(self, page: Page) -> None:
        results = page.counters(named.SPANS)
        self._exported, self._dropped = results[("exported",)], results[("dropped",)]

    @classmethod
    def of(cls, model: str, *, folder: Path | None) -> SpanMetrics:
        """Return those of this process; `model` and `folder` as in `ReplicaMetrics.of`, "" is a gateway."""
        return cls(_page(folder, "exporter", model))

    def exported(self, count: int) -> None:
        """Count spans that the collector took."""
        self._exported.add(count)

    def dropped(self, count: int) -> None:
        """Count spans that it did not take, or that were too many to hold."""
        self._dropped.add(count)


class ForwardMetrics:
    """What a gateway records of one model.

    Args:
        requests: All that came through it.
        objectives: Those alone that it answered itself: what it passes on, a replica counts.
    """

    def __init__(self, page: Page) -> None:
        self.requests = RequestMetrics(page, named.GATEWAY_REQUESTS, named.GATEWAY_REQUEST_DURATION)
        self.objectives = ObjectiveMetrics(page)


class GatewayMetrics:
    """What a gateway records of each declared model, and of requests that name none.

    Args:
        folder: As in `ReplicaMetrics.of`.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._pages: dict[str, ForwardMetrics] = {}

    def of(self, model: str) -> ForwardMetrics:
        """Return the metrics of a model that is declared; "" is none."""
        found = self._pages.get(model)
        if found is None:
            found = self._pages[model] = ForwardMetrics(_page(self._folder, "gateway", model))
        return found


def _page(folder: Path | None, role: str, model: str) -> Page:
    if folder is not None:
        try:
            return Page.claim(folder, role=role, model=model)
        except OSError as error:
            logger.warning("The metrics of this process are not published: %s", error)
    return Page.private(role)
