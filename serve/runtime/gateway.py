"""The application at `/`: what is not addressed to one model, or to a model that cannot answer yet."""

from __future__ import annotations

import ray.serve as ray_serve
from fastapi import FastAPI

from serve.api.gateway_app import build_gateway_app
from serve.runtime.directory import RayDirectory
from serve.runtime.ingress import take_over
from serve.settings import Settings

APPLICATION = "gateway"


@ray_serve.ingress()
class Gateway:
    """The gateway's replica."""

    def __init__(self, settings: str) -> None:
        own = Settings.model_validate_json(settings)
        self._app = build_gateway_app(RayDirectory(), settings=own, base_url=own.url)
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
