"""Where replicas say how far they are, kept in Ray's control store so that no further process is needed for it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from serve.api.directory import Capacity, ModelScaling, ModelStatus

NAMESPACE = b"roundhouse"
_DECLARED = b"declared"
_STATUSES = b"statuses"


@dataclass(frozen=True, slots=True)
class ReplicaPhase:
    """What one replica last said.

    Args:
        replica: Its Ray Serve id.
        phase: As in `serve.host.Phase`.
        message: For people; for `failed`, why.
        done: Bytes or steps done, of `total`; 0 of 0 where unknown.
        at: Unix time, seconds.
        seconds: Finished phases of this replica and how long each took.
        request: Of a ready replica, a body that `infer` answers, where the task alone does not tell.
    """

    model: str
    replica: str
    phase: str
    message: str
    done: int
    total: int
    at: float
    seconds: dict[str, float]
    request: dict[str, Any] | None = None


def report(phase: ReplicaPhase) -> None:
    """Publish a replica's phase, replacing what any replica of its model said before."""
    _internal_kv_put(_key(phase.model), json.dumps(asdict(phase)).encode(), overwrite=True, namespace=NAMESPACE)


def reported() -> list[ReplicaPhase]:
    """Return what a replica of each model last said, oldest first."""
    found = []
    for key in _internal_kv_list(b"phase/", namespace=NAMESPACE):
        value = _internal_kv_get(key, namespace=NAMESPACE)
        if value:
            found.append(ReplicaPhase(**json.loads(value)))
    return sorted(found, key=lambda phase: phase.at)


def forget(model: str) -> None:
    """Remove what the replicas of a model said."""
    _internal_kv_del(_key(model), namespace=NAMESPACE)


def _key(model: str) -> bytes:
    return f"phase/{model}".encode()


def declare(models: Sequence[dict[str, Any]]) -> None:
    """Publish the models that are declared, for the gateway's directory."""
    _internal_kv_put(_DECLARED, json.dumps(models).encode(), overwrite=True, namespace=NAMESPACE)


def declared() -> list[dict[str, Any]]:
    """Return what `declare` published last."""
    value = _internal_kv_get(_DECLARED, namespace=NAMESPACE)
    return list(json.loads(value)) if value else []


def publish(models: Sequence[ModelStatus], capacity: Capacity) -> None:
    """Publish the models' state and what the machines have, as the one process that asks Ray knows it."""
    told = json.dumps({"models": [asdict(model) for model in models], "capacity": capacity}).encode()
    _internal_kv_put(_STATUSES, told, overwrite=True, namespace=NAMESPACE)


def published() -> tuple[list[ModelStatus], Capacity]:
    """Return what `publish` published last."""
    value = _internal_kv_get(_STATUSES, namespace=NAMESPACE)
    if not value:
        return [], {}
    told = json.loads(value)
    models = [ModelStatus(**model | {"scaling": ModelScaling(**model["scaling"])}) for model in told["models"]]
    return models, told["capacity"]


class PhaseReporter:
    """Publishes the phases of one replica, at most ten a second while nothing but a counter moves."""

    def __init__(self, model: str, replica: str) -> None:
        self._model = model
        self._replica = replica
        self._phase = ""
        self._entered = time.time()
        self._sent = 0.0
        self._seconds: dict[str, float] = {}

    def __call__(
        self, phase: str, message: str = "", done: int = 0, total: int = 0, request: dict[str, Any] | None = None
    ) -> None:
        """Publish; called from any one thread at a time."""
        now = time.time()
        if phase != self._phase:
            if self._phase:
                spent = now - self._entered
                self._seconds[self._phase] = round(self._seconds.get(self._phase, 0.0) + spent, 3)
            self._phase, self._entered = phase, now
        elif request is None and now - self._sent < 0.1:
            return
        self._sent = now
        report(ReplicaPhase(self._model, self._replica, phase, message, done, total, now, dict(self._seconds), request))
