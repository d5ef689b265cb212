"""Streams computed together: admitted, delivered, left and failed."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import Cancelled, DeadlineExceeded, InvalidInput, NotReady, Overloaded, PredictionFailed
from serve.stepping import Generators, Stepper, Stream, WorkThread
from serve.telemetry import instruments as named
from serve.telemetry.metrics import WorkMetrics
from serve.telemetry.page import Page
from tests.toys import Countdown, Words


class Reins:
    """Lets a model's steps happen one by one: each waits until `allow` was called for it."""

    def __init__(self, words: Words) -> None:
        self._allowed = threading.Semaphore(0)
        self._free = False
        words.on_step = self._wait

    def _wait(self) -> None:
        if not self._free:
            assert self._allowed.acquire(timeout=10)

    def allow(self, steps: int = 1) -> None:
        self._allowed.release(steps)

    def let_go(self) -> None:
        self._free = True
        self._allowed.release(1000)


@contextlib.asynccontextmanager
async def stepper_of(model: Any, **options: Any) -> AsyncIterator[Stepper]:
    thread, preparer = WorkThread("model"), WorkThread("prepare")
    thread.start()
    preparer.start()
    try:
        yield Stepper(model, thread=thread, preparer=preparer, prepare=getattr(model, "prepare", None), **options)
    finally:
        thread.close()
        preparer.close()


async def texts(stream: Stream) -> list[str]:
    return [part["text"] async for part in stream]


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def prompt(words: int | str) -> dict[str, bytes]:
    return {"prompt": str(words).encode()}


async def test_streams_share_steps_and_late_ones_are_admitted_as_slots_fall_free() -> None:
    model = Words(slots=2)
    reins = Reins(model)
    async with stepper_of(model) as stepper:
        streams = [stepper.open(prompt(count)) for count in (3, 5, 2, 4)]
        await until(lambda: len(model.prepared) == 4)
        reins.let_go()
        assert await asyncio.gather(*map(texts, streams)) == [
            [f"w{index} " for index in range(count)] for count in (3, 5, 2, 4)
        ]
        assert model.admitted == ["3", "5", "2", "4"], "the oldest first"
        assert model.most == 2
        stats = stepper.stats()
        assert stats.steps <= 11, "fourteen words: five steps of two, four of the last alone, up to two before company"
        assert (stats.queued, stats.running, stats.ended) == (0, 0, 4)


@settings(max_examples=30)
@given(
    slots=st.integers(1, 3),
    readers=st.lists(
        st.tuples(st.sampled_from(["1", "3", "40", "bad", "x"]), st.none() | st.integers(0, 3)), max_size=12
    ),
)
def test_every_stream_ends_once_and_every_slot_is_free_afterwards(
    slots: int, readers: list[tuple[str, int | None]]
) -> None:
    async def read(stream: Stream, leaves_after: int | None) -> list[str] | Exception:
        got: list[str] = []
        try:
            while leaves_after is None or len(got) < leaves_after:
                got.append((await anext(stream))["text"])
        except StopAsyncIteration:
            return got
        except (PredictionFailed, InvalidInput) as error:
            return error
        finally:
            stream.close()
        return got

    async def story() -> None:
        model = Words(slots=slots)
        async with stepper_of(model) as stepper:
            streams = [stepper.open(prompt(words)) for words, _ in readers]
            results = await asyncio.gather(*(read(s, leaves) for s, (_, leaves) in zip(streams, readers, strict=True)))
            for (words, leaves), result in zip(readers, results, strict=True):
                if isinstance(result, Exception):
                    assert isinstance(result, {"bad": PredictionFailed, "x": InvalidInput}[words])
                elif leaves == 0:
                    assert result == []
                else:
                    count = int(words) if leaves is None else min(int(words), leaves)
                    assert result == [f"w{index} " for index in range(count)]
            await until(lambda: not model.active and stepper.stats().running == 0)
            assert stepper.stats().queued == 0
            assert model.most <= slots
            await stepper.drain()

    asyncio.run(story())


async def test_first_part_is_there_before_the_last_is_computed() -> None:
    model = Words()
    reins = Reins(model)
    async with stepper_of(model) as stepper:
        stream = stepper.open(prompt(3))
        reins.allow(1)
        assert (await anext(stream))["text"] == "w0 "
        assert model.active
        reins.let_go()
        assert await texts(stream) == ["w1 ", "w2 "]


async def test_cancelled_stream_frees_its_slot_within_one_step() -> None:
    model = Words(slots=1)
    reins = Reins(model)
    async with stepper_of(model) as stepper:
        stream, waiting = stepper.open(prompt(1000)), stepper.open(prompt(2))
        reader = asyncio.create_task(texts(stream))
        reins.allow(1)
        await until(lambda: stream.read == 1)
        reader.cancel()
        await asyncio.wait([reader])
        stream.close()
        reins.allow(1)  # the step that ran as it was cancelled
        reins.allow(1)
        assert (await anext(waiting))["text"] == "w0 "
        assert model.released == [1]
        reins.let_go()
        assert await texts(waiting) == ["w1 "]
    assert stepper.stats().running == 0


async def test_stream_that_leaves_before_its_turn_is_never_admitted() -> None:
    model = Words(slots=1)
    reins = Reins(model)
    async with stepper_of(model, max_queue=2) as stepper:
        running = stepper.open(prompt(2))
        await until(lambda: stepper.stats().running == 1)
        for _ in range(100):
            stepper.open(prompt(3)).close()
        assert stepper.stats().queued == 0
        reins.let_go()
        await texts(running)
        assert model.admitted == ["2"]


async def test_queue_of_streams_is_bounded() -> None:
    model = Words(slots=1)
    reins = Reins(model)
    async with stepper_of(model, max_queue=2) as stepper:
        streams = [stepper.open(prompt(1))]
        await until(lambda: stepper.stats().running == 1)
        streams += [stepper.open(prompt(1)) for _ in range(2)]
        assert stepper.room() == 0
        with pytest.raises(Overloaded) as refused:
            stepper.open(prompt(1))
        assert refused.value.retry_after_s > 0
        reins.let_go()
        await asyncio.gather(*map(texts, streams))


async def test_bytes_of_waiting_streams_are_bounded() -> None:
    model = Words(slots=1)
    reins = Reins(model)
    async with stepper_of(model, max_queue_bytes=100) as stepper:
        streams = [stepper.open(prompt(1), size_bytes=100)]
        await until(lambda: stepper.stats().running == 1)
        assert stepper.stats().queued_bytes == 0, "what is computed waits no longer"
        left = stepper.open(prompt(1), size_bytes=60)
        with pytest.raises(Overloaded, match="60 bytes wait, and 41 more"):
            stepper.open(prompt(1), size_bytes=41)
        left.close()
        streams.append(stepper.open(prompt(1), size_bytes=100))
        reins.let_go()
        await asyncio.gather(*map(texts, streams))
        assert stepper.stats().queued_bytes == 0


async def test_deadline_ends_a_stream_with_what_it_has_and_frees_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Words(slots=1)
    reins = Reins(model)
    loop = asyncio.get_running_loop()
    really_later, alarms = loop.call_later, []

    def call_later(delay: float, function: Any, *args: Any, **options: Any) -> asyncio.TimerHandle:
        if delay == 60:
            alarms.append(lambda: function(*args))
        return really_later(delay, function, *args, **options)

    monkeypatch.setattr(loop, "call_later", call_later)
    async with stepper_of(model, clock=lambda: 1000.0) as stepper:
        running = stepper.open(prompt(1000), deadline=1060.0)
        waiting = stepper.open(prompt(1), deadline=1060.0)
        reins.allow(1)
        assert (await anext(running))["text"] == "w0 "
        for ring in alarms:
            ring()
        with pytest.raises(DeadlineExceeded):
            await anext(running)
        with pytest.raises(DeadlineExceeded):
            await anext(waiting)
        reins.let_go()
        assert await texts(stepper.open(prompt(1))) == ["w0 "]
        assert model.admitted == ["1000", "1"]
        assert model.released == [1]


async def test_failing_admission_and_preparation_fail_their_stream_only() -> None:
    model = Words()
    async with stepper_of(model) as stepper:
        bad, wrong, good = stepper.open(prompt("bad")), stepper.open(prompt("x")), stepper.open(prompt(2))
        with pytest.raises(PredictionFailed, match="ValueError: bad prompt"):
            await anext(bad)
        with pytest.raises(InvalidInput, match="is no number"):
            await anext(wrong)
        assert await texts(good) == ["w0 ", "w1 "]
        assert stepper.stats().queued == 0


async def test_failing_step_fails_its_streams_and_the_next_are_served() -> None:
    model = Words(slots=2)

    def break_down() -> None:
        model.on_step = lambda: None
        raise RuntimeError("out of memory")

    async with stepper_of(model) as stepper:
        first = stepper.open(prompt(3))
        assert await anext(first)
        model.on_step = break_down
        streams = [first, stepper.open(prompt(500))]
        results = await asyncio.gather(*map(texts, streams), return_exceptions=True)
        assert any(isinstance(result, PredictionFailed) for result in results)
        assert await texts(stepper.open(prompt(2))) == ["w0 ", "w1 "]
        assert not model.active


@pytest.mark.parametrize("method", ["prepare", "admit", "step"])
async def test_model_that_exits_fails_its_stream_and_its_thread_goes_on(method: str) -> None:
    model = Words()
    works, broken = getattr(model, method), True
    setattr(model, method, lambda *given: sys.exit("no licence") if broken else works(*given))
    async with stepper_of(model) as stepper:
        for _ in range(2):
            with pytest.raises(PredictionFailed, match="SystemExit: no licence"):
                await texts(stepper.open(prompt(2)))
        broken = False
        assert await texts(stepper.open(prompt(1))) == ["w0 "]


async def test_model_that_admits_under_no_key_fails_the_stream_only() -> None:
    model = Words()
    admit = model.admit
    model.admit = lambda prepared: [admit(prepared)] if prepared == "1" else admit(prepared)  # type: ignore[method-assign, return-value, assignment]
    async with stepper_of(model) as stepper:
        with pytest.raises(PredictionFailed, match="TypeError"):
            await texts(stepper.open(prompt(1)))
        assert await texts(stepper.open(prompt(2))) == ["w0 ", "w1 "]


@pytest.mark.parametrize("answer", [None, [None], ["w0"]])
async def test_step_that_returns_nonsense_fails_its_streams(answer: Any) -> None:
    model = Words()
    async with stepper_of(model) as stepper:
        model.step = lambda: answer  # type: ignore[method-assign]
        with pytest.raises(PredictionFailed, match=r"TypeError|AttributeError"):
            await texts(stepper.open(prompt(2)))


async def test_results_before_the_nonsense_of_a_step_count() -> None:
    model = Words()
    step = model.step
    model.step = lambda: [*step(), None]  # type: ignore[list-item, method-assign]
    async with stepper_of(model) as stepper:
        assert await texts(stepper.open(prompt(1))) == ["w0 "]


async def test_error_without_a_text_is_told_by_its_type() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError("mute")

    model = Words()

    def fall() -> None:
        raise Mute

    model.on_step = fall
    async with stepper_of(model) as stepper:
        with pytest.raises(PredictionFailed, match="Mute"):
            await texts(stepper.open(prompt(1)))


async def test_whole_answer_wakes_its_reader_once() -> None:
    async with stepper_of(Words()) as stepper:
        parts = await stepper.open(prompt(4), whole=True).all_parts()
        assert [part["token_ids"] for part in parts] == [[0], [1], [2], [3]]
        assert parts[-1]["finish_reason"] == "stop"


async def test_reader_that_falls_behind_loses_its_stream_and_not_the_memory() -> None:
    model = Words(slots=1)
    async with stepper_of(model, max_behind=10) as stepper:
        stream = stepper.open(prompt(100_000))
        await until(lambda: stream.ended)
        got = []
        with pytest.raises(Cancelled, match="behind"):
            async for part in stream:
                got.append(part)
        assert 10 < len(got) < 1000
        assert await texts(stepper.open(prompt(1))) == ["w0 "], "its slot is free"


class Endless:
    """Counts for ever, and says how far it got and whether it was closed."""

    def __init__(self) -> None:
        self.reached = 0
        self.closed = 0

    def stream(self, _: Any) -> Iterator[dict[str, Any]]:
        try:
            while True:
                self.reached += 1
                yield {"text": str(self.reached)}
        finally:
            self.closed += 1


async def test_generator_waits_for_its_reader_and_is_closed_when_that_leaves() -> None:
    model = Endless()
    async with stepper_of(Generators(model.stream, 2), max_behind=5) as stepper:
        stream = stepper.open({})
        await until(lambda: model.reached == 5)
        for number in range(1, 101):
            assert (await anext(stream))["text"] == str(number)
        await until(lambda: model.reached == 105)
        stream.close()
        await until(lambda: model.closed == 1)
        assert model.reached == 105


async def test_generators_advance_together_up_to_the_batch_size() -> None:
    async with stepper_of(Generators(Countdown().stream, 2)) as stepper:
        streams = [stepper.open({"x": count}) for count in (3, -1, 2, 4)]

        async def numbers(stream: Stream) -> list[int]:
            return [part["y"] async for part in stream]

        results = await asyncio.gather(*map(numbers, streams), return_exceptions=True)
        assert [results[0], *results[2:]] == [[3, 2, 1], [2, 1], [4, 3, 2, 1]]
        assert isinstance(results[1], PredictionFailed)


async def test_drain_waits_for_streams_and_close_ends_them() -> None:
    model = Words(slots=1)
    reins = Reins(model)
    async with stepper_of(model) as stepper:
        stream = stepper.open(prompt(2))
        draining = asyncio.create_task(stepper.drain())
        await asyncio.sleep(0)
        with pytest.raises(NotReady):
            stepper.open(prompt(1))
        assert not draining.done()
        reins.let_go()
        assert await texts(stream) == ["w0 ", "w1 "]
        await draining
    model = Words(slots=1)
    reins = Reins(model)
    async with stepper_of(model) as stepper:
        streams = [stepper.open(prompt(20)), stepper.open(prompt(20))]
        await until(lambda: stepper.stats().running == 1)
        await stepper.close()
        for stream in streams:
            with pytest.raises(NotReady):
                await anext(stream)
        reins.let_go()
        await until(lambda: model.released == [1])
        assert model.admitted == ["20"]


class Mute(BaseException):
    """Cannot be put in words."""

    def __str__(self) -> str:
        raise ValueError("no text")

    @classmethod
    def speak(cls) -> None:
        raise cls


async def test_work_thread_answers_raises_and_skips_what_was_cancelled() -> None:
    thread = WorkThread("work")
    held = threading.Event()
    ran: list[str] = []
    holding = thread.call(held.wait, 10)
    skipped = thread.call(ran.append, "skipped")
    skipped.cancel()
    thread.start()
    held.set()
    assert await holding
    assert await thread.call(max, 2, 3) == 3
    with pytest.raises(ZeroDivisionError):
        await thread.call(lambda: 1 / 0)
    with pytest.raises(PredictionFailed, match="StopIteration"):
        await thread.call(lambda: next(iter(())))
    with pytest.raises(PredictionFailed, match="Mute: its text cannot be told"):
        await thread.call(Mute.speak)
    thread.post(lambda: ran.append(str(1 / 0)))
    thread.post(sys.exit)
    assert await thread.call(lambda: "alive") == "alive"
    assert ran == []
    assert thread.is_alive()
    thread.close()
    with pytest.raises(NotReady):
        thread.call(max, 2, 3)
    await until(lambda: not thread.is_alive())


class Told:
    """A page and what it says."""

    def __init__(self) -> None:
        self.page = Page.private("replica")
        self.metrics = WorkMetrics(self.page, "stream")

    def __call__(self, instrument: named.Instrument, *values: str) -> float:
        """A number, or how many a histogram has observed."""
        told = self.page.reading("toy").numbers(instrument, values)
        return sum(told[:-1]) if instrument.kind == "histogram" else told[0]

    def sum_of(self, histogram: named.Instrument, *values: str) -> float:
        return self.page.reading("toy").numbers(histogram, values)[-1]


async def test_metrics_count_tokens_and_the_time_between_them() -> None:
    now = 100.0

    class Slow(Words):
        def prepare(self, item: Any) -> str:
            nonlocal now
            now += 3
            return super().prepare(item)

    told, model = Told(), Slow(slots=2)
    reins = Reins(model)
    async with stepper_of(model, metrics=told.metrics, clock=lambda: now) as stepper:
        stream = stepper.open(prompt(3))
        await until(lambda: stepper.stats().running == 1)
        now = 110.0
        for _ in range(3):
            reins.allow()
            await anext(stream)
            now += 2
        assert await texts(stream) == []
        assert (told(named.TIME_TO_FIRST_TOKEN), told.sum_of(named.TIME_TO_FIRST_TOKEN)) == (1, 10)
        assert (told(named.INTER_TOKEN_LATENCY), told.sum_of(named.INTER_TOKEN_LATENCY)) == (2, 4)
        assert (told(named.TOKENS, "output"), told(named.TOKENS, "input")) == (3, 1)
        assert (told(named.BATCH_SIZE, "stream"), told.sum_of(named.BATCH_SIZE, "stream")) == (3, 3)
        phases = ("prepare", "queue", "compute")
        assert [told.sum_of(named.PHASE_DURATION, phase) for phase in phases] == [3, 0, 11]
        assert [told(named.PHASE_DURATION, phase) for phase in phases] == [1, 1, 1]
        assert not any(told(named.DROPPED, *values) for values in named.DROPPED.series())


async def test_metrics_tell_which_streams_wait_run_and_leave() -> None:
    told, model = Told(), Words(slots=1)
    reins = Reins(model)
    async with stepper_of(model, metrics=told.metrics, max_queue=2, max_queue_bytes=100) as stepper:
        running = stepper.open(prompt(9), size_bytes=5)
        await until(lambda: told(named.RUNNING, "stream") == 1)
        waiting = [stepper.open(prompt(9), size_bytes=30), stepper.open(prompt(9), size_bytes=40)]
        assert (told(named.QUEUE_DEPTH, "stream"), told(named.QUEUE_SIZE, "stream")) == (2, 70)
        with pytest.raises(Overloaded):
            stepper.open(prompt(1))
        waiting[0].close()
        with pytest.raises(Overloaded):
            stepper.open(prompt(1), size_bytes=61)
        assert (told(named.QUEUE_DEPTH, "stream"), told(named.QUEUE_SIZE, "stream")) == (1, 40)
        assert told(named.REJECTED, "queue_full") == told(named.REJECTED, "queue_bytes_full") == 1
        running.close()
        await stepper.close()
        reins.let_go()
        assert told(named.DROPPED, "cancelled", "queued") == told(named.DROPPED, "cancelled", "running") == 1
        assert told(named.DROPPED, "shutdown", "queued") == 1
        with pytest.raises(NotReady):
            stepper.open(prompt(1))
        assert told(named.REJECTED, "not_ready") == 1
        await until(lambda: told(named.RUNNING, "stream") == told(named.QUEUE_DEPTH, "stream") == 0)


async def test_metrics_tell_a_deadline_from_a_reader_that_left() -> None:
    told, model = Told(), Words(slots=1)
    reins = Reins(model)
    async with stepper_of(model, metrics=told.metrics) as stepper:
        running = stepper.open(prompt(9))
        await until(lambda: told(named.RUNNING, "stream") == 1)
        late = stepper.open(prompt(9), deadline=0.0)
        with pytest.raises(DeadlineExceeded):
            await texts(late)
        assert told(named.DROPPED, "expired", "queued") == 1
        running.close()
        reins.let_go()


@pytest.mark.parametrize("part", [{"token_ids": 7}, {"token_ids": None, "prompt_tokens": "many"}, {"y": 1}, {}])
async def test_parts_without_tokens_are_no_tokens_and_reach_their_reader(part: dict[str, Any]) -> None:
    class Odd(Countdown):
        def stream(self, item: Any) -> Iterator[dict[str, Any]]:
            yield part | {"n": 1}
            yield part | {"n": 2}

    told = Told()
    async with stepper_of(Generators(Odd().stream, 2), metrics=told.metrics) as stepper:
        assert [found["n"] async for found in stepper.open({})] == [1, 2]
        assert told(named.TIME_TO_FIRST_TOKEN) == 1
        assert told(named.TOKENS, "output") == told(named.TOKENS, "input") == told(named.INTER_TOKEN_LATENCY) == 0


async def test_a_stream_that_left_before_its_last_part_came_is_dropped_and_not_answered() -> None:
    told = Told()
    async with stepper_of(Words(), metrics=told.metrics) as stepper:
        stream = stepper.open(prompt(1))
        while not stepper.stats().ended:  # nothing is delivered while the event loop is held here
            pass
        stream.close()
        await stepper.drain()
        await asyncio.sleep(0)
        assert told(named.DROPPED, "cancelled", "running") == 1
        assert told(named.PHASE_DURATION, "compute") == 0


async def test_a_generator_that_is_held_for_its_reader_is_in_no_step() -> None:
    told, advanced = Told(), []

    def count(item: Any) -> Iterator[dict[str, Any]]:
        for number in range(int(item["x"])):
            advanced.append(number)
            yield {"y": number}
        advanced.append(None)

    async with stepper_of(Generators(count, 2), metrics=told.metrics, max_behind=2) as stepper:
        unread, read = stepper.open({"x": 9}), stepper.open({"x": 9})
        assert len([part async for part in read]) == 9
        assert len([part async for part in unread]) == 9
        await until(lambda: told.sum_of(named.BATCH_SIZE, "stream") == len(advanced) == 20)
