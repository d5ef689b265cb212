"""Items run together: a queue that keeps a model busy, and with nothing that nobody awaits any more."""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from serve.errors import Cancelled, DeadlineExceeded, NotReady, Overloaded, PredictionFailed
from serve.telemetry.metrics import WorkMetrics
from serve.telemetry.passage import Passage
from serve.telemetry.tracing import BatchTrace, Tracer

T = TypeVar("T")
R = TypeVar("R")
X = TypeVar("X")

# How many batches' worth of the oldest entries are candidates for one batch: more makes batches of nearer costs,
# less keeps the order of arrival.
_WINDOW_BATCHES = 4
# Entries handed to one call of `prepare`; a call may return after some of them.
_PREPARE_AT_ONCE = 64
_PACE_DECAY = 0.95
_COMPACT_ABOVE = 256


def compose(
    costs: Sequence[int],
    *,
    max_batch_size: int,
    max_batch_cost: int | None,
    padded: bool,
    overhead: float | None = None,
) -> list[int]:
    """Choose a batch among waiting items; pure.

    The oldest item is always chosen, so that each waits for at most as many batches as items were before it.

    Args:
        costs: Of the candidates, the oldest first; at least one.
        max_batch_cost: Bound of the batch's cost, which only a lone oldest item may exceed.
        padded: The batch costs its size times its longest item, and is made of items near the oldest in cost;
            otherwise it costs the sum, and items join in order of arrival where they fit.
        overhead: Cost that starting one more batch is worth; None, not yet measured, takes that of one item.

    Returns:
        Indexes into `costs`, ascending.
    """
    if padded:
        near = _near(costs, max_batch_size, max_batch_cost)
        return sorted(_cut(costs, near, overhead))
    chosen, total = [0], costs[0]
    for index in range(1, len(costs)):
        if len(chosen) == max_batch_size:
            break
        if max_batch_cost is None or total + costs[index] <= max_batch_cost:
            chosen.append(index)
            total += costs[index]
    return chosen


def _near(costs: Sequence[int], max_batch_size: int, max_batch_cost: int | None) -> list[int]:
    """Return the items nearest to the oldest in cost that fit with it, in ascending order of cost."""
    head = costs[0]
    shorter = sorted((i for i in range(1, len(costs)) if costs[i] < head), key=lambda i: -costs[i])
    longer = sorted((i for i in range(1, len(costs)) if costs[i] >= head), key=lambda i: costs[i])
    below = above = 0
    longest = head
    budget = float("inf") if max_batch_cost is None else max_batch_cost
    while (size := below + above + 2) <= max_batch_size and size * longest <= budget:
        up = costs[longer[above]] if above < len(longer) else None
        if up is not None and size * up > budget:
            up = None
        down = costs[shorter[below]] if below < len(shorter) else None
        if up is not None and (down is None or up - head <= head - down):
            longest = up
            above += 1
        elif down is not None:
            below += 1
        else:
            break
    return [*reversed(shorter[:below]), 0, *longer[:above]]


def _cut(costs: Sequence[int], ascending: list[int], overhead: float | None) -> list[int]:
    """Cut a batch, and keep the side of item 0, wherever two batches are cheaper than one by more than `overhead`."""
    while len(ascending) > 1:
        longest = costs[ascending[-1]]
        worth = longest if overhead is None else overhead
        saving, cut = max((k * (longest - costs[ascending[k - 1]]), k) for k in range(1, len(ascending)))
        if saving <= worth:
            break
        ascending = ascending[cut:] if 0 in ascending[cut:] else ascending[:cut]
    return ascending


class Pace:
    """How fast batches went lately, weighted towards the last twenty or so."""

    def __init__(self) -> None:
        self._items = self._seconds = 0.0
        self._batches = self._priced_seconds = self._cost = self._cost_squared = self._cost_seconds = 0.0

    def record(self, *, items: int, seconds: float, cost: int | None) -> None:
        """Count one batch; a cost of None, not known, counts for the rate alone."""
        self._items = self._items * _PACE_DECAY + items
        self._seconds = self._seconds * _PACE_DECAY + seconds
        if cost is None:
            return
        self._batches = self._batches * _PACE_DECAY + 1
        self._priced_seconds = self._priced_seconds * _PACE_DECAY + seconds
        self._cost = self._cost * _PACE_DECAY + cost
        self._cost_squared = self._cost_squared * _PACE_DECAY + cost * cost
        self._cost_seconds = self._cost_seconds * _PACE_DECAY + cost * seconds

    @property
    def items_per_s(self) -> float | None:
        """Items per second of a busy model; None before the first batch."""
        return self._items / self._seconds if self._seconds > 0 else None

    @property
    def overhead(self) -> float | None:
        """What a batch takes beside its cost, in units of cost (a least-squares line through cost and seconds).

        Infinite where seconds do not grow with cost; None while the costs seen are too few or too much alike.
        """
        spread = self._batches * self._cost_squared - self._cost**2
        if self._batches < 4 or spread < 0.01 * self._cost**2:
            return None
        slope = (self._batches * self._cost_seconds - self._cost * self._priced_seconds) / spread
        if slope <= 0:
            return float("inf")
        return max(0.0, (self._priced_seconds - slope * self._cost) / self._batches / slope)


@dataclass(frozen=True, slots=True)
class BatcherStats:
    """Counters and gauges of a batcher.

    Args:
        queued: Items that wait, those being prepared included.
        queued_bytes: Their bytes, as told to `submit`.
        running: Items in the batch that runs.
        batches: Batches run, reruns included.
        items: Items answered, failed ones included.
        dropped: Items that were cancelled or expired before they reached the model.
        items_per_s: Items per second of a busy model, lately; None before the first batch.
    """

    queued: int
    queued_bytes: int
    running: int
    batches: int
    items: int
    dropped: int
    items_per_s: float | None


class _Reply(asyncio.Future[Any]):
    """The future of one request; it is resolved once, and cancelling it frees its place in the queue at once."""

    def __init__(
        self,
        batcher: Batcher[Any, Any],
        rows: int,
        size_bytes: int,
        *,
        single: bool,
        arrived: float,
        passage: Passage | None,
    ) -> None:
        super().__init__(loop=asyncio.get_running_loop())
        self.batcher = batcher
        self.passage = passage
        self.entries: list[_Entry] = []
        self.results: list[Any] = [None] * rows
        self.missing = rows
        self.waiting = rows
        self.size_bytes = size_bytes
        self.single = single
        self.arrived = arrived
        self.launched = math.inf
        self.prepare_s = 0.0

    def cancel(self, msg: Any | None = None) -> bool:
        cancelled = super().cancel(msg)
        if cancelled:
            self.batcher._abandon(self, "cancelled")
        return cancelled

    def fail(self, error: Exception) -> None:
        """Resolve with an error unless resolved."""
        if not self.done():
            self.set_exception(error)
            self.batcher._abandon(self, "expired" if isinstance(error, DeadlineExceeded) else "shutdown")

    def answer(self, row: int, result: Any, now: float) -> None:
        """Take one row's result or exception; the last result and the first exception resolve."""
        if self.done():
            return
        self.results[row] = result
        self.missing -= 1
        failed = isinstance(result, Exception)
        if self.missing and not failed:
            return
        if not self.single:
            self.set_result(self.results)
        elif failed:
            self.set_exception(result)
        else:
            self.set_result(result)
        if failed:
            self.batcher._abandon(self, "sibling")
        else:
            self.batcher._answered(self, now)


class _Entry:
    """One item in the queue."""

    __slots__ = ("arrived", "cost", "item", "reply", "row", "waiting")

    def __init__(self, item: Any, cost: int, reply: _Reply, row: int, arrived: float) -> None:
        self.item = item
        self.cost = cost
        self.reply = reply
        self.row = row
        self.arrived = arrived
        self.waiting = True


class _Part:
    """Entries that run in one call; where a call failed, a half of them."""

    __slots__ = ("entries", "known_bad", "priced", "sibling", "trace")

    def __init__(self, entries: list[_Entry], *, priced: bool, sibling: _Part | None = None) -> None:
        self.entries = entries
        self.priced = priced
        self.sibling = sibling
        self.known_bad = False
        self.trace: BatchTrace | None = None

    def halves(self) -> tuple[_Part, _Part]:
        """Return both halves; if the first succeeds, the second is known to hold what made the whole fail."""
        middle = (len(self.entries) + 1) // 2
        second = _Part(self.entries[middle:], priced=self.priced)
        return _Part(self.entries[:middle], priced=self.priced, sibling=second), second


class Batcher(Generic[T, R]):
    """Runs submitted items in batches, one batch at a time; to be used from one event loop.

    A batch is sealed when the model is free, never earlier. An idle model starts as soon as the oldest item has waited
    `max_wait_s` or a batch is full; with 0, at the end of the event loop's turn. Items whose future is done (cancelled,
    or past its deadline) never reach `run`. Where `run` raises, its batch is run again in halves, so that the bad item
    fails alone; an item is computed at most ceil(log2 n) + 1 times.

    Args:
        run: Computes a batch: as many results as items, in order; an exception among them fails only its item.
            What it raises for a lone item is that item's error.
        prepare: Makes items ready for `run` while the model is busy, and returns the costs (or the exceptions) of the
            first of them, at least one; the rest is handed over again. `run` may get an item that was not prepared.
        max_batch_size: Items in one batch.
        max_wait_s: Seconds that an idle model may wait for company.
        max_batch_cost, padded: See `compose`.
        max_queue: Items that may wait.
        max_queue_bytes: Bytes that may wait.
        clock: Seconds; deadlines are on it.
        metrics: What it records; without them nobody sees it.
        tracer: What records batches of requests that are recorded; None records none.
    """

    def __init__(
        self,
        run: Callable[[Sequence[T]], Awaitable[Sequence[R | Exception]]],
        *,
        max_batch_size: int,
        max_wait_s: float = 0.0,
        max_batch_cost: int | None = None,
        padded: bool = False,
        max_queue: int = 1024,
        max_queue_bytes: int = 256 * 2**20,
        prepare: Callable[[Sequence[T]], Awaitable[Sequence[int | Exception]]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        metrics: WorkMetrics | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._run = run
        self._tracer = tracer
        self._prepare = prepare
        self._max_batch_size = max_batch_size
        self._max_wait_s = max_wait_s
        self._max_batch_cost = max_batch_cost
        self._padded = padded
        self._max_queue = max_queue
        self._max_queue_bytes = max_queue_bytes
        self._clock = clock
        self._metrics = metrics or WorkMetrics.private("item")

        self._costly = padded or max_batch_cost is not None
        self._window_size = max_batch_size * (_WINDOW_BATCHES if self._costly else 1)
        self._unprepared: deque[_Entry] = deque()
        self._ready: deque[_Entry] = deque()
        self._window: list[_Entry] = []  # the oldest of the ready, candidates for the next batch
        self._queued = 0
        self._queued_bytes = 0
        self._dead = 0

        self._in_preparation: list[_Entry] = []
        self._preparing: asyncio.Future[Sequence[int | Exception]] | None = None
        self._preparing_since = 0.0
        self._running: asyncio.Future[Sequence[R | Exception]] | None = None
        self._running_part: _Part | None = None
        self._parts: list[_Part] = []  # of the batch that runs, what is still to be run again
        self._turn_is_due = False
        self._patience: asyncio.TimerHandle | None = None
        self._deadlines: list[tuple[float, int, _Reply]] = []
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = float("inf")
        self._submitted = 0
        self._closing = False
        self._idle: asyncio.Future[None] | None = None

        self._pace = Pace()
        self._batches = 0
        self._items = 0
        self._dropped = 0

    @property
    def prepares(self) -> bool:
        """Whether items are made ready before they run."""
        return self._prepare is not None

    @property
    def _running_items(self) -> int:
        return len(self._running_part.entries) if self._running_part is not None else 0

    # Coming in

    def submit(
        self,
        item: T,
        *,
        cost: int = 1,
        size_bytes: int = 0,
        deadline: float | None = None,
        passage: Passage | None = None,
    ) -> asyncio.Future[R]:
        """Queue one item.

        Args:
            cost: In the unit of `max_batch_cost`; where there is `prepare`, its answer replaces it.
            size_bytes: What the item counts for in `max_queue_bytes`.
            deadline: On `clock`; the future fails with DeadlineExceeded then.
            passage: Where the request's moments are noted.

        Raises:
            Overloaded: The queue is full.
            NotReady: `drain` or `close` was called.
        """
        return self._admit((item,), (cost,), size_bytes, deadline, passage, single=True)

    def submit_many(
        self,
        items: Sequence[T],
        *,
        costs: Sequence[int] | None = None,
        size_bytes: int = 0,
        deadline: float | None = None,
        passage: Passage | None = None,
    ) -> asyncio.Future[list[R | Exception | None]]:
        """Queue the items of one request, all or none, behind one future of their results in order.

        An item that fails is an exception in the list, which then resolves at once; what nobody awaits any more is
        not computed, and None in the list. Otherwise as `submit`; `size_bytes` is of all items together.
        """
        return self._admit(items, costs or (1,) * len(items), size_bytes, deadline, passage, single=False)

    def _admit(
        self,
        items: Sequence[T],
        costs: Sequence[int],
        size_bytes: int,
        deadline: float | None,
        passage: Passage | None,
        *,
        single: bool,
    ) -> _Reply:
        self._check_room(len(items), size_bytes)
        now = self._clock()
        reply = _Reply(self, len(items), size_bytes, single=single, arrived=now, passage=passage)
        if not items:
            reply.set_result([])
            return reply
        if deadline is not None:
            if deadline <= now:
                reply.set_exception(DeadlineExceeded("the deadline had passed before the request was queued"))
                self._metrics.dropped("expired", queued=len(items))
                return reply
            self._watch(reply, deadline, now)
        queue = self._ready if self._prepare is None else self._unprepared
        for row, item in enumerate(items):
            entry = _Entry(item, costs[row], reply, row, now)
            reply.entries.append(entry)
            queue.append(entry)
        self._queued += len(items)
        self._queued_bytes += size_bytes
        self._soon()
        return reply

    def _check_room(self, items: int, size_bytes: int) -> None:
        if self._closing:
            self._metrics.rejected("not_ready", items)
            raise NotReady("the model is shutting down", phase="draining", retry_after_s=1.0)
        if self._queued + items > self._max_queue:
            self._metrics.rejected("queue_full", items)
            raise Overloaded(
                f"{self._queued} items wait and at most {self._max_queue} may", retry_after_s=self.retry_after_s()
            )
        if self._queued_bytes + size_bytes > self._max_queue_bytes:
            self._metrics.rejected("queue_bytes_full", items)
            raise Overloaded(
                f"{self._queued_bytes} bytes wait and at most {self._max_queue_bytes} may",
                retry_after_s=self.retry_after_s(),
            )

    def retry_after_s(self) -> float:
        """Return the seconds until what waits should have been run, between 0.1 and 60; 1 before the first batch."""
        rate = self._pace.items_per_s
        if rate is None:
            return 1.0
        return min(60.0, max(0.1, (self._queued + self._running_items) / rate))

    # Leaving early

    def _abandon(self, reply: _Reply, reason: str) -> None:
        """Free what a request that was resolved early still holds in the queue."""
        self._note(reply, self._clock())
        if reply.missing:
            self._metrics.dropped(reason, queued=reply.waiting, running=reply.missing - reply.waiting)
        if reply.waiting:
            self._queued -= reply.waiting
            self._queued_bytes -= reply.size_bytes
            self._dropped += reply.waiting
            reply.waiting = 0
            for entry in reply.entries:
                if entry.waiting:
                    self._dead += 1
                    entry.item = None
            if self._dead > _COMPACT_ABOVE and self._dead > self._queued:
                self._compact()
            self._soon()
        reply.entries = []

    def _compact(self) -> None:
        self._unprepared = deque(entry for entry in self._unprepared if not entry.reply.done())
        self._ready = deque(entry for entry in self._ready if not entry.reply.done())
        self._window = [entry for entry in self._window if not entry.reply.done()]
        self._dead = sum(entry.reply.done() for entry in self._in_preparation)

    def _watch(self, reply: _Reply, deadline: float, now: float) -> None:
        """Have one timer for all deadlines, set to the earliest."""
        self._submitted += 1
        heapq.heappush(self._deadlines, (deadline, self._submitted, reply))
        if len(self._deadlines) > 2 * (self._queued + self._running_items) + _COMPACT_ABOVE:
            self._deadlines = [entry for entry in self._deadlines if not entry[2].done()]
            heapq.heapify(self._deadlines)
        if deadline < self._alarm_at:
            self._set_alarm(deadline, now)

    def _set_alarm(self, at: float, now: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = at
        self._alarm = asyncio.get_running_loop().call_later(max(0.0, at - now), self._expire)

    def _expire(self) -> None:
        now = self._clock()
        self._alarm, self._alarm_at = None, float("inf")
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][2].done()):
            _, _, reply = heapq.heappop(self._deadlines)
            reply.fail(DeadlineExceeded("the deadline passed before the answer"))
        if self._deadlines:
            self._set_alarm(self._deadlines[0][0], now)

    # Going through

    def _soon(self) -> None:
        """Look for work at the end of this turn of the event loop, so that what arrives in one turn leaves together."""
        if not self._turn_is_due:
            self._turn_is_due = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._turn_is_due = False
        if self._running is None and not self._start_unprepared():
            self._start_batch()
        ahead = len(self._ready) < self._window_size + self._max_batch_size  # prepared items are large
        if self._prepare is not None and self._unprepared and self._preparing is None and ahead:
            self._start_preparing(self._prepare)
        self._settle()

    def _start_unprepared(self) -> bool:
        """Hand what just arrived to an idle model unprepared, saving a hop, where its cost does not matter."""
        if not self._unprepared or self._preparing or self._ready or self._window or self._max_wait_s:
            return False
        if self._queued > (1 if self._costly else self._max_batch_size):
            return False
        entries = [entry for entry in self._unprepared if not entry.reply.done()]
        self._dead -= len(self._unprepared) - len(entries)
        self._unprepared.clear()
        if entries:
            self._launch(entries, priced=False)
        return bool(entries)

    def _start_preparing(self, prepare: Callable[[Sequence[T]], Awaitable[Sequence[int | Exception]]]) -> None:
        entries: list[_Entry] = []
        while self._unprepared and len(entries) < _PREPARE_AT_ONCE:
            entry = self._unprepared.popleft()
            if entry.reply.done():
                self._dead -= 1
            else:
                entries.append(entry)
        if entries:
            self._in_preparation = entries
            self._preparing_since = self._clock()
            self._preparing = _begin(prepare, [entry.item for entry in entries])
            self._preparing.add_done_callback(self._prepared)

    def _prepared(self, done: asyncio.Future[Sequence[int | Exception]]) -> None:
        entries, self._in_preparation, self._preparing = self._in_preparation, [], None
        now = self._clock()
        outcome = _outcome(done)
        if isinstance(outcome, Exception) or not 0 < len(outcome) <= len(entries):
            error = outcome if isinstance(outcome, Exception) else _wrong_count(len(outcome), len(entries))
            outcome = [error] * len(entries)
        for entry, cost in zip(entries, outcome, strict=False):
            if entry.reply.done():
                self._dead -= 1
            elif isinstance(cost, Exception):
                self._take(entry)
                self._items += 1
                entry.reply.answer(entry.row, cost, now)
            else:
                if entry.row == 0:
                    entry.reply.prepare_s = now - self._preparing_since
                    if entry.reply.passage is not None:
                        entry.reply.passage.was_prepared(self._preparing_since, now)
                entry.cost = cost
                self._ready.append(entry)
        self._unprepared.extendleft(reversed(entries[len(outcome) :]))
        self._turn()

    def _start_batch(self) -> None:
        self._fill_window()
        if not self._window:
            return
        wait_s = self._window[0].arrived + self._max_wait_s - self._clock()
        if wait_s > 0 and not self._full() and not self._closing:
            if self._patience is None:
                self._patience = asyncio.get_running_loop().call_later(wait_s, self._patience_ends)
            return
        if self._costly:
            chosen = compose(
                [entry.cost for entry in self._window],
                max_batch_size=self._max_batch_size,
                max_batch_cost=self._max_batch_cost,
                padded=self._padded,
                overhead=self._pace.overhead,
            )
            entries = [self._window[index] for index in chosen]
            taken = set(chosen)
            self._window = [entry for index, entry in enumerate(self._window) if index not in taken]
        else:
            entries, self._window = self._window, []
        self._launch(entries, priced=True)

    def _patience_ends(self) -> None:
        self._patience = None
        self._turn()

    def _full(self) -> bool:
        if len(self._window) >= self._max_batch_size:
            return True
        return self._max_batch_cost is not None and sum(entry.cost for entry in self._window) >= self._max_batch_cost

    def _fill_window(self) -> None:
        live = [entry for entry in self._window if not entry.reply.done()]
        self._dead -= len(self._window) - len(live)
        while self._ready and len(live) < self._window_size:
            entry = self._ready.popleft()
            if entry.reply.done():
                self._dead -= 1
            else:
                live.append(entry)
        self._window = live

    def _take(self, entry: _Entry) -> None:
        """Count an entry out of the queue."""
        entry.waiting = False
        entry.reply.waiting -= 1
        self._queued -= 1
        if not entry.reply.waiting:
            self._queued_bytes -= entry.reply.size_bytes

    def _launch(self, entries: list[_Entry], *, priced: bool) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        now = self._clock()
        for entry in entries:
            self._take(entry)
            if now < entry.reply.launched:
                entry.reply.launched = now
        self._parts = [_Part(entries, priced=priced)]
        self._run_next_part()

    def _run_next_part(self) -> None:
        while self._parts:
            part = self._parts.pop()
            part.entries = [entry for entry in part.entries if not entry.reply.done()]
            if part.known_bad and len(part.entries) > 1:
                self._parts.extend(reversed(part.halves()))
            elif part.entries:
                self._call(part)
                return
        self._running = None
        self._running_part = None

    def _call(self, part: _Part) -> None:
        started = self._clock()
        self._batches += 1
        self._running_part = part
        if self._tracer is not None:
            part.trace = self._tracer.batch([entry.reply.passage for entry in part.entries])
        self._running = _begin(self._run, [entry.item for entry in part.entries])
        self._running.add_done_callback(lambda done: self._ran(part, started, done))

    def _ran(self, part: _Part, started: float, done: asyncio.Future[Sequence[R | Exception]]) -> None:
        entries = part.entries
        outcome = _outcome(done)
        now = self._clock()
        self._metrics.batch(len(entries), now - started)
        cost = self._count_cost(entries) if part.priced and self._costly else None
        if self._tracer is not None and part.trace is not None:
            part.trace.ran(started, now, cost=cost, error=outcome if isinstance(outcome, Exception) else None)
            self._tracer.end_batch(part.trace)
        if isinstance(outcome, Exception):
            if len(entries) > 1:
                self._parts.extend(reversed(part.halves()))
            else:
                self._answer(entries, [outcome], now)
        elif len(outcome) != len(entries):
            self._answer(entries, [_wrong_count(len(outcome), len(entries)) for _ in entries], now)
        else:
            self._pace.record(items=len(entries), cost=cost, seconds=now - started)
            if part.sibling is not None:
                part.sibling.known_bad = True
            self._answer(entries, outcome, now)
        self._run_next_part()
        if self._running is None:
            self._turn()

    def _count_cost(self, entries: list[_Entry]) -> int:
        """Return what a batch cost as it was computed, counted beside what its items alone would have."""
        costs = [entry.cost for entry in entries]
        asked = sum(costs)
        computed = len(costs) * max(costs) if self._padded else asked
        self._metrics.cost(asked, computed)
        return computed

    def _answer(self, entries: list[_Entry], outcome: Sequence[R | Exception], now: float) -> None:
        self._items += len(entries)
        for entry, result in zip(entries, outcome, strict=True):
            entry.reply.answer(entry.row, result, now)

    def _answered(self, reply: _Reply, now: float) -> None:
        """Let go of a request whose last result is there."""
        reply.entries = []
        self._note(reply, now)
        self._metrics.answered(
            prepare_s=reply.prepare_s,
            queue_s=reply.launched - reply.arrived - reply.prepare_s,
            compute_s=now - reply.launched,
        )

    def _note(self, reply: _Reply, now: float) -> None:
        if reply.passage is not None:
            launched = 0.0 if reply.launched == math.inf else reply.launched
            reply.passage.went(arrived=reply.arrived, launched=launched, answered=now)

    # Ending

    def _settle(self) -> None:
        self._metrics.holds(self._queued, self._queued_bytes, self._running_items)
        if self._idle is not None and not self._idle.done() and self._running is None and not self._queued:
            self._idle.set_result(None)

    async def drain(self) -> None:
        """Refuse new items and return when all queued ones are resolved."""
        self._closing = True
        if self._running is None and not self._queued:
            return
        if self._idle is None:
            self._idle = asyncio.get_running_loop().create_future()
        self._soon()
        await asyncio.shield(self._idle)

    async def close(self) -> None:
        """Refuse new items and fail all that are not resolved with NotReady."""
        self._closing = True
        waiting = [*self._window, *self._ready, *self._in_preparation, *self._unprepared]
        parts = [*self._parts, *([self._running_part] if self._running_part else [])]
        running = [entry for part in parts for entry in part.entries]
        for entry in (*waiting, *running):
            entry.reply.fail(NotReady("the model shut down before the answer", phase="draining", retry_after_s=1.0))
        for call in (self._running, self._preparing):
            if call is not None:
                call.cancel()
        for timer in (self._alarm, self._patience):
            if timer is not None:
                timer.cancel()

    def stats(self) -> BatcherStats:
        """Return the counters and gauges as they are now."""
        return BatcherStats(
            queued=self._queued,
            queued_bytes=self._queued_bytes,
            running=self._running_items,
            batches=self._batches,
            items=self._items,
            dropped=self._dropped,
            items_per_s=self._pace.items_per_s,
        )


def _begin(
    function: Callable[[Sequence[T]], Awaitable[Sequence[X]]], items: Sequence[T]
) -> asyncio.Future[Sequence[X]]:
    """Call a function that may raise before there is anything to await."""
    try:
        return asyncio.ensure_future(function(items))
    except Exception as error:
        failed: asyncio.Future[Sequence[X]] = asyncio.get_running_loop().create_future()
        failed.set_exception(error)
        return failed


def _outcome(done: asyncio.Future[Sequence[Any]]) -> Sequence[Any] | Exception:
    if done.cancelled():
        return Cancelled("the batch was cancelled")
    error = done.exception()
    if error is None:
        results = done.result()
        return (
            results if isinstance(results, Sequence) else PredictionFailed(f"got {type(results).__name__}, not a list")
        )
    return error if isinstance(error, Exception) else Cancelled(f"{type(error).__name__}: {error}")


def _wrong_count(results: int, items: int) -> PredictionFailed:
    return PredictionFailed(f"the model gave {results} results for {items} items")
