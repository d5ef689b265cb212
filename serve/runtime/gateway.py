"""The application at `/`: what is not addressed to one model, or to a model that cannot answer yet."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray.serve as ray_serve
from fastapi import FastAPI

from serve.api.directory import ModelStatus
from serve.api.gateway_app import build_gateway_app
from serve.runtime import phases
from serve.runtime.ingress import take_over
from serve.runtime.replica import application_name
from serve.settings import Settings

logger = logging.getLogger("ray.serve")

APPLICATION = "gateway"
_REFRESH_S = 1.0
_FIRST_READ_S = 5.0
_RETRY_AFTER_S = 2.0


class RayDirectory:
    """The declared models and their state, read from Ray once a second on a thread, because Ray's calls block."""

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
                self._models = read_models()
            except Exception:
                logger.exception("The state of the models could not be read; what was known stays.")
            self._first.set()
            time.sleep(_REFRESH_S)


def read_models() -> list[ModelStatus]:
    """Ask Ray for every declared model's state (some milliseconds)."""
    applications = ray_serve.status().applications
    last = {phase.model: phase for phase in phases.reported()}
    return [
        model_status(entry, applications.get(application_name(str(entry["name"]))), last.get(str(entry["name"])))
        for entry in phases.declared()
    ]


def model_status(
    entry: dict[str, Any],
    application: ray_serve.schema.ApplicationStatusOverview | None,
    last: phases.ReplicaPhase | None,
) -> ModelStatus:
    """Fold what was declared, what Ray says and what a replica last said into one status (pure)."""
    running = target = 0
    phase, message = "queued", "waiting for a replica"
    if application is not None:
        for deployment in application.deployments.values():
            running += deployment.replica_states.get("RUNNING", 0)
            target += sum(deployment.replica_states.values())
        if running:
            phase, message = "ready", ""
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
    )


def progress(last: phases.ReplicaPhase) -> str:
    """Return a replica's message with how much of it is done."""
    if last.total > 10**6:
        return f"{last.message} {last.done / 1e6:.0f} of {last.total / 1e6:.0f} MB".strip()
    if last.total:
        return f"{last.message} {last.done} of {last.total}".strip()
    return last.message


@ray_serve.ingress()
class Gateway:
    """The gateway's replica."""

    def __init__(self, settings: str) -> None:
        own = Settings.model_validate_json(settings)
        self._app = build_gateway_app(RayDirectory(), settings=own, base_url=f"http://127.0.0.1:{own.port}")
        take_over(lambda: self._app)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


def build_gateway(settings: Settings) -> ray_serve.Application:
    """Return the gateway's Ray Serve application."""
    deployment = ray_serve.deployment(
        name="gateway",
        num_replicas=1,
        max_ongoing_requests=100_000,
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False, "log_level": settings.log_level.upper()},
    )(Gateway)
    return deployment.bind(settings.model_dump_json())
