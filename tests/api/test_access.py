"""What requests leave in the log: a line each where that is on, and their identifiers on every other line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from serve.api.gateway_app import build_gateway_app
from serve.api.model_app import build_model_app
from serve.settings import Settings
from serve.telemetry.lines import as_json
from serve.telemetry.logs import Log
from tests.api.toys import Embedder, Front, Models, Talker, below, direct, hosted, listening, spec

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
IDS = {"x-request-id": "order-7", "traceparent": f"00-{TRACE}-{SPAN}-01"}
STRANGER = "/nowhere/at/all%0d%0aforged"


def text(words: str) -> dict[str, Any]:
    return {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [words]}]}


class Lines:
    """What was logged."""

    def __init__(self, **about: str) -> None:
        self._text: list[str] = []
        self.log = Log(as_json, self._text.append, level="info", about=about)

    def all(self) -> list[dict[str, Any]]:
        self.log.flush()
        return [json.loads(line) for line in "".join(self._text).splitlines()]

    def of(self, logger: str) -> list[dict[str, Any]]:
        return [found for found in self.all() if found["logger"] == logger]

    @property
    def access(self) -> list[dict[str, Any]]:
        return self.of("roundhouse.access")


@pytest.fixture
def lines():
    made = Lines(model="embed")
    with made.log:
        yield made


@contextlib.asynccontextmanager
async def replica(model: Any, task: str = "text-embedding", *, access_log: bool = True) -> AsyncIterator[Any]:
    prefix = "/v2/models/embed"
    async with hosted(spec(task, name="embed"), model) as host:
        app = below(prefix, build_model_app(host, settings=Settings(access_log=access_log)))
        async with direct(app) as client:
            client.base_url = httpx.URL(f"http://test{prefix}")
            yield client


async def test_each_request_has_one_line(lines: Lines):
    async with replica(Embedder()) as client:
        answer = await client.post("/infer", json=text("a"), headers=IDS)
        await client.post("/infer", json={})
        await client.post("/infer", json=text("burst"))
        await client.get("/ready")
        await client.get(STRANGER)
        await client.request("BREW", "/infer")
        await client.get("/versions/7/stats")
    first, *others = lines.access
    assert first["duration_ms"] > 0
    del first["duration_ms"], first["time"]
    assert first == {
        "level": "info",
        "logger": "roundhouse.access",
        "message": "POST /infer 200",
        "model": "embed",
        "request_id": "order-7",
        "trace_id": TRACE,
        "span_id": SPAN,
        "method": "POST",
        "route": "/infer",
        "status": 200,
        "outcome": "ok",
        "bytes": len(answer.content),
    }
    assert [(found["message"], found["outcome"]) for found in others] == [
        ("POST /infer 400", "invalid_value"),
        ("POST /infer 500", "prediction_failed"),
        ("GET /ready 200", "ok"),
        ("GET (no route) 404", "not_found"),
        ("(other) /infer 405", "method_not_allowed"),
        ("GET /versions/{version}/stats 400", "invalid_value"),
    ]
    assert "forged" not in str(lines.all())


async def test_the_access_log_is_off_by_default(lines: Lines):
    async with replica(Embedder(), access_log=Settings().access_log) as client:
        await client.post("/infer", json=text("a"))
        await client.get("/ready")
    assert lines.access == []


async def test_a_client_that_leaves_has_its_line(lines: Lines):
    model = Embedder()
    async with replica(model) as client:
        model.go.clear()
        asked = asyncio.create_task(client.post("/infer", json=text("a")))
        await asyncio.to_thread(model.started.wait, 10)
        asked.cancel()
        await asyncio.wait([asked])
        model.go.set()
    (found,) = lines.access
    assert (found["status"], found["outcome"], found["bytes"]) == (499, "client_closed_request", 0)


@pytest.mark.parametrize(("words", "outcome"), [("one two", "ok"), ("one crash", "prediction_failed")])
async def test_a_stream_has_one_line_with_all_of_its_bytes(lines: Lines, words: str, outcome: str):
    async with replica(Talker(), "text-generation") as client:
        body = {"model": "embed", "prompt": words, "stream": True}
        answer = await client.post("/v1/completions", json=body)
    (found,) = lines.access
    assert (found["status"], found["outcome"], found["bytes"]) == (200, outcome, len(answer.content))


async def test_the_gateway_names_the_model_it_found_and_no_other():
    lines = Lines(component="gateway")
    settings = Settings(access_log=True)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(lines.log)
        host = await stack.enter_async_context(hosted(spec("text-embedding", name="embed"), Embedder()))
        front = Front({"embed": build_model_app(host, settings=Settings())})
        async with listening(front) as behind:
            models = Models({"embed": "ready", "other": "loading"})
            front.gateway = build_gateway_app(models, settings=settings, base_url=behind)
            async with httpx.AsyncClient(base_url=behind) as client:
                ask = {"model": "embed", "input": "a"}
                await client.post("/v1/embeddings", json=ask)
                await client.post("/v1/embeddings", json=ask | {"input": 7})
                await client.post("/v1/embeddings", json=ask | {"model": "forged\n"})
                await client.post("/v2/models/other/infer", json={})
    assert [(found["message"], found["outcome"]) for found in lines.access] == [
        ("POST /v1/embeddings 200", "ok"),
        ("POST /v1/embeddings 400", "invalid_value"),
        ("POST /v1/embeddings 404", "model_not_found"),
        ("POST /v2/models/{name}/{rest:path} 503", "model_not_ready"),
    ]
    assert [found.get("model") for found in lines.access] == ["embed", "embed", None, "other"]
    assert "forged" not in str(lines.all())


async def test_a_failing_predict_is_one_line_with_the_identifiers_of_its_request(lines: Lines):
    async with replica(Embedder(), access_log=False) as client:
        assert (await client.post("/infer", json=text("burst"), headers=IDS)).status_code == 500
    (found,) = lines.all()
    assert (found["level"], found["message"]) == ("error", "the model raised")
    assert (found["request_id"], found["trace_id"], found["model"]) == ("order-7", TRACE, "embed")
    assert (found["exception"]["type"], found["exception"]["message"]) == ("ValueError", "burst")


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_stream_that_fails_in_the_model_is_one_line_with_its_identifiers(lines: Lines, is_stream: bool):
    async with replica(Talker(), "text-generation", access_log=False) as client:
        body = {"model": "embed", "prompt": "one crash", "stream": is_stream}
        await asyncio.gather(
            client.post("/v1/completions", json=body, headers=IDS),
            client.post("/v1/completions", json=body | {"prompt": "one two"}, headers={"x-request-id": "other"}),
        )
    (found,) = lines.all()
    assert (found["message"], found["request_id"], found["trace_id"]) == ("the model raised", "order-7", TRACE)


async def test_what_a_model_logs_of_a_batch_names_no_request(lines: Lines):
    class Chatty(Embedder):
        def predict(self, batch: Any) -> Any:
            logging.getLogger("users.model").warning("a batch", extra={"size": len(batch)})
            return super().predict(batch)

    async with replica(Chatty(), access_log=False) as client:
        lines.log.flush()
        await client.post("/infer", json=text("a"), headers=IDS)
    found = lines.of("users.model")[-1]
    assert (found["model"], found["size"]) == ("embed", 1)
    assert "request_id" not in found


async def test_strange_identifiers_forge_no_line(lines: Lines):
    async with replica(Embedder(), access_log=True) as client:
        strange = {b"x-request-id": b"a\x1b[2J\x9b" + b"x" * 5000, b"traceparent": b"\xff" * 90}
        await client.post("/infer", json=text("burst"), headers=list(strange.items()))
    found, accessed = lines.all()
    assert found["request_id"] == accessed["request_id"]
    assert found["request_id"].startswith("a\\x1b[2J\\x9bxxx")
    assert len(found["request_id"]) < 200
    assert "trace_id" not in found
