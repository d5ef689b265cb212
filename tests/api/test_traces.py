"""What requests leave behind as spans, through the applications that answer them: whole trees, and linked batches."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from serve.api.gateway_app import build_gateway_app
from serve.api.model_app import build_model_app
from serve.settings import Settings
from serve.telemetry.spans import Span, spans_of
from serve.telemetry.tracing import Record, Sampling, Tracer
from tests.api.toys import Embedder, Front, Models, Talker, direct, hosted, listening, spec

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
PHASES = {"read", "queue", "compute", "respond"}


class Spans:
    """What tracers handed on."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def tracer(self, model: str = "", ratio: float = 1.0, **options: Any) -> Tracer:
        sampling = Sampling(ratio=ratio, **{"errors": False} | options)
        return Tracer(sampling, self.records.append, model=model, passes_on=not model)

    def all(self) -> list[Span]:
        return [span for record in self.records for span in spans_of(record)]

    def named(self, name: str) -> list[Span]:
        return [span for span in self.all() if span.name == name]

    def check(self) -> None:
        """Every span but a batch hangs on another one or on the client's."""
        found = self.all()
        ids = {span.span_id for span in found}
        assert len(ids) == len(found)
        for span in found:
            if span.name.startswith("batch "):
                assert span.parent_id == b""
            else:
                assert span.parent_id in ids or span.parent_id.hex() == SPAN, span.name


def text(words: str) -> dict[str, Any]:
    return {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [words]}]}


@contextlib.asynccontextmanager
async def embedder(spans: Spans, **options: Any) -> AsyncIterator[tuple[Embedder, httpx.AsyncClient]]:
    model, tracer = Embedder(), spans.tracer("embed", **options)
    async with (
        hosted(spec("text-embedding", name="embed"), model, tracer=tracer) as host,
        direct(build_model_app(host, settings=Settings(), tracer=tracer)) as client,
    ):
        yield model, client


async def test_items_that_run_together_are_linked_with_their_batch():
    spans = Spans()
    async with embedder(spans) as (model, client):
        model.go.clear()
        first = asyncio.create_task(client.post("/infer", json=text("a"), headers=TRACEPARENT))
        await asyncio.to_thread(model.started.wait, 10)
        rest = [asyncio.create_task(client.post("/infer", json=text(word), headers=TRACEPARENT)) for word in "bcd"]
        while len(asyncio.all_tasks()) < 5:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        model.go.set()
        for reply in await asyncio.gather(first, *rest):
            assert reply.status_code == 200
    spans.check()
    requests = {span.span_id: span for span in spans.named("POST /v2/models/{model}/infer")}
    batches = spans.named("batch embed")
    assert len(requests) == 4
    assert all(span.parent_id.hex() == SPAN for span in requests.values())
    linked = [ids.span_id for batch in batches for ids in batch.links]
    assert sorted(linked) == sorted(requests)
    assert sum(batch.attributes["roundhouse.batch.size"] for batch in batches) == 4
    for compute in spans.named("compute"):
        (link,) = compute.links
        (batch,) = [span for span in batches if span.span_id == link.span_id]
        assert compute.parent_id in {ids.span_id for ids in batch.links}
    for request in requests.values():
        phases = [span for span in spans.all() if span.parent_id == request.span_id]
        assert {span.name for span in phases} == PHASES
        whole = request.ended - request.began
        assert sum(span.ended - span.began for span in phases) == pytest.approx(whole)


async def test_an_error_is_told_in_the_phase_that_it_happened_in():
    spans = Spans()
    async with embedder(spans) as (_, client):
        assert (await client.post("/infer", json=text("burst"))).status_code == 500
        assert (await client.post("/infer", json={})).status_code == 400
    failed, refused = spans.named("POST /v2/models/{model}/infer")
    assert (failed.error, failed.attributes["error.type"]) == ("prediction_failed", "prediction_failed")
    assert (refused.error, refused.attributes["error.type"]) == (None, "invalid_value")
    (compute,) = spans.named("compute")
    assert compute.error == "prediction_failed"
    assert [event for span in spans.all() for event in span.events if event[0] == "exception"] == [
        ("exception", compute.ended, {"exception.type": "prediction_failed"}),
        ("exception", refused.ended, {"exception.type": "invalid_value"}),
    ]


async def test_a_client_that_leaves_is_told_without_an_error():
    spans = Spans()
    async with embedder(spans) as (model, client):
        model.go.clear()
        asked = asyncio.create_task(client.post("/infer", json=text("a"), headers=TRACEPARENT))
        await asyncio.to_thread(model.started.wait, 10)
        asked.cancel()
        await asyncio.wait([asked])
        model.go.set()
        await client.post("/infer", json=text("the next"), headers=TRACEPARENT)
    spans.check()
    request, _ = spans.named("POST /v2/models/{model}/infer")
    assert (request.error, request.attributes["error.type"]) == (None, "client_closed_request")
    compute, _ = spans.named("compute")
    batch, _ = spans.named("batch embed")
    assert [ids.span_id for ids in batch.links] == [request.span_id]
    assert [ids.span_id for ids in compute.links] == [batch.span_id]


async def test_nothing_that_clients_sent_is_told_unless_it_is_asked_for():
    for content in (False, True):
        spans = Spans()
        async with embedder(spans, content=content) as (_, client):
            await client.post("/infer", json=text("topsecret"))
            await client.post("/infer", json=text("poison topsecret"))
            await client.post("/v1/embeddings", json={"model": "embed", "input": "topsecret"})
            await client.post("/infer", json={"inputs": "topsecret"})
        assert ("topsecret" in str(spans.all())) == content


@pytest.mark.parametrize("stream", [False, True])
async def test_text_is_told_in_the_words_of_generative_ai(stream: bool):
    spans = Spans()
    tracer = spans.tracer("talk")
    async with (
        hosted(spec("text-generation", name="talk"), Talker(), tracer=tracer) as host,
        direct(build_model_app(host, settings=Settings(), tracer=tracer)) as client,
    ):
        body = {"model": "talk", "prompt": "a b c d", "max_tokens": 3, "stream": stream}
        assert (await client.post("/v1/completions", json=body, headers=TRACEPARENT)).status_code == 200
    spans.check()
    (compute,) = spans.named("text_completion talk")
    assert compute.attributes == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "roundhouse",
        "gen_ai.request.model": "talk",
        "gen_ai.response.model": "talk",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 4,
        "gen_ai.usage.output_tokens": 3,
        "roundhouse.phase": "compute",
    }
    ((name, at, _),) = compute.events
    assert name == "first_token"
    assert compute.began <= at <= compute.ended


async def test_the_gateway_stands_between_the_client_and_the_replica():
    spans = Spans()
    models = Models({"embed": "ready", "other": "loading"})
    tracer = spans.tracer("embed", ratio=0)
    async with hosted(spec("text-embedding", name="embed"), Embedder(), tracer=tracer) as host:
        front = Front({"embed": build_model_app(host, settings=Settings(), tracer=tracer)})
        async with listening(front) as behind:
            front.gateway = build_gateway_app(models, settings=Settings(), base_url=behind, tracer=spans.tracer())
            async with httpx.AsyncClient(base_url=behind) as client:
                ask = {"model": "embed", "input": "a"}
                assert (await client.post("/v1/embeddings", json=ask, headers=TRACEPARENT)).status_code == 200
                assert (await client.post("/v1/embeddings", json=ask)).status_code == 200
                reply = await client.post("/v1/embeddings", json=ask | {"model": "none"}, headers=TRACEPARENT)
                assert reply.status_code == 404
    gateway = spans.named("POST /v1/embeddings")
    attempts = [span for span in spans.all() if span.kind == "client"]
    replicas = spans.named("POST /v2/models/{model}/v1/embeddings")
    assert (len(gateway), len(attempts), len(replicas)) == (3, 2, 2)
    assert [span.parent_id.hex() for span in gateway] == [SPAN, "", SPAN]
    assert {span.parent_id for span in replicas} == {span.span_id for span in attempts}
    assert {span.parent_id for span in attempts} == {span.span_id for span in gateway[:2]}
    assert gateway[2].attributes["error.type"] == "model_not_found"
    assert gateway[0].attributes["roundhouse.model"] == "embed"


async def test_a_failure_that_is_kept_at_its_end_is_one_trace_over_both_hops():
    spans = Spans()
    tracer = spans.tracer("embed", ratio=0, errors=True)
    async with hosted(spec("text-embedding", name="embed"), Embedder(), tracer=tracer) as host:
        front = Front({"embed": build_model_app(host, settings=Settings(), tracer=tracer)})
        async with listening(front) as behind:
            gateway = spans.tracer(ratio=0, errors=True)
            models = Models({"embed": "ready"})
            front.gateway = build_gateway_app(models, settings=Settings(), base_url=behind, tracer=gateway)
            async with httpx.AsyncClient(base_url=behind) as client:
                for words in ("a", "burst"):
                    await client.post("/v1/embeddings", json={"model": "embed", "input": words})
    found = spans.all()
    assert len({span.trace_id for span in found}) == 1
    ids = {span.span_id for span in found}
    assert [span.name for span in found if span.parent_id not in ids] == ["POST /v1/embeddings"]
    assert [span.error for span in spans.named("compute")] == ["prediction_failed"]
