"""What `helm test` runs, against a platform whose models answer, fail, start and are none at all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from serve.cluster import verify as verify_module
from serve.cluster.verify import verify
from tests.cluster.fakes import Answer, Clock, Faults, _Server

READY = {"name": "a", "phase": "ready", "message": ""}
RIGHT = {"outputs": [{"name": "embedding", "shape": [1, 384]}]}
EXAMPLE = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["A cat sleeps."]}]}


class Platform(_Server):
    """Answers by path; of several indexes, each is told once and the last one from then on."""

    name = "platform"

    def __init__(self, *indexes: Any, infer: Answer = (200, RIGHT)) -> None:
        super().__init__(Faults())
        self.indexes = [*indexes]
        self.infer = infer
        self.bodies: list[Any] = []

    def answer(self, method: str, path: str, body: Any, request: Any) -> Answer:
        if path == "/v2/repository/index":
            return 200, self.indexes.pop(0) if len(self.indexes) > 1 else self.indexes[0]
        if path == "/v2/models/a/openapi.json":
            content = {"application/json": {"example": EXAMPLE}}
            return 200, {"paths": {"/infer": {"post": {"requestBody": {"content": content}}}}}
        if path == "/v2/models/a/infer":
            self.bodies.append(body)
            return self.infer
        return 404, {"error": "no such model"}


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()

    def sleep(seconds: float) -> None:
        made.seconds += seconds

    monkeypatch.setattr(verify_module, "time", SimpleNamespace(monotonic=made, sleep=sleep))
    return made


def told(platform: Platform) -> tuple[bool, list[str]]:
    said: list[str] = []
    with platform.running():
        return verify(platform.url, timeout_s=60, say=said.append), said


def test_every_model_is_sent_the_example_of_its_documents() -> None:
    platform = Platform([READY | {"phase": "starting"}], [READY])
    right, said = told(platform)
    assert right
    assert platform.bodies == [EXAMPLE]
    assert said == [
        "waiting for a starting",
        "a: embedding [1, 384] in 0 ms",
        "1 of 1 models answer; one that is not Accepted is not among them",
    ]


def test_a_platform_without_models_has_proven_nothing() -> None:
    right, said = told(Platform([]))
    assert not right
    assert said == [
        "no model is served, so nothing was tried; declare one, or see why those that there are were not Accepted:"
        " kubectl describe models.roundhouse.dev"
    ]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((500, {"error": "out of memory"}), "a: 500 "),
        ((200, {"error": "none"}), "a: does not answer as its documents say: KeyError: 'outputs'"),
        ((200, []), "a: does not answer as its documents say: TypeError"),
        ((200, {"outputs": ["x"]}), "a: does not answer as its documents say: TypeError"),
    ],
)
def test_a_model_that_answers_wrongly_is_told(answer: Answer, words: str) -> None:
    right, said = told(Platform([READY], infer=answer))
    assert not right
    assert said[0].startswith(words)
    assert said[1].startswith("0 of 1 models answer")


def test_a_model_that_failed_and_one_without_documents_are_told() -> None:
    failed = {"name": "b", "phase": "failed", "message": "no space left"}
    right, said = told(Platform([READY, failed, READY | {"name": "c"}]))
    assert not right
    assert said[1] == "b: failed: no space left"
    assert said[2].startswith("c: does not answer as its documents say: HTTPStatusError")
    assert said[3].startswith("1 of 3 models answer")


@pytest.mark.parametrize("index", [[READY | {"phase": "loading"}], {"error": "starting"}, [{"name": "a"}]])
def test_a_platform_that_does_not_settle_is_given_up(index: Any) -> None:
    platform = Platform(index)
    right, said = told(platform)
    assert not right
    assert said[-1] == f"{platform.url} did not answer within 60 s, or models were still on their way"
