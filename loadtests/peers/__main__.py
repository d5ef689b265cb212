"""Measure Roundhouse and its peers side by side; `make bench` runs this."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import uvloop

from loadtests.peers import inputs
from loadtests.peers.catalog import COMMON, PEERS, SERVERS, Peer, Route
from loadtests.peers.client import Exchange
from loadtests.peers.environments import ROOT, WORK, python_of
from loadtests.peers.measure import Cell, Server, bare_rates
from loadtests.peers.processes import wait_until_quiet
from loadtests.peers.report import Bare, write

_TEXTS = {"sentences": inputs.sentences, "mixed": inputs.mixed}


def main() -> None:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a started server is stopped
    peers = [peer for peer in PEERS if not arguments.only or peer.name in arguments.only]
    started = time.strftime("%Y-%m-%d %H:%M")
    answers = {load: _answers(load) for load in _TEXTS}
    absent: dict[str, str] = {}
    for peer in peers:
        peer.python()
    cells: list[Cell] = []
    bare: dict[str, dict[str, list[Bare]]] = {}
    for round_number in range(arguments.rounds):
        if not arguments.no_bare:
            _bare(bare, arguments)
        for model in arguments.models:
            # Each round starts with another peer, so that none is always measured after the same neighbour.
            for peer in peers[round_number % len(peers) :] + peers[: round_number % len(peers)]:
                print(f"round {round_number + 1}: {peer.label}, {model}", flush=True)
                try:
                    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                        cells += runner.run(_measure(peer, model, answers, arguments, round_number))
                except RuntimeError as error:
                    print(error, file=sys.stderr, flush=True)
                    absent[peer.name] = str(error).splitlines()[0]
        about = f"{started}; {round_number + 1} rounds, {arguments.duration:g} s a cell."
        report = write(cells, bare, absent, folder=arguments.output, about=about)
    print(f"Report: {report}")
    if absent:
        sys.exit(1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.peers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of two seconds a cell, reported apart")
    parser.add_argument("--rounds", type=int, help="default: 3")
    parser.add_argument("--duration", type=float, metavar="S", help="seconds a cell; default: 5")
    parser.add_argument("--only", action="append", choices=[peer.name for peer in PEERS], help="may be repeated")
    parser.add_argument("--models", nargs="+", choices=["minilm", "noop"], default=["minilm", "noop"])
    parser.add_argument("--no-bare", action="store_true", help="leave out the loops without a server")
    parser.add_argument("--output", type=Path, help="default: loadtests/reports")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
    arguments.duration = arguments.duration or (2.0 if arguments.quick else 5.0)
    arguments.patience = 3.0 if arguments.quick else 60.0
    arguments.output = arguments.output or (WORK / "quick" if arguments.quick else ROOT / "loadtests" / "reports")
    return arguments


async def _measure(
    peer: Peer, model: str, answers: dict[str, np.ndarray], arguments: argparse.Namespace, round_number: int
) -> list[Cell]:
    """Start a server, measure each of its routes under each load, stop it."""
    if not peer.routes(model):
        return []
    server = Server(peer, model, seconds=arguments.duration, patience_s=arguments.patience)
    cells: list[Cell] = []
    try:
        for route in peer.routes(model):
            for load, exchanges in _exchanges(route, model, answers).items():
                await server.wait_until_right(exchanges[0])
                async for cell in server.cells(route, load, exchanges, seed=round_number):
                    cells.append(cell)
                    print(_line(cell), flush=True)
    finally:
        server.tree.stop()
    return cells


def _exchanges(route: Route, model: str, answers: dict[str, np.ndarray]) -> dict[str, Sequence[Exchange]]:
    if model == "noop":
        return {"numbers": [route.exchange(row, row) for row in inputs.numbers()]}
    return {
        load: [route.exchange(text, vector) for text, vector in zip(make(), answers[load], strict=True)]
        for load, make in _TEXTS.items()
    }


def _answers(load: str) -> np.ndarray:
    """Return the bare model's vectors of a load's texts, computed once."""
    texts = _written(load)
    vectors = texts.with_suffix(".npy")
    if not vectors.exists():
        command = [str(python_of("bare")), str(SERVERS / "bare.py"), "answers", str(texts), str(vectors)]
        bare_rates(command, {**os.environ, **COMMON})
    loaded: np.ndarray = np.load(vectors)
    return loaded


def _written(load: str) -> Path:
    text = json.dumps(_TEXTS[load]())
    path = WORK / "answers" / f"{load}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def _bare(bare: dict[str, dict[str, list[Bare]]], settings: argparse.Namespace) -> None:
    """Add one round of the models alone."""
    for load in _TEXTS:
        arguments = [str(_written(load)), str(settings.duration)]
        commands = {
            "bare torch": [str(python_of("bare")), str(SERVERS / "bare.py"), "torch", *arguments],
            "Roundhouse's model": [
                sys.executable, str(SERVERS / "bare.py"), "roundhouse", *arguments, str(WORK / "cache"),
            ],
        }  # fmt: skip
        for name, command in commands.items():
            wait_until_quiet(settings.patience)
            paths = {"PYTHONPATH": f"{SERVERS}:{ROOT}"}
            lines = bare_rates(command, {**os.environ, **COMMON, **paths})
            rows = [json.loads(line) for line in lines]
            told = ", ".join("{rate:.0f}/s at {batch}".format(**row) for row in rows)
            print(f"  {load}: {name}: {told}", flush=True)
            bare.setdefault(load, {}).setdefault(name, []).extend(rows)


def _line(cell: Cell) -> str:
    trouble = f", {cell.failed} failed, {cell.wrong} wrong: {cell.last_failure}" if cell.failed or cell.wrong else ""
    load = cell.load
    return (
        f"  {load.inputs} {load.route} {load.mode}: {cell.rate:.0f}/s, p50 {cell.p50_ms:.1f} ms, "
        f"p99 {cell.p99_ms:.1f} ms, CPU {cell.cpu_ms:.2f} ms, client {cell.client_cpu_ms:.3f} ms, "
        f"PSS {cell.pss_mb:.0f} MB, start {cell.start_s:.1f} s, busy before {load.busy_before:.0%}{trouble}"
    )


if __name__ == "__main__":
    main()
