"""The cells of all rounds as one Markdown report and one plot."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import psutil

from loadtests.peers.catalog import PEERS
from loadtests.peers.measure import Cell

_LOADS = {
    "sentences": "MiniLM, a sentence of 12 words a request",
    "mixed": "MiniLM, a text of 5 to 250 tokens a request",
    "numbers": "No model: four numbers echoed",
}
_LABELS = {peer.name: peer.label for peer in PEERS}

#: Of one loop without a server: batch, items a second, median ms of a batch, CPU ms of an item.
Bare = dict[str, float]


def write(
    cells: Sequence[Cell], bare: dict[str, dict[str, list[Bare]]], absent: dict[str, str], *, folder: Path, about: str
) -> Path:
    """Write peers.md, peers.png and peers.json into `folder`; return the report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {"about": about, "bare": bare, "absent": absent, "cells": [asdict(cell) for cell in cells]}
    (folder / "peers.json").write_text(json.dumps(raw, indent=1) + "\n")
    _plot(cells, folder / "peers.png")
    report = folder / "peers.md"
    report.write_text("\n".join(_lines(cells, bare, absent, about)) + "\n")
    return report


def _lines(
    cells: Sequence[Cell], bare: dict[str, dict[str, list[Bare]]], absent: dict[str, str], about: str
) -> list[str]:
    lines = ["# Roundhouse beside its peers", "", about, "", machine(), "", "![Throughput and CPU](peers.png)"]
    for load, title in _LOADS.items():
        if of_load := [cell for cell in cells if cell.load.inputs == load]:
            lines += ["", f"## {title}", "", *_table(of_load)]
        if load in bare:
            lines += ["", *_bare_table(bare[load])]
    if absent:
        lines += ["", "## Not measured", "", *(f"- {_LABELS.get(name, name)}: {why}" for name, why in absent.items())]
    own = statistics.median(cell.client_cpu_ms for cell in cells if cell.load.mode == "32") if cells else math.nan
    return [
        *lines,
        "",
        "## How to read it",
        "",
        "- One copy of a model on one compute thread, so one core computes; the rows of two workers or replicas have "
        "two copies and use both cores. Batches of at most 32 within 5 ms where a peer has any; access logs off.",
        "- Each figure is the median over the rounds, in which the peers took turns. Rank with them; gaps under 15 % "
        "are noise.",
        "- Open loop: requests at random times, 70 % of what the same peer answered with 32 clients in that round; "
        "latency counts from when a request was due.",
        "- CPU and PSS are of all processes of a server, its daemons included. Every answer was checked to be its "
        f"caller's own. The load generator took {own:.3f} ms of CPU a request with 32 clients, not in the table.",
    ]


def _table(cells: Sequence[Cell]) -> list[str]:
    lines = [
        "| | req/s at 1 / 8 / 32 | p50 ms at 1 / 8 / 32 | p99 ms at 32 | open loop: req/s, p50, p99 ms "
        "| CPU ms/req at 32 | PSS MB | start s | failed, wrong |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    names = {(cell.peer, cell.load.route) for cell in cells}
    return lines + [
        _row(name, [cell for cell in cells if (cell.peer, cell.load.route) == name])
        for name in sorted(names, key=lambda name: -_median(cells, name, "32", lambda cell: cell.rate))
    ]


def _row(name: tuple[str, str], cells: Sequence[Cell]) -> str:
    def at(mode: str, value: Callable[[Cell], float]) -> float:
        return _median(cells, name, mode, value)

    rates = " / ".join(_number(at(mode, lambda cell: cell.rate)) for mode in ("1", "8", "32"))
    p50 = " / ".join(_number(at(mode, lambda cell: cell.p50_ms)) for mode in ("1", "8", "32"))
    opened = ", ".join(
        _number(at("open", value))
        for value in (lambda cell: cell.rate, lambda cell: cell.p50_ms, lambda cell: cell.p99_ms)
    )
    return (
        f"| {_label(*name)} | {rates} | {p50} | {_number(at('32', lambda cell: cell.p99_ms))} | {opened} | "
        f"{at('32', lambda cell: cell.cpu_ms):.2f} | {at('32', lambda cell: cell.pss_mb):.0f} | "
        f"{at('32', lambda cell: cell.start_s):.1f} | {sum(c.failed for c in cells)}, {sum(c.wrong for c in cells)} |"
    )


def _bare_table(bare: dict[str, list[Bare]]) -> list[str]:
    lines = [
        "| without a server | items/s at batch 1 / 8 / 32 | ms a batch at 1 / 8 / 32 | CPU ms/item at 32 |",
        "|---|---|---|---|",
    ]
    for name, rows in bare.items():
        by_size = {
            size: [row for row in rows if row["batch"] == size] for size in sorted({row["batch"] for row in rows})
        }
        rate, took = (
            " / ".join(_number(statistics.median(row[key] for row in of_size)) for of_size in by_size.values())
            for key in ("rate", "p50_ms")
        )
        cpu = statistics.median(row["cpu_ms"] for row in rows if row["batch"] == 32)
        lines.append(f"| {name} | {rate} | {took} | {cpu:.2f} |")
    return lines


def _median(cells: Sequence[Cell], name: tuple[str, str], mode: str, value: Callable[[Cell], float]) -> float:
    values = [value(cell) for cell in cells if (cell.peer, cell.load.route) == name and cell.load.mode == mode]
    return statistics.median(values) if values else math.nan


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _label(peer: str, route: str) -> str:
    label = _LABELS[peer] + (f", {route}" if route else "")
    return f"**{label}**" if peer.startswith("roundhouse") else label


def machine() -> str:
    """Return what the figures were measured on, as a sentence."""
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    memory = psutil.virtual_memory().total / 2**30
    return f"Machine: {psutil.cpu_count()} cores of {model}, {memory:.0f} GiB, Python {platform.python_version()}."


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _plot(cells: Sequence[Cell], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    loads = [load for load in _LOADS if any(cell.load.inputs == load for cell in cells)]
    if not loads:
        return
    figure, grid = pyplot.subplots(len(loads), 2, figsize=(12, 1 + 3.6 * len(loads)), squeeze=False)
    for load, (left, right) in zip(loads, grid, strict=True):
        of_load = [cell for cell in cells if cell.load.inputs == load]
        names = sorted(
            {(cell.peer, cell.load.route) for cell in of_load},
            key=lambda name: _median(of_load, name, "32", lambda cell: cell.rate),
        )
        labels = [_label(*name).strip("*") for name in names]
        colours = ["tab:orange" if name[0].startswith("roundhouse") else "tab:gray" for name in names]
        left.barh(labels, [_median(of_load, name, "32", lambda cell: cell.rate) for name in names], color=colours)
        left.set_title(f"{_LOADS[load]}\nreq/s with 32 clients", fontsize=9)
        right.barh(labels, [_median(of_load, name, "32", lambda cell: cell.cpu_ms) for name in names], color=colours)
        right.set_title("CPU ms a request (less is better)", fontsize=9)
        right.set_yticklabels([])
        for axes in (left, right):
            axes.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
