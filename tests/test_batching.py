"""What the batcher promises, on fake time and for traffic of any kind."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.batching import Batcher, Pace, compose
from serve.errors import DeadlineExceeded, NotReady, Overloaded, PredictionFailed
from serve.telemetry import instruments as named
from serve.telemetry.metrics import WorkMetrics
from serve.telemetry.page import Page
from tests.fake_time import run

EPSILON = 1e-9


# A simulated day of traffic: everything that happens is recorded with its fake time.


@dataclass(frozen=True)
class Arrival:
    """One item: when it comes (tenths of a second after the one before), and what becomes of it."""

    gap: int
    cost: int = 1
    size_bytes: int = 0
    cancel_after_s: float | None = None
    timeout_s: float | None = None
    fate: str = "fine"  # or `poison`: the batch raises; `error`: an exception in place of its result


@dataclass(frozen=True)
class Day:
    arrivals: tuple[Arrival, ...]
    max_batch_size: int = 4
    max_wait_s: float = 0.0
    max_batch_cost: int | None = None
    padded: bool = False
    max_queue: int = 1024
    max_queue_bytes: int = 2**20
    batch_s: float = 1.0
    item_s: float = 0.0
    prepare_s: float | None = None


@dataclass
class Life:
    """What became of one item."""

    number: int
    arrival: Arrival
    came: float
    future: asyncio.Future[Any] | None = None
    refused: Overloaded | None = None
    cancelled_at: float | None = None
    resolved_at: float | None = None
    runs: list[int] = field(default_factory=list)

    @property
    def deadline(self) -> float:
        return math.inf if self.arrival.timeout_s is None else self.came + self.arrival.timeout_s

    def waits_at(self, time: float, runs: list[Run]) -> bool:
        """Surely in the queue at a time (not at its very edges)."""
        gone = min(self.deadline, math.inf if self.cancelled_at is None else self.cancelled_at)
        started = runs[self.runs[0]].start if self.runs else math.inf
        return self.refused is None and self.came + EPSILON < time < min(gone, started) - EPSILON


@dataclass
class Run:
    """One call of the model."""

    start: float
    end: float
    numbers: list[int]
    again: bool


@dataclass
class Record:
    day: Day
    lives: list[Life]
    runs: list[Run]
    page: Page = field(default_factory=lambda: Page.private("replica"))

    def number(self, instrument: named.Instrument, *values: str) -> float:
        """What the metrics say: a number, or how many a histogram has observed."""
        told = self.page.reading("toy").numbers(instrument, values)
        return sum(told[:-1]) if instrument.kind == "histogram" else told[0]

    def sum_of(self, histogram: named.Instrument, *values: str) -> float:
        return self.page.reading("toy").numbers(histogram, values)[-1]


async def live(day: Day) -> Record:
    loop = asyncio.get_running_loop()
    record = Record(day, [], [])
    prepared: set[int] = set()

    def model(batch: Sequence[Life]) -> Awaitable[list[Any]]:
        again = any(item.runs for item in batch)
        current = Run(loop.time(), math.inf, [item.number for item in batch], again)
        for item in batch:
            item.runs.append(len(record.runs))
        record.runs.append(current)
        return compute(batch, current)

    async def compute(batch: Sequence[Life], current: Run) -> list[Any]:
        await asyncio.sleep(day.batch_s + day.item_s * len(batch))
        current.end = loop.time()
        if any(item.arrival.fate == "poison" for item in batch):
            raise ValueError("poison")
        return [ArithmeticError(item.number) if item.arrival.fate == "error" else item.number for item in batch]

    async def prepare(batch: Sequence[Life]) -> list[int | Exception]:
        assert day.prepare_s is not None
        some = batch[:3]
        await asyncio.sleep(day.prepare_s * len(some))
        prepared.update(item.number for item in some)
        return [item.arrival.cost for item in some]

    batcher: Batcher[Life, int] = Batcher(
        model,
        max_batch_size=day.max_batch_size,
        max_wait_s=day.max_wait_s,
        max_batch_cost=day.max_batch_cost,
        padded=day.padded,
        max_queue=day.max_queue,
        max_queue_bytes=day.max_queue_bytes,
        prepare=None if day.prepare_s is None else prepare,
        clock=loop.time,
        metrics=WorkMetrics(record.page, "item"),
    )
    for number, arrival in enumerate(day.arrivals):
        if arrival.gap:
            await asyncio.sleep(arrival.gap / 10)
        come(batcher, Life(number, arrival, loop.time()), record)
    await batcher.drain()
    await asyncio.sleep(1000)  # whatever timers there are go off
    stats = batcher.stats()
    assert (stats.queued, stats.queued_bytes, stats.running) == (0, 0, 0)
    return record


def come(batcher: Batcher[Life, int], item: Life, record: Record) -> None:
    loop = asyncio.get_running_loop()
    record.lives.append(item)
    waiting = [other for other in record.lives[:-1] if other.future and not other.future.done() and not other.runs]
    full = (
        len(waiting) + 1 > record.day.max_queue
        or sum(other.arrival.size_bytes for other in waiting) + item.arrival.size_bytes > record.day.max_queue_bytes
    )
    deadline = None if item.arrival.timeout_s is None else item.deadline
    try:
        future = batcher.submit(item, cost=item.arrival.cost, size_bytes=item.arrival.size_bytes, deadline=deadline)
    except Overloaded as error:
        assert full
        assert error.retry_after_s > 0
        item.refused = error
        return
    assert not full
    item.future = future

    def resolved(_: asyncio.Future[int]) -> None:
        assert item.resolved_at is None
        item.resolved_at = loop.time()

    def cancel() -> None:
        if future.cancel():
            item.cancelled_at = loop.time()

    future.add_done_callback(resolved)
    if item.arrival.cancel_after_s is not None:
        loop.call_later(item.arrival.cancel_after_s, cancel)


# Odd fractions keep cancellations and deadlines off the instants at which batches start and end.
never = st.none()
arrivals = st.builds(
    Arrival,
    gap=st.integers(0, 12),
    cost=st.integers(1, 40),
    size_bytes=st.integers(0, 100),
    cancel_after_s=never | never | st.integers(0, 40).map(lambda tenths: tenths / 10 + 0.0137),
    timeout_s=never | never | st.integers(0, 40).map(lambda tenths: tenths / 10 + 0.0271),
    fate=st.sampled_from(["fine"] * 10 + ["poison", "error"]),
)
days = st.builds(
    Day,
    arrivals=st.lists(arrivals, max_size=40).map(tuple),
    max_batch_size=st.integers(1, 9),
    max_wait_s=st.sampled_from([0.0, 0.0, 0.35, 2.5]),
    max_batch_cost=st.none() | st.integers(1, 120),
    padded=st.booleans(),
    max_queue=st.integers(1, 30),
    max_queue_bytes=st.integers(50, 1000),
    batch_s=st.sampled_from([0.05, 0.7, 3.0]),
    item_s=st.sampled_from([0.0, 0.11]),
    prepare_s=st.none() | st.none() | st.sampled_from([0.0, 0.013, 0.4]),
)
ordinary = settings(max_examples=40)


@ordinary
@given(days)
def test_every_future_is_resolved_exactly_once(day: Day) -> None:
    for item in run(live(day)).lives:
        if item.refused is not None:
            continue
        assert item.future is not None and item.future.done()
        if item.future.cancelled():
            assert item.cancelled_at is not None
        elif (error := item.future.exception()) is None:
            assert item.future.result() == item.number
            assert item.arrival.fate == "fine"
        elif isinstance(error, DeadlineExceeded):
            assert item.resolved_at == pytest.approx(item.deadline, abs=EPSILON)
        else:
            assert item.arrival.fate == ("poison" if isinstance(error, ValueError) else "error")


@ordinary
@given(days)
def test_metrics_count_each_item_and_each_run_once(day: Day) -> None:
    record = run(live(day))
    accepted = [item for item in record.lives if item.future is not None]
    cancelled = [item for item in accepted if item.future.cancelled()]
    errors = [(item, item.future.exception()) for item in accepted if not item.future.cancelled()]
    expired = [item for item, error in errors if isinstance(error, DeadlineExceeded)]
    answered = [item for item, error in errors if error is None]
    rejected = [record.number(named.REJECTED, reason) for reason in ("queue_full", "queue_bytes_full")]
    assert sum(rejected) == len(record.lives) - len(accepted)
    for reason, items in (("cancelled", cancelled), ("expired", expired)):
        told = tuple(record.number(named.DROPPED, reason, stage) for stage in ("queued", "running"))
        assert told == (sum(not item.runs for item in items), sum(bool(item.runs) for item in items))
    for phase in ("prepare", "queue", "compute"):
        assert record.number(named.PHASE_DURATION, phase) == len(answered)
    whole = sum(item.resolved_at - item.came for item in answered)
    parts = sum(record.sum_of(named.PHASE_DURATION, phase) for phase in ("prepare", "queue", "compute"))
    assert parts == pytest.approx(whole, abs=1e-6)
    assert record.number(named.BATCH_SIZE, "item") == len(record.runs)
    assert record.sum_of(named.BATCH_SIZE, "item") == sum(len(one.numbers) for one in record.runs)
    busy = sum(one.end - one.start for one in record.runs)
    assert record.sum_of(named.BATCH_DURATION, "item") == pytest.approx(busy, abs=1e-6)
    if day.prepare_s is None and (day.padded or day.max_batch_cost is not None):
        batches = [[record.lives[number].arrival.cost for number in one.numbers] for one in record.runs]
        assert record.number(named.COST_ASKED) == sum(map(sum, batches))
        padded = sum(len(batch) * max(batch) for batch in batches)
        assert record.number(named.COST_COMPUTED) == (padded if day.padded else sum(map(sum, batches)))
    for gauge in (named.QUEUE_DEPTH, named.QUEUE_SIZE, named.RUNNING):
        assert record.number(gauge, "item") == 0


@ordinary
@given(days)
def test_model_never_idles_while_work_waits_longer_than_max_wait(day: Day) -> None:
    record = run(live(Day(**{**vars(day), "prepare_s": None})))
    free = -math.inf
    for current in record.runs:
        for item in record.lives:
            due = max(free, item.came + day.max_wait_s)
            if due < current.start - EPSILON:
                between = (due + current.start) / 2
                assert not item.waits_at(between, record.runs), f"item {item.number} waits for an idle model"
        assert current.start >= free, "one batch at a time"
        free = current.end
    for item in record.lives:
        assert not item.waits_at(max(free, item.came + day.max_wait_s) + 500, record.runs)


@ordinary
@given(days)
def test_oldest_is_always_in_the_next_batch(day: Day) -> None:
    record = run(live(Day(**{**vars(day), "prepare_s": None})))
    for index, current in enumerate(record.runs):
        if not current.again:
            earlier = [
                item
                for item in record.lives[: min(current.numbers)]
                if item.waits_at(current.start, record.runs) and (not item.runs or item.runs[0] > index)
            ]
            assert not earlier, "an older item was passed over by the whole batch"


@ordinary
@given(days)
def test_batches_stay_within_size_and_cost(day: Day) -> None:
    record = run(live(Day(**{**vars(day), "prepare_s": None})))
    for current in record.runs:
        costs = [record.lives[number].arrival.cost for number in current.numbers]
        assert len(costs) <= day.max_batch_size
        if day.max_batch_cost is not None and len(costs) > 1:
            assert (len(costs) * max(costs) if day.padded else sum(costs)) <= day.max_batch_cost


@ordinary
@given(days)
def test_where_cost_does_not_matter_the_order_is_that_of_arrival(day: Day) -> None:
    record = run(live(Day(**{**vars(day), "padded": False, "max_batch_cost": None})))
    order = [number for current in record.runs if not current.again for number in current.numbers]
    assert order == sorted(order)


@ordinary
@given(days)
def test_cancelled_and_expired_items_are_never_computed(day: Day) -> None:
    record = run(live(day))
    for item in record.lives:
        starts = [record.runs[index].start for index in item.runs]
        assert all(start <= item.deadline for start in starts)
        assert item.cancelled_at is None or all(start <= item.cancelled_at for start in starts)


@ordinary
@given(days)
def test_deadline_is_kept_while_the_model_is_busy(day: Day) -> None:
    for item in run(live(day)).lives:
        if item.resolved_at is not None:
            assert item.resolved_at <= item.deadline + EPSILON


@ordinary
@given(days)
def test_bad_items_are_isolated_with_bounded_recomputation(day: Day) -> None:
    record = run(live(day))
    for item in record.lives:
        if item.runs:
            first = record.runs[item.runs[0]]
            assert len(item.runs) <= math.ceil(math.log2(len(first.numbers))) + 1


@given(size=st.integers(1, 64), bad=st.data())
def test_one_bad_item_costs_two_runs_a_halving_at_most_and_one_where_the_first_half_is_good(
    size: int, bad: st.DataObject
) -> None:
    position = bad.draw(st.integers(0, size - 1))
    fates = [Arrival(0, fate="poison" if index == position else "fine") for index in range(size)]
    record = run(live(Day(tuple(fates), max_batch_size=64)))
    halvings = math.ceil(math.log2(size))
    assert len(record.runs) <= (2 * halvings + 1 if position < size - 1 else halvings + 2)
    failed = [item.number for item in record.lives if item.future and item.future.exception()]
    assert failed == [position]


# Composition, which is pure


@given(
    costs=st.lists(st.integers(1, 300), min_size=1, max_size=60),
    max_batch_size=st.integers(1, 40),
    max_batch_cost=st.none() | st.integers(1, 4096),
    padded=st.booleans(),
    overhead=st.none() | st.floats(0, 500) | st.just(math.inf),
)
def test_compose_holds_the_oldest_and_both_bounds(
    costs: list[int], max_batch_size: int, max_batch_cost: int | None, padded: bool, overhead: float | None
) -> None:
    chosen = compose(
        costs, max_batch_size=max_batch_size, max_batch_cost=max_batch_cost, padded=padded, overhead=overhead
    )
    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= max_batch_size
    taken = [costs[index] for index in chosen]
    if max_batch_cost is not None and len(taken) > 1:
        assert (len(taken) * max(taken) if padded else sum(taken)) <= max_batch_cost
    if padded and overhead is not None:
        ascending = sorted(taken)
        for k in range(1, len(ascending)):
            assert k * (ascending[-1] - ascending[k - 1]) <= overhead, "two batches would have been cheaper"


@pytest.mark.parametrize("head", [250, 5])
def test_long_text_does_not_make_short_ones_pay(head: int) -> None:
    costs = [head, *([5] * 20), 250, 240, *([5] * 20), 245]
    chosen = [costs[i] for i in compose(costs, max_batch_size=32, max_batch_cost=4096, padded=True)]
    assert sorted(chosen) == (sorted([250, 250, 240, 245]) if head == 250 else [5] * 32)


def test_padded_batch_prefers_the_older_of_equals() -> None:
    costs = [20, 7, 7, 7, 20, 20, 20]
    assert compose(costs, max_batch_size=3, max_batch_cost=None, padded=True, overhead=math.inf) == [0, 4, 5]
    assert compose(costs[:4], max_batch_size=3, max_batch_cost=None, padded=True, overhead=math.inf) == [0, 1, 2]


def test_sum_skips_what_does_not_fit() -> None:
    assert compose([5, 9, 2, 1, 1], max_batch_size=4, max_batch_cost=8, padded=False) == [0, 2, 3]


def test_pace_finds_what_starting_a_batch_costs() -> None:
    pace = Pace()
    assert pace.items_per_s is None
    for cost in (10, 500, 40, 900, 20, 700):
        pace.record(items=10, cost=cost, seconds=0.030 + cost * 0.001)
        pace.record(items=1, cost=None, seconds=0.1)
    assert pace.overhead == pytest.approx(30, rel=1e-6)
    for _ in range(200):
        pace.record(items=10, cost=100, seconds=0.5)
    assert pace.items_per_s == pytest.approx(20, rel=1e-3)
    assert pace.overhead is None


def test_pace_calls_padding_free_where_time_does_not_grow_with_cost() -> None:
    pace = Pace()
    for cost in (10, 500, 40, 900, 20, 700):
        pace.record(items=10, cost=cost, seconds=0.030)
    assert pace.overhead == math.inf


# Single cases, told as stories


class Gate:
    """A model that answers when told to."""

    def __init__(self) -> None:
        self.calls: list[list[Any]] = []
        self.pending: list[asyncio.Future[Any]] = []

    def __call__(self, batch: Sequence[Any]) -> Awaitable[list[Any]]:
        self.calls.append(list(batch))
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self.pending.append(future)
        return future

    def open(self, answer: Callable[[list[Any]], Any] = lambda batch: batch) -> None:
        result = answer(self.calls[len(self.calls) - len(self.pending)])
        future = self.pending.pop(0)
        future.set_exception(result) if isinstance(result, Exception) else future.set_result(result)


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def batcher_of(model: Callable[..., Awaitable[list[Any]]], **options: Any) -> Batcher[Any, Any]:
    return Batcher(model, **{"max_batch_size": 4, "clock": asyncio.get_running_loop().time, **options})


def test_lone_item_starts_at_once_and_those_that_come_meanwhile_leave_together() -> None:
    async def story() -> None:
        gate = Gate()
        batcher = batcher_of(gate)
        first = batcher.submit("a")
        await turns()
        assert gate.calls == [["a"]]
        rest = [batcher.submit(item) for item in "bcdef"]
        await turns()
        assert gate.calls == [["a"]]
        gate.open()
        await turns()
        assert await first == "a"
        assert gate.calls[1:] == [["b", "c", "d", "e"]]
        gate.open()
        await turns()
        gate.open()
        assert await asyncio.gather(*rest) == list("bcdef")

    run(story())


def test_items_of_one_turn_leave_together() -> None:
    async def story() -> None:
        gate = Gate()
        batcher = batcher_of(gate)
        futures = [batcher.submit(item) for item in "abc"]
        await turns()
        assert gate.calls == [["a", "b", "c"]]
        gate.open()
        assert await asyncio.gather(*futures) == list("abc")

    run(story())


def test_full_batch_does_not_wait_for_company() -> None:
    async def story() -> None:
        gate = Gate()
        batcher = batcher_of(gate, max_wait_s=10.0, max_batch_cost=100)
        batcher.submit("a", cost=30)
        await turns()
        assert gate.calls == []
        batcher.submit("b", cost=70)
        await turns()
        assert gate.calls == [["a", "b"]]
        gate.open()

    run(story())


@pytest.mark.parametrize("wrong", [lambda batch: batch[:-1], lambda batch: [*batch, 1], lambda batch: 7])
def test_wrong_answer_of_the_model_fails_the_whole_batch(wrong: Callable[[list[Any]], Any]) -> None:
    async def story() -> None:
        gate = Gate()
        batcher = batcher_of(gate, max_batch_size=1 if wrong([]) == 7 else 4)
        futures = [batcher.submit(item) for item in ("a" if wrong([]) == 7 else "abc")]
        await turns()
        gate.open(wrong)
        results = await asyncio.gather(*futures, return_exceptions=True)
        assert all(isinstance(result, PredictionFailed) for result in results)
        assert batcher.submit("d") and await turns() is None
        gate.open()

    run(story())


def test_model_that_raises_before_it_awaits_fails_its_item_only() -> None:
    async def story() -> None:
        def model(batch: Sequence[Any]) -> Awaitable[list[Any]]:
            if "bad" in batch:
                raise KeyError("bad")
            return asyncio.sleep(0, list(batch))

        batcher = batcher_of(model)
        results = await asyncio.gather(*(batcher.submit(i) for i in ("a", "bad", "c")), return_exceptions=True)
        assert results[0] == "a" and results[2] == "c"
        assert isinstance(results[1], KeyError)

    run(story())


def test_request_of_many_items_is_split_and_answered_in_order() -> None:
    async def story() -> None:
        async def model(batch: Sequence[int]) -> list[int]:
            return [item * 2 for item in batch]

        batcher = batcher_of(model)
        assert await batcher.submit_many(range(11)) == [2 * number for number in range(11)]
        assert await batcher.submit_many([]) == []
        assert batcher.stats().batches == 3

    run(story())


def test_request_ends_with_its_first_failed_item_and_the_rest_is_not_computed() -> None:
    async def story() -> None:
        gate = Gate()
        batcher = batcher_of(gate, max_batch_size=2)
        future = batcher.submit_many([1, 2, 3, 4, 5])
        await turns()
        gate.open(lambda batch: [batch[0], ValueError("bad")])
        result = await future
        assert result[0] == 1 and isinstance(result[1], ValueError) and result[2:] == [None] * 3
        await turns()
        assert len(gate.calls) == 1
        assert batcher.stats().queued == 0

    run(story())


def test_request_is_queued_whole_or_not_at_all() -> None:
    async def story() -> None:
        gate = Gate()
        batcher = batcher_of(gate, max_queue=4, max_queue_bytes=100)
        batcher.submit_many([1, 2, 3])
        with pytest.raises(Overloaded):
            batcher.submit_many([4, 5])
        with pytest.raises(Overloaded, match="bytes"):
            batcher.submit(4, size_bytes=101)
        assert batcher.stats().queued == 3

    run(story())


def test_cancelling_frees_the_queue_at_once() -> None:
    async def story() -> None:
        gate = Gate()
        batcher = batcher_of(gate, max_queue=4)
        running = batcher.submit("a")
        await turns()
        waiting = [batcher.submit(item) for item in "bcde"]
        for _ in range(3000):
            waiting.pop().cancel()
            waiting.append(batcher.submit("x"))
        assert batcher.stats().queued == 4
        assert batcher.stats().dropped == 3000
        gate.open()
        await turns()
        assert gate.calls[1] == ["b", "c", "d", "x"]
        gate.open()
        assert await running == "a"

    run(story())


def test_retry_after_follows_the_queue_and_the_rate() -> None:
    async def story() -> None:
        async def model(batch: Sequence[Any]) -> list[Any]:
            await asyncio.sleep(2.0)
            return list(batch)

        batcher = batcher_of(model, max_queue=12)
        assert batcher.retry_after_s() == 1.0
        await asyncio.gather(*(batcher.submit(item) for item in range(4)))
        futures = [batcher.submit(item) for item in range(12)]
        with pytest.raises(Overloaded) as refused:
            batcher.submit("one too many")
        assert refused.value.retry_after_s == pytest.approx(6.0)
        await asyncio.gather(*futures)

    run(story())


def test_drain_finishes_what_is_queued_and_refuses_the_rest() -> None:
    async def story() -> None:
        gate = Gate()
        batcher = batcher_of(gate, max_wait_s=60.0)
        future = batcher.submit("a")
        draining = asyncio.ensure_future(batcher.drain())
        await turns()
        with pytest.raises(NotReady) as refused:
            batcher.submit("b")
        assert refused.value.phase == "draining"
        assert not draining.done()
        gate.open()
        await draining
        assert await future == "a"
        await batcher.drain()

    run(story())


@pytest.mark.parametrize("prepares", [False, True])
def test_close_fails_what_is_left(prepares: bool) -> None:
    async def story() -> None:
        gate, preparing = Gate(), Gate()
        batcher = batcher_of(gate, max_batch_size=2, prepare=preparing if prepares else None)
        futures = [batcher.submit(item) for item in range(7)]
        await turns()
        await batcher.close()
        results = await asyncio.gather(*futures, return_exceptions=True)
        assert all(isinstance(result, NotReady) for result in results)
        await turns()
        assert len(gate.calls) == (0 if prepares else 1)

    run(story())


def test_items_are_prepared_while_the_model_is_busy_and_a_lone_one_goes_straight_to_it() -> None:
    async def story() -> None:
        gate, preparing = Gate(), Gate()
        batcher = batcher_of(gate, prepare=preparing, padded=True)
        lone = batcher.submit("a")
        await turns()
        assert (gate.calls, preparing.calls) == ([["a"]], [])
        rest = [batcher.submit(item) for item in "bcd"]
        await turns()
        assert preparing.calls == [["b", "c", "d"]]
        preparing.open(lambda batch: [3, ValueError("c is wrong")])
        await turns()
        assert preparing.calls[1:] == [["d"]]
        preparing.open(lambda batch: [3])
        gate.open()
        await turns()
        assert gate.calls[1:] == [["b", "d"]]
        gate.open()
        results = await asyncio.gather(lone, *rest, return_exceptions=True)
        assert [results[0], results[1], results[3]] == ["a", "b", "d"]
        assert isinstance(results[2], ValueError)

    run(story())


def test_items_that_one_call_of_prepare_leaves_keep_their_order() -> None:
    async def story() -> None:
        gate, preparing = Gate(), Gate()
        batcher = batcher_of(gate, max_batch_size=8, prepare=preparing, padded=True)
        futures = [batcher.submit(item) for item in "abcdef"]
        for left in (["a", "b", "c", "d", "e", "f"], ["b", "c", "d", "e", "f"], ["c", "d", "e", "f"]):
            await turns()
            assert preparing.calls[-1] == left
            preparing.open(lambda batch: [3])
        await turns()
        preparing.open(lambda batch: [3] * len(batch))
        gate.open()
        await turns()
        gate.open()
        assert await asyncio.gather(*futures) == list("abcdef")
        assert [item for call in gate.calls for item in call] == list("abcdef")

    run(story())


def test_no_more_is_prepared_than_two_batches_beyond_the_one_that_runs() -> None:
    async def story() -> None:
        gate, prepared = Gate(), []

        async def prepare(batch: Sequence[Any]) -> list[int]:
            prepared.append(batch[0])
            return [1]

        batcher = batcher_of(gate, max_batch_size=1, prepare=prepare)
        futures = [batcher.submit(item) for item in range(50)]
        await turns(200)
        assert len(prepared) == 3
        while gate.pending:
            gate.open()
            await turns(20)
        assert await asyncio.gather(*futures) == list(range(50))

    run(story())


def test_failing_preparation_fails_its_items() -> None:
    async def story() -> None:
        gate, preparing = Gate(), Gate()
        batcher = batcher_of(gate, prepare=preparing, padded=True)
        futures = [batcher.submit(item) for item in "ab"]
        await turns()
        preparing.open(lambda batch: OSError("no disk"))
        results = await asyncio.gather(*futures, return_exceptions=True)
        assert all(isinstance(result, OSError) for result in results)
        assert batcher.stats().queued == 0

    run(story())


def test_deadlines_that_were_kept_are_forgotten() -> None:
    async def story() -> None:
        async def model(batch: Sequence[Any]) -> list[Any]:
            return list(batch)

        loop = asyncio.get_running_loop()
        batcher = batcher_of(model)
        started = loop.time()
        for _ in range(2000):
            await batcher.submit("x", deadline=loop.time() + 60)
        assert loop.time() == started
        with pytest.raises(DeadlineExceeded):
            await batcher.submit("late", deadline=loop.time())

    run(story())


def test_metrics_tell_where_a_request_s_time_went_and_what_waits() -> None:
    async def story() -> None:
        record = Record(Day(()), [], [])

        async def prepare(batch: Sequence[Any]) -> list[int]:
            await asyncio.sleep(2)
            return [1] * len(batch)

        async def model(batch: Sequence[Any]) -> list[Any]:
            await asyncio.sleep(10)
            return list(batch)

        batcher = batcher_of(model, prepare=prepare, padded=True, metrics=WorkMetrics(record.page, "item"))
        first = batcher.submit("a", size_bytes=7)
        await asyncio.sleep(1)
        second = batcher.submit_many(["b", "c"], size_bytes=30)
        await asyncio.sleep(1)
        assert record.number(named.QUEUE_DEPTH, "item") == 2
        assert record.number(named.QUEUE_SIZE, "item") == 30
        assert record.number(named.RUNNING, "item") == 1
        await first
        assert [record.sum_of(named.PHASE_DURATION, phase) for phase in ("prepare", "queue", "compute")] == [0, 0, 10]
        await second
        assert [record.sum_of(named.PHASE_DURATION, phase) for phase in ("prepare", "queue", "compute")] == [2, 7, 20]
        assert record.number(named.PHASE_DURATION, "queue") == 2, "one a request, not one an item"

    run(story())


def test_metrics_tell_of_items_that_nobody_wants_any_more() -> None:
    async def story() -> None:
        record, gate = Record(Day(()), [], []), Gate()
        batcher = batcher_of(gate, max_batch_size=2, metrics=WorkMetrics(record.page, "item"))
        request = batcher.submit_many(["a", "b", "c"])
        late = batcher.submit("d", deadline=asyncio.get_running_loop().time())
        await turns()
        gate.open(lambda batch: [ValueError("bad"), "b"])
        await asyncio.gather(request, late, return_exceptions=True)
        await turns()
        assert record.number(named.DROPPED, "sibling", "queued") == 1, "c; b was computed already"
        assert record.number(named.DROPPED, "sibling", "running") == 1, "b, in the batch that just ended"
        assert record.number(named.DROPPED, "expired", "queued") == 1
        left = batcher.submit("e")
        await batcher.close()
        await asyncio.gather(left, return_exceptions=True)
        assert record.number(named.DROPPED, "shutdown", "queued") == 1
        with pytest.raises(NotReady):
            batcher.submit_many(["f", "g"])
        assert record.number(named.REJECTED, "not_ready") == 2

    run(story())
