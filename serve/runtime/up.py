"""`roundhouse up`: start the platform, show how far it is, follow the declaration's edits, and stop it whole."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import psutil

from serve.api.directory import ModelStatus
from serve.api.documents import curl
from serve.declaration import Declaration, parse_declaration, read_declaration
from serve.errors import SpecError
from serve.runtime import state
from serve.runtime.board import Board, settled, time_spent
from serve.runtime.local import Platform, PlatformError, has_haproxy
from serve.runtime.logs import Follower, serious
from serve.settings import Settings
from serve.spec import ModelSpec
from serve.telemetry.lines import form_of, renderer
from serve.telemetry.logs import Log, to_stream

if TYPE_CHECKING:
    from serve.runtime.directory import Asker

_STARTING_POLL_S = 0.5
_SETTLED_POLL_S = 2.0
_FIRST_ALONE_S = 20.0
_LOG_POLL_S = 1.0
# A terminal that is closed sends the last one.
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

logger = logging.getLogger(__name__)


class Up:
    """One run of `roundhouse up`."""

    def __init__(self, path: Path, *, settings: Settings, dashboard: bool) -> None:
        is_terminal = sys.stdout.isatty()
        is_json = form_of(settings.log_format, is_terminal=is_terminal) == "json"
        self._path = path
        # Every process of this run tells its log in the form that this output has.
        self._settings = settings.replaced(log_format="json" if is_json else "text")
        self._render = renderer(self._settings.log_format, is_terminal=is_terminal, colour=Settings.wants_colour())
        self._board = Board(log=logger if is_json else None)
        self._write = to_stream(sys.stdout) if is_json else self._board.write
        self._stop = threading.Event()
        self._platform = Platform(self._settings, say=self._board.say, dashboard=dashboard)
        self._steps: dict[str, float] = {}
        self._is_started = self._is_ending = self._is_deaf = False
        self._seen: bytes | str | None = None

    def run(self) -> int:
        """Serve until told to stop; return the exit status."""
        with Log(self._render, self._write, level=self._settings.log_level, about={"component": "up"}):
            return self._run()

    def _run(self) -> int:
        declaration = self._load(self._content())
        self._listen()
        state.claim(self._settings)
        try:
            self._start(declaration)
            self._follow(declaration)
        finally:
            self._is_ending = True
            self._board.hide()
            if self._is_started:
                self._board.say("stopping" if self._platform.is_lost else "stopping: draining what is in flight")
            with _deferred_signals():
                self._platform.stop()
                state.remove(self._settings)
            if self._is_started:
                self._board.say("stopped")
        return 0

    def _listen(self) -> None:
        for number in _ENDING:
            # What `nohup` starts outlives its terminal.
            if signal.getsignal(number) is not signal.SIG_IGN or number != signal.SIGHUP:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        # Of a closed terminal a shell may tell once more.
        if self._is_ending or (number == signal.SIGHUP and self._stop.is_set()):
            return
        if self._stop.is_set() or not self._is_started:
            raise KeyboardInterrupt
        self._stop.set()

    def _load(self, content: bytes | str) -> Declaration:
        self._seen = content
        if isinstance(content, str):
            raise SpecError(content)
        return parse_declaration(content, path=self._path, base_dir=self._path.resolve().parent)

    def _content(self) -> bytes | str:
        """Return what the file holds, or why it cannot be read."""
        try:
            return read_declaration(self._path, again=True)
        except SpecError as error:
            return str(error)

    def _start(self, declaration: Declaration) -> None:
        began = time.monotonic()
        with self._board.working("starting the platform, about ten seconds"):
            self._platform.start(declaration.models)
        self._is_started = True
        threading.Thread(target=self._forward, name="forward", daemon=True).start()
        self._steps["Ray and Ray Serve"] = time.monotonic() - began
        self._listen()  # Ray has put its own in place
        self._warn(declaration)
        if not has_haproxy():
            self._board.say("note: HAProxy is not to be had here; Ray's own proxy is used, which is slower")
        state.write(
            self._settings,
            state.Running(
                pid=os.getpid(),
                created=psutil.Process().create_time(),
                url=self._settings.url,
                file=str(self._path.resolve()),
                logs=str(self._platform.logs),
            ),
        )
        self._board.say(f"serving on {self._settings.url}, logs in {self._platform.logs}")
        # The first model has the machine to itself until it answers, so that something does early.
        self._platform.apply(declaration.models, base_dir=declaration.base_dir, at_most=1)

    def _forward(self) -> None:
        """Tell here what the models and the gateway log of what is wrong; everything is in their files."""
        follower = Follower(self._platform.logs, log_format=self._settings.log_format)
        while not self._stop.wait(_LOG_POLL_S):
            for event in filter(None, map(serious, follower.events())):
                with contextlib.suppress(OSError):  # its reader has left; everything is in the files
                    self._write(self._render(event) + "\n")

    def _warn(self, declaration: Declaration) -> None:
        for note in self._platform.shortages(declaration.models):
            self._board.say(f"note: {note}")

    def _ask(self, asker: Asker) -> list[ModelStatus] | None:
        """Return the models' state, or None while Ray does not tell: it brings a lost controller back by itself."""
        try:
            models = self._platform.attended(asker.ask)
        except PlatformError:
            raise
        except Exception as error:
            if not self._is_deaf:
                self._board.say(f"Ray does not tell how the models are ({type(error).__name__}); asking again")
            self._is_deaf = True
            return None
        self._is_deaf = False
        return models

    def _follow(self, declaration: Declaration) -> None:
        from serve.runtime.directory import Asker

        asker = Asker(self._platform.machine)
        announced = whole = False
        began = time.monotonic()
        while not self._stop.is_set():
            models = self._ask(asker)
            if models is None:
                self._stop.wait(_SETTLED_POLL_S)
                continue
            self._board.show(models)
            alone_s = time.monotonic() - began
            if not whole and (any(settled(model) for model in models) or alone_s > _FIRST_ALONE_S):
                self._platform.apply(declaration.models, base_dir=declaration.base_dir)
                whole = True
            done = all(settled(model) for model in models)
            if done and not announced:
                self._announce(declaration, models)
                announced = True
            self._stop.wait(_SETTLED_POLL_S if done else _STARTING_POLL_S)
            edited = self._edited()
            if edited is not None:
                declaration, announced = edited, False

    def _edited(self) -> Declaration | None:
        """Return the declaration if its file changed and is right; a wrong edit is told and changes nothing."""
        content = self._content()
        if content == self._seen:
            return None
        try:
            declaration = self._load(content)
        except SpecError as error:
            self._board.block(f"{self._path.name} changed, and is wrong; what runs goes on:\n{error}")
            return None
        try:
            changes = self._platform.apply(declaration.models, base_dir=declaration.base_dir)
        except PlatformError:
            raise
        except Exception as error:
            self._board.say(f"{self._path.name} changed, and Ray did not take it ({error}); trying again")
            self._seen = None
            return None
        parts = [f"starting {spec.name}" for spec in changes.deploy] + [f"removing {name}" for name in changes.remove]
        self._board.say(f"{self._path.name} changed: {', '.join(parts) or 'no model is different'}")
        self._warn(declaration)
        return declaration

    def _announce(self, declaration: Declaration, models: list[ModelStatus]) -> None:
        ready = {model.name: model for model in models if model.phase == "ready"}
        lines = ["", self._time_spent(), "", f"{len(ready)} of {len(models)} models are ready:"]
        lines += [self._line(spec, ready) for spec in declaration.models]
        lines += ["", f"Documentation: {self._settings.url}/docs    Stop: Ctrl-C, or roundhouse down", ""]
        self._board.block("\n".join(lines))

    def _line(self, spec: ModelSpec, ready: Mapping[str, ModelStatus]) -> str:
        if spec.name not in ready:
            return f"  {spec.name:<14} failed; see above, and the logs in {self._platform.logs}"
        request = ready[spec.name].request
        body = json.dumps(request) if request else None
        return f"  {spec.name:<14} {curl(spec.name, spec.task, self._settings.url, request=body)}"

    def _time_spent(self) -> str:
        from serve.runtime import phases

        return time_spent(self._steps, {phase.model: phase.seconds for phase in phases.reported()})


@contextlib.contextmanager
def _deferred_signals() -> Iterator[None]:
    """Ignore a further Ctrl-C while processes are being ended: half an end would leave some behind."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _ENDING}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def up(path: Path, *, settings: Settings, dashboard: bool = False) -> int:
    """Run the platform until Ctrl-C, SIGTERM, or the end of its terminal.

    Raises:
        SpecError: The declaration is wrong; nothing was started.
        PlatformError: Ray did not start, the port is taken, or Ray's node ended while it served.
    """
    return Up(path, settings=settings, dashboard=dashboard).run()
