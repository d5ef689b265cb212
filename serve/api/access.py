"""The access log: one line for each request, whichever way it went."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from serve.api.errors import INTERNAL, OUTCOMES_OF_STATUS, PathNotFound, problem
from serve.api.wire import Message, Receive, Scope, Send
from serve.errors import Cancelled
from serve.telemetry.logs import REQUEST, access

App = Callable[[Scope, Receive, Send], Awaitable[None]]
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"})


class Logged:
    """An application (ASGI) each of whose requests has its line in the access log.

    Args:
        app: Answers.
        route_of: Returns the pattern of the path that a request has; empty where there is none.
    """

    def __init__(self, app: App, *, route_of: Callable[[Scope], str]) -> None:
        self._app = app
        self._route_of = route_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        began = time.perf_counter()
        REQUEST.set((dict(scope["headers"]), None))
        status = sent = 0

        async def counted(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            sent += len(message.get("body", b""))
            await send(message)

        ended = INTERNAL
        try:
            await self._app(scope, receive, counted)
        except asyncio.CancelledError:
            ended = problem(Cancelled())
            raise
        finally:
            status = status or ended.status
            access(
                {
                    "method": scope["method"] if scope["method"] in _METHODS else "(other)",
                    "route": self._route_of(scope),
                    "status": status,
                    "outcome": _outcome(status),
                    "duration_ms": round((time.perf_counter() - began) * 1000, 3),
                    "bytes": sent,
                }
            )


def _outcome(status: int) -> str:
    """Return `ok`, or the code of the error that ended the request that this code runs for."""
    request = REQUEST.get()
    passage = request[1] if request else None
    outcome: str = getattr(passage, "outcome", "ok")
    if status < 400 or outcome != "ok":
        return outcome
    if passage is None and status == 404:  # no endpoint of ours answered
        return problem(PathNotFound()).code
    return OUTCOMES_OF_STATUS.get(status, INTERNAL.code)
