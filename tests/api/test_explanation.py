"""`explain` as a client gets it: from the gateway for every declared model, and from a model's own application."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from serve.api.directory import ModelScaling, ModelStatus
from serve.api.explanation import example, explanation
from serve.api.gateway_app import build_gateway_app
from serve.api.insight import NO_INSIGHT
from serve.api.model_app import build_model_app
from serve.autoscaling.kept import Kept
from serve.settings import Settings
from tests.api.toys import Embedder, direct, hosted, spec
from tests.looks import look

SCALING = ModelScaling(starting=2, draining=1, min_replicas=1, max_replicas=3, target_ongoing_requests=2.0)
STATUS = ModelStatus("minilm", "text-embedding", ready_replicas=1, target_replicas=3, scaling=SCALING)
KEPT = Kept().after(look()).after(look(at=look().at + 1, wanted_replicas=3, lasted_s=0.0))


class Declared:
    def models(self) -> Sequence[ModelStatus]:
        return [STATUS]


def gateway():
    insight = dataclasses.replace(NO_INSIGHT, kept=lambda model: KEPT if model == "minilm" else Kept())
    return build_gateway_app(Declared(), settings=Settings(), base_url="http://127.0.0.1:9", insight=insight)


async def test_the_gateway_explains_a_model_that_does_not_answer_yet():
    async with direct(gateway()) as client:
        reply = await client.get("/v2/models/minilm/explain", headers={"x-request-id": "r1"})
    assert (reply.status_code, reply.headers["x-request-id"]) == (200, "r1")
    told = reply.json()
    assert told["model"] == "minilm"
    assert told["replicas"] == {"wanted": 3, "starting": 2, "ready": 1, "draining": 1}
    assert told["bounds"] == {"min_replicas": 1, "max_replicas": 3}
    assert told["target_ongoing_requests"] == 2.0
    assert (told["look"]["asked_replicas"], told["look"]["wanted_replicas"]) == (4, 3)
    [decision] = told["decisions"]
    assert {key: decision[key] for key in ("at", "from", "to", "reason", "sentence")} == {
        "at": "2026-01-01T12:01:07.000Z",
        "from": 1,
        "to": 3,
        "reason": "load",
        "sentence": "1 -> 3 at 12:01:07 UTC: 6.2 ongoing requests over 30 s, target 2 a replica, at most 3",
    }
    assert decision["inputs"]["ongoing_requests"] == 6.2


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/v2/models/minilmm/explain", 404, "model 'minilmm' is not declared; did you mean 'minilm'?"),
        ("GET", "/v2/models/minilm/explain/", 200, ""),
        ("POST", "/v2/models/minilmm/explain", 404, "did you mean 'minilm'?"),
    ],
)
async def test_a_model_that_is_not_declared_is_refused_in_the_protocols_shape(
    method: str, path: str, status: int, words: str
):
    async with direct(gateway()) as client:
        reply = await client.request(method, path)
    assert reply.status_code == status
    assert words in reply.json().get("error", "")


async def test_a_replica_explains_its_model():
    async with (
        hosted(spec("text-embedding"), Embedder()) as host,
        direct(build_model_app(host, settings=Settings(), explain=lambda: {"model": "toy"})) as client,
    ):
        assert (await client.get("/explain")).json() == {"model": "toy"}
        assert (await client.post("/explain")).status_code == 405


async def test_a_model_that_nothing_scales_says_so():
    async with (
        hosted(spec("text-embedding", scaling={"max_replicas": 4}), Embedder()) as host,
        direct(build_model_app(host, settings=Settings())) as client,
    ):
        told = (await client.get("/explain")).json()
    assert told["replicas"] == {"wanted": 1, "starting": 0, "ready": 1, "draining": 0}
    assert told["bounds"] == {"min_replicas": 1, "max_replicas": 1}
    assert told["holds"] == "it runs in this one process, and nothing scales it"
    assert (told["look"], told["decisions"]) == (None, [])


def test_a_number_that_was_fixed_since_keeps_its_past_and_tells_no_load():
    fixed = dataclasses.replace(STATUS, scaling=ModelScaling(min_replicas=2, max_replicas=2))
    told = explanation(fixed, KEPT, now=look().at)
    assert told["look"] is None
    assert told["holds"].startswith("the number is fixed")
    assert len(told["decisions"]) == 1


def test_the_example_of_the_documents_is_an_explanation():
    told = example("a")
    assert told.keys() == explanation(STATUS, KEPT, now=0.0).keys()
    assert told["holds"].startswith("scaling.max_replicas holds it at 3")
    assert told["decisions"][0]["sentence"].startswith("1 -> 3 at ")
