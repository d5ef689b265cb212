"""Measure what metrics and traces cost: `python -m loadtests.telemetry` writes loadtests/reports/telemetry.md.

The same replica's process runs four times, unwatched and watched more and more, without a proxy before it whose CPU
would make the share smaller. The four take turns of a few seconds, so that what else the machine does meets all alike.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import orjson
import uvloop

from loadtests.peers import inputs
from loadtests.peers.catalog import COMMON
from loadtests.peers.client import ClosedLoop, Exchange, ask
from loadtests.peers.environments import ROOT, WORK
from loadtests.peers.processes import Tree, cpu_s, free_port
from loadtests.telemetry.server import MODES

PEERS = ROOT / "loadtests" / "peers"
REPORT = ROOT / "loadtests" / "reports" / "telemetry.md"
_READY_S = 120.0
_CLIENTS = {"noop": 8, "minilm": 32}


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.telemetry", description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--duration", type=float, metavar="S", default=2.0, help="seconds a turn; default: 2")
    arguments = parser.parse_args()
    lines = [
        "# What being watched costs\n",
        f"{time.strftime('%Y-%m-%d %H:%M')}; {arguments.rounds} rounds of turns of {arguments.duration:g} s. "
        "Medians over the rounds; the share is the median of each round's own. `python -m loadtests.telemetry` "
        "measures again.\n",
    ]
    for model in _CLIENTS:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            told = runner.run(_measure(model, arguments.rounds, arguments.duration))
        lines += _table(model, told)
    REPORT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _table(model: str, told: dict[str, list[tuple[float, float]]]) -> list[str]:
    lines = [
        f"## {model}, {_CLIENTS[model]} clients\n",
        "| | CPU ms a request | share of unwatched | requests a second | share of unwatched |",
        "|---|---|---|---|---|",
    ]
    for mode, turns in told.items():
        cpu, rate = (statistics.median(turn[part] for turn in turns) for part in (0, 1))
        shares = [
            statistics.median(turn[part] / plain[part] for turn, plain in zip(turns, told["unwatched"], strict=True))
            for part in (0, 1)
        ]
        lines.append(f"| {mode} | {cpu:.4f} | {shares[0]:.3f} | {rate:.0f} | {shares[1]:.3f} |")
    return [*lines, ""]


async def _measure(model: str, rounds: int, seconds: float) -> dict[str, list[tuple[float, float]]]:
    """Return (CPU ms a request, requests a second) of every turn, by mode."""
    exchanges = exchanges_of(model)
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        collector = free_port()
        sink = start("collector", str(collector), "0")
        servers: dict[str, tuple[Tree, int]] = {}
        try:
            for mode in MODES:
                port = free_port()
                told = (str(PEERS / f"{model}.yaml"), str(port), mode, f"http://127.0.0.1:{collector}")
                servers[mode] = (start("server", *told, str(Path(folder, mode))), port)
                await ready(port, exchanges[0], servers[mode][0])
            for number in range(rounds + 1):
                for mode, (tree, port) in servers.items():
                    turn = await _turn(tree, port, exchanges, _CLIENTS[model], seconds)
                    if number:  # the first warms up
                        found[mode].append(turn)
                        print(f"{model}, round {number}, {mode}: {turn[0]:.4f} ms, {turn[1]:.0f}/s", flush=True)
        finally:
            for tree, _ in servers.values():
                tree.stop()
            sink.stop()
    return found


async def _turn(tree: Tree, port: int, exchanges: list[Exchange], clients: int, seconds: float) -> tuple[float, float]:
    loop = ClosedLoop("127.0.0.1", port, exchanges)
    loop.start(clients)
    await asyncio.sleep(0.3)
    processes = tree.processes()
    before, began = cpu_s(processes), time.perf_counter()
    loop.tally.counting = True
    await asyncio.sleep(seconds)
    loop.tally.counting = False
    took = time.perf_counter() - began
    count = len(loop.tally.latencies_s)
    await loop.stop()
    await asyncio.sleep(1.2)  # what was recorded is sent within a second, and belongs to this turn
    used = sum(cpu_s(processes).values()) - sum(before.values())
    if loop.tally.failed or loop.tally.wrong or not count:
        sys.exit(f"{loop.tally.failed} failed and {loop.tally.wrong} wrong: {loop.tally.last_failure}")
    return used * 1e3 / count, count / took


def start(module: str, *arguments: str) -> Tree:
    """Start a module of this folder."""
    WORK.mkdir(parents=True, exist_ok=True)
    return Tree(
        [sys.executable, "-m", f"loadtests.telemetry.{module}", *arguments],
        environment={**COMMON, "PYTHONPATH": str(ROOT)},
        folder=WORK,
        log=WORK / f"telemetry-{module}.log",
    )


async def ready(port: int, exchange: Exchange, tree: Tree) -> None:
    """Wait for a right answer, or end with what the server said."""
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline and not tree.ended:
        try:
            status, body = await ask("127.0.0.1", port, exchange.payload)
            if status == 200 and exchange.check(body):
                return
        except OSError:
            pass
        await asyncio.sleep(0.1)
    sys.exit(f"a server did not start:\n{tree.log.read_text(errors='replace')[-2000:]}")


def exchanges_of(model: str) -> list[Exchange]:
    """Return the requests for a model."""
    if model == "noop":
        return [_exchange("x", "FP32", [1, 4], row) for row in inputs.numbers()]
    return [_exchange("text", "BYTES", [1], [text]) for text in inputs.sentences()]


def _exchange(name: str, datatype: str, shape: list[int], data: list[object] | list[float] | list[str]) -> Exchange:
    tensor = {"name": name, "datatype": datatype, "shape": shape, "data": data}
    body = orjson.dumps({"inputs": [tensor]})
    head = f"POST /infer HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return Exchange(head.encode() + body, lambda answer: b'"outputs"' in answer)


if __name__ == "__main__":
    main()
