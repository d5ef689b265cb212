"""Measure what a collector in trouble costs; `python -m loadtests.telemetry.trouble` writes reports/trouble.md.

A replica that records every request is asked at a steady rate while its collector is well, killed, hung (stopped, so
that connections are made and never answered) and slow (five seconds an answer), a minute each.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import uvloop

from loadtests.peers.client import OpenLoop
from loadtests.peers.environments import ROOT
from loadtests.peers.processes import Tree, free_port, pss_mb
from loadtests.telemetry.__main__ import PEERS, exchanges_of, ready, start

REPORT = ROOT / "loadtests" / "reports" / "trouble.md"
_SLOW_S = "5"


class Collector:
    """A collector that changes its ways."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._tree: Tree | None = None

    def well(self) -> None:
        """Answer at once."""
        self._run("0")

    def slow(self) -> None:
        """Answer late."""
        self._run(_SLOW_S)

    def hung(self) -> None:
        """Answer nothing, with the port open."""
        self._run("0")
        time.sleep(2)
        for process in self._tree.processes() if self._tree is not None else ():
            os.kill(process.pid, signal.SIGSTOP)

    def killed(self) -> None:
        """End at once."""
        if self._tree is not None:
            for process in self._tree.processes():
                process.kill()
            self._tree.stop()
            self._tree = None

    def _run(self, wait_s: str) -> None:
        self.killed()
        self._tree = start("collector", str(self._port), wait_s)


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.telemetry.trouble", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each state; default: 60")
    parser.add_argument("--rate", type=float, default=1000.0, help="requests a second; default: 1000")
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        rows = runner.run(_measure(arguments.seconds, arguments.rate))
    lines = [
        "# What a collector in trouble costs\n",
        f"{time.strftime('%Y-%m-%d %H:%M')}; the no-op at {arguments.rate:g} requests a second, all of them recorded, "
        f"{arguments.seconds:g} s a state. `python -m loadtests.telemetry.trouble` measures again.\n",
        "| collector | answered | failed | p50 ms | p99 ms | PSS MB at the end |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    REPORT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


async def _measure(seconds: float, rate: float) -> list[str]:
    exchanges, port, collecting = exchanges_of("noop"), free_port(), free_port()
    collector = Collector(collecting)
    states: list[tuple[str, Callable[[], None]]] = [
        ("well", collector.well),
        ("killed", collector.killed),
        ("well again", collector.well),
        ("hung", collector.hung),
        ("slow", collector.slow),
        ("well at last", collector.well),
    ]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        told = (str(PEERS / "noop.yaml"), str(port), "100 %", f"http://127.0.0.1:{collecting}", str(Path(folder, "m")))
        tree = start("server", *told)
        try:
            await ready(port, exchanges[0], tree)
            for name, change in states:
                await asyncio.to_thread(change)
                loop = OpenLoop("127.0.0.1", port, exchanges)
                loop.start(rate, seed=7)
                await asyncio.sleep(1.0)
                loop.tally.counting = True
                await asyncio.sleep(seconds)
                loop.tally.counting = False
                memory = pss_mb(tree.processes())
                await loop.stop()
                tally, latencies = loop.tally, sorted(loop.tally.latencies_s)
                if not latencies:
                    sys.exit(f"nothing was answered: {tally.last_failure}")
                late = latencies[int(0.99 * len(latencies))] * 1e3
                middle = statistics.median(latencies) * 1e3
                failed = tally.failed + tally.wrong
                rows.append(f"| {name} | {len(latencies)} | {failed} | {middle:.2f} | {late:.2f} | {memory:.0f} |")
                print(rows[-1], flush=True)
        finally:
            tree.stop()
            collector.killed()
    return rows


if __name__ == "__main__":
    main()
