"""One model as one Ray Serve application: the replica holds the FastAPI app, the Host and the model in one process."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.serve as ray_serve
from fastapi import FastAPI

from serve.api.documents import infer_example
from serve.api.model_app import build_model_app
from serve.applications import DEPLOYMENT, MODEL_VARIABLE, deployment_options, replica_options
from serve.host import Host, Phase
from serve.runtime import directory
from serve.runtime.events import begin_log
from serve.runtime.ingress import take_over
from serve.runtime.phases import PhaseReporter
from serve.settings import Settings
from serve.spec import ModelSpec, Objectives, revision_of
from serve.telemetry.export import start_tracing
from serve.telemetry.metrics import ReplicaMetrics

logger = logging.getLogger(__name__)

# The event loop and the model's thread share the GIL; a shorter turn lets the model's next operation start sooner.
SWITCH_INTERVAL_S = 0.0005

_LONGEST_EXAMPLE = 2000  # characters that people still paste


@ray_serve.ingress()
class ModelReplica:
    """A replica: loads its model, then answers; Ray takes it into routing once the constructor has returned.

    Args:
        spec: The model's declaration in JSON; empty where a Ray Serve config holds it.
        base_dir: Folder against which a relative `file:` source is resolved.
    """

    async def __init__(self, spec: str, base_dir: str) -> None:  # type: ignore[misc]
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        take_over(lambda: self._app)
        self._spec = ModelSpec.model_validate_json(spec or _from_config())
        self._settings = Settings.from_environment()
        name, tag = self._spec.name, ray_serve.get_replica_context().replica_tag
        about = {"model": name, "revision": revision_of(self._spec), "replica": tag}
        self._log = begin_log(self._settings, f"model-{name}_{tag}", about)
        say = PhaseReporter(name, tag)
        say("starting", "importing")
        metrics = ReplicaMetrics.of(self._spec.name, folder=self._settings.metrics_dir)
        self._tracing = start_tracing(self._settings, instance=tag, model=name)
        tracer = self._tracing.tracer
        self._host = Host(self._spec, settings=self._settings, base_dir=Path(base_dir), metrics=metrics, tracer=tracer)

        def on_phase(phase: Phase) -> None:
            say(phase.name, phase.message, phase.done, phase.total)

        try:
            await self._host.load(on_phase)
            explain = partial(directory.explained, self._spec.name)
            self._app = build_model_app(self._host, settings=self._settings, tracer=tracer, explain=explain)
        except Exception as error:
            say("failed", f"{type(error).__name__}: {error}")
            logger.exception("The model does not start.")
            self._log.flush()
            raise
        say("ready", f"pid {os.getpid()}", request=self._own_request())

    def _own_request(self) -> dict[str, Any] | None:
        """Return a request that a user's class answers; those of the other tasks are known."""
        example = infer_example(self._host.signature) if self._spec.task == "python" else None
        return example if len(json.dumps(example)) <= _LONGEST_EXAMPLE else None

    def reconfigure(self, edited: dict[str, Any]) -> None:
        """Take over what an edit of the declaration changes without a restart (called by Ray with `user_config`)."""
        self._host.metrics.objectives.promise(Objectives.model_validate(edited["objectives"]))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def check_health(self) -> None:
        """Fail where the model can answer nothing more, so that Ray replaces the replica."""
        if not self._host.is_alive:
            raise RuntimeError(f"model {self._spec.name} can answer nothing more: its thread or its engine is gone")

    async def __del__(self) -> None:
        if hasattr(self, "_host"):
            await self._host.drain(max(30.0, self._spec.deadline_ms / 1000))
            await self._host.close()
            await asyncio.to_thread(self._tracing.close)
        if hasattr(self, "_log"):
            self._log.flush()


def build_application(spec: ModelSpec, *, base_dir: Path, log_level: str) -> ray_serve.Application:
    """Return a model's Ray Serve application; nothing runs until it is deployed.

    Args:
        base_dir: Folder against which a relative `file:` source is resolved.
    """
    options = deployment_options(spec) | replica_options(spec)
    options["logging_config"] = {"enable_access_log": False, "log_level": log_level.upper()}
    deployment = ray_serve.deployment(max_constructor_retry_count=1, **options)(ModelReplica)
    return deployment.bind(json.dumps(spec.model_dump(mode="json", by_alias=True)), str(base_dir))


def cluster_application(args: dict[str, str]) -> ray_serve.Application:  # noqa: ARG001 - Ray passes them
    """Return a model's application for a Ray Serve config, which says the deployment's options and holds the model."""
    return ray_serve.deployment(name=DEPLOYMENT, max_constructor_retry_count=1)(ModelReplica).bind("", "/")


def _from_config() -> str:
    """Return the declaration that a Ray Serve config has put into this replica's environment."""
    variables: dict[str, str] = ray.get_runtime_context().runtime_env["env_vars"]
    return variables[MODEL_VARIABLE]
