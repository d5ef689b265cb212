"""Models small enough to see through, for tests of what stands around a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from serve.errors import InvalidInput
from serve.models.base import Item, LoadContext, Signature, Step, TensorSpec
from serve.spec import ModelSpec

NUMBER = Signature(
    inputs=(TensorSpec("x", "FP32", (-1,), "a number"),),
    outputs=(TensorSpec("y", "FP32", (-1,), "the same number"),),
    example={"x": np.float32(1)},
)


def spec(**fields: Any) -> ModelSpec:
    """Return a spec for a model that is handed to the Host as an object."""
    return ModelSpec.model_validate(
        {"name": "toy", "task": "python", "source": "file:toy.py", "options": {"class": "Toy"}, **fields}
    )


class Echo:
    """Answers what it gets; remembers the batches and the threads."""

    signature = NUMBER

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.threads: set[str] = set()

    def load(self, context: LoadContext) -> None:
        self.threads.add(threading.current_thread().name)

    def predict(self, batch: Sequence[Any]) -> Sequence[Mapping[str, Any] | Exception]:
        self.threads.add(threading.current_thread().name)
        self.batches.append([float(item["x"]) for item in batch])
        return [{"y": item["x"]} for item in batch]


class Slow(Echo):
    """Holds each batch until `go` is set; `started` tells that one is held."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.started = threading.Event()
        self.go.set()

    def predict(self, batch: Sequence[Any]) -> Sequence[Mapping[str, Any] | Exception]:
        self.started.set()
        self.go.wait(10)
        return super().predict(batch)


class Poison(Echo):
    """Raises for a whole batch that holds a negative number, and fails only the row of a number above 100."""

    def predict(self, batch: Sequence[Any]) -> Sequence[Mapping[str, Any] | Exception]:
        super().predict(batch)
        if any(item["x"] < 0 for item in batch):
            raise ValueError("negative")
        return [ArithmeticError("too large") if item["x"] > 100 else {"y": item["x"]} for item in batch]


class Prepared(Echo):
    """Doubles in `prepare`, refuses zero there, costs what the number says."""

    padded = True

    def __init__(self) -> None:
        super().__init__()
        self.prepared: list[float] = []

    def prepare(self, item: Item) -> dict[str, Any]:
        self.threads.add(threading.current_thread().name)
        self.prepared.append(float(item["x"]))
        if item["x"] == 0:
            raise InvalidInput("is zero", place="x")
        return {"x": item["x"] * 2}

    def cost(self, prepared: dict[str, Any]) -> int:
        return int(prepared["x"])


class Countdown(Echo):
    """Streams n, n-1, ... 1 with a plain generator; below zero it raises at once."""

    def stream(self, item: Item) -> Iterator[dict[str, Any]]:
        if item["x"] < 0:
            raise ValueError("negative")
        for number in range(int(item["x"]), 0, -1):
            yield {"y": number}


TEXT = Signature(
    inputs=(TensorSpec("prompt", "BYTES", (-1,), "how many words, a number in digits"),),
    outputs=(TensorSpec("text", "BYTES", (-1,), "so many words"),),
    example={"prompt": b"2"},
)


class Words:
    """A stepped model: a prompt `3` gives `w0 `, `w1 `, `w2 `, one a step; `on_step` runs in each step."""

    signature = TEXT

    def __init__(self, slots: int = 2) -> None:
        self.slots = slots
        self.active: dict[int, list[int]] = {}
        self.prepared: list[str] = []
        self.admitted: list[str] = []
        self.released: list[int] = []
        self.most = 0
        self.on_step: Callable[[], None] = lambda: None
        self._next = 0

    def load(self, context: LoadContext) -> None:
        pass

    def prepare(self, item: Item) -> str:
        text = bytes(item["prompt"]).decode()
        if not text.isdigit() and text != "bad":
            raise InvalidInput("is no number", place="prompt")
        self.prepared.append(text)
        return text

    def admit(self, prepared: str) -> int:
        self.admitted.append(prepared)
        if prepared == "bad":
            raise ValueError("bad prompt")
        assert len(self.active) < self.slots
        self._next += 1
        self.active[self._next] = [0, int(prepared)]
        self.most = max(self.most, len(self.active))
        return self._next

    def step(self) -> Sequence[Step]:
        self.on_step()
        steps = []
        for key, state in list(self.active.items()):
            part: dict[str, Any] = {"text": f"w{state[0]} ", "token_ids": [state[0]]}
            state[0] += 1
            done = state[0] >= state[1]
            if done:
                del self.active[key]
                part |= {"finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": state[0]}
            steps.append(Step(key, part, done=done))
        return steps

    def release(self, key: int) -> None:
        self.released.append(key)
        del self.active[key]
