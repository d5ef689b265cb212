"""uvicorn with a short way for whole requests: most of a small request's cost is the server's own machinery."""

from __future__ import annotations

import asyncio
import logging
import re
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.api.body import read_length
from serve.api.wire import Message, Scope

logger = logging.getLogger(__name__)

_STATUS_LINES = {int(status): f"HTTP/1.1 {int(status)} {status.phrase}\r\n".encode() for status in HTTPStatus}
_LONGEST_WHOLE_BYTES = 256 * 1024
_SEPARATOR = b"\r\n\r\n"
# A request with any of these goes the long way, which knows what they mean.
_DOUBTFUL_TARGET = re.compile(rb"[^!$&-;=@-Z_a-z~]")
_LONG_WAY_HEADERS = frozenset((b"transfer-encoding", b"expect", b"upgrade", b"connection", b"te", b"trailer"))


class WholeRequest:
    """A request that arrived in one piece, as one ASGI exchange whose answer leaves in as few writes as it can."""

    __slots__ = ("_body", "_head", "_headless", "_left", "_length", "_protocol", "scope")

    def __init__(self, protocol: WholeRequestProtocol, scope: Scope, body: bytes) -> None:
        self._protocol = protocol
        self.scope = scope
        self._body: bytes | None = body
        self._head: bytes | None = None
        self._headless = False
        self._length: int | None = None
        self._left: asyncio.Event | None = None

    async def receive(self) -> Message:
        """Return the body, then wait for the client to leave (ASGI)."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        self._left = asyncio.Event()
        await self._left.wait()
        return {"type": "http.disconnect"}

    def leave(self) -> None:
        """Tell whoever waits that the client has gone."""
        if self._left is not None:
            self._left.set()

    async def send(self, message: Message) -> None:
        """Write an answer's start together with its first part (ASGI)."""
        if message["type"] == "http.response.start":
            status: int = message["status"]
            parts = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
            for name, value in message["headers"]:
                parts += (name, b": ", value, b"\r\n")
                if name == b"content-length":
                    self._length = int(value)
            if self._length is None:
                parts.append(b"transfer-encoding: chunked\r\n")
            parts.append(b"\r\n")
            self._head = b"".join(parts)
            return
        await self._protocol.write(self._framed(message.get("body", b""), last=not message.get("more_body", False)))

    def _framed(self, body: bytes, *, last: bool) -> bytes:
        if self._length is None:
            body = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            if last:
                body += b"0\r\n\r\n"
        head, self._head = self._head, None
        if head is not None:
            self._headless = True
            return head + body
        return body

    @property
    def started(self) -> bool:
        """Return whether any of the answer was written."""
        return self._headless


class WholeRequestProtocol(HttpToolsProtocol):
    """uvicorn's protocol; a POST that arrives whole and plain, on a quiet connection, skips most of it.

    Both ways cancel a request's task when its client leaves, so that no application needs to watch for that.
    """

    _request: asyncio.Task[None] | None = None
    _whole: WholeRequest | None = None
    _later: bytes = b""
    _closing: bool = False

    def data_received(self, data: bytes) -> None:
        """Take the short way where it is open."""
        if self._whole is not None:
            self._later += data
            if len(self._later) > _LONGEST_WHOLE_BYTES:
                self.transport.pause_reading()
            return
        if self.cycle is None or self.cycle.response_complete:
            whole = self._parse(data)
            if whole is not None:
                self._unset_keepalive_if_required()
                self._whole = whole
                self._request = task = self.loop.create_task(self._answer(whole))
                self.tasks.add(task)
                task.add_done_callback(self._answered)
                return
        super().data_received(data)

    def _parse(self, data: bytes) -> WholeRequest | None:
        """Return the request if it is whole and plain, else None; what is doubtful is left to the strict parser."""
        if not data.startswith(b"POST /") or len(data) > _LONGEST_WHOLE_BYTES or self._in_message:
            return None
        end = data.find(_SEPARATOR)
        if end < 0:
            return None
        head = data[:end]
        lines = head.split(b"\r\n")
        target, _, version = lines[0][5:].rpartition(b" ")
        if version != b"HTTP/1.1" or _DOUBTFUL_TARGET.search(target):
            return None
        if not head.count(b"\n") == head.count(b"\r") == len(lines) - 1:
            return None
        headers: list[tuple[bytes, bytes]] = []
        length = -1
        for line in lines[1:]:
            name, _, value = line.partition(b":")
            name = name.lower()
            if not name.replace(b"-", b"").isalnum() or name in _LONG_WAY_HEADERS:
                return None
            value = value.strip(b" \t")
            if name == b"content-length":
                told = read_length(value)
                if length >= 0 or told is None:
                    return None
                length = told
            headers.append((name, value))
        if length != len(data) - end - 4:
            return None
        path = target.decode("ascii")
        scope: Scope = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self.root_path + path,
            "raw_path": target,
            "query_string": b"",
            "root_path": self.root_path,
            "headers": headers,
            "client": self.client,
            "server": self.server,
            "state": {},
        }
        return WholeRequest(self, scope, data[end + 4 :])

    async def _answer(self, whole: WholeRequest) -> None:
        try:
            await self.app(whole.scope, whole.receive, whole.send)
        except Exception:
            logger.exception("The application raised.")
            if whole.started:
                self.transport.close()
            else:
                self.transport.write(_STATUS_LINES[500] + b"content-length: 0\r\nconnection: close\r\n\r\n")
                self.transport.close()

    def _answered(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        self._whole = None
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self._closing:
            self.transport.close()
            return
        if self._later:
            later, self._later = self._later, b""
            self.transport.resume_reading()
            self.data_received(later)
            return
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    async def write(self, data: bytes) -> None:
        """Write to the client, waiting while it reads slower than it is written to."""
        if self.transport.is_closing():
            return
        self.transport.write(data)
        if self.flow.write_paused:
            await self.flow.drain()

    def on_message_begin(self) -> None:
        """Note that the strict parser is in the middle of a message."""
        self._in_message = True
        super().on_message_begin()

    def on_message_complete(self) -> None:
        """Note that the strict parser is between messages."""
        self._in_message = False
        super().on_message_complete()

    _in_message: bool = False

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._request = task = self.loop.create_task(cycle.run_asgi(app))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel what the client no longer waits for."""
        if self._whole is not None:
            self._whole.leave()
        super().connection_lost(exc)
        if self._request is not None and not self._request.done():
            self._request.cancel()

    def shutdown(self) -> None:
        """Close once the request in flight is answered."""
        if self._whole is None:
            super().shutdown()
        else:
            self._closing = True


def server_config(app: Any, *, host: str, port: int, keep_alive_s: int) -> uvicorn.Config:
    """Return the configuration of a server that listens with `WholeRequestProtocol`."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=WholeRequestProtocol,
        ws="none",
        lifespan="off",
        timeout_keep_alive=keep_alive_s,
        access_log=False,
        log_config=None,
        log_level="critical",
        proxy_headers=False,
        server_header=False,
        date_header=False,
    )
