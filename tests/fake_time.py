"""An event loop whose clock jumps to whatever is due next, so that tests of time neither wait nor race."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

X = TypeVar("X")


class _Jump(selectors.SelectSelector):
    loop: FakeTimeLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise AssertionError("every task waits for something that never happens")
        self.loop.now += max(0.0, timeout)
        return super().select(0)


class FakeTimeLoop(asyncio.SelectorEventLoop):
    """Its clock starts at 1000 and moves only when nothing else can; `problems` collects what callbacks raised."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.problems: list[dict[str, Any]] = []
        selector = _Jump()
        selector.loop = self
        super().__init__(selector)
        self.set_exception_handler(lambda _, context: self.problems.append(context))

    def time(self) -> float:
        return self.now


def run(main: Coroutine[Any, Any, X]) -> X:
    """Run a coroutine to its end in fake time; a callback that raised fails the test."""
    with asyncio.Runner(loop_factory=FakeTimeLoop) as runner:
        result = runner.run(main)
        loop = runner.get_loop()
        assert isinstance(loop, FakeTimeLoop)
        assert not loop.problems, loop.problems
        return result
