"""The application at `/`: what is not addressed to one model, or to a model that cannot answer yet."""

from __future__ import annotations

import threading
import time
from typing import Any

import ray.serve as ray_serve
from fastapi import FastAPI

from serve.api.gateway_app import build_gateway_app
from serve.applications import GATEWAY, MAX_ONGOING_REQUESTS
from serve.runtime import decisions, directory, phases
from serve.runtime.events import begin_log
from serve.runtime.ingress import take_over
from serve.settings import Settings
from serve.telemetry.export import start_tracing

_ASK_S = 2.0


@ray_serve.ingress()
class Gateway:
    """The gateway's replica.

    Where a driver stays, as under `roundhouse up`, that declares the models and asks Ray for their state. A cluster has
    none: there the declared models come as Ray's `user_config`, which changes no process, and the gateway asks.
    """

    def __init__(self) -> None:
        settings = Settings.from_environment()
        tag = ray_serve.get_replica_context().replica_tag
        begin_log(settings, f"gateway_{tag}", {"component": "gateway", "replica": tag})
        self._tracing = start_tracing(settings, instance=tag, passes_on=True)
        models = directory.RayDirectory()
        self._app = build_gateway_app(
            models,
            settings=settings,
            base_url=settings.url,
            tracer=self._tracing.tracer,
            insight=models.insight(),
        )
        self._asks = False
        take_over(lambda: self._app)

    def reconfigure(self, declared: dict[str, Any]) -> None:
        """Take the declared models over (called by Ray with a cluster's `user_config`)."""
        models = declared["models"]
        names = {model["name"] for model in models}
        before = {model["name"] for model in phases.declared()}
        for name in before - names:
            phases.forget(name)
        # A model that is declared anew has no past, whoever had its name.
        for name in before ^ names:
            decisions.forget(name)
        phases.declare(models)
        if not self._asks:
            self._asks = True
            threading.Thread(target=self._ask, name="asker", daemon=True).start()

    def _ask(self) -> None:
        asker = directory.Asker()
        while True:
            asker.ask_or_keep()
            time.sleep(_ASK_S)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    def __del__(self) -> None:
        if hasattr(self, "_tracing"):
            self._tracing.close()


def build_gateway(*, log_level: str) -> ray_serve.Application:
    """Return the gateway's application for `roundhouse up`."""
    return ray_serve.deployment(
        name=GATEWAY,
        num_replicas=1,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False, "log_level": log_level.upper()},
    )(Gateway).bind()


def cluster_application(args: dict[str, str]) -> ray_serve.Application:  # noqa: ARG001 - Ray passes them
    """Return the gateway's application from a Ray Serve config, which says the options of the deployment itself."""
    return ray_serve.deployment(name=GATEWAY)(Gateway).bind()
