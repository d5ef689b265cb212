"""A replica's HTTP server: ours in place of the one that Ray Serve would start, whose wrapper costs more than the rest.

Ray 2.60 runs each request through a request-id middleware, two tasks, a semaphore, three context managers and a log
record: 0.35 ms of CPU, where everything else of a small request takes 0.2. What of it a replica needs is kept here: the
count of requests in flight, on which autoscaling and draining stand, the request metrics, and Ray's health and route
checks. It reaches into `ray.serve._private.replica`, which is why Ray's minor version is pinned.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from ray.serve._private import replica as ray_replica
from ray.serve._private.common import RequestMetadata, RequestProtocol

from serve.api.server import server_config
from serve.api.wire import Message, Receive, Scope, Send


class CountedApplication:
    """The replica's application, each request counted in Ray's own metrics.

    Args:
        application: Answers what is below `prefix`.
        ray: Ray's ASGI callable of the replica; answers everything else.
        prefix: The route prefix of the application, without a slash at its end.
        metrics: The replica's metrics (`ray.serve._private.replica.ReplicaMetricsManager`).
        is_draining: Whether the replica is on its way out, with nothing wrong with it.
    """

    def __init__(
        self, application: Any, *, ray: Any, prefix: str, metrics: Any, is_draining: Callable[[], bool]
    ) -> None:
        self._application = application
        self._ray = ray
        self._prefix = prefix
        self._metrics = metrics
        self._is_draining = is_draining
        self._metadata = RequestMetadata(
            request_id="",
            internal_request_id="",
            call_method="__call__",
            route=prefix,
            is_streaming=True,
            _request_protocol=RequestProtocol.HTTP,
            is_direct_ingress=True,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        path: str = scope["path"]
        if path == "/-/healthz" and self._is_draining():
            # Ray fails this check at once. HAProxy would count the replica out before it is told of the one that
            # takes its place, and callers would get 503 between the two; a replica that is leaving still answers.
            await _answer_healthy(send)
            return
        if path.startswith("/-/") or not path.startswith(self._prefix):
            await self._ray(scope, receive, send)
            return
        scope["root_path"] = scope.get("root_path", "") + self._prefix
        failed = False

        async def watched(message: Message) -> None:
            nonlocal failed
            if message["type"] == "http.response.start" and message["status"] >= 500:
                failed = True
            await send(message)

        metrics = self._metrics
        began = time.perf_counter()
        metrics.inc_num_ongoing_requests(self._metadata)
        try:
            await self._application(scope, receive, watched)
        finally:
            metrics.dec_num_ongoing_requests(self._metadata)
            metrics.record_request_metrics(
                route=self._prefix, latency_ms=(time.perf_counter() - began) * 1000, is_error=failed
            )


async def _answer_healthy(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"success"})


def take_over(application: Callable[[], Any]) -> None:
    """Have Ray start our server in this process; called in the replica's constructor, before Ray starts its own.

    Args:
        application: Returns the replica's application; called when the server starts.
    """

    async def start(
        ray_application: Any,
        http_options: Any,
        *,
        event_loop: asyncio.AbstractEventLoop,
        enable_so_reuseport: bool = False,  # noqa: ARG001 - Ray passes it
    ) -> tuple[asyncio.Task[None], uvicorn.Server]:
        replica = ray_application.__self__
        counted = CountedApplication(
            application(),
            ray=ray_application,
            prefix=(replica._route_prefix or "").rstrip("/"),
            metrics=replica._metrics_manager,
            is_draining=lambda: replica._shutting_down and replica._healthy,
        )
        listener = listen(http_options.host, http_options.port)
        config = server_config(
            counted,
            host=http_options.host,
            port=http_options.port,
            keep_alive_s=http_options.keep_alive_timeout_s,
        )
        server = uvicorn.Server(config)
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        return event_loop.create_task(server.serve(sockets=[listener])), server

    ray_replica.start_asgi_http_server = start


def listen(host: str, port: int) -> socket.socket:
    """Return a bound socket.

    Raises:
        RuntimeError: From the OSError of a port that is taken; Ray then tries the next.
    """
    listener = socket.socket()
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise RuntimeError(f"{host}:{port} cannot be listened on") from error
    return listener
