"""The server's short way must be told from the long one by nothing but its cost."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.api.server import WholeRequestProtocol, server_config


class Echo:
    """Tells what it was asked; remembers what was cancelled."""

    def __init__(self) -> None:
        self.cancelled = 0
        self.entered = asyncio.Event()
        self.left = asyncio.Event()
        self.release = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if scope["path"] == "/wait":
            self.entered.set()
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                self.left.set()
                raise
        if scope["path"] == "/raise":
            raise ValueError("as asked")
        told = json.dumps(
            {
                "method": scope["method"],
                "path": scope["path"],
                "query": scope["query_string"].decode(),
                "headers": [[name.decode(), value.decode("latin-1")] for name, value in scope["headers"]],
                "body": body.decode("latin-1"),
            }
        ).encode()
        if scope["path"] == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for part in (told[:10], told[10:], b""):
                await send({"type": "http.response.body", "body": part, "more_body": bool(part)})
            return
        headers = [(b"content-length", b"%d" % len(told))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": told})


class Server:
    def __init__(self, app: Echo) -> None:
        self.app = app
        self.uvicorn = uvicorn.Server(server_config(app, host="127.0.0.1", port=0, keep_alive_s=30))
        self.uvicorn.install_signal_handlers = lambda: None  # type: ignore[attr-defined]

    async def __aenter__(self) -> Server:
        self.task = asyncio.create_task(self.uvicorn.serve())
        while not self.uvicorn.started:
            await asyncio.sleep(0)
        self.port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        self.uvicorn.should_exit = True
        await self.task

    async def exchange(self, parts: Sequence[bytes], answers: int = 1) -> list[tuple[int, Any]]:
        """Send bytes in pieces, each seen by the server before the next, and read answers."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
                for _ in range(3):
                    await asyncio.sleep(0)
            return [await read_answer(reader) for _ in range(answers)]
        finally:
            writer.close()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, Any]:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    status = int(head.split(b" ", 2)[1])
    lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
    if lines.get(b"transfer-encoding") == b"chunked":
        body = b""
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    else:
        body = await reader.readexactly(int(lines.get(b"content-length", b"0")))
    return status, json.loads(body) if body.startswith(b"{") else body


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with Server(Echo()) as running:
        yield running


def request(path: str = "/infer", body: bytes = b"{}", headers: Sequence[tuple[str, str]] = ()) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: here", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def is_short(data: bytes) -> bool:
    """Whether the short way takes these bytes as one request."""
    config = server_config(Echo(), host="127.0.0.1", port=0, keep_alive_s=1)
    config.load()
    loop = asyncio.new_event_loop()
    try:
        asyncio.set_event_loop(loop)
        protocol = WholeRequestProtocol(
            config=config, server_state=uvicorn.server.ServerState(), app_state={}, _loop=loop
        )
        return protocol._parse(data) is not None
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def test_a_plain_request_takes_the_short_way():
    assert is_short(request(headers=[("X-Request-Id", "7"), ("Accept", "*/*")]))


@pytest.mark.parametrize(
    "data",
    [
        request()[:-1],
        request() + b"x",
        request().replace(b"Content-Length: 2", b"Content-Length: 2\r\nContent-Length: 2"),
        request().replace(b"Content-Length: 2", b"Transfer-Encoding: chunked\r\nContent-Length: 2"),
        request().replace(b"Content-Length: 2", b"Content-Length: +2"),
        request().replace(b"Content-Length: 2", b"Content-Length : 2"),
        request().replace(b"Host: here", b"Host: here\r\n folded"),
        request().replace(b"Host: here", b"Host: he\nre"),
        request().replace(b"Host: here", b"Host: he\rre"),
        request().replace(b"HTTP/1.1", b"HTTP/1.0"),
        request("/a?b=c"),
        request("/a%20b"),
        request("/a b"),
        request(headers=[("Connection", "close")]),
        request(headers=[("Expect", "100-continue")]),
        request(headers=[("Upgrade", "websocket")]),
        request().replace(b"POST", b"GET"),
        request().replace(b"Content-Length: 2", b"Content-Length: " + b"2" * 5000),
    ],
)
def test_what_is_doubtful_goes_to_the_strict_parser(data: bytes):
    assert not is_short(data)


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[tuple[asyncio.Runner, Server]]:
    """A server in a loop of its own, for a test that is many: each that stops takes a tenth of a second to notice."""
    with asyncio.Runner() as runner:
        running = Server(Echo())
        runner.run(running.__aenter__())
        yield runner, running
        runner.run(running.__aexit__())


@settings(max_examples=60)
@given(
    body=st.binary(max_size=300),
    path=st.sampled_from(["/infer", "/stream", "/v1/embeddings"]),
    cuts=st.lists(st.integers(1, 400), max_size=3),
    extra=st.lists(st.tuples(st.sampled_from(["X-A", "Accept", "Connection"]), st.sampled_from(["a", "keep-alive"]))),
)
def test_the_answer_does_not_depend_on_how_the_request_arrives(elsewhere, body, path, cuts, extra):
    runner, server = elsewhere
    data = request(path, body, extra)
    at = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [data[start:end] for start, end in itertools.pairwise(at)]

    async def both() -> list[tuple[int, Any]]:
        return await server.exchange([data]) + await server.exchange(pieces)

    whole, cut = runner.run(both())
    assert whole == cut
    assert whole[0] == 200
    assert whole[1]["body"] == body.decode("latin-1")
    assert whole[1]["path"] == path


async def test_requests_sent_without_waiting_are_answered_in_order(server: Server):
    data = b"".join(request("/infer", b"%d" % index) for index in range(5))
    answers = await server.exchange([data[:100], data[100:]], answers=5)
    assert [answer["body"] for _, answer in answers] == ["0", "1", "2", "3", "4"]


async def test_a_second_request_waits_for_the_first(server: Server):
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request("/wait"))
    await server.app.entered.wait()
    writer.write(request("/infer", b"second"))
    server.app.release.set()
    first, second = await read_answer(reader), await read_answer(reader)
    assert (first[1]["path"], second[1]["body"]) == ("/wait", "second")
    writer.close()


@pytest.mark.parametrize("extra", [(), (("Connection", "keep-alive"),)], ids=["short", "long"])
async def test_a_client_that_leaves_cancels_its_request(server: Server, extra: Sequence[tuple[str, str]]):
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request("/wait", headers=extra))
    await server.app.entered.wait()
    writer.close()
    await asyncio.wait_for(server.app.left.wait(), 10)
    assert server.app.cancelled == 1


async def test_an_application_that_raises_is_a_500(server: Server):
    [(status, _)] = await server.exchange([request("/raise")])
    assert status == 500


async def test_shutting_down_answers_what_is_in_flight():
    async with Server(Echo()) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request("/wait"))
        await server.app.entered.wait()
        server.uvicorn.should_exit = True
        answer = asyncio.create_task(read_answer(reader))
        await asyncio.sleep(0)
        server.app.release.set()
        assert (await answer)[0] == 200
        writer.close()
