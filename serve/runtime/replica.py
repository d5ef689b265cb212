"""One model as one Ray Serve application: the replica holds the FastAPI app, the Host and the model in one process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import ray.serve as ray_serve
from fastapi import FastAPI

from serve.api.documents import infer_example
from serve.api.model_app import build_model_app
from serve.host import Host, Phase
from serve.runtime.ingress import take_over
from serve.runtime.phases import PhaseReporter
from serve.settings import Settings
from serve.spec import ModelSpec

# The event loop and the model's thread share the GIL; a shorter turn lets the model's next operation start sooner.
SWITCH_INTERVAL_S = 0.0005

# The Host bounds its queue in items and bytes and answers 429 itself; Ray's own bound would answer without a reason.
MAX_ONGOING_REQUESTS = 100_000

_LONGEST_EXAMPLE = 2000  # characters that people still paste


def application_name(model: str) -> str:
    """Return the name of a model's Ray Serve application."""
    return f"model-{model}"


def route_prefix(model: str) -> str:
    """Return where a model's application is mounted."""
    return f"/v2/models/{model}"


@ray_serve.ingress()
class ModelReplica:
    """A replica: loads its model, then answers; Ray takes it into routing once the constructor has returned."""

    async def __init__(self, spec: str, settings: str, base_dir: str) -> None:  # type: ignore[misc]
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        take_over(lambda: self._app)
        self._spec = ModelSpec.model_validate_json(spec)
        self._settings = Settings.model_validate_json(settings)
        say = PhaseReporter(self._spec.name, ray_serve.get_replica_context().replica_tag)
        say("starting", "importing")
        self._host = Host(self._spec, settings=self._settings, base_dir=Path(base_dir))

        def on_phase(phase: Phase) -> None:
            say(phase.name, phase.message, phase.done, phase.total)

        try:
            await self._host.load(on_phase)
            self._app = build_model_app(self._host, settings=self._settings)
        except Exception as error:
            say("failed", f"{type(error).__name__}: {error}")
            raise
        say("ready", f"pid {os.getpid()}", request=self._own_request())

    def _own_request(self) -> dict[str, Any] | None:
        """Return a request that a user's class answers; those of the other tasks are known."""
        example = infer_example(self._host.signature) if self._spec.task == "python" else None
        return example if len(json.dumps(example)) <= _LONGEST_EXAMPLE else None

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def check_health(self) -> None:
        """Fail where the model's thread is gone, so that Ray replaces the replica."""
        if not self._host.is_alive:
            raise RuntimeError(f"the thread of model {self._spec.name} is gone")

    async def __del__(self) -> None:
        if hasattr(self, "_host"):
            await self._host.drain(max(30.0, self._spec.deadline_ms / 1000))
            await self._host.close()


def build_application(spec: ModelSpec, *, settings: Settings, base_dir: Path) -> ray_serve.Application:
    """Return a model's Ray Serve application; nothing runs until it is deployed.

    Args:
        base_dir: Folder against which a relative `file:` source is resolved.
    """
    options: dict[str, Any] = {
        "name": "model",
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "max_constructor_retry_count": 1,
        "health_check_period_s": 10,
        "graceful_shutdown_timeout_s": max(10.0, spec.deadline_ms / 1000),
        "ray_actor_options": actor_options(spec),
        "logging_config": {"enable_access_log": False, "log_level": settings.log_level.upper()},
    }
    scaling = spec.scaling
    if scaling.min_replicas == scaling.max_replicas:
        options["num_replicas"] = scaling.min_replicas
    else:
        options["autoscaling_config"] = {
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": scaling.target_ongoing_requests,
        }
    deployment = ray_serve.deployment(**options)(ModelReplica)
    return deployment.bind(
        json.dumps(spec.model_dump(mode="json", by_alias=True)), settings.model_dump_json(), str(base_dir)
    )


def actor_options(spec: ModelSpec) -> dict[str, Any]:
    """Return what one replica asks of Ray's scheduler.

    No runtime_env: with one, Ray could not give the replica a process that it has started ahead.
    """
    options: dict[str, Any] = {"num_cpus": spec.resources.cpus}
    if spec.resources.gpus:
        options["num_gpus"] = spec.resources.gpus
    if spec.resources.memory:
        options["memory"] = spec.resources.memory
    return options
