"""A thousand requests of every kind against a real collector: traces whole, batches linked, trouble harmless."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.e2e.running import Running
from tests.otlp import Collector, Received

pytestmark = pytest.mark.e2e

REQUESTS = 1000
PHASES = {"read", "queue", "compute", "respond"}


class Client:
    """Sends requests, each with a span of its own."""

    def __init__(self, url: str) -> None:
        self.sent: dict[str, tuple[str, str]] = {}  # trace -> the client's span, what was sent
        self._http = httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=32))
        self._dice = random.Random(5)

    async def close(self) -> None:
        await self._http.aclose()

    def _headers(self, kind: str) -> dict[str, str]:
        trace, span = f"{self._dice.getrandbits(128):032x}", f"{self._dice.getrandbits(64):016x}"
        self.sent[trace] = (span, kind)
        return {"traceparent": f"00-{trace}-{span}-01"}

    async def ask(self, kind: str) -> int:
        headers = self._headers(kind)
        path, body = _request(kind, self._dice.randrange(100))
        if kind == "cancelled":
            async with self._http.stream("POST", path, json=body, headers=headers) as reply:
                await anext(reply.aiter_bytes())
                return reply.status_code
        if kind.startswith("stream"):
            async with self._http.stream("POST", path, json=body, headers=headers) as reply:
                await reply.aread()
                return reply.status_code
        return (await self._http.post(path, json=body, headers=headers)).status_code


def _request(kind: str, number: int) -> tuple[str, dict[str, Any]]:
    value = {"bad": "no", "failing": -1}.get(kind, number)
    infer = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [value, 2]}]}
    chat = {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    embed = {"model": "minilm", "input": ["a short text", "another one"]}
    return {
        "infer": ("/v2/models/double/infer", infer),
        "bad": ("/v2/models/double/infer", infer),
        "failing": ("/v2/models/double/infer", infer),
        "embed": ("/v2/models/minilm/v1/embeddings", embed),
        "embed through the gateway": ("/v1/embeddings", embed),
        "unknown through the gateway": ("/v1/embeddings", embed | {"model": "minilm2"}),
        "chat": ("/v1/chat/completions", chat),
        "cancelled": ("/v2/models/smollm2/v1/chat/completions", chat | {"stream": True, "max_tokens": 1500}),
        "stream": ("/v2/models/smollm2/v1/chat/completions", chat | {"stream": True}),
        "stream through the gateway": ("/v1/chat/completions", chat | {"stream": True}),
    }[kind]


EXPECTED = {"bad": 400, "failing": 500, "unknown through the gateway": 404}
KINDS = (
    *("infer",) * 8, *("embed",) * 3, *("embed through the gateway",) * 3, "chat", "stream",
    "stream through the gateway", "bad", "failing", "cancelled", "unknown through the gateway",
)  # fmt: skip


async def send(url: str, kinds: Sequence[str]) -> Client:
    client = Client(url)
    waiting = list(kinds)

    async def one() -> None:
        while waiting:
            kind = waiting.pop()
            assert await client.ask(kind) == EXPECTED.get(kind, 200), kind

    await asyncio.gather(*(one() for _ in range(16)))
    await client.close()
    return client


@pytest.fixture(scope="module")
def run(catalog: Running, collector: Collector) -> tuple[Client, list[Received]]:
    kinds = [KINDS[number % len(KINDS)] for number in range(REQUESTS)]
    random.Random(3).shuffle(kinds)
    began = time.time_ns()
    client = asyncio.run(send(catalog.url, kinds))
    # Other files of tests ask the same platform.
    return client, [span for span in settled(collector, client) if span.began >= began]


def settled(collector: Collector, client: Client) -> list[Received]:
    """Return the spans once every request's own is there and no more come."""
    deadline = time.monotonic() + 60
    count = 0
    while time.monotonic() < deadline:
        spans = collector.wait_for(count)
        there = {span.trace for span in spans if span.kind == "server"}
        if there >= client.sent.keys() and len(spans) == count:
            return spans
        count = len(spans)
        time.sleep(2.5)  # exporters send every second
    missing = Counter(client.sent[trace][1] for trace in client.sent.keys() - there)
    raise AssertionError(f"these have no span: {missing}")


def by_trace(spans: Sequence[Received]) -> dict[str, list[Received]]:
    found: dict[str, list[Received]] = defaultdict(list)
    for span in spans:
        found[span.trace].append(span)
    return found


def test_every_request_is_one_tree_below_its_clients_span(run: tuple[Client, list[Received]]):
    client, spans = run
    traces = by_trace(spans)
    assert len({span.id for span in spans}) == len(spans)
    for trace, (parent, kind) in client.sent.items():
        ids = {span.id: span for span in traces[trace]}
        assert [span.name for span in traces[trace] if span.parent not in ids and span.parent != parent] == []
        roots = [span for span in traces[trace] if span.parent == parent]
        servers = [span for span in traces[trace] if span.kind == "server"]
        assert [root.kind for root in roots] == ["server"], kind
        hops = 2 if ("through" in kind or kind == "chat") and "unknown" not in kind else 1
        assert len(servers) == hops, (kind, [span.name for span in traces[trace]])
    batches = {span.trace for span in spans if span.name.startswith("batch ")}
    assert [span for span in spans if span.trace not in client.sent and span.trace not in batches] == []


def test_every_batch_links_exactly_its_members(run: tuple[Client, list[Received]]):
    client, spans = run
    batches = [span for span in spans if span.name.startswith("batch ")]
    assert len(batches) > 50
    assert max(batch.attributes["roundhouse.batch.size"] for batch in batches) > 1
    assert all(batch.parent == "" for batch in batches)
    from_batches = {(batch.id, member) for batch in batches for _, member in batch.links}
    computes = [span for span in spans if span.links and not span.name.startswith("batch ")]
    from_members = {(batch, span.parent) for span in computes for _, batch in span.links}
    assert from_batches == from_members
    items = Counter(member for _, member in from_batches)
    assert items.total() >= len(items) > 500
    for trace, (_, kind) in client.sent.items():
        if kind in ("infer", "embed"):
            (request,) = [span for span in spans if span.trace == trace and span.kind == "server"]
            assert request.id in items, kind


def test_spans_of_a_models_own_code_are_in_the_trace_of_its_batch(run: tuple[Client, list[Received]]):
    _, spans = run
    batches = {span.id: span for span in spans if span.name == "batch double"}
    own = [span for span in spans if span.name == "own code"]
    assert {span.parent for span in own} == batches.keys()
    assert all(span.trace == batches[span.parent].trace for span in own)


def test_the_phases_of_a_request_are_all_of_it(run: tuple[Client, list[Received]]):
    _, spans = run
    children = defaultdict(list)
    for span in spans:
        children[span.parent].append(span)
    checked = 0
    for span in spans:
        phases = [child for child in children[span.id] if child.kind == "internal"]
        if span.kind == "server" and len(phases) == len(PHASES):
            whole = span.ended - span.began
            assert sum(phase.ended - phase.began for phase in phases) == pytest.approx(whole, rel=0.02)
            checked += 1
    assert checked > 800


def test_errors_are_told_once_and_leaving_is_none(run: tuple[Client, list[Received]]):
    client, spans = run
    traces = by_trace(spans)
    for trace, (_, kind) in client.sent.items():
        told = [event for span in traces[trace] for event in span.events if event[0] == "exception"]
        assert len(told) == (kind in ("bad", "failing", "unknown through the gateway")), (kind, told)
        if kind == "cancelled":
            (server,) = [span for span in traces[trace] if span.kind == "server"]
            assert server.attributes["error.type"] == "client_closed_request"
            assert not server.is_error


def test_language_models_are_told_in_their_own_words(run: tuple[Client, list[Received]]):
    client, spans = run
    traces = by_trace(spans)
    streamed = [trace for trace, (_, kind) in client.sent.items() if kind.startswith("stream")]
    for trace in streamed:
        (chat,) = [span for span in traces[trace] if span.name == "chat smollm2"]
        assert chat.attributes["gen_ai.usage.output_tokens"] == 4
        assert [name for name, _ in chat.events] == ["first_token"]
    assert streamed


def test_an_exemplar_leads_to_its_trace(catalog: Running, collector: Collector, run: tuple[Client, list[Received]]):
    reply = httpx.get(f"{catalog.url}/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    exemplars = [
        sample.exemplar.labels
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
        if sample.exemplar is not None and sample.labels["model"] in ("double", "minilm", "smollm2")
    ]
    known = {(span.trace, span.id) for span in collector.spans if span.kind == "server"}
    assert exemplars
    assert all((labels["trace_id"], labels["span_id"]) in known for labels in exemplars)


@pytest.mark.parametrize("trouble", ["hung", "refusing"])
def test_a_collector_in_trouble_fails_no_request(catalog: Running, collector: Collector, trouble: str):
    if trouble == "hung":
        collector.goes_on.clear()
    collector.refuses = trouble == "refusing"
    try:
        asyncio.run(send(catalog.url, ["infer", "embed", "embed through the gateway"] * 100))
    finally:
        collector.refuses = False
        collector.goes_on.set()
