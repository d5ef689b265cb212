"""One cell of the comparison at a time: a load on a server, and what it cost."""

from __future__ import annotations

import asyncio
import math
import statistics
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from loadtests.peers.catalog import COMMON, Peer, Route, Start
from loadtests.peers.client import ClosedLoop, Exchange, OpenLoop, Tally, ask
from loadtests.peers.environments import WORK
from loadtests.peers.processes import Tree, cpu_s, free_port, pss_mb, wait_until_quiet

_READY_TIMEOUT_S = 240.0
_WARM_UP_S = 1.5
_OPEN_SHARE = 0.7
_TURNS = 5
_LONGEST = 3.0


@dataclass(frozen=True, slots=True)
class Load:
    """What was asked of a server.

    Args:
        route: Its way of being asked, where it has several.
        inputs: `sentences`, `mixed` or `numbers`.
        mode: `1`, `8` or `32` clients, or `open`.
        busy_before: Share of the machine that was busy before, the idle server included.
        offered: Requests a second of an open loop.
    """

    route: str
    inputs: str
    mode: str
    busy_before: float
    offered: float | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    """What one load on one server gave; times in milliseconds.

    Args:
        rate: Right answers a second.
        cpu_ms: CPU of all processes of the server for one right answer.
        client_cpu_ms: CPU of the load generator for one right answer.
        start_s: Seconds from the start of the server to its first right answer.
    """

    peer: str
    load: Load
    rate: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    client_cpu_ms: float
    pss_mb: float
    start_s: float
    failed: int
    wrong: int
    last_failure: str


class Server:
    """A started peer, answering."""

    def __init__(self, peer: Peer, model: str, *, seconds: float, patience_s: float) -> None:
        self._seconds, self._patience_s = seconds, patience_s
        self.peer, self.model, self.port = peer, model, free_port()
        start: Start = peer.start(peer.python(), model, self.port)
        folder = WORK / "run" / peer.name
        folder.mkdir(parents=True, exist_ok=True)
        self._began = time.perf_counter()
        self.tree = Tree(
            start.command,
            environment={**COMMON, **start.environment},
            folder=folder,
            log=folder / f"{model}.log",
        )
        self.start_s = 0.0

    async def wait_until_right(self, exchange: Exchange) -> None:
        """Wait for a right answer. Raises RuntimeError when the server ends or takes too long."""
        last = "no answer"
        deadline = time.perf_counter() + _READY_TIMEOUT_S
        while time.perf_counter() < deadline:
            if self.tree.ended:
                break
            try:
                status, body = await ask("127.0.0.1", self.port, exchange.payload)
                if status == 200 and exchange.check(body):
                    self.start_s = self.start_s or time.perf_counter() - self._began
                    return
                last = f"{status} {body[:300]!r}"
            except (OSError, ValueError) as error:
                last = repr(error)
            await asyncio.sleep(0.1)
        tail = self.tree.log.read_text(errors="replace")[-1500:]
        raise RuntimeError(f"{self.peer.name} does not serve {self.model} ({last}); its log ends:\n{tail}")

    async def cells(self, route: Route, load: str, exchanges: Sequence[Exchange], *, seed: int) -> AsyncIterator[Cell]:
        """Measure a route under each load: closed with 1, 8 and 32 clients, then open at 70 % of what 32 gave."""
        rate = 0.0
        for clients in (1, 8, 32):
            loop = ClosedLoop("127.0.0.1", self.port, exchanges)
            busy = await self._quiet()
            loop.start(clients)
            cell = await self._cell(loop, Load(route.name, load, str(clients), busy))
            rate = _OPEN_SHARE * cell.rate
            yield cell
        if rate > 0:
            open_loop = OpenLoop("127.0.0.1", self.port, exchanges)
            busy = await self._quiet()
            open_loop.start(rate, seed)
            yield await self._cell(open_loop, Load(route.name, load, "open", busy, offered=rate))

    async def _quiet(self) -> float:
        return await asyncio.to_thread(wait_until_quiet, self._patience_s)

    async def _enough(self, tally: Tally, load: Load) -> None:
        """Wait for the seconds of a cell, and longer for a slow server, so that every client has a few turns."""
        await asyncio.sleep(self._seconds)
        wanted = _TURNS * (32 if load.mode == "open" else int(load.mode))
        for _ in range(math.ceil(_LONGEST * self._seconds)):
            if len(tally.latencies_s) + tally.failed + tally.wrong >= wanted:
                return
            await asyncio.sleep(1.0)

    async def _cell(self, loop: ClosedLoop | OpenLoop, load: Load) -> Cell:
        await asyncio.sleep(_WARM_UP_S)
        processes = self.tree.processes()
        before, own, began = cpu_s(processes), time.process_time(), time.perf_counter()
        loop.tally.counting = True
        await self._enough(loop.tally, load)
        loop.tally.counting = False
        took, own, after = time.perf_counter() - began, time.process_time() - own, cpu_s(processes)
        processes = self.tree.processes()
        after |= cpu_s([process for process in processes if process.pid not in after])
        memory = pss_mb(processes)
        await loop.stop()
        tally, count = loop.tally, len(loop.tally.latencies_s)
        latencies = sorted(tally.latencies_s) or [math.nan]
        return Cell(
            peer=self.peer.name,
            load=load,
            rate=count / took,
            p50_ms=statistics.median(latencies) * 1e3,
            p99_ms=latencies[min(len(latencies) - 1, int(0.99 * len(latencies)))] * 1e3,
            cpu_ms=sum(used - before.get(pid, 0.0) for pid, used in after.items()) * 1e3 / max(1, count),
            client_cpu_ms=own * 1e3 / max(1, count),
            pss_mb=memory,
            start_s=self.start_s,
            failed=tally.failed,
            wrong=tally.wrong,
            last_failure=tally.last_failure,
        )


def bare_rates(command: Sequence[str], environment: dict[str, str]) -> list[str]:
    """Run a loop without a server and return its lines of JSON."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()
