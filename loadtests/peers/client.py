"""A lean HTTP/1.1 load generator on asyncio's protocols, so that the generator's own CPU stays small beside a server's.

Closed loop: so many clients, each sending its next request as its last is answered. Open loop: requests leave at
random times of a given rate whatever the server does, and latency counts from the time at which each was due
(https://www.scylladb.com/2021/04/22/on-coordinated-omission/).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

_ANSWER_TIMEOUT_S = 30.0
_MAX_CONNECTIONS = 512


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and what answers it.

    Args:
        payload: The whole HTTP request.
        check: Whether a body is the right answer to this very request.
    """

    payload: bytes
    check: Callable[[bytes], bool]


@dataclass(slots=True)
class Tally:
    """What happened to the requests that were answered while `counting`.

    Args:
        latencies_s: Of right answers, seconds.
        wrong: Answers of another request, or of no shape that was expected.
        failed: Answers of another status than 200, and requests whose connection broke.
    """

    latencies_s: list[float] = field(default_factory=list)
    wrong: int = 0
    failed: int = 0
    counting: bool = False
    last_failure: str = ""

    def add(self, exchange: Exchange, status: int, body: bytes, latency_s: float) -> None:
        if status != 200:
            self.fail(f"{status} {body[:200]!r}")
        elif self.counting:
            if exchange.check(body):
                self.latencies_s.append(latency_s)
            else:
                self.wrong += 1
                self.last_failure = f"wrong answer {body[:200]!r}"

    def fail(self, reason: str) -> None:
        self.last_failure = reason
        if self.counting:
            self.failed += 1


class Owner(Protocol):
    """Whoever gives a connection its requests."""

    def answered(self, connection: Connection, status: int, body: bytes) -> None:
        """Take an answer; the connection is free again."""

    def lost(self, connection: Connection) -> None:
        """Learn that the connection closed; it carried a request if `exchange` is set."""


class Connection(asyncio.Protocol):
    """One connection; at most one request at a time."""

    __slots__ = ("_buffer", "_closing", "_owner", "exchange", "since", "transport")

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._buffer = b""
        self._closing = False
        self.exchange: Exchange | None = None
        self.since = 0.0
        self.transport: asyncio.Transport | None = None

    def send(self, exchange: Exchange, since: float) -> None:
        """Send a request whose latency counts from `since` (time.perf_counter)."""
        self.exchange, self.since = exchange, since
        assert self.transport is not None
        self.transport.write(exchange.payload)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        answer = parsed(self._buffer)
        if answer is None:
            return
        status, body, closing = answer
        self._buffer, self._closing = b"", closing
        if closing and self.transport is not None:
            self.transport.close()
        self._owner.answered(self, status, body)

    def connection_lost(self, error: Exception | None) -> None:
        self._owner.lost(self)

    @property
    def usable(self) -> bool:
        return not self._closing and self.transport is not None and not self.transport.is_closing()


def parsed(data: bytes) -> tuple[int, bytes, bool] | None:
    """Return status, body and whether the server closes, or None while the answer is incomplete."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = data[:end].lower()
    closing = b"connection: close" in head
    start = head.find(b"content-length:")
    if start >= 0:
        stop = head.find(b"\r\n", start)
        size = int(head[start + 15 : stop if stop >= 0 else end])
        body = data[end + 4 : end + 4 + size]
        return (int(head[9:12]), body, closing) if len(body) == size else None
    if b"transfer-encoding: chunked" not in head:
        raise ValueError(f"an answer of no known length: {head!r}")
    chunks, at = [], end + 4
    while True:
        line = data.find(b"\r\n", at)
        if line < 0:
            return None
        size = int(data[at:line].split(b";")[0], 16)
        if len(data) < line + 2 + size + 2:
            return None
        if size == 0:
            return int(head[9:12]), b"".join(chunks), closing
        chunks.append(data[line + 2 : line + 2 + size])
        at = line + 2 + size + 2


class _Load:
    """What both loops share: the exchanges in turn, the connections, the tally."""

    def __init__(self, host: str, port: int, exchanges: Sequence[Exchange]) -> None:
        self._address = (host, port)
        self._exchanges = exchanges
        self._next = 0
        self._open: set[Connection] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._stopped = False
        self.tally = Tally()

    def _take(self) -> Exchange:
        self._next = (self._next + 1) % len(self._exchanges)
        return self._exchanges[self._next]

    def _connect(self, exchange: Exchange, since: float) -> None:
        task = asyncio.get_running_loop().create_task(self._connect_and_send(exchange, since))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect_and_send(self, exchange: Exchange, since: float) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(200):
            try:
                _, connection = await loop.create_connection(lambda: Connection(self), *self._address)
            except OSError as error:
                self.tally.fail(repr(error))
                await asyncio.sleep(0.05)
                continue
            self._open.add(connection)
            connection.send(exchange, since)
            return

    def _settle(self, connection: Connection, status: int, body: bytes) -> None:
        exchange, connection.exchange = connection.exchange, None
        assert exchange is not None
        self.tally.add(exchange, status, body, time.perf_counter() - connection.since)

    async def _finish(self) -> None:
        self._stopped = True
        for task in list(self._connecting):
            task.cancel()
        for connection in list(self._open):
            if connection.transport is not None:
                connection.transport.abort()
        await asyncio.sleep(0)


class ClosedLoop(_Load):
    """So many clients, each with one request at a time."""

    def start(self, clients: int) -> None:
        for _ in range(clients):
            self._connect(self._take(), time.perf_counter())

    def answered(self, connection: Connection, status: int, body: bytes) -> None:
        self._settle(connection, status, body)
        if self._stopped:
            return
        if connection.usable:
            connection.send(self._take(), time.perf_counter())
        else:
            self._connect(self._take(), time.perf_counter())

    def lost(self, connection: Connection) -> None:
        self._open.discard(connection)
        if connection.exchange is not None and not self._stopped:
            self.tally.fail("the connection broke")
            self._connect(self._take(), time.perf_counter())

    async def stop(self) -> None:
        await self._finish()


class OpenLoop(_Load):
    """Requests at the times of a Poisson process."""

    def start(self, rate: float, seed: int) -> None:
        self._idle: list[Connection] = []
        self._waiting: deque[tuple[Exchange, float]] = deque()
        self._random, self._rate = random.Random(seed), rate
        self._due = time.perf_counter()
        self._plan()

    def _plan(self) -> None:
        self._due += self._random.expovariate(self._rate)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.0, self._due - time.perf_counter()), self._fire)

    def _fire(self) -> None:
        self._give(self._take(), self._due)
        self._plan()

    def _give(self, exchange: Exchange, due: float) -> None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                connection.send(exchange, due)
                return
        if len(self._open) + len(self._connecting) < _MAX_CONNECTIONS:
            self._connect(exchange, due)
        else:
            self._waiting.append((exchange, due))

    def answered(self, connection: Connection, status: int, body: bytes) -> None:
        self._settle(connection, status, body)
        if self._stopped:
            return
        if connection.usable:
            self._idle.append(connection)
        if self._waiting:
            self._give(*self._waiting.popleft())

    def lost(self, connection: Connection) -> None:
        self._open.discard(connection)
        if connection.exchange is not None and not self._stopped:
            self.tally.fail("the connection broke")

    async def stop(self) -> None:
        self._timer.cancel()
        await self._finish()


async def ask(host: str, port: int, payload: bytes) -> tuple[int, bytes]:
    """Send one request on a connection of its own; return status and body. Raises OSError, TimeoutError, ValueError."""
    async with asyncio.timeout(_ANSWER_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(payload)
            data = b""
            while (answer := parsed(data)) is None:
                more = await reader.read(65536)
                if not more:
                    raise ConnectionResetError("the connection closed before the answer")
                data += more
            return answer[0], answer[1]
        finally:
            writer.close()
