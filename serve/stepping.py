"""Streams computed together: what continuous batching needs between a stepped model's thread and the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

from serve.errors import Cancelled, DeadlineExceeded, NotReady, Overloaded, PredictionFailed, RoundhouseError
from serve.models.base import Item, Step, SteppedModel
from serve.telemetry.metrics import WorkMetrics
from serve.telemetry.passage import Passage

X = TypeVar("X")
Part = Mapping[str, Any]

logger = logging.getLogger(__name__)


def failure(error: BaseException, *, batch_size: int | None = None) -> RoundhouseError:
    """Return what the caller sees of an exception: ours as it is; the model's own by type and text, and logged here.

    Args:
        batch_size: Of what it ended, where that was more than the request that this code runs for.
    """
    if isinstance(error, RoundhouseError):
        return error
    logger.error("the model raised", exc_info=error, extra={} if batch_size is None else {"batch_size": batch_size})
    try:
        text = str(error)
    except Exception as nested:
        text = f"its text cannot be told ({type(nested).__name__})"
    return PredictionFailed(f"{type(error).__name__}: {text}" if text else type(error).__name__)


class WorkThread:
    """A thread that runs what it is given, in order; a dedicated queue costs a third of what an executor does."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._is_closed = False

    def start(self) -> None:
        """Begin with what has been posted."""
        self._thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException:  # a model may call sys.exit(), and a library may panic
                logger.exception("a job of thread %s raised", self._thread.name)

    def post(self, job: Callable[[], None]) -> None:
        """Run `job` after what was posted before it; what it raises is only logged."""
        self._jobs.put(job)

    def call(self, function: Callable[..., X], *args: Any) -> asyncio.Future[X]:
        """Run `function(*args)` on the thread; a call whose future is cancelled before it starts does not run.

        Raises:
            NotReady: The thread was closed.
        """
        if self._is_closed:
            raise NotReady("the model is shutting down", phase="draining", retry_after_s=1.0)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[X] = loop.create_future()

        def job() -> None:
            if future.cancelled():
                return
            try:
                result = function(*args)
            except BaseException as error:
                tell(loop, _fail, future, error)
            else:
                tell(loop, _answer, future, result)

        self._jobs.put(job)
        return future

    def is_alive(self) -> bool:
        """Return whether it runs what is posted."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End the thread after what was posted before."""
        self._is_closed = True
        self._jobs.put(None)


def tell(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    """Have the event loop call a function; nobody is left to be told once the loop is closed."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        logger.debug("the event loop is closed")


def _answer(future: asyncio.Future[X], result: X) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        # A future does not take StopIteration, and SystemExit would end the event loop.
        takes = isinstance(error, Exception) and not isinstance(error, StopIteration)
        future.set_exception(error if takes else failure(error))


class Generators:
    """A model with a plain `stream(prepared)` as a stepped one: a step advances each running generator by one part."""

    def __init__(self, stream: Callable[[Any], Iterator[Part]], slots: int) -> None:
        self.slots = slots
        self.held: set[int] = set()
        self._stream = stream
        self._keys = itertools.count()
        self._running: dict[int, Iterator[Part]] = {}

    def admit(self, prepared: Any) -> int:
        """Start a generator."""
        key = next(self._keys)
        self._running[key] = iter(self._stream(prepared))
        return key

    def step(self) -> Sequence[Step]:
        """Advance every generator that is not held."""
        return [self._advance(key) for key in list(self._running) if key not in self.held]

    def _advance(self, key: int) -> Step:
        try:
            return Step(key, dict(next(self._running[key])))
        except StopIteration:
            del self._running[key]
            return Step(key, None, done=True)
        except BaseException as error:
            del self._running[key]
            return Step(key, None, done=True, error=error if isinstance(error, Exception) else failure(error))

    def release(self, key: int) -> None:
        """Close a generator, which runs its `finally`."""
        generator = self._running.pop(key)
        close = getattr(generator, "close", None)
        if close is not None:
            close()


class Stream:
    """The event loop's end of one stream; it has one reader."""

    def __init__(
        self,
        stepper: Stepper,
        item: Item,
        *,
        whole: bool,
        size_bytes: int,
        opened_at: float,
        passage: Passage | None = None,
    ) -> None:
        self.item: Item | None = item
        self.passage = passage
        self.context = contextvars.copy_context()  # the log's lines about it have its request's identifiers
        self.size_bytes = size_bytes
        self.prepared: Any = None
        self.whole = whole
        self.key: int | None = None
        self.waiting = True
        self.left = False
        self.opened_at = opened_at
        self.prepare_s = 0.0
        self.admitted_at = 0.0
        self.last_part_at = 0.0
        self.sent = 0
        self.read = 0
        self.timer: asyncio.TimerHandle | None = None
        self._stepper = stepper
        self._parts: deque[Part] = deque()
        self._ended = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Part:
        while not self._parts:
            if self._ended:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            await self._wait()
        self.read += 1
        self._stepper.was_read(self)
        return self._parts.popleft()

    async def all_parts(self) -> list[Part]:
        """Return every part once the stream has ended; raises what ended it early."""
        while not self._ended:
            await self._wait()
        if self._error is not None:
            raise self._error
        return list(self._parts)

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def close(self) -> None:
        """Leave: the slot is free within one step. Does nothing to a stream that has ended."""
        self.end(None)
        self._stepper.leave(self)

    def put(self, part: Part) -> int:
        """Take one part and return how many wait for the reader."""
        if not self._ended:
            self._parts.append(part)
            if not self.whole:
                self._wake()
        return len(self._parts)

    def end(self, error: Exception | None) -> None:
        """Let no more follow; the reader gets what waits and then the error."""
        if self._ended:
            return
        self._ended, self._error = True, error
        if self.timer is not None:
            self.timer.cancel()
        self._wake()

    @property
    def ended(self) -> bool:
        """No more follows."""
        return self._ended

    @property
    def error(self) -> Exception | None:
        """What ended it early."""
        return self._error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclass(frozen=True, slots=True)
class StepperStats:
    """Streams that wait and their bytes, streams in slots, steps run, and streams that their model ended."""

    queued: int
    queued_bytes: int
    running: int
    steps: int
    ended: int


#: A stream, a part of its answer, whether it is the end, and the error that it ends with.
_Delivery = tuple[Stream, Part | None, bool, Exception | None]


class Stepper:
    """Drives a stepped model on its thread: release who left, admit who waits, step, deliver.

    Each turn is one job of the thread, so that other work of the model runs between two steps.

    Args:
        model: Its methods are called on `thread` only.
        prepare: Called on `preparer` with the item; None leaves it as it is.
        max_queue: Streams that may wait for a slot.
        max_queue_bytes: Bytes that they may have, as told to `open`.
        max_behind: Parts that may wait for their reader; then a generator pauses, and a stream of a stepped model,
            which cannot pause, ends with Cancelled.
        metrics: What it records; without them nobody sees it.
    """

    def __init__(
        self,
        model: SteppedModel | Generators,
        *,
        thread: WorkThread,
        preparer: WorkThread,
        prepare: Callable[[Item], Any] | None,
        max_queue: int = 1024,
        max_queue_bytes: int = 2**28,
        max_behind: int = 1024,
        clock: Callable[[], float] = time.monotonic,
        metrics: WorkMetrics | None = None,
    ) -> None:
        self._model = model
        self._pausable = model if isinstance(model, Generators) else None
        self._thread = thread
        self._preparer = preparer
        self._prepare = prepare
        self._max_queue = max_queue
        self._max_queue_bytes = max_queue_bytes
        self._max_behind = max_behind
        self._clock = clock
        self._metrics = metrics or WorkMetrics.private("stream")
        self._loop = asyncio.get_running_loop()

        self._lock = threading.Lock()
        self._turn_is_due = False
        self._news = False  # something changed since the turn began
        self._arrivals: deque[Stream] = deque()
        self._leavers: deque[Stream] = deque()
        self._active: dict[int, Stream] = {}  # the model's thread only
        self._open: set[Stream] = set()  # the event loop only
        self._queued = self._queued_bytes = 0
        self._steps = 0
        self._ended = 0
        self._stream_s = 1.0
        self._closing = False
        self._idle: asyncio.Future[None] | None = None

    # On the event loop

    def open(
        self,
        item: Item,
        *,
        size_bytes: int = 0,
        deadline: float | None = None,
        whole: bool = False,
        passage: Passage | None = None,
    ) -> Stream:
        """Queue a stream.

        Args:
            size_bytes: What it counts for in `max_queue_bytes`.
            deadline: On the clock; the stream then ends with DeadlineExceeded.
            whole: The reader wants `all_parts` at the end and is not woken before.
            passage: Where the request's moments are noted.

        Raises:
            Overloaded: Too many streams wait, or too many bytes of them.
            NotReady: `drain` or `close` was called.
        """
        if self._closing:
            self._metrics.rejected("not_ready", 1)
            raise NotReady("the model is shutting down", phase="draining", retry_after_s=1.0)
        if self._queued >= self._max_queue:
            self._metrics.rejected("queue_full", 1)
            raise Overloaded(
                f"{self._queued} streams wait and at most {self._max_queue} may", retry_after_s=self.retry_after_s()
            )
        if self._queued_bytes + size_bytes > self._max_queue_bytes:
            self._metrics.rejected("queue_bytes_full", 1)
            raise Overloaded(
                f"{self._queued_bytes} bytes wait, and {size_bytes} more would be above {self._max_queue_bytes}",
                retry_after_s=self.retry_after_s(),
            )
        stream = Stream(self, item, whole=whole, size_bytes=size_bytes, opened_at=self._clock(), passage=passage)
        with self._lock:
            self._queued += 1
            self._queued_bytes += size_bytes
            self._tell_what_it_holds()
        self._open.add(stream)
        if deadline is not None:
            stream.timer = self._loop.call_later(max(0.0, deadline - self._clock()), self._expire, stream)
        if self._prepare is None:
            stream.prepared, stream.item = item, None
            self._arrivals.append(stream)
            self._kick()
        else:
            self._preparer.post(lambda: self._prepare_stream(stream))
        return stream

    def room(self) -> int:
        """Return how many more streams may wait."""
        return self._max_queue - self._queued

    def retry_after_s(self) -> float:
        """Return the seconds until the streams that wait should have slots, between 0.1 and 60."""
        return min(60.0, max(0.1, self._queued * self._stream_s / self._model.slots))

    def _expire(self, stream: Stream) -> None:
        stream.end(DeadlineExceeded("the deadline passed before the answer was complete"))
        self.leave(stream)

    def leave(self, stream: Stream) -> None:
        """Have a stream's slot freed, or its place in the queue."""
        if stream not in self._open:
            return
        self._forget(stream)
        self._note(stream, self._clock())
        self._count_dropped(stream)
        with self._lock:
            stream.left = True
            if stream.waiting:
                self._dequeue(stream)
                with contextlib.suppress(ValueError):  # its item may be at the preparer still
                    self._arrivals.remove(stream)
            else:
                self._leavers.append(stream)
        self._kick()

    def _count_dropped(self, stream: Stream) -> None:
        reasons = {DeadlineExceeded: "expired", NotReady: "shutdown"}
        reason = reasons.get(type(stream.error), "cancelled")
        self._metrics.dropped(reason, queued=stream.waiting, running=not stream.waiting)

    def _dequeue(self, stream: Stream) -> None:
        """Take a stream out of the counts of what waits; the lock is held."""
        stream.waiting = False
        self._queued -= 1
        self._queued_bytes -= stream.size_bytes
        self._tell_what_it_holds()

    def _tell_what_it_holds(self) -> None:
        """Let the metrics say what waits and runs; the lock is held, so that the last to know is the last to tell."""
        self._metrics.holds(self._queued, self._queued_bytes, len(self._active))

    def was_read(self, stream: Stream) -> None:
        """Take note that a reader read; a generator that was held for it goes on."""
        if self._pausable is not None and stream.sent - stream.read == self._max_behind - 1:
            self._kick()

    def _forget(self, stream: Stream) -> None:
        self._open.discard(stream)
        if self._idle is not None and not self._open and not self._idle.done():
            self._idle.set_result(None)

    def _deliver(self, steps: list[_Delivery]) -> None:
        now = self._clock()
        for stream, part, done, error in steps:
            if part is not None:
                self._count_part(stream, part, now)
                behind = stream.put(part)
                if behind > self._max_behind and not stream.whole and self._pausable is None:
                    stream.end(Cancelled(f"the reader fell {behind} parts behind"))
                    self.leave(stream)
            if done:
                if error is None and not stream.ended:
                    self._count_answered(stream, now)
                if not stream.ended:
                    self._note(stream, now)
                stream.end(error)
                self._forget(stream)
                if stream.admitted_at:
                    self._stream_s += 0.1 * (now - stream.admitted_at - self._stream_s)

    def _count_part(self, stream: Stream, part: Part, now: float) -> None:
        tokens = _token_count(part)
        if stream.last_part_at:
            self._metrics.next_part(now - stream.last_part_at, tokens)
        else:
            self._metrics.first_part(now - stream.opened_at, tokens)
            if stream.passage is not None and not stream.passage.first_part:
                stream.passage.first_part = now
        stream.last_part_at = now
        prompt = part.get("prompt_tokens") if isinstance(part, dict) else None
        if type(prompt) is int and prompt > 0:
            self._metrics.prompt(prompt)

    def _count_answered(self, stream: Stream, now: float) -> None:
        self._metrics.answered(
            prepare_s=stream.prepare_s,
            queue_s=stream.admitted_at - stream.opened_at - stream.prepare_s,
            compute_s=now - stream.admitted_at,
        )

    def _note(self, stream: Stream, now: float) -> None:
        if stream.passage is not None:
            stream.passage.went(arrived=stream.opened_at, launched=stream.admitted_at, answered=now)

    async def drain(self) -> None:
        """Refuse new streams and return when all have ended."""
        self._closing = True
        if self._open:
            self._idle = self._idle or self._loop.create_future()
            await asyncio.shield(self._idle)

    async def close(self) -> None:
        """Refuse new streams and end all with NotReady."""
        self._closing = True
        for stream in list(self._open):
            stream.end(NotReady("the model shut down before the answer", phase="draining", retry_after_s=1.0))
            self.leave(stream)

    def stats(self) -> StepperStats:
        """Return the counters and gauges as they are now."""
        return StepperStats(
            queued=self._queued,
            queued_bytes=self._queued_bytes,
            running=len(self._active),
            steps=self._steps,
            ended=self._ended,
        )

    # On the preparer's thread

    def _prepare_stream(self, stream: Stream) -> None:
        if stream.left:
            return
        began = self._clock()
        try:
            stream.prepared = self._prepare(stream.item)  # type: ignore[misc,arg-type]
        except BaseException as error:
            self._refuse(stream, error)
            return
        finally:
            stream.item = None
        ended = self._clock()
        stream.prepare_s = ended - began
        if stream.passage is not None:
            stream.passage.was_prepared(began, ended)
        self._arrivals.append(stream)
        self._kick()

    def _refuse(self, stream: Stream, error: BaseException) -> None:
        with self._lock:
            if stream.waiting:
                self._dequeue(stream)
        tell(self._loop, self._deliver, [(stream, None, True, stream.context.run(failure, error))])

    # On the model's thread

    def _kick(self) -> None:
        with self._lock:
            self._news = True
            if self._turn_is_due:
                return
            self._turn_is_due = True
        self._thread.post(self._turn)

    def _turn(self) -> None:
        with self._lock:
            self._news = False
        try:
            runnable = self._advance()
        except BaseException as error:  # the model is no stepped model after all; the next turn must still come
            tell(self._loop, self._deliver, self._fail_all(failure(error)))
            runnable = False
        with self._lock:
            self._turn_is_due = again = self._news or runnable or bool(self._arrivals and self._has_room())
            self._tell_what_it_holds()
        if again:
            self._thread.post(self._turn)

    def _advance(self) -> bool:
        """Take one step of what is there; return whether another would find something to do."""
        self._release_leavers()
        self._admit_arrivals()
        runnable = self._hold_slow_readers()
        if runnable:
            delivery = self._step()
            if delivery:
                tell(self._loop, self._deliver, delivery)
        return runnable

    def _has_room(self) -> bool:
        return len(self._active) < self._model.slots

    def _release_leavers(self) -> None:
        while self._leavers:
            stream = self._leavers.popleft()
            # A key may be in use again already, by another stream.
            if stream.key is not None and self._active.get(stream.key) is stream:
                del self._active[stream.key]
                self._release(stream.key)

    def _release(self, key: int) -> None:
        try:
            self._model.release(key)
        except BaseException:
            logger.exception("the model raised as it released a stream")

    def _admit_arrivals(self) -> None:
        while self._arrivals and self._has_room():
            stream = self._arrivals.popleft()
            with self._lock:
                if stream.left:
                    continue
                self._dequeue(stream)
            try:
                key = self._model.admit(stream.prepared)
                self._active[key] = stream
            except BaseException as error:
                tell(self._loop, self._deliver, [(stream, None, True, stream.context.run(failure, error))])
            else:
                stream.key = key
                stream.admitted_at = self._clock()
                with self._lock:
                    self._tell_what_it_holds()
            stream.prepared = None

    def _hold_slow_readers(self) -> bool:
        """Return whether any stream can go on."""
        if self._pausable is None:
            return bool(self._active)
        self._pausable.held = {
            key for key, stream in self._active.items() if stream.sent - stream.read >= self._max_behind
        }
        return len(self._pausable.held) < len(self._active)

    def _step(self) -> list[_Delivery]:
        self._steps += 1
        size = len(self._active) - (len(self._pausable.held) if self._pausable is not None else 0)
        began = self._clock()
        taken: list[_Delivery] = []
        try:
            for step in self._model.step():
                if delivery := self._delivery(step):  # what was taken before an error counts
                    taken.append(delivery)  # noqa: PERF401
        except BaseException as error:
            taken += self._fail_all(failure(error, batch_size=len(self._active)))
        self._metrics.batch(size, self._clock() - began)
        return taken

    def _delivery(self, step: Step) -> _Delivery | None:
        stream = self._active.get(step.key)
        done = step.done or step.error is not None
        if stream is None or not (done or step.output):
            return None
        if done:
            del self._active[step.key]
            self._ended += 1
        if step.output is not None:
            stream.sent += 1
        return stream, step.output, done, stream.context.run(failure, step.error) if step.error else None

    def _fail_all(self, error: Exception) -> list[_Delivery]:
        failed = dict(self._active)
        self._active.clear()
        for key in failed:
            self._release(key)
        return [(stream, None, True, PredictionFailed(str(error))) for stream in failed.values()]


def _token_count(part: Part) -> int:
    """Return how many tokens a part brings; a user's model may put anything in their place."""
    tokens = part.get("token_ids") if isinstance(part, dict) else None
    return len(tokens) if isinstance(tokens, list | tuple) else 0
