"""The documents show requests that are answered, and are valid OpenAPI."""

from __future__ import annotations

import json
import shlex
from html.parser import HTMLParser
from typing import Any

import pytest
from openapi_spec_validator import validate

from serve.api.documents import curl, infer_example, shortened
from serve.api.gateway_app import build_gateway_app
from serve.api.model_app import build_model_app
from serve.settings import Settings
from tests.api.toys import Embedder, Everything, Listener, Models, Talker, direct, hosted, spec

SETTINGS = Settings()
TASKS: list[tuple[str, Any]] = [
    ("text-embedding", Embedder),
    ("text-generation", Talker),
    ("speech-to-text", Listener),
    ("python", Everything),
]


@pytest.mark.parametrize(("task", "model"), TASKS)
async def test_every_model_has_a_valid_document_whose_examples_it_answers(task: str, model: Any) -> None:
    async with hosted(spec(task), model()) as host, direct(build_model_app(host, settings=SETTINGS)) as ask:
        document = (await ask.get("/openapi.json")).json()
        validate(document)
        assert document["servers"] == [{"url": "/v2/models/toy"}]
        answered = []
        for path, operations in document["paths"].items():
            if "get" in operations:
                assert (await ask.get(path)).status_code == 200
                continue
            for kind, content in operations["post"]["requestBody"]["content"].items():
                if kind == "application/json" and "example" in content:
                    reply = await ask.post(path, json=content["example"])
                    assert reply.status_code == 200, reply.text
                    answered.append(path)
    expected = {
        "text-embedding": ["/infer", "/v1/embeddings"],
        "text-generation": ["/infer", "/v1/chat/completions", "/v1/completions"],
        "speech-to-text": ["/infer"],
        "python": [],
    }
    assert answered == expected[task]


class Tags(HTMLParser):
    """Collects what a page would load, and checks that its elements are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)
        if tag in ("script", "link", "img", "iframe"):
            self.loaded.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize(("task", "model"), TASKS)
async def test_every_model_has_a_page_that_loads_nothing(task: str, model: Any) -> None:
    described = spec(task, description="<script>alert(1)</script>")
    async with hosted(described, model()) as host, direct(build_model_app(host, settings=SETTINGS)) as ask:
        page = Tags()
        page.feed((await ask.get("/docs")).text)
        assert (page.open, page.loaded) == ([], [])


async def test_the_gateway_document_is_valid() -> None:
    models = Models({"minilm": "ready"})
    async with direct(build_gateway_app(models, settings=SETTINGS, base_url="http://127.0.0.1:9")) as ask:
        document = (await ask.get("/openapi.json")).json()
        validate(document)
        described = document["paths"]["/v2/repository/index"]["post"]["responses"]["200"]["content"]["application/json"]
        index = (await ask.post("/v2/repository/index")).json()
        assert described["schema"]["type"] == "array"
        assert [entry["version"] for entry in described["example"]] == [entry["version"] for entry in index]
        assert "`model` names one of: minilm." in document["paths"]["/v1/embeddings"]["post"]["description"]
        page = Tags()
        page.feed((await ask.get("/")).text)
        assert (page.open, page.loaded) == ([], [])


def test_an_example_of_encoded_bytes_is_base64() -> None:
    example = infer_example(Listener.signature)
    assert example == {"inputs": [{"name": "audio", "datatype": "BYTES", "shape": [1], "data": ["UklGRg=="]}]}


@pytest.mark.parametrize(
    "task",
    [
        "text-embedding",
        "text-generation",
        "image-classification",
        "speech-to-text",
        "forecast",
        "voice-activity",
        "python",
    ],
)
def test_every_task_has_a_command_that_asks_the_model(task: str) -> None:
    command = curl("toy", task, "http://h:1", request='{"id": "it\'s"}')
    assert "toy" in command
    assert "curl http://h:1/" in command
    if " -d {" in command.replace("'", ""):
        assert isinstance(json.loads(shlex.split(command)[-1]), dict)


def test_long_examples_are_cut_for_people() -> None:
    cut = shortened({"a": "x" * 500, "b": list(range(50))})
    assert cut["a"].endswith("(500 characters)")
    assert cut["b"][-1] == "… 50 in all"
