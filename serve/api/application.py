"""A FastAPI application whose hot routes skip FastAPI: no middleware, no routing, no validation stands before them."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import orjson
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Route

from serve.api.access import App, Logged
from serve.api.errors import (
    MethodNotAllowed,
    PathNotFound,
    Shape,
    open_inference_shape,
    openai_shape,
    problem,
    send_error,
)
from serve.api.wire import JSON_HEADER, Headers, Receive, Scope, Send, echoed, relative_path, send_bytes
from serve.errors import Cancelled, ModelNotFound
from serve.telemetry.logs import REQUEST
from serve.telemetry.passage import Passage
from serve.telemetry.traceparent import TraceIds, sampled_trace
from serve.telemetry.tracing import Tracer

#: What answers one request: scope, its headers by name (the last of a name), receive, send.
Answer = Callable[[Scope, dict[bytes, bytes], Receive, Send], Awaitable[None]]

#: What counts a request that has ended, from how it went and its headers.
Meter = Callable[[Passage, Mapping[bytes, bytes]], None]


def exemplar_of(passage: Passage, headers: Mapping[bytes, bytes], tracer: Tracer | None) -> TraceIds | None:
    """Return the trace that a request's exemplar leads to: its own, or where none is sent from here, its caller's."""
    if tracer is not None and tracer.sampling.follow:
        return passage.trace.ids if passage.trace is not None and passage.trace.is_sampled else None
    return sampled_trace(headers.get(b"traceparent"))


def note_failure(passage: Passage, error: Exception) -> None:
    """Note what ended a request, under the code that it is told with."""
    passage.failed(problem(error).code, error)


class Endpoint:
    """An ASGI application that answers one route and tells its errors in one protocol's shape.

    Args:
        meter: Told of every request; None for what is no request to a model.
        tracer: What records requests; None records none.
        route: The path as spans tell it, with placeholders.
    """

    def __init__(
        self,
        answer: Answer,
        shape: Shape,
        *,
        meter: Meter | None = None,
        tracer: Tracer | None = None,
        route: str = "",
    ) -> None:
        self._answer = answer
        self._shape = shape
        self._meter = meter
        self._tracer = tracer
        self._route = route

    @classmethod
    def telling(cls, make: Callable[[dict[str, str]], Any], shape: Shape) -> Endpoint:
        """Return the endpoint of a document that is made from the path's parameters: an object, or a page of HTML."""

        async def answer(scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:  # noqa: ARG001
            made = make(scope["path_params"])
            kind = (b"content-type", b"text/html; charset=utf-8") if isinstance(made, str) else JSON_HEADER
            body = made.encode() if isinstance(made, str) else orjson.dumps(made)
            await send_bytes(send, 200, [kind, *echoed(headers)], body)

        return cls(answer, shape)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer (ASGI)."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        passage = Passage()
        passage.enter(scope)
        REQUEST.set((headers, passage))  # never reset: each request is a task of its own
        if self._tracer is not None:
            passage.trace = self._tracer.begin(headers)

        async def tracked(message: Any) -> None:
            if not passage.status:
                passage.status = message["status"]
                passage.replied = time.monotonic()
            await send(message)

        try:
            await self._answer(scope, headers, receive, tracked)
        except asyncio.CancelledError:
            note_failure(passage, Cancelled())
            raise
        except Exception as error:
            note_failure(passage, error)
            if passage.status and isinstance(error, Cancelled):
                return
            if passage.status:
                raise
            await send_error(tracked, error, self._shape, extra=echoed(headers))
        finally:
            if self._meter is not None and passage.is_counted:
                passage.ended = time.monotonic()
                if self._tracer is not None:
                    self._tracer.end(passage, scope, headers, self._route)
                self._meter(passage, headers)


class Application(FastAPI):
    """FastAPI with a table of hot POST routes in front.

    Args:
        hot: Path below the mount point -> what answers POST there.
        routes: Everything else.
        access_log: Whether each request has its line in the access log.
    """

    def __init__(
        self, *, hot: Mapping[str, Endpoint], routes: Sequence[BaseRoute], access_log: bool = False, **options: Any
    ) -> None:
        super().__init__(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, **options)
        self._hot: Mapping[str, App] = hot
        self._rest: App = self._answer_rest
        if access_log:
            self._hot = {path: Logged(end, route_of=functools.partial(_itself, path)) for path, end in hot.items()}
            self._rest = Logged(self._answer_rest, route_of=self._route_of)
        # The hot routes stand first: Ray looks each request's path up in this list to name its route.
        self.router.routes[:0] = [*(Route(path, end, methods=["POST"]) for path, end in hot.items()), *routes]
        self.add_exception_handler(HTTPException, _refuse)  # type: ignore[arg-type]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a hot route at once, and leave everything else to FastAPI (ASGI)."""
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        if scope["method"] == "POST" and (endpoint := self._hot.get(relative_path(scope) or "")) is not None:
            await endpoint(scope, receive, send)
            return
        await self._rest(dict(scope), receive, send)

    def _route_of(self, scope: Scope) -> str:
        """Return the pattern of the route that a request has, whatever its method."""
        return next(
            (each.path for each in self.router.routes if isinstance(each, Route) and each.matches(scope)[1]), ""
        )

    async def _answer_rest(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = relative_path(scope)
        if path is None:
            # The server matches prefixes by letters: `/v2/models/ab` arrives at the model `a`.
            await _send_not_found(scope, send)
            return
        if len(path) > 1 and path.endswith("/"):
            path = path.rstrip("/") or "/"
        scope["path"] = scope.get("root_path", "") + path
        await super().__call__(scope, receive, send)


def _itself(path: str, scope: Scope) -> str:  # noqa: ARG001 - as `_route_of`
    return path


def shape_of(path: str) -> Shape:
    """Return the shape of errors that clients of a path read."""
    return openai_shape if path.startswith("/v1/") or path == "/v1" or "/v1/" in path else open_inference_shape


async def _send_not_found(scope: Scope, send: Send) -> None:
    name = scope["path"].removeprefix("/v2/models/").partition("/")[0]
    own = scope["root_path"].rpartition("/")[2]
    await send_error(send, ModelNotFound(name, near=[own]), shape_of(scope["path"]), extra=[])


async def _refuse(request: Any, error: HTTPException) -> Any:
    """Tell FastAPI's own refusals (no such path, no such method) in the protocol's shape."""
    path = request.scope["path"]
    allow = (error.headers or {}).get("Allow", "")
    if error.status_code == 405:
        told: Exception = MethodNotAllowed(f"{request.method} is not answered at {path}; {allow} is", allow=allow)
    else:
        told = PathNotFound(f"there is nothing at {path[:200]}; see {request.scope.get('root_path', '')}/docs")
    return _Refusal(told, shape_of(path), echoed(dict(request.scope["headers"])))


class _Refusal:
    def __init__(self, error: Exception, shape: Shape, extra: Headers) -> None:
        self._told = (error, shape, extra)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI
        error, shape, extra = self._told
        await send_error(send, error, shape, extra=extra)
