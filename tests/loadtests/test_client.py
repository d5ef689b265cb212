"""The load generator counts what was answered, and latency from when it was due."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from loadtests.peers.client import ClosedLoop, Exchange, OpenLoop, ask, parsed

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
ANSWERS = [
    (HEAD + b"content-length: 5\r\n\r\nhello", (200, b"hello", False)),
    (HEAD + b"Content-Length: 0\r\n\r\n", (200, b"", False)),
    (b"HTTP/1.1 503 Busy\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno", (503, b"no", True)),
    (HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\n\r\n", (200, b"hello", False)),
]


@pytest.mark.parametrize(("data", "answer"), ANSWERS)
def test_an_answer_is_read_once_it_is_whole(data: bytes, answer: tuple[int, bytes, bool]) -> None:
    assert parsed(data) == answer
    whole_from = len(data) - len(b"\r\n") if b"chunked" in data else len(data)
    assert all(parsed(data[:end]) is None for end in range(whole_from - 2))


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=5))
def test_chunks_are_joined(chunks: list[bytes]) -> None:
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    data = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"
    assert parsed(data) == (200, b"".join(chunks), False)


def test_an_answer_without_a_length_is_told() -> None:
    with pytest.raises(ValueError, match="no known length"):
        parsed(HEAD + b"\r\nhello")


Reply = Callable[[web.Request, bytes], web.StreamResponse]


@asynccontextmanager
async def server(reply: Reply) -> AsyncIterator[int]:
    async def handle(request: web.Request) -> web.StreamResponse:
        return reply(request, await request.read())

    application = web.Application()
    application.router.add_post("/", handle)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def echo(request: web.Request, body: bytes) -> web.Response:
    return web.Response(body=body)


def echo_and_close(request: web.Request, body: bytes) -> web.Response:
    response = web.Response(body=body)
    response.force_close()
    return response


def exchange(text: str) -> Exchange:
    head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n\r\n"
    return Exchange((head + text).encode(), lambda body: body == text.encode())


EXCHANGES = [exchange(str(number)) for number in range(50)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("reply", [echo, echo_and_close])
async def test_a_closed_loop_keeps_so_many_requests_in_flight(reply: Reply) -> None:
    async with server(reply) as port:
        loop = ClosedLoop("127.0.0.1", port, EXCHANGES)
        loop.tally.counting = True
        loop.start(4)
        await until(lambda: len(loop.tally.latencies_s) > 100)
        await loop.stop()
    assert (loop.tally.failed, loop.tally.wrong) == (0, 0)


@pytest.mark.parametrize("reply", [echo, echo_and_close])
async def test_an_open_loop_sends_at_its_rate_whatever_the_answers(reply: Reply) -> None:
    async with server(reply) as port:
        loop = OpenLoop("127.0.0.1", port, EXCHANGES)
        loop.tally.counting = True
        loop.start(500.0, seed=1)
        await until(lambda: len(loop.tally.latencies_s) > 100)
        await loop.stop()
    assert (loop.tally.failed, loop.tally.wrong) == (0, 0)


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    asked, release = [], asyncio.Event()

    async def slow(request: web.Request) -> web.Response:
        asked.append(await request.read())
        await release.wait()
        return web.Response(body=asked[0])

    application = web.Application()
    application.router.add_post("/", slow)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    loop = OpenLoop("127.0.0.1", runner.addresses[0][1], EXCHANGES)
    try:
        loop.start(500.0, seed=1)
        await until(lambda: len(asked) > 20)
        assert loop.tally.latencies_s == []
    finally:
        release.set()
        await loop.stop()
        await runner.cleanup()


async def test_an_answer_of_another_request_is_wrong_and_an_error_is_a_failure() -> None:
    def reply(request: web.Request, body: bytes) -> web.Response:
        return web.Response(status=500) if body.endswith(b"7") else web.Response(body=b"1" if body == b"2" else body)

    async with server(reply) as port:
        loop = ClosedLoop("127.0.0.1", port, EXCHANGES)
        loop.tally.counting = True
        loop.start(2)
        await until(lambda: loop.tally.wrong > 1 and loop.tally.failed > 1)
        await loop.stop()
        assert await ask("127.0.0.1", port, exchange("5").payload) == (200, b"5")
    assert loop.tally.latencies_s


async def test_a_connection_that_breaks_is_a_failure_and_its_client_goes_on() -> None:
    answers = iter([False, True])

    def reply(request: web.Request, body: bytes) -> web.Response:
        if not next(answers, True):
            assert request.transport is not None
            request.transport.abort()
        return web.Response(body=body)

    async with server(reply) as port:
        loop = ClosedLoop("127.0.0.1", port, EXCHANGES)
        loop.tally.counting = True
        loop.start(1)
        await until(lambda: len(loop.tally.latencies_s) > 5)
        await loop.stop()
    assert loop.tally.failed == 1
