"""The parts of ASGI that the hot routes need, without a framework between."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeVar, cast

from serve.errors import Cancelled

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]
Result = TypeVar("Result")

JSON_HEADER = (b"content-type", b"application/json")
# What a request and its answer share, so that both can be found in the same logs.
_ECHOED = b"x-request-id"


async def send_bytes(send: Send, status: int, headers: Headers, body: bytes) -> None:
    """Send a whole answer."""
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def echoed(headers: dict[bytes, bytes]) -> Headers:
    """Return the request's headers that its answer repeats."""
    request_id = headers.get(_ECHOED)
    return [] if request_id is None else [(_ECHOED, request_id)]


def relative_path(scope: Scope) -> str | None:
    """Return the path below the application's mount point, `/` at least; None where it is not below it.

    Servers differ in whether `path` includes `root_path`: both are understood.
    """
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and path.startswith(root):
        path = path[len(root) :]
        if path and not path.startswith("/"):
            return None
    return path or "/"


async def disconnected(receive: Receive) -> None:
    """Return once the client has gone; only after its body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(work: Coroutine[Any, Any, Result], receive: Receive) -> Result:
    """Return what `work` returns; cancel it if the client goes first, or if the caller is cancelled.

    Raises:
        Cancelled: The client went first.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Cancelled("the client left before its answer")
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


@contextlib.asynccontextmanager
async def cancelled_on_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Cancel the block if the client goes; the block ends with `Cancelled`.

    Raises:
        Cancelled: The client went.
    """
    running = cast("asyncio.Task[object]", asyncio.current_task())
    watch = asyncio.ensure_future(disconnected(receive))
    gone = False

    def leave(_: asyncio.Future[None]) -> None:
        nonlocal gone
        if not watch.cancelled() and watch.exception() is None:
            gone = True
            running.cancel()

    watch.add_done_callback(leave)
    try:
        yield
    except asyncio.CancelledError:
        if gone and running.uncancel() == 0:
            raise Cancelled("the client left before its answer") from None
        raise
    finally:
        watch.remove_done_callback(leave)
        watch.cancel()
