"""What a person watching `roundhouse up` sees: each model's phase as it changes, and where the time went."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO, cast

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from serve.api.directory import ModelStatus
from serve.runtime.status import PHASE_COLOURS


class Output(io.TextIOBase):
    """A stream whose reader may leave, as a terminal that is closed: what is told then is lost, and work goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Return the stream's."""
        return self._stream.encoding

    def isatty(self) -> bool:
        """Return whether it is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Return the stream's."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write where somebody reads."""
        with self._left_alone():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write out where somebody reads."""
        with self._left_alone():
            self._stream.flush()

    @contextlib.contextmanager
    def _left_alone(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.EIO, errno.EPIPE):
                # What the stream still holds, and what Python flushes at exit, goes nowhere without an error.
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class Board:
    """A live table on a terminal, one line an event elsewhere.

    Args:
        log: Where it tells everything instead, for programs to read.
    """

    def __init__(self, console: Console | None = None, *, log: logging.Logger | None = None) -> None:
        self._console = console or Console(file=cast("TextIO", Output(sys.stdout)), highlight=False)
        self._log = log
        self._began = time.monotonic()
        self._last: dict[str, tuple[str, str]] = {}
        self._live: Live | None = None

    def elapsed_s(self) -> float:
        """Return seconds since the board was made."""
        return time.monotonic() - self._began

    def say(self, text: str) -> None:
        """Print one line with the time since the start."""
        if self._log is not None:
            self._log.info("%s", text)
            return
        self._console.print(Text(f"{self.elapsed_s():6.1f} s  {text}"), soft_wrap=True)

    @contextlib.contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Show that something goes on, where there is a terminal to show it on."""
        with self._console.status(text) if self._is_live() else contextlib.nullcontext():
            yield

    def _is_live(self) -> bool:
        return self._log is None and self._console.is_terminal

    def block(self, text: str) -> None:
        """Print lines as they are."""
        if self._log is not None:
            self._log.info("%s", text.strip())
            return
        self._console.print(Text(text), soft_wrap=True)

    def write(self, lines: str) -> None:
        """Print lines of a log, each with its end, above what is shown in place; ANSI escapes are colours."""
        for line in lines.splitlines():
            self._console.print(Text.from_ansi(line), soft_wrap=True)

    def show(self, models: Sequence[ModelStatus]) -> None:
        """Show the models' state; on a terminal in place, elsewhere only what changed."""
        if self._is_live() and self._live is None and any(not settled(model) for model in models):
            self._live = Live(console=self._console, refresh_per_second=8, transient=True)
            self._live.start()
        for model in models:
            self._note(model)
        if self._live is not None:
            self._live.update(self._table(models))
            if all(settled(model) for model in models):
                self.hide()

    def hide(self) -> None:
        """Take the live table away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _note(self, model: ModelStatus) -> None:
        was = self._last.get(model.name)
        now = (model.phase, model.message)
        if was == now:
            return
        self._last[model.name] = now
        if was is None or was[0] != model.phase or (settled(model) and model.message):
            detail = f": {model.message}" if model.message else ""
            self.say(f"{model.name} {model.phase}{detail}")

    def _table(self, models: Sequence[ModelStatus]) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("", "model", "task", "phase", "replicas", ""):
            table.add_column(heading)
        for model in models:
            mark = Text("●", "green") if model.phase == "ready" else Text("✗", "red")
            table.add_row(
                mark if settled(model) else Spinner("dots"),
                model.name,
                model.task,
                Text(model.phase, PHASE_COLOURS.get(model.phase, "cyan")),
                f"{model.ready_replicas}/{model.target_replicas}",
                Text(model.message, overflow="ellipsis", no_wrap=True),
            )
        return table


def settled(model: ModelStatus) -> bool:
    """Return whether nothing more will happen to the model by itself."""
    return model.phase in ("ready", "failed") and not model.changing


def time_spent(steps: Mapping[str, float], replicas: Mapping[str, Mapping[str, float]]) -> str:
    """Return where the start's time went: the platform's own steps, then each model's phases, in seconds."""
    lines = ["Where the time went (seconds):"]
    lines.append("  platform      " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in steps.items()))
    for model, phases in replicas.items():
        spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items() if seconds >= 0.05)
        lines.append(f"  {model:<13} {spent or 'less than 0.1 in all'}")
    return "\n".join(lines)
