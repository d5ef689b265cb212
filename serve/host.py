"""One model, hosted: load, warm up, admit, batch, predict and report, whatever carries the requests."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.batching import Batcher
from serve.errors import (
    InvalidInput,
    LoadError,
    NotReady,
    Overloaded,
    PayloadTooLarge,
    PredictionFailed,
    RoundhouseError,
    SourceError,
)
from serve.models.base import Item, LoadContext, Model, Signature, SteppedModel
from serve.settings import Settings
from serve.spec import ModelSpec
from serve.stepping import Generators, Part, Stepper, Stream, WorkThread, failure, tell
from serve.telemetry.metrics import ReplicaMetrics
from serve.telemetry.page import Page
from serve.telemetry.passage import Passage
from serve.telemetry.tracing import BatchTrace, Tracer

_PREPARE_SLICE_S = 0.002
_WARM_STEPS = 4
_RETRY_AFTER_S = 2.0
_CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Phase:
    """How far a model is.

    Args:
        name: `queued`, `downloading`, `loading`, `warming`, `ready`, `draining` or `failed`.
        message: For people; for `failed`, why.
        done: Bytes or steps done, of `total`; 0 of 0 where unknown.
    """

    name: str
    message: str = ""
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class HostStats:
    """What a host holds and has done.

    Args:
        queued: Items and streams that wait.
        queued_bytes: Bytes of the items that wait, as told to `infer`.
        running: Items in the batch that runs, and streams in slots.
        batches: Batches and steps run.
        items: Items answered, failed ones included, and streams ended by the model.
        dropped: Items that were cancelled or expired before they reached the model.
        items_per_s: Items per second of a busy model, lately; None before the first batch.
    """

    queued: int = 0
    queued_bytes: int = 0
    running: int = 0
    batches: int = 0
    items: int = 0
    dropped: int = 0
    items_per_s: float | None = None


class _Row:
    """One item on its way through a model that prepares."""

    __slots__ = ("is_prepared", "value")

    def __init__(self, item: Item) -> None:
        self.value: Any = item
        self.is_prepared = False


class Host:
    """One model in this process; to be used from one event loop.

    The model's calls are made on one thread of its own, and preparation runs on a second one. They share the
    interpreter lock with the event loop, so a process that hosts a model should call `sys.setswitchinterval(0.0005)`:
    beside a busy loop, a model of many small operations then computes about a tenth more.

    Args:
        spec: The model's declaration.
        settings: Where caches are.
        model: In place of the one that the spec's task names; its source is then not fetched.
        base_dir: Folder against which a relative `file:` source is resolved; none takes the working directory.
        clock: Seconds.
        metrics: What it and whoever carries its requests record; without them nobody sees it.
        tracer: What records batches of requests that are recorded; None records none.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        settings: Settings,
        model: Model | SteppedModel | None = None,
        base_dir: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        metrics: ReplicaMetrics | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.spec = spec
        self._tracer = tracer
        self.metrics = metrics or ReplicaMetrics(Page.private("replica"))
        self._settings = settings
        self._model: Any = model
        self._base_dir = base_dir or Path.cwd()
        self._clock = clock
        self._phase = Phase("queued")
        self._entered_at = clock()
        self.metrics.load.entered("queued")
        self._thread = WorkThread(f"model-{spec.name}")
        self._preparer = WorkThread(f"prepare-{spec.name}")
        self._batcher: Batcher[Any, Mapping[str, Any]] | None = None
        self._stepper: Stepper | None = None

    @property
    def phase(self) -> str:
        """The name of the phase it is in."""
        return self._phase.name

    @property
    def signature(self) -> Signature:
        """What the model takes and gives; raises NotReady before it is loaded."""
        if self._batcher is None and self._stepper is None:
            raise self._not_ready()
        signature: Signature = self._model.signature
        return signature

    @property
    def is_alive(self) -> bool:
        """Return whether a loaded model is still asked and can still answer."""
        threads_run = self._thread.is_alive() and self._preparer.is_alive()
        return threads_run and not getattr(self._model, "broken", False)

    @property
    def streams(self) -> bool:
        """Whether the model answers in parts."""
        return self._stepper is not None

    # Loading

    async def load(self, on_phase: Callable[[Phase], None] | None = None) -> None:
        """Fetch the source, load the model and warm it up.

        Args:
            on_phase: Called on the event loop with every change.

        Raises:
            SourceError: The files could not be had.
            LoadError: The model did not load, or did not answer its example.
        """
        loop = asyncio.get_running_loop()
        began = self._clock()

        def say(phase: Phase) -> None:
            self._enter(phase)
            if on_phase is not None:
                on_phase(phase)

        def say_more(phase: Phase) -> None:
            if self._phase.name == phase.name:  # a model may go on telling after it has loaded
                say(phase)

        def progress_of(name: str) -> Callable[[str, int, int], None]:
            return lambda message, done, total: tell(loop, say_more, Phase(name, message, done, total))

        self._thread.start()
        self._preparer.start()
        try:
            await self._load(say, progress_of)
        except Exception as error:
            self.metrics.load.failed("source" if isinstance(error, SourceError) else "model")
            say(Phase("failed", _told(error)))
            self._end_threads()
            if isinstance(error, SourceError | LoadError):
                raise
            raise LoadError(_told(error)) from error
        self.metrics.load.loaded(self._clock() - began)
        say(Phase("ready"))

    def _enter(self, phase: Phase) -> None:
        before, self._phase = self._phase, phase
        if phase.name == before.name:
            return
        now = self._clock()
        self.metrics.load.spent(before.name, now - self._entered_at)
        self.metrics.load.entered(phase.name)
        self._entered_at = now

    async def _load(
        self, say: Callable[[Phase], None], progress_of: Callable[[str], Callable[[str, int, int], None]]
    ) -> None:
        if self._model is None:
            say(Phase("downloading", self.spec.source))
            source = await self._fetch(progress_of("downloading"))
        else:
            source = self._base_dir
        say(Phase("loading"))
        await self._thread.call(self._load_model, source, progress_of("loading"))
        say(Phase("warming"))
        await self._thread.call(self._warm_up, progress_of("warming"))
        self._start()

    async def _fetch(self, progress: Callable[[str, int, int], None]) -> Path:
        from serve.sources import fetch

        return await asyncio.to_thread(
            fetch,
            self.spec,
            settings=self._settings,
            base_dir=self._base_dir,
            progress=lambda done, total: progress(self.spec.source, done, total),
        )

    def _load_model(self, source: Path, progress: Callable[[str, int, int], None]) -> None:
        from serve.models import build
        from serve.models.devices import decide

        if self._model is None:
            self._model = build(self.spec)
        device, dtype = decide(self.spec)
        context = LoadContext(
            folder=source.parent if source.is_file() else source,
            file=source if source.is_file() else None,
            options=self.spec.task_options(),
            device=device,
            dtype=dtype,
            threads=max(1, int(self.spec.resources.cpus)),
            max_batch_size=self.spec.batching.max_batch_size,
            cache_dir=self._settings.cache_dir,
            progress=progress,
            gpus=self.spec.resources.gpus,
        )
        self._model.load(context)

    def _warm_up(self, progress: Callable[[str, int, int], None]) -> None:
        """Answer the example alone and in a full batch, so that no caller waits for what happens at a first time."""
        example = self._model.signature.example
        if example is None:
            return
        stepped = _is_stepped(self._model)
        sizes = sorted({1, self._model.slots if stepped else self.spec.batching.max_batch_size})
        for done, size in enumerate(sizes):
            progress(f"a batch of {size}", done, len(sizes))
            for error in (self._step_examples if stepped else self._predict_examples)(example, size):
                raise LoadError(f"the model fails on its own example: {_told(error)}") from error

    def _predict_examples(self, example: Item, size: int) -> list[Exception]:
        prepare = getattr(self._model, "prepare", None)
        results = self._predict([prepare(example) if prepare else example for _ in range(size)])
        if len(results) != size:
            return [PredictionFailed(f"predict returned {len(results)} results for {size} items")]
        return [result for result in results if isinstance(result, Exception)]

    def _step_examples(self, example: Item, size: int) -> list[Exception]:
        running = {self._model.admit(self._model.prepare(example)) for _ in range(size)}
        errors = []
        for _ in range(_WARM_STEPS):
            steps = self._model.step() if running else ()
            running -= {step.key for step in steps if step.done or step.error}
            errors += [step.error for step in steps if step.error]
        for key in running:
            self._model.release(key)
        return errors

    def _start(self) -> None:
        batching = self.spec.batching
        prepare = getattr(self._model, "prepare", None)
        stepped = _is_stepped(self._model)
        stream = getattr(self._model, "stream", None)
        if stepped or stream is not None:
            self._stepper = Stepper(
                self._model if stepped else Generators(stream, batching.max_batch_size),  # type: ignore[arg-type]
                thread=self._thread,
                preparer=self._preparer,
                prepare=prepare,
                max_queue=batching.max_queue,
                max_queue_bytes=batching.max_queue_bytes,
                clock=self._clock,
                metrics=self.metrics.streams,
            )
        if not stepped:
            self._batcher = Batcher(
                self._run_rows if prepare else self._run_items,
                max_batch_size=batching.max_batch_size,
                max_wait_s=batching.max_wait_ms / 1000,
                max_batch_cost=batching.max_batch_cost,
                padded=bool(getattr(self._model, "padded", False)),
                max_queue=batching.max_queue,
                max_queue_bytes=batching.max_queue_bytes,
                prepare=self._prepare_rows if prepare else None,
                clock=self._clock,
                metrics=self.metrics.items,
                tracer=self._tracer,
            )

    # Answering

    async def infer(
        self,
        items: Sequence[Item],
        *,
        timeout_s: float | None = None,
        size_bytes: int = 0,
        passage: Passage | None = None,
    ) -> list[Mapping[str, Any]]:
        """Answer the items of one request, one result an item, in order; cancelling drops what the model has not begun.

        Args:
            timeout_s: Seconds to the answer, at most the spec's `deadline_ms`.
            size_bytes: What the request counts for in `max_queue_bytes`.
            passage: Where the request's moments are noted.

        Raises:
            InvalidInput: An item is wrong; its place names the row.
            NotReady, Overloaded, DeadlineExceeded, PredictionFailed: See serve.errors.
        """
        if self._phase.name != "ready":
            self.metrics.items.rejected("not_ready", len(items))
            raise self._not_ready()
        self._check_size(len(items), size_bytes)
        deadline = self._deadline(timeout_s)
        if self._batcher is None:
            return await self._collect(items, deadline, size_bytes, passage)
        rows = [_Row(item) for item in items] if self._batcher.prepares else items
        results = await self._batcher.submit_many(rows, size_bytes=size_bytes, deadline=deadline, passage=passage)
        for row, result in enumerate(results):
            if isinstance(result, Exception):
                raise _of_row(failure(result), row, len(results))
        return results  # type: ignore[return-value]  # None is only beside an exception

    async def _collect(
        self, items: Sequence[Item], deadline: float, size_bytes: int, passage: Passage | None
    ) -> list[Mapping[str, Any]]:
        stepper = self._streaming()
        if len(items) > stepper.room():
            self.metrics.streams.rejected("queue_full", len(items))
            raise Overloaded(
                f"{len(items)} rows, and {stepper.room()} more may wait", retry_after_s=stepper.retry_after_s()
            )
        streams: list[Stream] = []

        async def answer(row: int) -> Mapping[str, Any]:
            try:
                return _joined(await streams[row].all_parts())
            except RoundhouseError as error:
                raise _of_row(error, row, len(items)) from error

        try:
            for row, item in enumerate(items):
                share = size_bytes // len(items) + (row < size_bytes % len(items))
                streams.append(stepper.open(item, size_bytes=share, deadline=deadline, whole=True, passage=passage))
            return [await answer(0)] if len(items) == 1 else await asyncio.gather(*map(answer, range(len(items))))
        finally:
            for stream in streams:
                stream.close()

    async def stream(
        self, item: Item, *, timeout_s: float | None = None, size_bytes: int = 0, passage: Passage | None = None
    ) -> AsyncIterator[Part]:
        """Answer one item in parts; closing or cancelling frees its slot within one step.

        Args:
            timeout_s: Seconds to the last part, at most the spec's `deadline_ms`.
            size_bytes: What the request counts for in `max_queue_bytes`.
            passage: Where its moments are noted.

        Raises what `infer` raises, before the first part or after some.
        """
        if self._phase.name != "ready":
            self.metrics.streams.rejected("not_ready", 1)
            raise self._not_ready()
        self._check_size(1, size_bytes)
        deadline = self._deadline(timeout_s)
        stream = self._streaming().open(item, size_bytes=size_bytes, deadline=deadline, passage=passage)
        try:
            async for part in stream:
                yield part
        finally:
            stream.close()

    def _streaming(self) -> Stepper:
        if self._stepper is None:
            raise InvalidInput(f"model {self.spec.name!r} does not answer in parts")
        return self._stepper

    def _deadline(self, timeout_s: float | None) -> float:
        longest = self.spec.deadline_ms / 1000
        return self._clock() + (longest if timeout_s is None else min(timeout_s, longest))

    def _check_size(self, items: int, size_bytes: int) -> None:
        most = min(self.spec.limits.max_items, self.spec.batching.max_queue)
        if items > most:
            raise PayloadTooLarge(f"{items} rows in one request; model {self.spec.name!r} takes at most {most}")
        if size_bytes > self.spec.batching.max_queue_bytes:
            raise PayloadTooLarge(
                f"{size_bytes} bytes in one request; model {self.spec.name!r} takes at most"
                f" {self.spec.batching.max_queue_bytes}"
            )

    def _not_ready(self) -> NotReady:
        reason = f": {self._phase.message}" if self._phase.message else ""
        return NotReady(
            f"model {self.spec.name!r} is {self._phase.name}{reason}",
            phase=self._phase.name,
            retry_after_s=_RETRY_AFTER_S,
        )

    # On the threads

    def _run_items(self, items: Sequence[Item]) -> asyncio.Future[Sequence[Mapping[str, Any] | Exception]]:
        return self._thread.call(self._predict, items)

    def _run_rows(self, rows: Sequence[_Row]) -> asyncio.Future[Sequence[Mapping[str, Any] | Exception]]:
        return self._thread.call(self._predict_rows, rows)

    def _prepare_rows(self, rows: Sequence[_Row]) -> asyncio.Future[Sequence[int | Exception]]:
        return self._preparer.call(self._prepare_some, rows)

    def _prepare_some(self, rows: Sequence[_Row]) -> list[int | Exception]:
        """Prepare rows until a slice of time is over, so that the model can begin with the first of slow ones."""
        end = time.perf_counter() + _PREPARE_SLICE_S
        costs: list[int | Exception] = []
        for row in rows:
            costs.append(self._prepare(row))
            if time.perf_counter() > end:
                break
        return costs

    def _prepare(self, row: _Row) -> int | Exception:
        """Prepare one row in place and return its cost, or what it raised."""
        cost = getattr(self._model, "cost", None)
        try:
            prepared = self._model.prepare(row.value)
            priced = int(cost(prepared)) if cost else 1
        except BaseException as error:
            return error if isinstance(error, Exception) else failure(error)
        row.value, row.is_prepared = prepared, True
        return priced

    def _predict_rows(self, rows: Sequence[_Row]) -> Sequence[Mapping[str, Any] | Exception]:
        failed = {
            index: cost
            for index, row in enumerate(rows)
            if not row.is_prepared and isinstance(cost := self._prepare(row), Exception)
        }
        if not failed:
            return self._predict([row.value for row in rows])
        good = [row.value for index, row in enumerate(rows) if index not in failed]
        results = self._predict(good) if good else ()
        if len(results) != len(good):
            told = f"predict returned {len(results)} results for {len(good)} items"
            results = [PredictionFailed(told) for _ in good]
        answers = iter(results)
        return [failed[index] if index in failed else next(answers) for index in range(len(rows))]

    def _predict(self, batch: Sequence[Any]) -> Sequence[Mapping[str, Any] | Exception]:
        running = self._tracer.running if self._tracer is not None else None
        results = self._model.predict(batch) if running is None else self._predict_within(running, batch)
        if not isinstance(results, Sequence):
            raise TypeError(f"predict returned {type(results).__name__}, not a list with a result for each item")
        return [
            result
            if isinstance(result, Mapping | Exception)
            else TypeError(f"predict returned {type(result).__name__} for an item, not its outputs by name")
            for result in results
        ]

    def _predict_within(self, running: BatchTrace, batch: Sequence[Any]) -> Any:
        """Have the spans of a model's own code belong to its batch."""
        from serve.telemetry.otel import within

        with within(running.ids):
            return self._model.predict(batch)

    # Ending

    def stats(self) -> HostStats:
        """Return what it holds and has done, as of now."""
        batched = self._batcher.stats() if self._batcher else None
        stepped = self._stepper.stats() if self._stepper else None
        return HostStats(
            queued=(batched.queued if batched else 0) + (stepped.queued if stepped else 0),
            queued_bytes=(batched.queued_bytes if batched else 0) + (stepped.queued_bytes if stepped else 0),
            running=(batched.running if batched else 0) + (stepped.running if stepped else 0),
            batches=(batched.batches if batched else 0) + (stepped.steps if stepped else 0),
            items=(batched.items if batched else 0) + (stepped.ended if stepped else 0),
            dropped=batched.dropped if batched else 0,
            items_per_s=batched.items_per_s if batched else None,
        )

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and wait until the accepted ones are answered, or `timeout_s` are over."""
        self._enter(Phase("draining"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                if self._batcher is not None:
                    await self._batcher.drain()
                if self._stepper is not None:
                    await self._stepper.drain()

    async def close(self) -> None:
        """Fail what is not answered, give back what the model took, and end the threads after what they compute now."""
        self._enter(Phase("draining"))
        if self._batcher is not None:
            await self._batcher.close()
        if self._stepper is not None:
            await self._stepper.close()
        close = getattr(self._model, "close", None)
        is_loaded = self._batcher is not None or self._stepper is not None
        if close is not None and is_loaded:
            with contextlib.suppress(Exception):  # nothing can be done about a model that does not let go
                await asyncio.wait_for(self._thread.call(close), _CLOSE_TIMEOUT_S)
        self._end_threads()

    def _end_threads(self) -> None:
        self._thread.close()
        self._preparer.close()


def _is_stepped(model: Any) -> bool:
    return all(hasattr(model, method) for method in ("admit", "step", "release"))


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, RoundhouseError) else f"{type(error).__name__}: {error}"


def _of_row(error: Exception, row: int, rows: int) -> Exception:
    """Return an error that names the row it is about."""
    if not isinstance(error, InvalidInput) or (rows == 1 and error.place):
        return error
    place = f"inputs row {row}" + (f", {error.place}" if error.place else "")
    return type(error)(error.message, place=place)


def _joined(parts: Sequence[Part]) -> Mapping[str, Any]:
    """Return the parts of a stream as one result: text and tokens joined, of the rest the last."""
    result: dict[str, Any] = {}
    try:
        for part in parts:
            result.update(part)
        if "text" in result:
            result["text"] = "".join(part.get("text", "") for part in parts)
        if "token_ids" in result:
            result["token_ids"] = [token for part in parts for token in part.get("token_ids", ())]
    except (TypeError, ValueError) as error:
        raise failure(error) from error
    return result
