"""The declared models and how far they are: asked of Ray by one process, read by all that answer for them.

Asking Ray costs its controller some milliseconds; the process that starts the platform does it and leaves the answer in
Ray's control store, where the gateway and the fallback read it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray.serve as ray_serve

from serve.api.directory import ModelStatus, version_of
from serve.applications import ANSWERING, application_name
from serve.runtime import phases

logger = logging.getLogger(__name__)

_REFRESH_S = 1.0
_FIRST_READ_S = 5.0
_RETRY_AFTER_S = 2.0


class RayDirectory:
    """The declared models and their state, read once a second on a thread, because Ray's calls block."""

    def __init__(self) -> None:
        self._models: Sequence[ModelStatus] = ()
        self._first = threading.Event()
        threading.Thread(target=self._refresh, name="directory", daemon=True).start()
        self._first.wait(_FIRST_READ_S)

    def models(self) -> Sequence[ModelStatus]:
        """Return every declared model, in the order of the declaration."""
        return self._models

    def _refresh(self) -> None:
        while True:
            try:
                self._models = phases.published()
            except Exception:
                logger.exception("The state of the models could not be read; what was known stays.")
            self._first.set()
            time.sleep(_REFRESH_S)


def ask() -> list[ModelStatus]:
    """Ask Ray for every declared model's state, and publish it."""
    entries = phases.declared()
    applications = ray_serve.status().applications if entries else {}
    last = {phase.model: phase for phase in phases.reported()}
    models = [
        model_status(entry, applications.get(application_name(str(entry["name"]))), last.get(str(entry["name"])))
        for entry in entries
    ]
    phases.publish(models)
    return models


def ask_or_keep() -> None:
    """Ask as `ask` does; where Ray does not tell, log it and leave what was published."""
    try:
        ask()
    except Exception:
        logger.exception("Ray does not tell how the models are; what was known stays.")


def model_status(
    entry: dict[str, Any],
    application: ray_serve.schema.ApplicationStatusOverview | None,
    last: phases.ReplicaPhase | None,
) -> ModelStatus:
    """Fold what was declared, what Ray says and what a replica last said into one status (pure)."""
    running = target = 0
    changing = False
    phase, message = "queued", "waiting for a replica"
    if application is not None:
        for deployment in application.deployments.values():
            running += sum(count for state, count in deployment.replica_states.items() if state in ANSWERING)
            target += sum(deployment.replica_states.values())
        if running:
            phase, message = "ready", ""
            changing = application.status == "DEPLOYING"
            if application.status == "DEPLOY_FAILED":
                message = f"its change failed, and what was before answers: {_why(application, last)}"
        elif application.status == "DEPLOY_FAILED":
            phase, message = "failed", application.message
        elif application.status == "UNHEALTHY":
            phase, message = "starting", "its replica died; another is on its way"
        elif application.status == "DELETING":
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
    )


def _why(application: ray_serve.schema.ApplicationStatusOverview, last: phases.ReplicaPhase | None) -> str:
    return last.message if last is not None and last.phase == "failed" else str(application.message)


def progress(last: phases.ReplicaPhase) -> str:
    """Return a replica's message with how much of it is done."""
    if last.total > 10**6:
        return f"{last.message} {last.done / 1e6:.0f} of {last.total / 1e6:.0f} MB".strip()
    if last.total:
        return f"{last.message} {last.done} of {last.total}".strip()
    return last.message
