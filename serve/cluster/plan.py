"""A forecast of where a cluster would put each replica, so that what does not fit is known before it is applied."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from serve.errors import SpecError
from serve.spec import ModelSpec

# Ray counts in ten-thousandths; whole numbers of them add up without error.
_UNIT = 10_000
_GATEWAY_CPU = 100
_GPU = "nvidia.com/gpu"
_SUFFIXES = {"": Fraction(1), "m": Fraction(1, 1000)} | {
    letter + binary: Fraction(1024 if binary else 1000) ** power
    for binary in ("", "i")
    for power, letter in enumerate("KMGTPE" if binary else "kMGTPE", start=1)
}


@dataclass(frozen=True, slots=True)
class Worker:
    """What one worker has: CPU cores, bytes of memory, whole GPUs."""

    name: str
    cpus: float
    memory: int
    gpus: int


@dataclass(frozen=True, slots=True)
class Placed:
    """One replica and its worker.

    Args:
        replica: From 1.
        least: Whether it is one of `min_replicas`, which are always there.
        gpus: Which of the worker's GPUs it is on.
    """

    model: str
    replica: int
    least: bool
    worker: str
    gpus: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Unplaced:
    """One replica that no worker has room for.

    Args:
        lacking: Resource -> what is missing on the worker that comes nearest; `CPU`, `GPU`, and `memory` in bytes.
        nearest: That worker; empty where there is none.
    """

    model: str
    replica: int
    least: bool
    lacking: Mapping[str, float]
    nearest: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """Where replicas would go, and those that would wait."""

    placed: tuple[Placed, ...]
    unplaced: tuple[Unplaced, ...]


class _Room:
    """What is left on one worker."""

    def __init__(self, worker: Worker) -> None:
        self.name = worker.name
        # The gateway has a replica on every worker.
        self.cpus = max(0, round(worker.cpus * _UNIT) - _GATEWAY_CPU)
        self.memory = worker.memory
        self.gpus = [_UNIT] * worker.gpus
        self.models: list[str] = []

    def lacking(self, spec: ModelSpec) -> dict[str, float]:
        """Return what is missing for a replica; empty where it fits."""
        cpus, gpus, memory = _needs(spec)
        whole = _UNIT * sum(left == _UNIT for left in self.gpus)
        gpu_room = whole if gpus >= _UNIT else max(self.gpus, default=0)
        missing = {
            "CPU": (cpus - self.cpus) / _UNIT,
            "GPU": (gpus - gpu_room) / _UNIT,
            "memory": memory - self.memory,
        }
        return {name: amount for name, amount in missing.items() if amount > 0}

    def take(self, spec: ModelSpec) -> tuple[int, ...]:
        """Give a replica its place and return its GPUs."""
        cpus, gpus, memory = _needs(spec)
        self.cpus -= cpus
        self.memory -= memory
        self.models.append(spec.name)
        if gpus >= _UNIT:
            chosen = [index for index, left in enumerate(self.gpus) if left == _UNIT][: gpus // _UNIT]
            for index in chosen:
                self.gpus[index] = 0
            return tuple(chosen)
        if not gpus:
            return ()
        index = min((i for i, left in enumerate(self.gpus) if left >= gpus), key=lambda i: self.gpus[i])
        self.gpus[index] -= gpus
        return (index,)

    def rank(self, spec: ModelSpec) -> tuple[int, int, int]:
        """Return what orders the workers that fit, best first: a shared GPU is filled up, replicas are spread."""
        _, gpus, _ = _needs(spec)
        opens_gpu = 0 < gpus < _UNIT and not any(gpus <= left < _UNIT for left in self.gpus)
        return int(opens_gpu), self.models.count(spec.name), len(self.models)


def _needs(spec: ModelSpec) -> tuple[int, int, int]:
    wanted = spec.resources
    return round(wanted.cpus * _UNIT), round(wanted.gpus * _UNIT), wanted.memory or 0


def forecast(specs: Sequence[ModelSpec], workers: Sequence[Worker]) -> Forecast:
    """Return where each replica would go: every model's least replicas first, then those that load would add (pure).

    Ray decides for itself, by what is free at the time: this is a forecast for an empty cluster.
    """
    rooms = [_Room(worker) for worker in workers]
    least = [(spec, n, True) for spec in specs for n in range(1, spec.scaling.min_replicas + 1)]
    more = [
        (spec, n, False) for spec in specs for n in range(spec.scaling.min_replicas + 1, spec.scaling.max_replicas + 1)
    ]
    placed: list[Placed] = []
    unplaced: list[Unplaced] = []
    for spec, replica, is_least in least + more:
        fitting = [room for room in rooms if not room.lacking(spec)]
        if fitting:
            room = min(fitting, key=lambda candidate: candidate.rank(spec))
            placed.append(Placed(spec.name, replica, is_least, room.name, room.take(spec)))
        else:
            lacking, nearest = _nearest(spec, rooms)
            unplaced.append(Unplaced(spec.name, replica, is_least, lacking, nearest))
    return Forecast(tuple(placed), tuple(unplaced))


def _nearest(spec: ModelSpec, rooms: Sequence[_Room]) -> tuple[dict[str, float], str]:
    if not rooms:
        wanted = spec.resources
        needs = {"CPU": wanted.cpus, "GPU": wanted.gpus, "memory": float(wanted.memory or 0)}
        return {name: amount for name, amount in needs.items() if amount}, ""
    lacking = [(room.lacking(spec), room.name) for room in rooms]
    return min(lacking, key=lambda found: (len(found[0]), sum(found[0].values())))


def workers_of_values(values: Any) -> list[Worker]:
    """Return the workers of the chart's `ray.workerGroups`.

    Raises:
        SpecError: There are none, or one is not of that form.
    """
    try:
        return [
            Worker(f"{name}-{index}", float(group["cpus"]), _bytes(group["memory"]), int(group.get("gpus", 0)))
            for name, group in values["ray"]["workerGroups"].items()
            for index in range(int(group.get("replicas", 1)))
        ]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise SpecError(
            f"no worker groups in the values ({error}); ray.workerGroups.NAME takes cpus, memory"
        ) from error


def workers_of_nodes(nodes: Any) -> list[Worker]:
    """Return a worker for all that pods may take of each node: `kubectl get nodes -o json`, or its items.

    Raises:
        SpecError: It is not of that form.
    """
    try:
        items = nodes["items"] if isinstance(nodes, dict) else nodes
        return [_worker(node) for node in items if _takes_pods(node)]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise SpecError(f"these are no nodes ({error}); give what `kubectl get nodes -o json` prints") from error


def _takes_pods(node: Mapping[str, Any]) -> bool:
    spec = node.get("spec", {})
    taints = [taint for taint in spec.get("taints", ()) if taint["effect"] in ("NoSchedule", "NoExecute")]
    return not spec.get("unschedulable") and all(taint["key"] == _GPU for taint in taints)


def _worker(node: Mapping[str, Any]) -> Worker:
    room = node["status"]["allocatable"]
    return Worker(
        node["metadata"]["name"], float(_quantity(room["cpu"])), _bytes(room["memory"]), int(room.get(_GPU, 0))
    )


def _bytes(written: object) -> int:
    return int(_quantity(written))


def _quantity(written: object) -> Fraction:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([a-zA-Z]*)", str(written))
    if match is None or match[2] not in _SUFFIXES:
        raise ValueError(f"{written!r} is no quantity")
    return Fraction(match[1]) * _SUFFIXES[match[2]]


def told(found: Forecast) -> str:
    """Return a forecast as a table for people."""
    rows = [("MODEL", "REPLICA", "WORKER", "GPU")]
    rows += [(one.model, _replica(one), one.worker, ",".join(map(str, one.gpus)) or "-") for one in found.placed]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for waits in found.unplaced:
        lacking = ", ".join(_amount(name, amount) for name, amount in waits.lacking.items())
        where = f"on {waits.nearest}, which comes nearest" if waits.nearest else "as there is no worker"
        lines.append(f"{waits.model} replica {_replica(waits)} does not fit: lacks {lacking} {where}")
    lines.append("A forecast for an empty cluster: Ray decides by what is free at the time.")
    return "\n".join(lines)


def _replica(one: Placed | Unplaced) -> str:
    return str(one.replica) if one.least else f"{one.replica} (under load)"


def _amount(name: str, amount: float) -> str:
    return f"{amount / 2**20:.4g} MiB of memory" if name == "memory" else f"{amount:g} {name}"
