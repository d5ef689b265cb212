"""What answers for an application that has no replica: HAProxy sends its requests to Ray's fallback proxy.

Ray's own answer there is to hold the request until a replica comes or to say so in plain text; a client that loads a
model for the first time would wait without a word. With HAProxy in front nothing else goes through that proxy, so the
gateway's application stands in it and answers 503 with the model's phase, or serves the gateway's own routes while no
gateway replica is up.
"""

from __future__ import annotations

import os

from starlette.middleware import Middleware

from serve.api.gateway_app import build_gateway_app
from serve.api.wire import Receive, Scope, Send
from serve.runtime.directory import RayDirectory
from serve.runtime.events import begin_log
from serve.settings import Settings
from serve.telemetry.export import start_tracing


class Fallback:
    """The gateway's application in front of Ray's own, which keeps its health and route checks."""

    def __init__(self, app: object) -> None:
        self._ray = app
        settings = Settings.from_environment()
        instance = f"fallback_{os.getpid()}"
        begin_log(settings, instance, {"component": "fallback"})
        tracing = start_tracing(settings, instance=instance, passes_on=True)
        models = RayDirectory()
        self._gateway = build_gateway_app(
            models,
            settings=settings,
            base_url=settings.url,
            watch_disconnect=True,
            tracer=tracing.tracer,
            insight=models.insight(),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        app = self._ray if scope["path"].startswith("/-/") else self._gateway
        await app(scope, receive, send)  # type: ignore[operator]


def middlewares() -> list[Middleware]:
    """Return what Ray puts around its proxy's application (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH)."""
    return [Middleware(Fallback)]
