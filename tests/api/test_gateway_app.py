"""The gateway passes on what names its model in the body, and answers for models that cannot answer themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest

from serve.api.directory import ModelStatus
from serve.api.gateway_app import build_gateway_app
from serve.api.model_app import build_model_app
from serve.settings import Settings
from tests.api.toys import Embedder, Front, Listener, Models, Talker, direct, hosted, listening, spec

SETTINGS = Settings()


def refused(reply: httpx.Response) -> tuple[int, str, str | None]:
    error = reply.json()["error"]
    return (
        (reply.status_code, error, None)
        if isinstance(error, str)
        else (reply.status_code, error["message"], error["code"])
    )


async def test_models_that_cannot_answer_are_explained() -> None:
    models = Models({"minilm": "loading", "smollm2": "failed"}, message="weights 3 of 9 MB")
    async with direct(build_gateway_app(models, settings=SETTINGS, base_url="http://127.0.0.1:9")) as client:
        for path in ("/v2/models/minilm", "/v2/models/minilm/infer", "/v2/models/minilm/v1/embeddings"):
            reply = await client.post(path, json={})
            status, message, _ = refused(reply)
            assert (status, reply.headers["retry-after"]) == (503, "4")
            assert "loading" in message
            assert "3 of 9 MB" in message
        reply = await client.post("/v1/embeddings", json={"model": "smollm2", "input": "x"})
        assert refused(reply) == (503, "model 'smollm2' failed to start: weights 3 of 9 MB", "model_not_ready")
        reply = await client.post("/v1/embeddings", json={"model": "minilmm", "input": "x"})
        assert refused(reply) == (404, "model 'minilmm' is not declared; did you mean 'minilm'?", "model_not_found")
        assert (await client.get("/v2/models/minilmm/ready")).status_code == 404
        assert (await client.get("/v2/health/live")).json() == {"live": True, "ready": False}
        assert (await client.get("/v2/health/ready")).status_code == 503
        models.phases = {"minilm": "ready", "smollm2": "failed"}
        assert (await client.get("/v2/health/ready")).json() == {"live": True, "ready": True}
        entries = (await client.post("/v2/repository/index")).json()
        assert [entry["state"] for entry in entries] == ["READY", "UNAVAILABLE"]
        assert entries[1]["reason"] == "failed: weights 3 of 9 MB"
        assert len((await client.post("/v2/repository/index", json={"ready": True})).json()) == 1
        assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["minilm", "smollm2"]
        assert (await client.get("/v1/models/minilm")).json()["id"] == "minilm"
        assert refused(await client.get("/v1/models/nobody"))[0] == 404


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "words"),
    [
        ("POST", "/v1/embeddings", {"content": b""}, 400, "body: is empty"),
        ("POST", "/v1/embeddings", {"content": b"{"}, 400, "body: is not valid JSON"),
        ("POST", "/v1/embeddings", {"content": b"[1]"}, 400, "must be a JSON object"),
        ("POST", "/v1/embeddings", {"json": {"input": "x"}}, 400, "model: is missing"),
        ("POST", "/v1/embeddings", {"json": {"model": 3}}, 400, "model: must be a string"),
        ("POST", "/v1/embeddings", {"content": b"<a/>", "headers": {"content-type": "text/xml"}}, 415, "content-type"),
        ("POST", "/v1/embeddings", {"content": b"x" * 2000}, 413, "2000 bytes or more"),
        ("POST", "/v1/audio/transcriptions", {"json": {"model": "a"}}, 415, "multipart/form-data"),
        ("POST", "/v1/audio/transcriptions", {"files": {"file": b"x"}}, 400, "model: is missing"),
        ("GET", "/v1/embeddings", {}, 405, "POST is"),
        ("POST", "/v1/images", {}, 404, "there is nothing at /v1/images"),
        ("GET", "/v3", {}, 404, "there is nothing at /v3"),
        ("DELETE", "/v2", {}, 405, "GET"),
        ("POST", "/v2/repository/index", {"content": b"[]"}, 400, "JSON object"),
        ("POST", "/v2/repository/models/nobody/load", {}, 404, "nobody"),
    ],
)
async def test_bad_requests_are_refused_with_their_place(
    method: str, path: str, options: dict[str, Any], status: int, words: str
) -> None:
    models = Models({"a": "ready"}, max_request_bytes=1000)
    async with direct(build_gateway_app(models, settings=SETTINGS, base_url="http://127.0.0.1:9")) as client:
        reply = await client.request(method, path, **options)
        found, message, _ = refused(reply)
        assert found == status
        assert words in message


@asynccontextmanager
async def platform(models: Models, *apps: tuple[str, Any]) -> AsyncIterator[str]:
    """Serve model applications at their prefixes and a gateway in front; yields the gateway's URL."""
    async with listening(Front(dict(apps))) as behind:
        app = build_gateway_app(models, settings=SETTINGS, base_url=behind, watch_disconnect=True)
        async with listening(app) as url:
            yield url


async def test_the_openai_client_works_through_the_gateway() -> None:
    models = Models({"embed": "ready", "talk": "ready", "listen": "ready"})
    async with (
        hosted(spec("text-embedding", name="embed"), Embedder()) as embed,
        hosted(spec("text-generation", name="talk"), Talker()) as talk,
        hosted(spec("speech-to-text", name="listen"), Listener()) as listen,
    ):
        apps = [(host.spec.name, build_model_app(host, settings=SETTINGS)) for host in (embed, talk, listen)]
        async with platform(models, *apps) as url:
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                found = await client.embeddings.create(model="embed", input=["a b", "c"])
                assert [len(entry.embedding) for entry in found.data] == [4, 4]
                stream = await client.chat.completions.create(
                    model="talk", messages=[{"role": "user", "content": "one two three"}], stream=True
                )
                said = [chunk.choices[0].delta.content or "" async for chunk in stream]
                assert "".join(said) == "one two three "
                heard = await client.audio.transcriptions.create(model="listen", file=("a.wav", b"RIFF1234"))
                assert heard.text == "8 bytes"
                with pytest.raises(openai.BadRequestError, match="does text-embedding"):
                    await client.completions.create(model="embed", prompt="x")
                with pytest.raises(openai.NotFoundError) as caught:
                    await client.embeddings.create(model="embedd", input="x")
                assert caught.value.body["param"] == "model"
            async with httpx.AsyncClient() as plain:
                headers = {"x-request-id": "r1", "x-request-timeout-ms": "no"}
                body = {"model": "embed", "input": "x"}
                reply = await plain.post(f"{url}/v1/embeddings", json=body, headers=headers)
                assert (reply.status_code, reply.headers["x-request-id"]) == (400, "r1")
                assert "header x-request-timeout-ms" in refused(reply)[1]


async def test_a_large_answer_and_a_large_request_pass_whole() -> None:
    async with (
        hosted(spec("text-embedding", name="embed", batching={"max_batch_size": 64}), Embedder()) as host,
        platform(Models({"embed": "ready"}), ("embed", build_model_app(host, settings=SETTINGS))) as url,
        httpx.AsyncClient() as client,
    ):
        texts = ["word " * 5000 + str(index) for index in range(200)]
        reply = await client.post(f"{url}/v1/embeddings", json={"model": "embed", "input": texts}, timeout=30)
        data = reply.json()["data"]
        assert [entry["index"] for entry in data] == list(range(200))
        assert data[0]["embedding"][0] == 25001


@pytest.mark.parametrize("prompt", ["loop", "silence"])
async def test_a_client_that_leaves_the_gateway_frees_its_stream(prompt: str) -> None:
    model = Talker()
    async with hosted(spec("text-generation", name="talk"), model) as host:
        app = build_model_app(host, settings=SETTINGS)
        async with platform(Models({"talk": "ready"}), ("talk", app)) as url, httpx.AsyncClient() as client:
            model.released.clear()
            body = {"model": "talk", "prompt": prompt, "stream": True}
            asked = asyncio.ensure_future(client.post(f"{url}/v1/completions", json=body))
            while not model.active:
                await asyncio.sleep(0.01)
            asked.cancel()
            assert await asyncio.to_thread(model.released.wait, 10)
            while host.stats().running:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def scripted(answer: bytes) -> AsyncIterator[tuple[str, list[int]]]:
    """Listen on a free port, answer every request with `answer` and close; yields the URL and the requests' count."""
    count: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        count.append(1)
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", count


PROXY_500 = b"HTTP/1.1 500 Internal Server Error\r\ncontent-type: text/plain\r\ncontent-length: 5\r\n\r\noops\n"
PROXYS_503 = (
    b"HTTP/1.1 503 Service Unavailable\r\nx-roundhouse-proxy: 1\r\ncontent-type: application/json\r\n"
    b'content-length: 15\r\n\r\n{"error": "no"}'
)
RAY_404 = b"HTTP/1.1 404 Not Found\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\nno"
RAY_408 = b"HTTP/1.1 408 Request Timeout\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\nno"
CUT = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{"
CUT_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n"


@pytest.mark.parametrize(
    ("answer", "phase", "status", "code"),
    [
        (PROXY_500, "ready", 503, "replica_lost"),
        (PROXY_500, "starting", 503, "model_not_ready"),
        (PROXYS_503, "ready", 503, "replica_lost"),
        (PROXYS_503, "starting", 503, "model_not_ready"),
        (RAY_404, "starting", 503, "model_not_ready"),
        (RAY_408, "ready", 504, "deadline_exceeded"),
        (b"", "ready", 503, "replica_lost"),
        (b"not http at all\r\n\r\n", "ready", 503, "replica_lost"),
    ],
)
async def test_a_lost_replica_is_told_in_the_protocol_and_nothing_is_repeated(
    answer: bytes, phase: str, status: int, code: str
) -> None:
    class Changing(Models):
        asked = 0

        def models(self) -> list[ModelStatus]:
            self.asked += 1
            self.phases = {"a": "ready" if self.asked <= 2 else phase}
            return super().models()

    async with (
        scripted(answer) as (url, count),
        direct(build_gateway_app(Changing({"a": "ready"}), settings=SETTINGS, base_url=url)) as client,
    ):
        reply = await client.post("/v1/embeddings", json={"model": "a", "input": "x"})
        found, _, found_code = refused(reply)
        assert (found, found_code) == (status, code)
        assert status != 503 or int(reply.headers["retry-after"]) >= 1
        assert len(count) == 1


async def test_a_stream_that_breaks_ends_with_an_error_event() -> None:
    async with (
        scripted(CUT_STREAM) as (url, _),
        direct(build_gateway_app(Models({"a": "ready"}), settings=SETTINGS, base_url=url)) as client,
    ):
        reply = await client.post("/v1/chat/completions", json={"model": "a"})
        assert reply.status_code == 200
        assert reply.text.startswith("abcdata: ")
        assert "replica_lost" in reply.text


async def test_nothing_behind_the_gateway_is_a_503() -> None:
    async with scripted(b"") as (url, _):
        pass
    async with direct(build_gateway_app(Models({"a": "ready"}), settings=SETTINGS, base_url=url)) as client:
        reply = await client.post("/v1/embeddings", json={"model": "a", "input": "x"})
        assert refused(reply)[0] == 503


async def test_the_spare_way_is_taken_where_the_nearest_proxy_is_gone() -> None:
    async with scripted(b"") as (gone, _):
        pass
    async with hosted(spec("text-embedding", name="embed"), Embedder()) as embed:
        front = Front({"embed": build_model_app(embed, settings=SETTINGS)})
        async with listening(front) as spare:
            settings = Settings(proxies_url=spare)
            app = build_gateway_app(Models({"embed": "ready"}), settings=settings, base_url=gone)
            async with direct(app) as client:
                reply = await client.post("/v1/embeddings", json={"model": "embed", "input": "x"})
                assert reply.status_code == 200, reply.text


async def test_pages_list_every_model_and_load_nothing_from_elsewhere() -> None:
    models = Models({"minilm": "ready", "odd": "failed"}, message="<b>why</b>")
    async with direct(build_gateway_app(models, settings=SETTINGS, base_url="http://127.0.0.1:9")) as client:
        for path in ("/docs", "/"):
            page = (await client.get(path)).text
            assert "curl http://test/v1/embeddings" in page
            assert 'href="/v2/models/minilm/docs"' in page
            assert "&lt;b&gt;why" in page
            assert "<script" not in page
            assert "src=" not in page


class Watched(Models):
    """A directory that does something as soon as it is asked for the third time."""

    def __init__(self, then: Callable[[Models], None]) -> None:
        super().__init__({"embed": "ready"})
        self.asked = 0
        self.then = then

    def models(self) -> list[ModelStatus]:
        self.asked += 1
        if self.asked == 3:
            self.then(self)
        return super().models()


@asynccontextmanager
async def proxied(front: Front, models: Models) -> AsyncIterator[httpx.AsyncClient]:
    """Serve a front whose unknown paths go to the gateway, which passes requests on to that front."""
    async with listening(front) as url:
        front.gateway = build_gateway_app(models, settings=SETTINGS, base_url=url, watch_disconnect=True)
        async with httpx.AsyncClient(base_url=url) as client:
            yield client


ASKED = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a b"]}]}


async def test_a_request_to_a_ready_model_waits_until_the_proxy_knows_it() -> None:
    async with hosted(spec("text-embedding", name="embed"), Embedder()) as embed:
        app = build_model_app(embed, settings=SETTINGS)
        for path, body in (("/v2/models/embed/infer", ASKED), ("/v1/embeddings", {"model": "embed", "input": "a b"})):
            front = Front({})
            models = Watched(lambda _, front=front: front.apps.update(embed=app))
            async with proxied(front, models) as client:
                reply = await client.post(path, json=body, headers={"x-request-id": "r 1"})
                assert reply.status_code == 200, reply.text
                assert reply.headers["x-request-id"] == "r 1"
                assert models.asked >= 3
        front = Front({})
        async with proxied(front, Watched(lambda _: front.apps.update(embed=app))) as client:
            reply = await client.get("/v2/models/embed/ready")
            assert reply.status_code == 200, reply.text


async def test_a_model_that_stops_being_ready_is_waited_for_no_longer() -> None:
    for path, body in (("/v2/models/embed/infer", ASKED), ("/v1/embeddings", {"model": "embed", "input": "a b"})):
        async with proxied(Front({}), Watched(lambda models: models.phases.update(embed="loading"))) as client:
            reply = await client.post(path, json=body)
            assert refused(reply)[:2] == (503, "model 'embed' is not ready (loading)")


@pytest.mark.parametrize("path", ["/v2/models/embed/infer", "/v1/embeddings"])
async def test_a_route_is_waited_for_no_longer_than_the_caller_waits(path: str) -> None:
    body = ASKED if path.startswith("/v2") else {"model": "embed", "input": "a b"}
    async with proxied(Front({}), Models({"embed": "ready"})) as client:
        reply = await client.post(path, json=body, headers={"x-request-timeout-ms": "500"}, timeout=60)
    assert reply.status_code == 504
    assert "its route is being set up; the request's 0.5 s are over" in refused(reply)[1]


async def test_a_request_that_waited_for_a_route_has_what_is_left_of_its_deadline() -> None:
    told: list[float] = []

    async def model(scope: Any, receive: Any, send: Any) -> None:
        told.append(float(dict(scope["headers"])[b"x-request-timeout-ms"]))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b"{}"})

    front = Front({})
    async with proxied(front, Watched(lambda _: front.apps.update(embed=model))) as client:
        body = {"model": "embed", "input": "a b"}
        reply = await client.post("/v1/embeddings", json=body, headers={"x-request-timeout-ms": "60000"})
    assert reply.status_code == 200
    assert 0 < told[0] < 60_000
