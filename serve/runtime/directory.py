"""The declared models and how far they are: asked of Ray by one process, read by all that answer for them.

Asking Ray costs its controller some milliseconds; the process that starts the platform does it and leaves the answer in
Ray's control store, where the gateway and the fallback read it. On a cluster, where none stays, each gateway asks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.serve import context

from serve.api.directory import Capacity, ModelScaling, ModelStatus, find, version_of
from serve.api.explanation import explanation
from serve.api.insight import Insight
from serve.applications import ANSWERING, application_name
from serve.autoscaling.kept import Kept
from serve.runtime import decisions, nvml, phases
from serve.telemetry.devices import Gpus

logger = logging.getLogger(__name__)

_REFRESH_S = 1.0
_FIRST_READ_S = 5.0
_RETRY_AFTER_S = 2.0
_CAPACITY_S = 10.0
_RESOURCES = {"cpu": "CPU", "gpu": "GPU", "memory": "memory"}


class RayDirectory:
    """The declared models and their state, read once a second on a thread, because Ray's calls block."""

    def __init__(self) -> None:
        self._known: tuple[Sequence[ModelStatus], Capacity] = ((), {})
        self._first = threading.Event()
        threading.Thread(target=self._refresh, name="directory", daemon=True).start()
        self._first.wait(_FIRST_READ_S)

    def models(self) -> Sequence[ModelStatus]:
        """Return every declared model, in the order of the declaration."""
        return self._known[0]

    def insight(self) -> Insight:
        """Return what else the platform tells of itself."""
        return Insight(kept=decisions.read, capacity=lambda: self._known[1], devices=Gpus(nvml.binding).read)

    def _refresh(self) -> None:
        while True:
            try:
                self._known = phases.published()
            except Exception:
                logger.exception("The state of the models could not be read; what was known stays.")
            self._first.set()
            time.sleep(_REFRESH_S)


class _Published:
    """What was published last, for one question."""

    def models(self) -> Sequence[ModelStatus]:
        return phases.published()[0]


def explained(model: str) -> dict[str, Any]:
    """Return why a model has the replicas that it has, as its own replica tells it; asks Ray's control store.

    Raises:
        ModelNotFound: It is not declared, or not any more.
    """
    return explanation(find(_Published(), model), decisions.read(model), now=time.time())


class Asker:
    """Asks Ray for every declared model's state, and publishes it.

    Args:
        machine: Resources as Ray names them -> what there really is, where Ray was told of more.
    """

    def __init__(self, machine: Mapping[str, float] | None = None) -> None:
        self._machine = machine or {}
        self._capacity: Capacity = {}
        self._capacity_at = -_CAPACITY_S

    def ask(self) -> list[ModelStatus]:
        """Ask, publish, and return the models' state."""
        entries = phases.declared()
        applications = _applications() if entries else {}
        last = {phase.model: phase for phase in phases.reported()}
        models = []
        for entry in entries:
            name = str(entry["name"])
            kept = Kept() if _is_fixed(entry) else decisions.read_last(name)
            models.append(model_status(entry, applications.get(application_name(name)), last.get(name), kept))
        if time.monotonic() - self._capacity_at >= _CAPACITY_S:
            self._capacity = capacity(ray.cluster_resources(), ray.available_resources(), machine=self._machine)
            self._capacity_at = time.monotonic()
        phases.publish(models, self._capacity)
        return models

    def ask_or_keep(self) -> None:
        """Ask; where Ray does not tell, log it and leave what was published."""
        try:
            self.ask()
        except Exception:
            logger.exception("Ray does not tell how the models are; what was known stays.")


def _applications() -> Mapping[str, Mapping[str, Any]]:
    """Return Ray's details of each application as plain values.

    Ray's own class for them serializes the router of each deployment as it is built: most of what a gateway of many
    models would do, and the requests beside it would wait for the interpreter.
    """
    client = context._get_global_client(raise_if_no_controller_running=False)
    return client.get_serve_details()["applications"] if client is not None else {}


def _is_fixed(entry: Mapping[str, Any]) -> bool:
    return bool(entry["scaling"]["min_replicas"] == entry["scaling"]["max_replicas"])


def capacity(total: Mapping[str, float], available: Mapping[str, float], *, machine: Mapping[str, float]) -> Capacity:
    """Return what the machines have and what of it no model has taken, from what Ray counts (pure).

    Args:
        total, available: Resources as Ray names them -> how much; what is all taken may be absent.
        machine: As in `Asker`.
    """
    found = {}
    for name, resource in _RESOURCES.items():
        told = total.get(resource, 0.0)
        size = machine.get(resource, told)
        found[name] = {"total": size, "free": max(0.0, size - told + available.get(resource, 0.0))}
    return found


def model_status(
    entry: Mapping[str, Any],
    application: Mapping[str, Any] | None,
    last: phases.ReplicaPhase | None,
    kept: Kept,
) -> ModelStatus:
    """Fold what was declared, what Ray says, what a replica last said and what was decided into one status (pure).

    Args:
        application: As `ray.serve.schema.ApplicationDetails` has it, in plain values; None where Ray knows of none.
    """
    states: Counter[str] = Counter()
    running = target = 0
    changing = False
    phase, message = "queued", "waiting for a replica"
    if application is not None:
        status = application["status"]
        for deployment in application["deployments"].values():
            states.update(replica["state"] for replica in deployment["replicas"])
            target += deployment["target_num_replicas"]
        running = sum(count for state, count in states.items() if state in ANSWERING)
        if running:
            phase, message = "ready", ""
            changing = status == "DEPLOYING"
            if status == "DEPLOY_FAILED":
                message = f"its change failed, and what was before answers: {_why(application, last)}"
        elif status == "DEPLOY_FAILED":
            phase, message = "failed", application["message"]
        elif status == "UNHEALTHY":
            phase, message = "starting", "its replica died; another is on its way"
        elif status == "DELETING":
            phase, message = "draining", ""
    if last is not None and not running and phase != "draining":
        if last.phase == "failed":
            phase, message = "failed", last.message
        elif phase == "queued" and last.phase == "ready":
            phase, message = "warming", "being put into routing"
        elif phase == "queued":
            phase, message = last.phase, progress(last)
    return ModelStatus(
        name=str(entry["name"]),
        task=str(entry["task"]),
        description=str(entry["description"]),
        phase=phase,
        message=message,
        retry_after_s=_RETRY_AFTER_S,
        ready_replicas=running,
        target_replicas=target,
        max_request_bytes=entry["limits"]["max_request_bytes"],
        request=last.request if last else None,
        version=version_of(entry["revision"]),
        changing=changing,
        scaling=_scaling(entry, states, kept),
    )


def _scaling(entry: Mapping[str, Any], states: Mapping[str, int], kept: Kept) -> ModelScaling:
    declared = entry["scaling"]
    return ModelScaling(
        starting=states.get("STARTING", 0),
        draining=states.get("STOPPING", 0),
        min_replicas=declared["min_replicas"],
        max_replicas=declared["max_replicas"],
        target_ongoing_requests=declared["target_ongoing_requests"],
        ongoing_requests=kept.look.ongoing_requests if kept.look else None,
        decisions={} if _is_fixed(entry) else {".".join(key): count for key, count in kept.counts.items()},
    )


def _why(application: Mapping[str, Any], last: phases.ReplicaPhase | None) -> str:
    return last.message if last is not None and last.phase == "failed" else str(application["message"])


def progress(last: phases.ReplicaPhase) -> str:
    """Return a replica's message with how much of it is done."""
    if last.total > 10**6:
        return f"{last.message} {last.done / 1e6:.0f} of {last.total / 1e6:.0f} MB".strip()
    if last.total:
        return f"{last.message} {last.done} of {last.total}".strip()
    return last.message
