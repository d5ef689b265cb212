"""Bodies that arrive in pieces, slowly or never, or that take long to read, and what they may take meanwhile."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import orjson
import pytest
from python_multipart.multipart import MultipartParser

from serve.api.body import Uploads, parse_object, quoted, read_body
from serve.api.gateway_app import build_gateway_app
from serve.api.model_app import build_model_app
from serve.errors import Cancelled, DeadlineExceeded, Overloaded, PayloadTooLarge
from serve.settings import Settings
from tests.api.toys import Embedder, Listener, Models, Talker, direct, hosted, spec
from tests.fake_time import run


class Client:
    """Sends a body in parts, each when the test says so; None leaves."""

    def __init__(self) -> None:
        self._parts: asyncio.Queue[tuple[bytes, bool] | None] = asyncio.Queue()

    def sends(self, part: bytes, *, more: bool = True) -> None:
        self._parts.put_nowait((part, more))

    def leaves(self) -> None:
        self._parts.put_nowait(None)

    async def receive(self) -> dict[str, Any]:
        part = await self._parts.get()
        if part is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part[0], "more_body": part[1]}


def reading(client: Client, uploads: Uploads, limit: int = 1000) -> asyncio.Task[bytes]:
    return asyncio.create_task(read_body({}, client.receive, limit=limit, uploads=uploads))


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_bodies_that_arrive_slowly_are_bounded_together_and_count_no_more_once_read() -> None:
    uploads = Uploads(100, within_s=60)
    slow, late = Client(), Client()
    first = reading(slow, uploads)
    slow.sends(b"a" * 60)
    await turns()
    second = reading(late, uploads)
    late.sends(b"b" * 41)
    with pytest.raises(Overloaded, match="60 bytes are arriving, and at most 100") as refused:
        await second
    assert refused.value.retry_after_s > 0
    slow.sends(b"a" * 10, more=False)
    assert await first == b"a" * 70
    uploads.take(100)


@pytest.mark.parametrize("end", ["leaves", "too large", "cancelled"])
async def test_body_that_is_not_read_to_its_end_counts_no_more(end: str) -> None:
    uploads = Uploads(100, within_s=60)
    client = Client()
    read = reading(client, uploads, limit=80)
    client.sends(b"a" * 50)
    await turns()
    with pytest.raises(Overloaded):
        uploads.take(51)
    if end == "leaves":
        client.leaves()
        with pytest.raises(Cancelled):
            await read
    elif end == "too large":
        client.sends(b"a" * 50)
        with pytest.raises(PayloadTooLarge):
            await read
    else:
        read.cancel()
        await asyncio.wait([read])
    uploads.take(100)


async def test_body_in_one_piece_needs_no_room_to_arrive() -> None:
    client = Client()
    client.sends(b"whole", more=False)
    assert await reading(client, Uploads(0, within_s=60)) == b"whole"


def test_body_that_does_not_arrive_in_time_gives_its_room_back() -> None:
    async def story() -> None:
        uploads = Uploads(100, within_s=60)
        client = Client()
        client.sends(b"a" * 50)
        began = asyncio.get_running_loop().time()
        with pytest.raises(DeadlineExceeded, match="had not arrived after 60 s"):
            await reading(client, uploads)
        assert asyncio.get_running_loop().time() == began + 60
        uploads.take(100)

    run(story())


MILLION = 1_000_000


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"a": [' + b"[]," * MILLION, "lists, objects and strings; send tensors flat, or as binary data"),
        (b'{"a": [' + b'"",' * MILLION, "lists, objects and strings"),
        (b'{"a": [' + b"{}," * 200_000, "keys and objects"),
        (b"{" + b",".join(b'"%d": 1' % i for i in range(100_001)), "keys and objects"),
    ],
)
def test_a_body_of_too_many_parts_is_refused_before_it_is_parsed(body: bytes, words: str) -> None:
    # None of them is JSON: the parser would say so.
    with pytest.raises(PayloadTooLarge, match=words) as refused:
        parse_object(body)
    assert refused.value.place == "body"


def test_numbers_and_what_stands_in_strings_are_no_parts() -> None:
    code = '[{"a": \\"b\\": [' * 200_000
    assert parse_object(orjson.dumps({"a": code, "b": [1] * 2 * MILLION}))["a"] == code


@pytest.mark.parametrize(
    "value", [[0] * 3 * MILLION, {"k": [0] * 3 * MILLION}, [[[0] * MILLION] * 9] * 9, "x" * MILLION]
)
def test_only_the_beginning_of_a_value_is_shown(value: object) -> None:
    assert len(quoted(value)) <= 60


def test_a_short_value_is_shown_as_it_is() -> None:
    for value in ([1, -1], "a 'b'", None, 1.5, {"a": 1}, True, 2**64):
        assert quoted(value) == repr(value)


class Held:
    """Holds whoever parses a large body until the test lets go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.go = threading.Event(), threading.Event()
        self._loads, self._write = orjson.loads, MultipartParser.write
        monkeypatch.setattr(orjson, "loads", lambda raw: self._held(raw) or self._loads(raw))
        monkeypatch.setattr(MultipartParser, "write", lambda parser, raw: self._held(raw) or self._write(parser, raw))

    def _held(self, raw: bytes) -> None:
        if len(raw) > MILLION // 2:
            self.began.set()
            assert self.go.wait(10), "nobody was answered meanwhile"


LONG = "a" * MILLION
TENSOR = {"name": "text", "datatype": "BYTES", "shape": [1], "data": [LONG]}
MODELS: dict[str, tuple[type[Any], str]] = {
    "embed": (Embedder, "text-embedding"),
    "talk": (Talker, "text-generation"),
    "listen": (Listener, "speech-to-text"),
}


@pytest.mark.parametrize("at_gateway", [False, True])
@pytest.mark.parametrize(
    ("name", "path", "sent"),
    [
        ("embed", "/infer", {"json": {"inputs": [TENSOR]}}),
        ("embed", "/v1/embeddings", {"json": {"model": "embed", "input": LONG}}),
        ("talk", "/v1/chat/completions", {"json": {"model": "talk", "messages": [{"role": "user", "content": LONG}]}}),
        ("talk", "/v1/completions", {"json": {"model": "talk", "prompt": LONG}}),
        ("listen", "/v1/audio/transcriptions", {"data": {"model": "listen"}, "files": {"file": "RIFF" + LONG}}),
    ],
)
async def test_while_a_large_body_is_read_others_are_answered(
    monkeypatch: pytest.MonkeyPatch, name: str, path: str, sent: dict[str, Any], at_gateway: bool
) -> None:
    if at_gateway and path == "/infer":
        pytest.skip("the gateway reads no tensors")
    held = Held(monkeypatch)
    kind, task = MODELS[name]
    async with hosted(spec(task, name=name), kind()) as host:
        models = Models({name: "ready"}, max_request_bytes=2**25)
        gateway = build_gateway_app(models, settings=Settings(), base_url="http://127.0.0.1:9")
        app = gateway if at_gateway else build_model_app(host, settings=Settings())
        async with direct(app) as client:
            asked = asyncio.ensure_future(client.post(path, **sent))
            assert await asyncio.to_thread(held.began.wait, 10)
            assert (await client.get("/v2" if at_gateway else "/ready")).status_code == 200
            held.go.set()
            # Nothing is behind this gateway; it has read the body to know that.
            assert (await asked).status_code == (503 if at_gateway else 200)
