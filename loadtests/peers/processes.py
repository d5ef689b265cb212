"""A peer's processes, daemons included: found by a mark in their environment, measured, and ended by id."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

_MARK = "PEERS_BENCHMARK_RUN"
_STOP_TIMEOUT_S = 40.0


class Tree:
    """A started command and everything that descends from it.

    Args:
        log: Takes its output.
    """

    def __init__(
        self, command: Sequence[str | Path], *, environment: Mapping[str, str], folder: Path, log: Path
    ) -> None:
        self._id = uuid.uuid4().hex
        self.log = log
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ROUNDHOUSE_", "RAY_"))}
        folder.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self._main = subprocess.Popen(
                [str(part) for part in command],
                env={**kept, **environment, _MARK: self._id},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def ended(self) -> bool:
        return self._main.poll() is not None

    def processes(self) -> list[psutil.Process]:
        """Return the processes that are alive now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self._id and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def stop(self) -> None:
        """Ask the first process to end, and after a while end what is left."""
        if not self.ended:
            self._main.send_signal(signal.SIGINT)
            try:
                self._main.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._main.terminate()
        for harshly in (False, True):
            left = self.processes()
            for process in left:
                try:
                    process.kill() if harshly else process.terminate()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(left, timeout=5)
        self._main.wait()


def cpu_s(processes: Sequence[psutil.Process]) -> dict[int, float]:
    """Return the CPU seconds of each living process, by id."""
    used = {}
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        used[process.pid] = times.user + times.system
    return used


def pss_mb(processes: Sequence[psutil.Process]) -> float:
    """Return the memory of the processes, what they share counted once, 10^6 bytes."""
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 1e6


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until_quiet(patience_s: float, *, busy: float = 0.15) -> float:
    """Wait until the machine's processors are nearly idle; return the share of them that was busy at the last look."""
    deadline = time.monotonic() + patience_s
    while True:
        share = psutil.cpu_percent(interval=1.0) / 100
        if share <= busy or time.monotonic() > deadline:
            return share
