"""A real platform, started as a user starts it, and what a test does with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx

from serve.runtime.local import free_ports

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [str(Path(sys.executable).with_name("roundhouse"))]
READY_WITHIN_S = 300

Result = TypeVar("Result")


@dataclass
class Running:
    """A `roundhouse up` of a test."""

    process: subprocess.Popen[bytes]
    url: str
    port: int
    declaration: Path
    log: Path
    environment: dict[str, str]

    def wait_for(self, name: str, phase: str = "ready") -> None:
        """Return once a model is in a phase; fail with the output if it ends or takes too long."""
        deadline = time.monotonic() + READY_WITHIN_S
        seen = "nothing"
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
                states = {entry["name"]: entry for entry in self.index()}
                seen = str(states)
                if self.is_in(states.get(name), phase):
                    return
            time.sleep(0.2)
        raise AssertionError(f"{name} did not become {phase}: {seen}\n{self.log.read_text()[-4000:]}")

    def is_in(self, entry: dict[str, str] | None, phase: str) -> bool:
        if entry is None or entry["phase"] != phase:
            return False
        return phase != "ready" or httpx.get(f"{self.url}/v2/models/{entry['name']}/ready").status_code == 200

    def index(self) -> list[dict[str, str]]:
        return list(httpx.post(f"{self.url}/v2/repository/index", timeout=10).raise_for_status().json())

    def command(self, *words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run `roundhouse` as a user would beside it."""
        return subprocess.run(
            [*COMMAND, *words], capture_output=True, text=True, timeout=timeout, env=self.environment, check=False
        )

    def stop(self) -> int:
        """Press Ctrl-C and wait."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=120)


@contextlib.contextmanager
def running_platform(declaration: Path, folder: Path, more: Mapping[str, str] | None = None) -> Iterator[Running]:
    """Run `roundhouse up`, with `more` in its environment."""
    (port,) = free_ports(1)
    environment = {
        **os.environ,
        "ROUNDHOUSE_STATE_DIR": str(folder / "state"),
        "ROUNDHOUSE_PORT": str(port),
        **(more or {}),
    }
    log = folder / "up.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*COMMAND, "up", str(declaration)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    running = Running(process, f"http://127.0.0.1:{port}", port, declaration, log, environment)
    try:
        yield running
    finally:
        running.stop()


def wait_until(condition: Callable[[], Result], within_s: float = 60.0) -> Result:
    """Return what a condition says once that holds; fail if that takes too long."""
    deadline = time.monotonic() + within_s
    while not (said := condition()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.1)
    return said
