"""A hosted model loads, answers, refuses and ends, with nothing around it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.errors import (
    DeadlineExceeded,
    InvalidInput,
    LoadError,
    NotReady,
    Overloaded,
    PayloadTooLarge,
    PredictionFailed,
    SourceError,
)
from serve.host import Host, Phase
from serve.models.base import LoadContext, Step
from serve.settings import Settings
from serve.telemetry.metrics import ReplicaMetrics
from tests.scraping import Scrape
from tests.toys import Countdown, Echo, Poison, Prepared, Slow, Words, spec


def rows(*numbers: float) -> list[dict[str, Any]]:
    return [{"x": np.float32(number)} for number in numbers]


def ys(results: Sequence[Any]) -> list[float]:
    return [float(result["y"]) for result in results]


def unready(model: Any, **fields: Any) -> Host:
    return Host(spec(**fields), settings=Settings(), model=model)


@contextlib.asynccontextmanager
async def hosted(model: Any, **fields: Any) -> AsyncIterator[Host]:
    host = unready(model, **fields)
    await host.load()
    for log in ("batches", "prepared", "admitted"):
        getattr(model, log, []).clear()
    try:
        yield host
    finally:
        await host.close()


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def test_loads_warms_up_and_answers_on_one_thread_of_its_own() -> None:
    model = Echo()
    host = unready(model, batching={"max_batch_size": 3})
    assert host.phase == "queued"
    with pytest.raises(NotReady) as refused:
        await host.infer(rows(1))
    assert refused.value.phase == "queued"
    phases: list[Phase] = []
    await host.load(phases.append)
    names = [phase.name for phase in phases]
    assert list(dict.fromkeys(names)) == ["loading", "warming", "ready"]
    assert model.batches == [[1.0], [1.0, 1.0, 1.0]]
    assert host.phase == "ready"
    assert host.signature is model.signature
    assert ys(await host.infer(rows(3, 4, 5, 6))) == [3, 4, 5, 6]
    assert model.threads == {"model-toy"}
    assert not host.streams
    await host.close()
    await until(lambda: "model-toy" not in {thread.name for thread in threading.enumerate()})


async def test_load_gives_the_model_its_context(tmp_path: Path) -> None:
    seen: list[LoadContext] = []

    class Curious(Echo):
        def load(self, context: LoadContext) -> None:
            seen.append(context)
            context.progress("unpacking", 3, 4)

    phases: list[Phase] = []
    declared = spec(resources={"cpus": 2.0}, batching={"max_batch_size": 7})
    host = Host(declared, settings=Settings(cache_dir=tmp_path), model=Curious())
    await host.load(phases.append)
    assert Phase("loading", "unpacking", 3, 4) in phases
    assert (seen[0].threads, seen[0].max_batch_size, seen[0].device, seen[0].cache_dir) == (2, 7, "cpu", tmp_path)
    assert seen[0].options == declared.task_options()
    await host.close()


@pytest.mark.parametrize("names_a_file", [True, False])
async def test_source_is_fetched_and_the_model_gets_its_folder_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names_a_file: bool
) -> None:
    seen: list[LoadContext] = []

    class Curious(Echo):
        def load(self, context: LoadContext) -> None:
            seen.append(context)

    monkeypatch.setattr("serve.models.build", lambda spec: Curious())
    (tmp_path / "toy.py").touch()
    declared = spec(source="file:toy.py" if names_a_file else f"file:{tmp_path}")
    host = Host(declared, settings=Settings(cache_dir=tmp_path / "cache"), base_dir=tmp_path)
    phases: list[Phase] = []
    await host.load(phases.append)
    assert phases[0] == Phase("downloading", declared.source)
    assert seen[0].folder.resolve() == tmp_path.resolve()
    assert seen[0].file == (seen[0].folder / "toy.py" if names_a_file else None)
    await host.close()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"load": lambda self, context: 1 / 0}, "ZeroDivisionError"),
        ({"predict": lambda self, batch: [ValueError("no")] * len(batch)}, "its own example: ValueError: no"),
        ({"predict": lambda self, batch: None}, "predict returned NoneType"),
        ({"predict": lambda self, batch: []}, "predict returned 0 results for 1 items"),
    ],
)
async def test_model_that_does_not_load_or_warm_up_fails_the_load(broken: dict[str, Any], message: str) -> None:
    host = unready(type("Broken", (Echo,), broken)())
    phases: list[Phase] = []
    with pytest.raises(LoadError, match=message):
        await host.load(phases.append)
    assert phases[-1].name == host.phase == "failed"
    with pytest.raises(NotReady, match=message) as refused:
        await host.infer(rows(1))
    assert refused.value.phase == "failed"
    await host.close()


async def test_missing_source_is_a_source_error(tmp_path: Path) -> None:
    host = Host(spec(source="file:absent.py"), settings=Settings(cache_dir=tmp_path), base_dir=tmp_path)
    with pytest.raises(SourceError, match=r"absent\.py"):
        await host.load()
    assert host.phase == "failed"


async def test_requests_that_come_while_the_model_is_busy_leave_together() -> None:
    model = Slow()
    async with hosted(model, batching={"max_batch_size": 8}) as host:
        model.go.clear()
        model.started.clear()
        first = asyncio.create_task(host.infer(rows(1)))
        await until(model.started.is_set)
        rest = [asyncio.create_task(host.infer(rows(number, number + 1))) for number in (2, 4, 6)]
        await asyncio.sleep(0)
        stats = host.stats()
        assert (stats.queued, stats.running) == (6, 1)
        model.go.set()
        assert [ys(result) for result in await asyncio.gather(first, *rest)] == [[1], [2, 3], [4, 5], [6, 7]]
        assert model.batches == [[1], [2, 3, 4, 5, 6, 7]]
        assert host.stats().items == 7


async def test_cancelled_request_never_reaches_the_model() -> None:
    model = Slow()
    async with hosted(model) as host:
        model.go.clear()
        model.started.clear()
        running = asyncio.create_task(host.infer(rows(1)))
        await until(model.started.is_set)
        left = asyncio.create_task(host.infer(rows(2), size_bytes=10))
        last = asyncio.create_task(host.infer(rows(3), size_bytes=10))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.wait([left])
        assert (host.stats().queued, host.stats().queued_bytes) == (1, 10)
        model.go.set()
        await asyncio.gather(running, last)
        assert model.batches == [[1], [3]]


@pytest.mark.parametrize(("deadline_ms", "timeout_s"), [(300.0, None), (300.0, 60.0), (60_000.0, 0.3)])
async def test_deadline_is_the_sooner_of_the_request_s_and_the_model_s(
    deadline_ms: float, timeout_s: float | None
) -> None:
    model = Slow()
    async with hosted(model, deadline_ms=deadline_ms) as host:
        model.go.clear()
        model.started.clear()
        running = asyncio.create_task(host.infer(rows(1), timeout_s=timeout_s))
        await until(model.started.is_set)
        waiting = asyncio.create_task(host.infer(rows(2), timeout_s=timeout_s))
        async with asyncio.timeout(10):
            for late in (running, waiting):
                with pytest.raises(DeadlineExceeded):
                    await late
        model.go.set()
    await until(lambda: "model-toy" not in {thread.name for thread in threading.enumerate()})
    assert model.batches == [[1]]


async def test_limits_of_a_request_and_of_the_queue() -> None:
    model = Slow()
    batching = {"max_queue": 3, "max_queue_bytes": 100}
    async with hosted(model, batching=batching, limits={"max_items": 2}) as host:
        with pytest.raises(PayloadTooLarge, match="3 rows"):
            await host.infer(rows(1, 2, 3))
        with pytest.raises(PayloadTooLarge, match="101 bytes"):
            await host.infer(rows(1), size_bytes=101)
        model.go.clear()
        model.started.clear()
        running = asyncio.create_task(host.infer(rows(1)))
        await until(model.started.is_set)
        queued = [asyncio.create_task(host.infer(rows(1, 2), size_bytes=60))]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="bytes"):
            await host.infer(rows(1), size_bytes=60)
        with pytest.raises(Overloaded, match="2 items wait") as refused:
            await host.infer(rows(1, 2))
        assert refused.value.retry_after_s > 0
        model.go.set()
        await asyncio.gather(running, *queued)


async def test_bad_item_of_a_batch_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = Poison()
    async with hosted(model, batching={"max_batch_size": 8}) as host:
        with caplog.at_level(logging.ERROR):
            results = await asyncio.gather(
                *(host.infer(rows(*numbers)) for numbers in ([1, 2], [3, -4], [5], [101], [6])), return_exceptions=True
            )
    assert [ys(results[index]) for index in (0, 2, 4)] == [[1, 2], [5], [6]]  # type: ignore[arg-type]
    assert isinstance(results[1], PredictionFailed) and str(results[1]) == "ValueError: negative"
    assert isinstance(results[3], PredictionFailed) and str(results[3]) == "ArithmeticError: too large"
    logged = [record.exc_info[0] for record in caplog.records if record.exc_info]
    assert sorted(kind.__name__ for kind in logged if kind) == ["ArithmeticError", "ValueError"], "once each"


async def test_preparation_runs_beside_the_model_and_names_the_row_that_it_refuses() -> None:
    model = Prepared()
    async with hosted(model, batching={"max_batch_size": 8, "max_batch_cost": 64}) as host:
        assert ys(await host.infer(rows(7))) == [14]
        results = await asyncio.gather(
            host.infer(rows(1, 2, 3)), host.infer(rows(4, 0, 6)), host.infer(rows(0)), return_exceptions=True
        )
    assert ys(results[0]) == [2, 4, 6]  # type: ignore[arg-type]
    assert isinstance(results[1], InvalidInput) and results[1].place == "inputs row 1, x"
    assert isinstance(results[2], InvalidInput) and results[2].place == "x"
    assert model.threads == {"model-toy", "prepare-toy"}


async def test_lone_request_is_prepared_and_predicted_in_one_call() -> None:
    model = Prepared()
    async with hosted(model, batching={"max_batch_size": 8}) as host:
        for number in (3, 5):
            assert ys(await host.infer(rows(number))) == [number * 2]
        with pytest.raises(InvalidInput):
            await host.infer(rows(0))
    assert model.batches == [[6], [10]]
    assert model.threads == {"model-toy"}


async def test_refused_and_failing_items_in_one_unprepared_batch_do_not_mix() -> None:
    class Touchy(Prepared):
        padded = False

        def predict(self, batch: Sequence[Any]) -> Any:
            if any(item["x"] < 0 for item in batch):
                raise ValueError("negative")
            return super().predict(batch)

    model = Touchy()
    async with hosted(model, batching={"max_batch_size": 8}) as host:
        results = await asyncio.gather(
            *(host.infer(rows(number)) for number in (1, 0, 2, -1, 3)), return_exceptions=True
        )
    assert [ys(results[index]) for index in (0, 2, 4)] == [[2], [4], [6]]  # type: ignore[arg-type]
    assert isinstance(results[1], InvalidInput)
    assert isinstance(results[3], PredictionFailed)
    assert sorted(set(model.prepared)) == [-1, 0, 1, 2, 3]
    assert [model.prepared.count(number) for number in (1, 2, 3, -1)] == [1, 1, 1, 1], "nothing is prepared twice"


async def test_wrong_count_beside_a_refused_item_fails_all_that_were_computed() -> None:
    class Forgetful(Prepared):
        padded = False

        def predict(self, batch: Sequence[Any]) -> Any:
            return list(super().predict(batch))[: 1 if len(batch) == 3 else len(batch)]

    async with hosted(Forgetful(), batching={"max_batch_size": 8}) as host:
        results = await asyncio.gather(*(host.infer(rows(number)) for number in (1, 0, 2, 3)), return_exceptions=True)
    assert isinstance(results[1], InvalidInput)
    for index in (0, 2, 3):
        assert isinstance(results[index], PredictionFailed), "which of them the one result is of, nobody knows"
        assert "1 results for 3 items" in str(results[index])


async def test_no_more_is_prepared_than_the_next_batches_need() -> None:
    class Held(Prepared):
        def __init__(self) -> None:
            super().__init__()
            self.go, self.started = threading.Event(), threading.Event()
            self.go.set()

        def predict(self, batch: Sequence[Any]) -> Any:
            self.started.set()
            self.go.wait(10)
            return super().predict(batch)

    model = Held()
    async with hosted(model, batching={"max_batch_size": 4}) as host:
        model.go.clear()
        model.started.clear()
        first = asyncio.create_task(host.infer(rows(1)))
        await until(model.started.is_set)
        rest = [asyncio.create_task(host.infer(rows(number))) for number in range(2, 1000)]
        await until(lambda: len(model.prepared) >= 4)
        seen = -1
        while seen != len(model.prepared):  # it stands still once enough is ready
            seen = len(model.prepared)
            for _ in range(20):
                await asyncio.sleep(0.002)
        assert seen < 300
        model.go.set()
        assert [ys(result) for result in await asyncio.gather(first, *rest)] == [[2 * n] for n in range(1, 1000)]


async def test_progress_told_after_the_load_does_not_bring_the_phase_back() -> None:
    class Chatty(Echo):
        def load(self, context: LoadContext) -> None:
            self.progress = context.progress

        def predict(self, batch: Sequence[Any]) -> Any:
            self.progress("still unpacking", 1, 2)
            return super().predict(batch)

    async with hosted(Chatty()) as host:
        assert ys(await host.infer(rows(1))) == [1]
        await asyncio.sleep(0)
        assert host.phase == "ready"
        assert ys(await host.infer(rows(2))) == [2]


async def test_close_ends_a_load_that_is_under_way() -> None:
    held, loading = threading.Event(), threading.Event()

    class Waits(Echo):
        def load(self, context: LoadContext) -> None:
            loading.set()
            held.wait(10)

    host = unready(Waits())
    load = asyncio.create_task(host.load())
    await until(loading.is_set)
    await host.close()
    held.set()
    with pytest.raises(LoadError, match="shutting down"):
        await load


async def test_stepped_parts_that_are_no_text_are_joined_or_refused() -> None:
    class Counts(Words):
        def step(self) -> Any:
            return [Step(step.key, {"text": 7}, done=step.done) for step in super().step()]

    class Plain(Words):
        def step(self) -> Any:
            return [Step(step.key, {"count": 7}, done=step.done) for step in super().step()]

    async with hosted(Plain()) as host:
        assert await host.infer([{"prompt": b"2"}]) == [{"count": 7}]
    host = unready(Counts())
    await host.load()
    with pytest.raises(PredictionFailed, match="TypeError"):
        await host.infer([{"prompt": b"2"}])
    await host.close()


@pytest.mark.parametrize(
    ("answer", "message"),
    [(lambda batch: [], "0 results for 1"), (lambda batch: [7], "returned int for an item"), (lambda batch: 7, "int")],
)
async def test_model_that_breaks_its_contract_is_a_failed_prediction(answer: Any, message: str) -> None:
    model = Echo()
    async with hosted(model) as host:
        model.predict = answer  # type: ignore[method-assign]
        with pytest.raises(PredictionFailed, match=message):
            await host.infer(rows(1))
        del model.predict
        assert ys(await host.infer(rows(2))) == [2]


async def test_generator_of_a_plain_model_streams() -> None:
    async with hosted(Countdown(), batching={"max_batch_size": 2}) as host:
        assert host.streams
        assert [part["y"] async for part in host.stream(rows(3)[0])] == [3, 2, 1]
        with pytest.raises(PredictionFailed, match="negative"):
            await anext(aiter(host.stream(rows(-1)[0])))
        assert ys(await host.infer(rows(3))) == [3]


async def test_model_without_parts_does_not_stream() -> None:
    async with hosted(Echo()) as host:
        with pytest.raises(InvalidInput, match="does not answer in parts"):
            await anext(aiter(host.stream(rows(3)[0])))


async def test_stepped_model_streams_and_answers_whole() -> None:
    model = Words(slots=2)
    async with hosted(model) as host:
        assert [part["text"] async for part in host.stream({"prompt": b"3"})] == ["w0 ", "w1 ", "w2 "]
        results = await host.infer([{"prompt": b"3"}, {"prompt": b"1"}, {"prompt": b"4"}])
        assert [result["text"] for result in results] == ["w0 w1 w2 ", "w0 ", "w0 w1 w2 w3 "]
        assert results[0] == {
            "text": "w0 w1 w2 ", "token_ids": [0, 1, 2], "finish_reason": "stop", "prompt_tokens": 1,
            "completion_tokens": 3,
        }  # fmt: skip
        with pytest.raises(InvalidInput) as wrong:
            await host.infer([{"prompt": b"1000000000"}, {"prompt": b"x"}])
        assert wrong.value.place == "inputs row 1, prompt"
        await until(lambda: not model.active)


async def test_closing_a_stream_frees_its_slot() -> None:
    model = Words(slots=1)
    async with hosted(model) as host:
        parts = host.stream({"prompt": b"100000"})
        assert (await anext(aiter(parts)))["text"] == "w0 "
        await parts.aclose()  # type: ignore[attr-defined]
        assert [part["text"] async for part in host.stream({"prompt": b"1"})] == ["w0 "]
        reading = asyncio.create_task(host.infer([{"prompt": b"100000"}]))
        await until(lambda: model.active)
        reading.cancel()
        await asyncio.wait([reading])
        await until(lambda: not model.active)


async def test_drain_answers_what_was_accepted_and_close_fails_the_rest() -> None:
    model = Slow()
    async with hosted(model) as host:
        model.go.clear()
        accepted = asyncio.create_task(host.infer(rows(1)))
        await asyncio.sleep(0)
        await host.drain(0.01)
        assert host.phase == "draining"
        with pytest.raises(NotReady) as refused:
            await host.infer(rows(2))
        assert refused.value.phase == "draining"
        model.go.set()
        await host.drain(10)
        assert accepted.done() and ys(accepted.result()) == [1]
    async with hosted(model) as host:
        model.go.clear()
        left = asyncio.create_task(host.infer(rows(1)))
        await asyncio.sleep(0)
        await host.close()
        with pytest.raises(NotReady):
            await left
        model.go.set()


def test_importing_the_host_imports_nothing_heavy() -> None:
    heavy = "torch", "ray", "fastapi", "starlette", "transformers"
    code = f"import sys, serve.host; print([name for name in {heavy!r} if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


async def test_closing_waits_for_what_the_model_gives_back():
    closed = []

    class Holding(Echo):
        def close(self) -> None:
            closed.append(True)

    host = Host(spec(), settings=Settings(), model=Holding())
    await host.load()
    await host.close()
    assert closed == [True]


async def test_closing_what_never_loaded_ends():
    class Failing(Echo):
        def load(self, context: object) -> None:
            raise ValueError("no weights")

        def close(self) -> None: ...

    host = Host(spec(), settings=Settings(), model=Failing())
    with pytest.raises(LoadError):
        await host.load()
    await host.close()


async def test_metrics_tell_how_it_loads_and_which_phase_it_is_in(tmp_path: Path) -> None:
    told: list[dict[str, float]] = []
    now = 10.0

    class Watched(Echo):
        def load(self, context: LoadContext) -> None:
            nonlocal now
            told.append(Scrape(tmp_path).nonzero("model_phase", "phase"))
            context.progress("weights", 1, 2)
            now += 4

        def predict(self, batch: Sequence[Any]) -> Sequence[Any]:
            nonlocal now
            now += 1
            return super().predict(batch)

    metrics = ReplicaMetrics.of("toy", folder=tmp_path)
    host = Host(spec(), settings=Settings(), model=Watched(), metrics=metrics, clock=lambda: now)
    assert Scrape(tmp_path).nonzero("model_phase", "phase") == {"queued": 1}
    with pytest.raises(NotReady):
        await host.infer(rows(1, 2))
    await host.load()
    scrape = Scrape(tmp_path)
    assert told == [{"loading": 1}]
    assert scrape.nonzero("model_phase", "phase") == {"ready": 1}
    assert scrape.nonzero("model_load_phase_duration_seconds_sum", "phase") == {"loading": 4, "warming": 1}
    assert scrape.nonzero("model_load_phase_duration_seconds_count", "phase") == {"loading": 1, "warming": 1}
    assert (scrape("cold_starts_total"), scrape("cold_start_duration_seconds_sum")) == (1, 5)
    assert scrape("rejected_total", reason="not_ready") == 2
    await host.close()
    assert Scrape(tmp_path).nonzero("model_phase", "phase") == {"draining": 1}


@pytest.mark.parametrize(("source", "reason"), [("file:absent", "source"), ("file:.", "model")])
async def test_metrics_tell_why_a_load_failed(tmp_path: Path, source: str, reason: str) -> None:
    metrics = ReplicaMetrics.of("toy", folder=tmp_path / "metrics")
    host = Host(spec(source=source), settings=Settings(), base_dir=tmp_path, metrics=metrics)
    with pytest.raises((SourceError, LoadError)):
        await host.load()
    scrape = Scrape(tmp_path / "metrics")
    assert scrape.nonzero("model_load_failures_total", "reason") == {reason: 1}
    assert scrape.nonzero("model_phase", "phase") == {"failed": 1}
    assert scrape("cold_starts_total") == 0
