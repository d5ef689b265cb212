"""A forecast of where a cluster would put each replica, so that what does not fit is known before it is applied."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from serve.errors import SpecError
from serve.spec import ModelSpec

# Ray counts in ten-thousandths; whole numbers of them add up without error.
_UNIT = 10_000
_GATEWAY_CPU = 100
_GPUS = re.compile(r"nvidia\.com/(gpu(\.shared)?|mig-.+)|amd\.com/gpu")
_SUFFIXES = {"": Fraction(1), "m": Fraction(1, 1000), "u": Fraction(1, 10**6), "n": Fraction(1, 10**9)} | {
    letter + binary: Fraction(1024 if binary else 1000) ** power
    for binary in ("", "i")
    for power, letter in enumerate("KMGTPE" if binary else "kMGTPE", start=1)
}
_QUANTITY = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,2}|[a-zA-Z]*)")

#: The groups that the chart's values begin with, which a site's values are laid over.
CHART_GROUPS: Mapping[str, Mapping[str, Any]] = {
    "cpu": {
        "replicas": 2,
        "maxReplicas": None,
        "cpus": 4,
        "memory": "8Gi",
        "gpus": 0,
        "gpuResource": "nvidia.com/gpu",
        "resources": {},
    }
}
#: What a group of another name takes where its values do not say.
GROUP_DEFAULTS: Mapping[str, Any] = {
    "replicas": 1,
    "cpus": 4,
    "memory": "8Gi",
    "gpus": 0,
    "gpuResource": "nvidia.com/gpu",
    "resources": {},
}
#: What the chart gives Ray's object store on each worker.
OBJECT_STORE_BYTES = 80 * 2**20
#: What Ray's own processes take on each worker: 430 MB were measured, of them 180 MB for a proxy and a gateway.
RAY_BYTES = 512 * 2**20
_MOST_CPUS, _MOST_GPUS, _MOST_WORKERS = 1024, 64, 10_000


@dataclass(frozen=True, slots=True)
class Worker:
    """What one worker has for models, less its part of a gateway's CPU.

    Args:
        cpus: Cores.
        memory: Bytes.
        gpus: Resource of a device plugin -> how many of it; a replica's are all of one.
    """

    name: str
    cpus: float
    memory: int
    gpus: Mapping[str, int]
    has_gateway: bool = True


@dataclass(frozen=True, slots=True)
class Placed:
    """One replica and its worker.

    Args:
        replica: From 1.
        least: Whether it is one of `min_replicas`, which are always there.
        kind: Resource of its GPUs; empty where it has none.
        gpus: Which of those that the worker has of this kind it is on.
    """

    model: str
    replica: int
    least: bool
    worker: str
    kind: str
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
        self.cpus = max(0, round(worker.cpus * _UNIT) - _GATEWAY_CPU * worker.has_gateway)
        self.memory = worker.memory
        self.gpus = {kind: [_UNIT] * count for kind, count in worker.gpus.items() if count}
        self.models: list[str] = []

    def lacking(self, spec: ModelSpec) -> dict[str, float]:
        """Return what is missing for a replica; empty where it fits."""
        cpus, gpus, memory = _needs(spec)
        gpu_room = max((_gpu_room(left, gpus) for left in self.gpus.values()), default=0)
        missing = {
            "CPU": (cpus - self.cpus) / _UNIT,
            "GPU": (gpus - gpu_room) / _UNIT,
            "memory": memory - self.memory,
        }
        return {name: amount for name, amount in missing.items() if amount > 0}

    def take(self, spec: ModelSpec) -> tuple[str, tuple[int, ...]]:
        """Give a replica its place and return the kind of its GPUs and which of that kind they are."""
        cpus, gpus, memory = _needs(spec)
        self.cpus -= cpus
        self.memory -= memory
        self.models.append(spec.name)
        if not gpus:
            return "", ()
        if gpus >= _UNIT:
            # The kind of which least is left, so that what asks for more still finds it.
            fitting = [kind for kind, left in self.gpus.items() if _gpu_room(left, gpus) >= gpus]
            kind = min(fitting, key=lambda kind: _gpu_room(self.gpus[kind], gpus))
            chosen = [index for index, left in enumerate(self.gpus[kind]) if left == _UNIT][: gpus // _UNIT]
        else:
            each = [(left, kind, i) for kind, gpus_left in self.gpus.items() for i, left in enumerate(gpus_left)]
            _, kind, index = min(one for one in each if one[0] >= gpus)
            chosen = [index]
        for index in chosen:
            self.gpus[kind][index] -= min(gpus, _UNIT)
        return kind, tuple(chosen)

    def rank(self, spec: ModelSpec) -> tuple[int, int, int]:
        """Return what orders the workers that fit, best first: a shared GPU is filled up, replicas are spread."""
        _, gpus, _ = _needs(spec)
        every = [left for gpus_left in self.gpus.values() for left in gpus_left]
        opens_gpu = 0 < gpus < _UNIT and not any(gpus <= left < _UNIT for left in every)
        return int(opens_gpu), self.models.count(spec.name), len(self.models)


def _gpu_room(gpus_left: Sequence[int], asked: int) -> int:
    """Return what GPUs of one kind have for a replica: whole ones together, or a part of one."""
    if asked >= _UNIT:
        return _UNIT * sum(left == _UNIT for left in gpus_left)
    return max(gpus_left, default=0)


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
            placed.append(Placed(spec.name, replica, is_least, room.name, *room.take(spec)))
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
    """Return the workers of the chart's `ray.workerGroups`, with what the chart sets where the values do not.

    Where KubeRay adds workers, these are all that it may add. Gateways are on the smallest, as they need least.

    Raises:
        SpecError: A group is not one that the chart takes.
    """
    ray = _mapping(values, "ray")
    autoscaling = _mapping(_mapping(ray, "kuberay", "ray."), "autoscaling", "ray.kuberay.")
    scales = ray.get("provider") == "kuberay" and autoscaling.get("enabled") is not False
    workers, least = [], 0
    for name, group in _groups(ray):
        place = f"ray.workerGroups.{name}"
        replicas, most = _replicas(group, place, scales=scales)
        worker = _worker_of_group(name, group, place)
        least += replicas
        workers += [replace(worker, name=f"{name}-{index}") for index in range(most)]
    given = _mapping(values, "gateway").get("replicas")
    gateways = _whole(given, "gateway.replicas", most=_MOST_WORKERS) if given else max(1, least)
    small = {worker.name for worker in sorted(workers, key=lambda worker: worker.cpus)[:gateways]}
    return [replace(worker, has_gateway=worker.name in small) for worker in workers]


def _mapping(parent: Any, key: str, place: str = "") -> Mapping[str, Any]:
    """Return what is at a key of the values, empty where nothing is."""
    if parent is not None and not isinstance(parent, Mapping):
        raise SpecError(f"{place.rstrip('.') or 'the values'}: {parent!r} is not a mapping")
    found = (parent or {}).get(key)
    if found is not None and not isinstance(found, Mapping):
        raise SpecError(f"{place}{key}: {found!r} is not a mapping")
    return found or {}


def _groups(ray: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the groups that Helm makes of the chart's values and a site's, where a null takes away."""
    if "workerGroups" in ray and ray["workerGroups"] is None:
        return
    given = _mapping(ray, "workerGroups", "ray.")
    for name in [*CHART_GROUPS, *(name for name in given if name not in CHART_GROUPS)]:
        if name in given and given[name] is None:
            continue
        merged = {**CHART_GROUPS.get(name, {}), **_mapping(given, name, "ray.workerGroups.")}
        yield name, {**GROUP_DEFAULTS, **{key: value for key, value in merged.items() if value is not None}}


def _replicas(group: Mapping[str, Any], place: str, *, scales: bool) -> tuple[int, int]:
    """Return how many workers a group has at least and at most."""
    replicas = _whole(group["replicas"], f"{place}.replicas", most=_MOST_WORKERS)
    most = _whole(group.get("maxReplicas") or replicas, f"{place}.maxReplicas", most=_MOST_WORKERS)
    if most > replicas and not scales:
        raise SpecError(
            f"{place}.maxReplicas: {most} is above replicas, {replicas}, and only KubeRay's autoscaling adds workers;"
            " set replicas, or ray.provider kuberay with ray.kuberay.autoscaling.enabled"
        )
    if most < replicas:
        raise SpecError(f"{place}.maxReplicas: {most} is below replicas, {replicas}")
    return replicas, most


def _worker_of_group(name: str, group: Mapping[str, Any], place: str) -> Worker:
    cpus = group["cpus"]
    if not isinstance(cpus, (int, float)) or isinstance(cpus, bool) or not 0 < cpus <= _MOST_CPUS:
        raise SpecError(f"{place}.cpus: {cpus!r} is not a number above 0 and at most {_MOST_CPUS}")
    limit = _mapping(_mapping(group, "resources", f"{place}."), "limits", f"{place}.resources.").get("memory")
    where = "memory" if limit is None else "resources.limits.memory"
    try:
        memory = _bytes(group["memory"] if limit is None else limit)
    except ValueError as error:
        raise SpecError(f"{place}.{where}: {error}") from error
    gpus, kind = _whole(group["gpus"], f"{place}.gpus", most=_MOST_GPUS), group["gpuResource"]
    if not isinstance(kind, str):
        raise SpecError(f"{place}.gpuResource: {kind!r} is no text, such as nvidia.com/gpu")
    return Worker(name, float(cpus), _left(memory), {kind: gpus} if gpus else {})


def _whole(value: object, place: str, *, most: int) -> int:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= most and value == int(value):
        return int(value)
    raise SpecError(f"{place}: {value!r} is not a whole number from 0 to {most}")


def _left(memory: int) -> int:
    """Return what models may take of a worker's memory."""
    return max(0, memory - OBJECT_STORE_BYTES - RAY_BYTES)


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
    return not spec.get("unschedulable") and all(_GPUS.fullmatch(taint["key"]) for taint in taints)


def _worker(node: Mapping[str, Any]) -> Worker:
    room = node["status"]["allocatable"]
    counts = {name: int(_quantity(amount)) for name, amount in room.items() if _GPUS.fullmatch(name)}
    gpus = {name: count for name, count in counts.items() if count}
    return Worker(node["metadata"]["name"], float(_quantity(room["cpu"])), _left(_bytes(room["memory"])), gpus)


def _bytes(written: object) -> int:
    return int(_quantity(written))


def _quantity(written: object) -> Fraction:
    match = _QUANTITY.fullmatch(str(written))
    if match and match[2] in _SUFFIXES:
        return Fraction(match[1]) * _SUFFIXES[match[2]]
    if match and match[2][1:]:
        with contextlib.suppress(ValueError):
            return Fraction(match[1]) * Fraction(10) ** int(match[2][1:])
    raise ValueError(f"{written!r} is no quantity such as 512Mi, 8Gi or 7e9")


def told(found: Forecast) -> str:
    """Return a forecast as a table for people."""
    rows = [("MODEL", "REPLICA", "WORKER", "GPU")]
    rows += [(one.model, _replica(one), one.worker, _gpus(one)) for one in found.placed]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for waits in found.unplaced:
        lacking = ", ".join(_amount(name, amount) for name, amount in waits.lacking.items())
        where = f"on {waits.nearest}, which comes nearest" if waits.nearest else "as there is no worker"
        lines.append(f"{waits.model} replica {_replica(waits)} does not fit: lacks {lacking} {where}")
    if any("memory" in waits.lacking for waits in found.unplaced):
        taken = _amount("memory", OBJECT_STORE_BYTES + RAY_BYTES)
        lines.append(f"Ray itself takes {taken} of each worker: its processes and its object store.")
    lines.append("A forecast for an empty cluster: Ray decides by what is free at the time.")
    return "\n".join(lines)


def _gpus(one: Placed) -> str:
    return f"{','.join(map(str, one.gpus))} {one.kind}" if one.gpus else "-"


def _replica(one: Placed | Unplaced) -> str:
    return str(one.replica) if one.least else f"{one.replica} (under load)"


def _amount(name: str, amount: float) -> str:
    return f"{amount / 2**20:.4g} MiB of memory" if name == "memory" else f"{amount:g} {name}"
