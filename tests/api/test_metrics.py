"""What requests leave behind in the metrics, through the applications that answer them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import orjson
import pytest

from serve.api.gateway_app import build_gateway_app
from serve.api.model_app import build_model_app
from serve.settings import Settings
from serve.spec import Objectives
from tests.api.toys import Embedder, Front, Models, Talker, below, direct, hosted, listening, spec
from tests.scraping import OPENMETRICS, Scrape, parse

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{SPAN}-01"


def text(words: str) -> dict[str, Any]:
    return {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [words]}]}


@contextlib.asynccontextmanager
async def embedder(folder: Path) -> AsyncIterator[tuple[Embedder, httpx.AsyncClient]]:
    model = Embedder()
    prefix = "/v2/models/embed"
    async with (
        hosted(spec("text-embedding", name="embed"), model, metrics_dir=folder) as host,
        direct(below(prefix, build_model_app(host, settings=Settings()))) as client,
    ):
        client.base_url = httpx.URL(f"http://test{prefix}")
        yield model, client


async def test_requests_are_counted_by_protocol_and_outcome(tmp_path: Path):
    async with embedder(tmp_path) as (_, client):
        for _ in range(2):
            assert (await client.post("/infer", json=text("a"))).status_code == 200
        assert (await client.post("/v1/embeddings", json={"model": "embed", "input": "a"})).status_code == 200
        assert (await client.post("/infer", json={})).status_code == 400
        assert (await client.post("/infer", json=text("burst"))).status_code == 500
        assert (await client.post("/infer", content=b"x", headers={"content-type": "text/xml"})).status_code == 415
        assert (await client.post("/v1/completions", json={"model": "embed", "prompt": "a"})).status_code == 400
        for path in ("/ready", "/docs", "/nothing"):
            await client.get(path)
        scrape = Scrape(tmp_path)
    told = scrape.found("requests_total", protocol="open_inference")
    assert {sample.labels["outcome"]: sample.value for sample in told if sample.value} == {
        "ok": 2,
        "invalid_value": 1,
        "prediction_failed": 1,
        "unsupported_media_type": 1,
    }
    assert scrape("requests_total", protocol="openai", outcome="ok") == 1
    assert scrape("requests_total", protocol="openai") == 2
    assert scrape("request_duration_seconds_count", protocol="open_inference", status="ok") == 2
    assert scrape("request_duration_seconds_count", status="error") == 4


async def test_the_phases_of_answered_requests_add_up(tmp_path: Path):
    async with embedder(tmp_path) as (model, client):
        model.go.clear()
        asked = [asyncio.create_task(client.post("/infer", json=text(words))) for words in ("a", "b c", "poison")]
        await asyncio.to_thread(model.started.wait, 10)
        model.go.set()
        await asyncio.gather(*asked)
        scrape = Scrape(tmp_path)
    phases = {sample.labels["phase"]: sample.value for sample in scrape.found("request_phase_duration_seconds_sum")}
    assert set(phases) == {"read", "prepare", "queue", "compute", "respond"}
    assert all(seconds >= 0 for seconds in phases.values())
    assert {sample.value for sample in scrape.found("request_phase_duration_seconds_count")} == {2}
    assert sum(phases.values()) == pytest.approx(scrape("request_duration_seconds_sum", status="ok"))


async def test_a_sampled_trace_becomes_the_exemplar_of_its_bucket(tmp_path: Path):
    async with embedder(tmp_path) as (_, client):
        await client.post("/infer", json=text("a"), headers={"traceparent": f"00-{'1' * 32}-{SPAN}-00"})
        assert Scrape(tmp_path).exemplars("request_duration_seconds") == {}
        await client.post("/infer", json=text("a"), headers={"traceparent": TRACEPARENT})
        (found,) = Scrape(tmp_path).exemplars("request_duration_seconds").values()
    assert found.labels == {"trace_id": TRACE, "span_id": SPAN}
    assert found.value > 0


async def test_a_client_that_leaves_is_an_outcome_and_its_item_is_dropped(tmp_path: Path):
    async with embedder(tmp_path) as (model, client):
        model.go.clear()
        asked = asyncio.create_task(client.post("/infer", json=text("a")))
        await asyncio.to_thread(model.started.wait, 10)
        asked.cancel()
        await asyncio.wait([asked])
        model.go.set()
        scrape = Scrape(tmp_path)
    assert scrape("requests_total", outcome="client_closed_request") == 1
    assert scrape("dropped_total", reason="cancelled", stage="running") == 1


@pytest.mark.parametrize(("words", "outcome"), [("one two", "ok"), ("one crash", "prediction_failed")])
async def test_a_stream_that_fails_after_its_start_is_an_error(tmp_path: Path, words: str, outcome: str):
    async with hosted(spec("text-generation", name="talk"), Talker(), metrics_dir=tmp_path) as host:
        async with direct(build_model_app(host, settings=Settings())) as client:
            body = {"model": "talk", "prompt": words, "stream": True}
            reply = await client.post("/v1/completions", json=body)
            assert reply.status_code == 200
        scrape = Scrape(tmp_path)
    assert scrape.nonzero("requests_total", "outcome") == {outcome: 1}
    assert scrape("time_to_first_token_seconds_count") == 1
    assert scrape("tokens_total", type="output") == len(words.split()) - (outcome != "ok")
    assert bool(scrape.found("request_phase_duration_seconds_count", phase="respond")) == (outcome == "ok")


def kept(scrape: Scrape, model: str, objective: str) -> tuple[float, float]:
    """Return how many requests met an objective and how many missed it."""
    met, missed = (
        scrape("objective_requests_total", model=model, objective=objective, result=each) for each in ("met", "missed")
    )
    return met, missed


async def test_a_replica_counts_what_it_promises(tmp_path: Path):
    declared = spec("text-embedding", name="embed", objectives={"latency_ms": 30_000.0, "availability": 0.99})
    async with hosted(declared, Embedder(), metrics_dir=tmp_path) as host:
        async with direct(build_model_app(host, settings=Settings())) as client:
            for words, status in (("a", 200), ("burst", 500), ("b", 200)):
                assert (await client.post("/infer", json=text(words))).status_code == status
            assert (await client.post("/infer", json={})).status_code == 400
            host.metrics.objectives.promise(Objectives(latency_ms=1e-6))
            assert (await client.post("/infer", json=text("a"))).status_code == 200
        scrape = Scrape(tmp_path)
    assert kept(scrape, "embed", "availability") == (3, 1)
    assert kept(scrape, "embed", "latency") == (2, 1)


async def test_a_stream_is_in_time_by_its_first_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    late = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late[0])
    monkeypatch.setattr("serve.api.application.time", clock)
    declared = spec("text-generation", name="talk", objectives={"latency_ms": 30_000.0})
    async with hosted(declared, Talker(), metrics_dir=tmp_path) as host:
        app = build_model_app(host, settings=Settings())

        async def slow_to_read(scope: Any, receive: Any, send: Any) -> None:
            async def read(message: dict[str, Any]) -> None:
                late[0] += 100.0 * (message["type"] == "http.response.body")
                await send(message)

            await app(scope, receive, read)

        async with direct(slow_to_read) as client:
            body = {"model": "talk", "prompt": "one two", "stream": True}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
        scrape = Scrape(tmp_path)
    assert scrape("request_duration_seconds_sum", status="ok") > 100
    assert kept(scrape, "talk", "latency") == (1, 0)


async def test_the_gateway_counts_what_it_passes_on_and_what_it_refuses(tmp_path: Path):
    models = Models({"embed": "ready", "other": "loading"})
    settings = Settings(metrics_dir=tmp_path)
    async with hosted(spec("text-embedding", name="embed"), Embedder(), metrics_dir=tmp_path) as host:
        front = Front({"embed": build_model_app(host, settings=settings)})
        async with listening(front) as behind:
            front.gateway = build_gateway_app(models, settings=settings, base_url=behind)
            async with httpx.AsyncClient(base_url=behind) as client:
                ask = {"model": "embed", "input": "a"}
                assert (await client.post("/v1/embeddings", json=ask)).status_code == 200
                assert (await client.post("/v1/embeddings", json=ask | {"input": 7})).status_code == 400
                assert (await client.post("/v1/embeddings", json=ask | {"model": "none"})).status_code == 404
                assert (await client.post("/v2/models/other/infer", json={})).status_code == 503
                assert (await client.get("/v2/models/other/ready")).status_code == 503
                reply = await client.get("/metrics", headers={"accept": OPENMETRICS})
        scrape = Scrape(tmp_path)
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    told = {
        (sample.labels["model"], sample.labels["protocol"], sample.labels["outcome"]): sample.value
        for sample in parse(reply.text)
        if sample.name == "roundhouse_gateway_requests_total" and sample.value
    }
    assert told == {
        ("embed", "openai", "ok"): 1,
        ("embed", "openai", "invalid_value"): 1,
        ("", "openai", "model_not_found"): 1,
        ("other", "open_inference", "model_not_ready"): 1,
    }
    assert scrape("requests_total", model="embed") == 2
    # What a replica answered it has counted; the gateway adds what it answered itself, and no caller's own doing.
    assert kept(scrape, "embed", "availability") == (1, 0)
    assert kept(scrape, "other", "availability") == (0, 1)
    assert kept(scrape, "", "availability") == (0, 0)


async def test_a_replicas_failure_is_counted_once(tmp_path: Path):
    settings = Settings(metrics_dir=tmp_path)
    async with hosted(spec("text-embedding", name="embed"), Embedder(), metrics_dir=tmp_path) as host:
        front = Front({"embed": build_model_app(host, settings=settings)})
        async with listening(front) as behind:
            front.gateway = build_gateway_app(Models({"embed": "ready"}), settings=settings, base_url=behind)
            async with httpx.AsyncClient(base_url=behind) as client:
                assert (
                    await client.post("/v1/embeddings", json={"model": "embed", "input": "burst"})
                ).status_code == 500
        scrape = Scrape(tmp_path)
    assert kept(scrape, "embed", "availability") == (0, 1)


async def test_a_replica_that_is_not_there_is_counted_by_the_gateway(tmp_path: Path):
    settings = Settings(metrics_dir=tmp_path)
    gateway = build_gateway_app(Models({"embed": "ready"}), settings=settings, base_url="http://127.0.0.1:9")
    async with direct(gateway) as client:
        assert (await client.post("/v1/embeddings", json={"model": "embed", "input": "a"})).status_code == 503
    assert kept(Scrape(tmp_path), "embed", "availability") == (0, 1)


async def test_without_a_folder_there_are_no_metrics_to_tell():
    async with direct(build_gateway_app(Models({}), settings=Settings(), base_url="http://127.0.0.1:9")) as client:
        reply = await client.get("/metrics")
        assert reply.status_code == 404
        assert "ROUNDHOUSE_METRICS_DIR" in reply.json()["error"]


async def test_ten_thousand_strange_requests_add_no_series(tmp_path: Path):
    dice = random.Random(7)

    def strange() -> str:
        return "".join(chr(dice.choice((dice.randrange(33, 127), dice.randrange(0xA1, 0x2FFF)))) for _ in range(12))

    settings = Settings(metrics_dir=tmp_path)
    async with hosted(spec("text-embedding", name="embed"), Embedder(), metrics_dir=tmp_path) as host:
        replica = below("/v2/models/embed", build_model_app(host, settings=settings))
        gateway = build_gateway_app(Models({"embed": "loading"}), settings=settings, base_url="http://127.0.0.1:9")

        async def attack(name: str) -> None:
            headers = {
                "content-type": "application/json",
                "x-request-id": name,
                "traceparent": f"00-{dice.getrandbits(128):032x}-{dice.getrandbits(64):016x}-01",
                name: name,
            }
            body = {"model": name, "input": "a", "id": name, "user": name}
            await post(gateway, "/v1/embeddings", body, headers)
            await post(gateway, f"/v2/models/{name.replace('/', '-')}/infer", text("a"), headers)
            await post(replica, "/v2/models/embed/v1/embeddings", body, headers)
            await post(replica, "/v2/models/embed/infer", text("a") | {"id": name}, headers)
            await post(replica, "/v2/models/embed/infer", {name: name}, headers)

        await attack("first")
        before = Scrape(tmp_path)
        for _ in range(2000):
            await attack(strange())
        after = Scrape(tmp_path)
    assert after.series() == before.series()
    assert after("requests_total") + after("gateway_requests_total") == 5 * 2001
    assert len(list(tmp_path.glob("*.page"))) == 2


async def post(app: Any, path: str, body: dict[str, Any], headers: dict[str, str]) -> None:
    """Ask an application without a client between, which would cost more than the answer."""
    content = orjson.dumps(body)
    sent = [(name.encode().lower(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": path, "root_path": "", "headers": sent, "query_string": b""}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        pass

    await app(scope, receive, send)
