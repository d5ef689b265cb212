"""What is wrong is a 4xx that names the place, and the model goes on answering others."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import pytest

from serve.api.model_app import build_model_app
from serve.settings import Settings
from tests.api.toys import Embedder, Everything, Listener, Talker, direct, hosted, spec

SETTINGS = Settings()
MODELS: dict[str, Any] = {
    "text-embedding": Embedder,
    "text-generation": Talker,
    "speech-to-text": Listener,
    "python": Everything,
}
DEEP = b"[" * 100_000 + b"]" * 100_000
DEEP_OBJECT = b'{"a":' * 200 + b"1" + b"}" * 200


def tensor(data: Any, shape: Any = None, datatype: str = "BYTES", name: str = "text", **more: Any) -> dict[str, Any]:
    return {"name": name, "shape": [1] if shape is None else shape, "datatype": datatype, "data": data, **more}


def inputs(*tensors: Any, **more: Any) -> dict[str, Any]:
    return {"inputs": list(tensors), **more}


GOOD = inputs(tensor(["a"]))

# content or JSON, headers, status, what the message has in it
INFER: list[tuple[Any, dict[str, str], int, str]] = [
    (b"", {}, 400, "body: is empty"),
    (b" ", {}, 400, "body: is not valid JSON"),
    (b"{", {}, 400, "body: is not valid JSON"),
    (json.dumps(GOOD).encode()[:-4], {}, 400, "body: is not valid JSON"),
    (json.dumps(GOOD).encode() + b"x", {}, 400, "body: is not valid JSON"),
    (b"[]", {}, 400, "must be a JSON object, not a list"),
    (b"null", {}, 400, "must be a JSON object, not null"),
    (b"\xff\xfe", {}, 400, "body: is not valid JSON"),
    (b'{"id": "\xff"}', {}, 400, "body: is not valid JSON"),
    (b'{"id": "\\ud800"}', {}, 400, "surrogate"),
    (b'{"id": "a", "id": "b"}', {}, 400, "'id' stands twice"),
    (b'{"id": "a", "id" : "b"}', {}, 400, "'id' stands twice"),
    (b'{"inputs": [{"name": "a", "name": "b"}]}', {}, 400, "'name' stands twice"),
    (b'{"inputs": [[{"name": "a", "name": "b"}]]}', {}, 400, "'name' stands twice"),
    (b'{"inputs": NaN}', {}, 400, "body: is not valid JSON"),
    (b'{"inputs": Infinity}', {}, 400, "body: is not valid JSON"),
    (b'{"inputs": 1e999}', {}, 400, "body: is not valid JSON"),
    (b'{"inputs": ' + b"9" * 5000 + b"}", {}, 400, "body: is not valid JSON"),
    (DEEP, {}, 400, "depth"),
    (DEEP_OBJECT, {}, 400, "levels deep"),
    (b'{"inputs": ' + b"[" * 500 + b"]" * 500 + b"}", {}, 400, "inputs[0]: must be an object"),
    ({}, {}, 400, "inputs: must be a list, not null"),
    ({"inputs": []}, {}, 400, "inputs: is empty; the model takes text"),
    ({"inputs": {}}, {}, 400, "inputs: must be a list"),
    ({"inputs": ["text"]}, {}, 400, "inputs[0]: must be an object, not a string"),
    ({**GOOD, "input": []}, {}, 400, "did you mean 'inputs'"),
    ({**GOOD, "id": 7}, {}, 400, "id: must be a string, not a number"),
    ({**GOOD, "parameters": []}, {}, 400, "parameters: must be an object"),
    ({**GOOD, "parameters": {"binary_data_output": "yes"}}, {}, 400, "parameters.binary_data_output: must be true or"),
    ({**GOOD, "parameters": {"temperature": 1}}, {}, 400, "parameters.temperature: model 'toy' has no such parameter"),
    ({**GOOD, "parameters": {"sequence_id": 4}}, {}, 400, "parameters.sequence_id: is not supported"),
    ({**GOOD, "parameters": {"priority": 1}}, {}, 400, "parameters.priority: is not supported"),
    ({**GOOD, "parameters": {"timeout": -1}}, {}, 400, "parameters.timeout: must be a whole number of microseconds"),
    ({**GOOD, "parameters": {"timeout": 10**30}}, {}, 400, "parameters.timeout"),
    ({**GOOD, "model_name": "other"}, {}, 400, "model_name: is 'other', and this is 'toy'"),
    ({**GOOD, "model_version": "2"}, {}, 400, "model_version: is '2'"),
    ({**GOOD, "outputs": {}}, {}, 400, "outputs: must be a list"),
    ({**GOOD, "outputs": [1]}, {}, 400, "outputs[0]: must be an object"),
    ({**GOOD, "outputs": [{"name": "embeding"}]}, {}, 400, "did you mean 'embedding'"),
    ({**GOOD, "outputs": [{"name": ["x"]}]}, {}, 400, "outputs[0].name"),
    ({**GOOD, "outputs": [{"name": "embedding"}] * 2}, {}, 400, "outputs[1].name: 'embedding' stands twice"),
    ({**GOOD, "outputs": [{"name": "embedding", "shape": []}]}, {}, 400, "outputs[0].shape: is not a key"),
    (
        {**GOOD, "outputs": [{"name": "embedding", "parameters": {"classification": 3}}]},
        {},
        400,
        "outputs[0].parameters.classification",
    ),
    (
        {**GOOD, "outputs": [{"name": "embedding", "parameters": {"binary_data": 1}}]},
        {},
        400,
        "outputs[0].parameters.binary_data: must be true or false",
    ),
    (inputs({"name": "text"}), {}, 400, "inputs[0].shape: is missing"),
    (inputs({"shape": [1], "datatype": "BYTES"}), {}, 400, "inputs[0].name: is missing"),
    (inputs({"name": "text", "shape": [1], "datatype": "BYTES"}), {}, 400, "inputs[0].data: is missing"),
    (
        inputs(tensor(["a"], name="txet")),
        {},
        400,
        "inputs[0].name: 'txet' is no input of the model; did you mean 'text'",
    ),
    (inputs(tensor(["a"], name={"a": 1})), {}, 400, "inputs[0].name"),
    (inputs(tensor(["a"], datatype="FP32")), {}, 400, "inputs[0].datatype: is 'FP32', and 'text' takes BYTES"),
    (inputs(tensor(["a"], datatype="STRING")), {}, 400, "inputs[0].datatype"),
    (inputs(tensor(["a"], dtype="BYTES")), {}, 400, "inputs[0].dtype: is not a key of a tensor"),
    (inputs(tensor(["a"]), tensor(["a"])), {}, 400, "inputs[1].name: 'text' stands twice"),
    (inputs(tensor(["a"], shape="1")), {}, 400, "inputs[0].shape: must be a list of whole numbers"),
    (inputs(tensor(["a"], shape=[1.0])), {}, 400, "inputs[0].shape: must be a list of whole numbers"),
    (inputs(tensor(["a"], shape=[True])), {}, 400, "inputs[0].shape: must be a list of whole numbers"),
    (inputs(tensor(["a"], shape=[-1])), {}, 400, "inputs[0].shape: must be a list of whole numbers"),
    (inputs(tensor(["a"], shape=[])), {}, 400, "inputs[0].shape: is [], and 'text' takes [-1]"),
    (inputs(tensor(["a"], shape=[1, 1])), {}, 400, "inputs[0].shape: is [1, 1], and 'text' takes [-1]"),
    (inputs(tensor([], shape=[0])), {}, 400, "inputs[0].shape[0]: has no row"),
    (inputs(tensor(["a"], shape=[2])), {}, 400, "inputs[0].data: holds 1 elements, and the shape [2] has 2"),
    (inputs(tensor(["a"], shape=[2**62])), {}, 413, "inputs[0].shape[0]"),
    (inputs(tensor(["a"] * 300, shape=[300])), {}, 413, "inputs[0].shape[0]: 300 items, and a request may have 256"),
    (inputs(tensor("a")), {}, 400, "inputs[0].data: must be a list, not a string"),
    (inputs(tensor([1])), {}, 400, "inputs[0].data[0]: must be a string (datatype BYTES), not a number"),
    (inputs(tensor([None])), {}, 400, "inputs[0].data[0]: must be a string"),
    (inputs(tensor([{"a": 1}])), {}, 400, "inputs[0].data[0]: must be a string"),
    (inputs(tensor(["poison"])), {}, 400, "text: is poison"),
    (inputs(tensor(["a", "poison"], shape=[2])), {}, 400, "inputs row 1, text: is poison"),
    (inputs(tensor(["a"], parameters={"shared_memory_region": "x"})), {}, 400, "shared memory is not supported"),
    (inputs(tensor(["a"], parameters=[1])), {}, 400, "inputs[0].parameters: must be an object"),
    (inputs(tensor(["a"], parameters={"binary_data_size": 4})), {}, 400, "0 bytes are left after the JSON"),
    (inputs(tensor(["a"], parameters={"binary_data_size": 0})), {}, 400, "inputs[0].data: stands beside"),
    (json.dumps(GOOD).encode(), {"inference-header-content-length": "9999"}, 400, "inference-header-content-length"),
    (json.dumps(GOOD).encode(), {"inference-header-content-length": "-1"}, 400, "inference-header-content-length"),
    (json.dumps(GOOD).encode(), {"inference-header-content-length": "x"}, 400, "inference-header-content-length"),
    (
        json.dumps(GOOD).encode() + b"abc",
        {"inference-header-content-length": str(len(json.dumps(GOOD)))},
        400,
        "body: 3 bytes follow",
    ),
    (GOOD, {"content-type": "text/html"}, 415, "header content-type: 'text/html' is not understood"),
    (GOOD, {"content-type": "multipart/form-data; boundary=x"}, 415, "header content-type"),
    (GOOD, {"content-type": "application/json; charset=utf-16"}, 415, "charset of JSON is utf-8"),
    (GOOD, {"content-encoding": "br"}, 415, "header content-encoding: 'br' is not one of gzip, deflate"),
    (GOOD, {"content-encoding": "gzip, gzip"}, 415, "header content-encoding"),
    (GOOD, {"x-request-timeout-ms": "soon"}, 400, "header x-request-timeout-ms: 'soon'"),
    (GOOD, {"x-request-timeout-ms": "0"}, 400, "header x-request-timeout-ms"),
    (GOOD, {"x-request-timeout-ms": "-5"}, 400, "header x-request-timeout-ms"),
    (GOOD, {"x-request-timeout-ms": "nan"}, 400, "header x-request-timeout-ms"),
    (GOOD, {"x-request-timeout-ms": "1e5"}, 400, "header x-request-timeout-ms"),
    (GOOD, {"x-request-timeout-ms": ""}, 400, "header x-request-timeout-ms"),
    (b"x" * 400_000, {}, 413, "body: 400000 bytes or more, and a request may have 300000"),
    (GOOD, {"inference-header-content-length": "9" * 5000}, 400, "header inference-header-content-length"),
    (GOOD, {"content-length": "9" * 5000}, 400, "header content-length: "),
    (GOOD, {"content-length": "99999999999"}, 413, "body: 99999999999 bytes"),
]


def body_of(content: Any) -> dict[str, Any]:
    return {"content": content} if isinstance(content, bytes) else {"content": json.dumps(content).encode()}


@pytest.fixture
async def embedder() -> Any:
    async with (
        hosted(spec("text-embedding", limits={"max_request_bytes": 300_000}), Embedder()) as host,
        direct(build_model_app(host, settings=SETTINGS)) as ask,
    ):
        yield ask
        assert (await ask.post("/infer", json=GOOD)).status_code == 200


@pytest.mark.parametrize(("content", "headers", "status", "words"), INFER)
async def test_infer(
    embedder: httpx.AsyncClient, content: Any, headers: dict[str, str], status: int, words: str
) -> None:
    reply = await embedder.post("/infer", **body_of(content), headers=headers)
    assert set(reply.json()) == {"error"}
    assert (reply.status_code, words in reply.json()["error"]) == (status, True), reply.text


NUMBERS: list[tuple[dict[str, Any], int, str]] = [
    (inputs(tensor([300], [1, 1], "UINT8", "in_UINT8")), 400, "inputs[0].data[0]: 300 is out of the range of UINT8"),
    (inputs(tensor([1.5], [1, 1], "INT32", "in_INT32")), 400, "inputs[0].data[0]: 1.5 is no whole number"),
    (inputs(tensor([2**64], [1, 1], "UINT64", "in_UINT64")), 400, "inputs[0].data[0]"),
    (inputs(tensor(["1"], [1, 1], "FP32", "in_FP32")), 400, "inputs[0].data[0]: '1' is no number"),
    (inputs(tensor([None], [1, 1], "FP32", "in_FP32")), 400, "inputs[0].data[0]: None is no number"),
    (inputs(tensor([1e39], [1, 1], "FP32", "in_FP32")), 400, "out of the range of FP32"),
    (inputs(tensor([[1, 2], [3]], [2, 2], "FP32", "in_FP32")), 400, "inputs[0].data: holds 3 elements"),
    (inputs(tensor([1, 2, 3], [2, 2], "FP32", "in_FP32")), 400, "holds 3 elements, and the shape [2, 2] has 4"),
    (inputs(tensor([1], [1, 1], "BOOL", "in_BOOL")), 400, "inputs[0].data[0]: 1 is no boolean"),
    (inputs(tensor(["%%%"], [1], name="picture")), 400, "inputs[0].data[0]: is not base64"),
    (inputs(tensor(["data:image/png;base64,AA=="], [1], name="picture")), 400, "leave out the data: prefix"),
    (inputs(tensor(["päth"], [1], name="picture")), 400, "inputs[0].data[0]: is not base64"),
    (
        inputs(tensor([1, 2], [2, 1], "FP32", "in_FP32"), tensor([1], [1, 1], "INT8", "in_INT8")),
        400,
        "inputs: the inputs differ in their number of items: in_FP32 has 2, in_INT8 has 1",
    ),
    (inputs(tensor([1], [1, 1], "FP32", "in_FP32"), parameters={"scale": None}), 400, "parameters.scale: must be a"),
    (inputs(tensor([1], [1, 1], "FP32", "in_FP32"), parameters={"scale": {"a": 1}}), 400, "parameters.scale: must be"),
    (inputs(tensor([1], [1, 1], "FP32", "in_FP32"), parameters={"scal": 1}), 400, "did you mean 'scale'"),
]


@pytest.mark.parametrize(("content", "status", "words"), NUMBERS)
async def test_infer_with_numbers(content: dict[str, Any], status: int, words: str) -> None:
    async with hosted(spec("python"), Everything()) as host, direct(build_model_app(host, settings=SETTINGS)) as ask:
        reply = await ask.post("/infer", **body_of(content))
        assert (reply.status_code, words in reply.json()["error"]) == (status, True), reply.text


BINARY: list[tuple[str, list[int], bytes, str]] = [
    ("FP32", [1, 2], np.float32([1]).tobytes(), "is 4, and the shape [1, 2] of FP32 takes 8 bytes"),
    ("BOOL", [1, 2], b"\x00\x02", "BOOL is a byte of 0 or 1"),
    ("BYTES", [1, 1], b"\x01\x00", "the length of element 0 is cut short"),
    ("BYTES", [1, 1], b"\xff\xff\xff\xffab", "element 0 should have 4294967295 bytes, and 2 are left"),
    ("BYTES", [1, 2], b"\x01\x00\x00\x00a", "holds 1 elements, and the shape has 2"),
]


@pytest.mark.parametrize(("datatype", "shape", "raw", "words"), BINARY)
async def test_infer_with_binary_tensors(datatype: str, shape: list[int], raw: bytes, words: str) -> None:
    sent = {
        "name": f"in_{datatype}",
        "shape": shape,
        "datatype": datatype,
        "parameters": {"binary_data_size": len(raw)},
    }
    head = json.dumps({"inputs": [sent]}).encode()
    async with hosted(spec("python"), Everything()) as host, direct(build_model_app(host, settings=SETTINGS)) as ask:
        headers = {"inference-header-content-length": str(len(head))}
        reply = await ask.post("/infer", content=head + raw, headers=headers)
        assert reply.status_code == 400
        assert "inputs[0]" in reply.json()["error"]
        assert words in reply.json()["error"]


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"model": "toy", "messages": list(messages), **more}


HELLO = {"role": "user", "content": "hello"}
OPENAI: list[tuple[str, str, Any, int, str | None, str]] = [
    ("text-embedding", "embeddings", b"", 400, "body", "is empty"),
    ("text-embedding", "embeddings", b'{"model": "toy", "model": "toy"}', 400, "body", "stands twice"),
    ("text-embedding", "embeddings", {"input": "x"}, 400, "model", "is missing; this is 'toy'"),
    ("text-embedding", "embeddings", {"model": 1, "input": "x"}, 400, "model", "must be a string, not a number"),
    ("text-embedding", "embeddings", {"model": "other", "input": "x"}, 404, "model", "did you mean 'toy'"),
    ("text-embedding", "embeddings", {"model": "toy"}, 400, "input", "is missing"),
    ("text-embedding", "embeddings", {"model": "toy", "input": ""}, 400, "input", "is an empty string"),
    ("text-embedding", "embeddings", {"model": "toy", "input": []}, 400, "input", "is an empty list"),
    ("text-embedding", "embeddings", {"model": "toy", "input": ["a", ""]}, 400, "input[1]", "is an empty string"),
    ("text-embedding", "embeddings", {"model": "toy", "input": [1, 2]}, 400, "input[0]", "token ids are not supported"),
    ("text-embedding", "embeddings", {"model": "toy", "input": [[1]]}, 400, "input[0]", "token ids are not supported"),
    ("text-embedding", "embeddings", {"model": "toy", "input": ["a", None]}, 400, "input[1]", "must be a string"),
    ("text-embedding", "embeddings", {"model": "toy", "input": {"a": 1}}, 400, "input", "not an object"),
    ("text-embedding", "embeddings", {"model": "toy", "input": ["a"] * 300}, 413, "input", "300 texts"),
    ("text-embedding", "embeddings", {"model": "toy", "input": "x", "dimensions": 2}, 400, "dimensions", "gives 4"),
    (
        "text-embedding",
        "embeddings",
        {"model": "toy", "input": "x", "dimensions": 0},
        400,
        "dimensions",
        "whole number",
    ),
    (
        "text-embedding",
        "embeddings",
        {"model": "toy", "input": "x", "encoding_format": "hex"},
        400,
        "encoding_format",
        "'hex'",
    ),
    (
        "text-embedding",
        "embeddings",
        {"model": "toy", "input": "x", "inputs": "x"},
        400,
        "inputs",
        "did you mean 'input'",
    ),
    ("text-embedding", "embeddings", {"model": "toy", "input": "poison"}, 400, "input", "is poison"),
    ("text-embedding", "embeddings", {"model": "toy", "input": ["a", "poison"]}, 400, "input[1]", "is poison"),
    ("text-embedding", "chat/completions", chat(HELLO), 400, "model", "does text-embedding"),
    ("text-embedding", "audio/transcriptions", {}, 400, "model", "ask it at /v1/embeddings"),
    ("python", "embeddings", {}, 400, "model", "ask it at /v2/models/toy/infer"),
    ("text-generation", "embeddings", {"model": "toy", "input": "x"}, 400, "model", "does text-generation"),
    ("text-generation", "chat/completions", chat(), 400, "messages", "is an empty list"),
    ("text-generation", "chat/completions", {"model": "toy"}, 400, "messages", "is missing"),
    ("text-generation", "chat/completions", {"model": "toy", "messages": "hello"}, 400, "messages", "not a string"),
    ("text-generation", "chat/completions", chat("hello"), 400, "messages[0]", "must be an object"),
    ("text-generation", "chat/completions", chat({"content": "x"}), 400, "messages[0].role", "must be one of"),
    ("text-generation", "chat/completions", chat({"role": "tool", "content": "x"}), 400, "messages[0].role", "'tool'"),
    (
        "text-generation",
        "chat/completions",
        chat({"role": ["user"], "content": "x"}),
        400,
        "messages[0].role",
        "must be",
    ),
    ("text-generation", "chat/completions", chat(HELLO, {"role": "user"}), 400, "messages[1].content", "is missing"),
    (
        "text-generation",
        "chat/completions",
        chat({**HELLO, "content": 3}),
        400,
        "messages[0].content",
        "must be a string",
    ),
    (
        "text-generation",
        "chat/completions",
        chat({**HELLO, "content": []}),
        400,
        "messages[0].content",
        "must be a string",
    ),
    (
        "text-generation",
        "chat/completions",
        chat({**HELLO, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
        400,
        "messages[0].content[0].type",
        "the model reads text only",
    ),
    (
        "text-generation",
        "chat/completions",
        chat({**HELLO, "content": [{"type": "text", "text": 1}]}),
        400,
        "messages[0].content[0].text",
        "must be a string",
    ),
    (
        "text-generation",
        "chat/completions",
        chat({**HELLO, "tool_calls": [{}]}),
        400,
        "messages[0].tool_calls",
        "not supp",
    ),
    (
        "text-generation",
        "chat/completions",
        chat({**HELLO, "rolle": "x"}),
        400,
        "messages[0].rolle",
        "did you mean 'role'",
    ),
    ("text-generation", "chat/completions", chat(HELLO, temperature=3), 400, "temperature", "from 0 to 2, not 3"),
    ("text-generation", "chat/completions", chat(HELLO, temperature="1"), 400, "temperature", "must be a number"),
    ("text-generation", "chat/completions", chat(HELLO, temperature=True), 400, "temperature", "must be a number"),
    ("text-generation", "chat/completions", chat(HELLO, top_p=0), 400, "top_p", "must be above 0"),
    ("text-generation", "chat/completions", chat(HELLO, top_p=1.1), 400, "top_p", "from 0 to 1"),
    ("text-generation", "chat/completions", chat(HELLO, max_tokens=0), 400, "max_tokens", "whole number from 1"),
    ("text-generation", "chat/completions", chat(HELLO, max_tokens=1.5), 400, "max_tokens", "whole number"),
    ("text-generation", "chat/completions", chat(HELLO, max_tokens=5000), 400, "max_tokens", "above the 1000"),
    (
        "text-generation",
        "chat/completions",
        chat(HELLO, max_tokens=1, max_completion_tokens=2),
        400,
        "max_tokens",
        "send one",
    ),
    ("text-generation", "chat/completions", chat(HELLO, seed=2**63), 400, "seed", "whole number"),
    ("text-generation", "chat/completions", chat(HELLO, seed="1"), 400, "seed", "whole number"),
    ("text-generation", "chat/completions", chat(HELLO, n=0), 400, "n", "from 1 to 16"),
    ("text-generation", "chat/completions", chat(HELLO, n=17), 400, "n", "from 1 to 16"),
    ("text-generation", "chat/completions", chat(HELLO, stop=[1]), 400, "stop", "a list of such"),
    ("text-generation", "chat/completions", chat(HELLO, stop=""), 400, "stop", "not empty"),
    (
        "text-generation",
        "chat/completions",
        chat(HELLO, stop=list("abcde")),
        400,
        "stop",
        "has 5 strings, and may have 4",
    ),
    ("text-generation", "chat/completions", chat(HELLO, stream="yes"), 400, "stream", "must be true or false"),
    ("text-generation", "chat/completions", chat(HELLO, stream_options={}), 400, "stream_options", "only for stream"),
    (
        "text-generation",
        "chat/completions",
        chat(HELLO, stream=True, stream_options={"usage": True}),
        400,
        "stream_options.usage",
        "known are include_usage",
    ),
    ("text-generation", "chat/completions", chat(HELLO, logprobs=True), 400, "logprobs", "is not supported"),
    ("text-generation", "chat/completions", chat(HELLO, top_logprobs=2), 400, "top_logprobs", "is not supported"),
    ("text-generation", "chat/completions", chat(HELLO, presence_penalty=0.5), 400, "presence_penalty", "is not supp"),
    ("text-generation", "chat/completions", chat(HELLO, frequency_penalty=1), 400, "frequency_penalty", "is not supp"),
    ("text-generation", "chat/completions", chat(HELLO, logit_bias={"1": 1}), 400, "logit_bias", "is not supported"),
    (
        "text-generation",
        "chat/completions",
        chat(HELLO, tools=[{"type": "function"}]),
        400,
        "tools",
        "is not supported",
    ),
    (
        "text-generation",
        "chat/completions",
        chat(HELLO, response_format={"type": "json_object"}),
        400,
        "response_format",
        "is not supported",
    ),
    ("text-generation", "chat/completions", chat(HELLO, temprature=1), 400, "temprature", "did you mean 'temperature'"),
    ("text-generation", "chat/completions", chat({**HELLO, "content": "poison"}), 400, "messages", "is poison"),
    ("text-generation", "completions", {"model": "toy"}, 400, "prompt", "is missing"),
    ("text-generation", "chat/completions", chat({**HELLO, "content": "poison"}, n=2), 400, "messages", "is poison"),
    ("text-generation", "completions", {"model": "toy", "prompt": [1, 2]}, 400, "prompt[0]", "token ids"),
    ("text-generation", "completions", {"model": "toy", "prompt": "x", "echo": True}, 400, "echo", "is not supported"),
    (
        "text-generation",
        "completions",
        {"model": "toy", "prompt": "x", "best_of": 3},
        400,
        "best_of",
        "is not supported",
    ),
    (
        "text-generation",
        "completions",
        {"model": "toy", "prompt": "x", "suffix": "y"},
        400,
        "suffix",
        "is not supported",
    ),
    ("text-generation", "completions", {"model": "toy", "prompt": ["x"] * 40, "n": 16}, 413, "prompt", "40 prompts"),
    ("text-generation", "completions", {"model": "toy", "prompt": ["x", "poison"]}, 400, "prompt[1]", "is poison"),
]


@pytest.mark.parametrize(("task", "endpoint", "content", "status", "param", "words"), OPENAI)
async def test_openai(task: str, endpoint: str, content: Any, status: int, param: str | None, words: str) -> None:
    async with hosted(spec(task), MODELS[task]()) as host, direct(build_model_app(host, settings=SETTINGS)) as ask:
        reply = await ask.post(f"/v1/{endpoint}", **body_of(content))
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (reply.status_code, error["param"]) == (status, param), error
        assert words in error["message"]
        assert error["type"] == "invalid_request_error"


def part(name: str, content: bytes, more: bytes = b"") -> bytes:
    return b'--b\r\ncontent-disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (name.encode(), more, content)


FILE = part("file", b"RIFF", b'; filename="a.wav"')
FORM = FILE + part("model", b"toy")
END = b"--b--\r\n"
FORMS: list[tuple[bytes, str, int, str, str]] = [
    (FORM + END, "application/json", 415, "header content-type", "multipart/form-data"),
    (FORM + END, "multipart/form-data", 400, "header content-type", "boundary"),
    (b"", "multipart/form-data; boundary=b", 400, "body", "cut short"),
    (b"garbage", "multipart/form-data; boundary=b", 400, "body", "damaged"),
    (FORM, "multipart/form-data; boundary=b", 400, "body", "cut short"),
    (FORM[:-30], "multipart/form-data; boundary=b", 400, "body", "cut short"),
    (part("model", b"toy") + END, "multipart/form-data; boundary=b", 400, "file", "is missing"),
    (FILE + END, "multipart/form-data; boundary=b", 400, "model", "is missing"),
    (FILE + FORM + END, "multipart/form-data; boundary=b", 400, "file", "more than once"),
    (part("file", b"") + part("model", b"toy") + END, "multipart/form-data; boundary=b", 400, "file", "is empty"),
    (FORM + part("model", b"toy") + END, "multipart/form-data; boundary=b", 400, "model", "more than once"),
    (FORM + part("prompt", b"x") + END, "multipart/form-data; boundary=b", 400, "prompt", "not supported"),
    (FORM + part("prompt", b"\xff") + END, "multipart/form-data; boundary=b", 400, "prompt", "not UTF-8"),
    (FORM + part("temperature", b"hot") + END, "multipart/form-data; boundary=b", 400, "temperature", "no number"),
    (
        FORM + part("temperature", b"nan") + END,
        "multipart/form-data; boundary=b",
        400,
        "temperature",
        "must be a number",
    ),
    (FORM + part("temperature", b"0.4") + END, "multipart/form-data; boundary=b", 400, "temperature", "only 0"),
    (FORM + part("stream", b"true") + END, "multipart/form-data; boundary=b", 400, "stream", "comes whole"),
    (FORM + part("response_format", b"srt") + END, "multipart/form-data; boundary=b", 400, "response_format", "'srt'"),
    (
        FORM + part("timestamp_granularities[]", b"word") + END,
        "multipart/form-data; boundary=b",
        400,
        "timestamp_granularities[]",
        "not supported",
    ),
    (FORM + part("languge", b"en") + END, "multipart/form-data; boundary=b", 400, "languge", "did you mean 'language'"),
    (FORM.replace(b"RIFF", b"text") + END, "multipart/form-data; boundary=b", 400, "file", "is no sound file"),
    (b"--b\r\nx: y\r\n\r\nz\r\n" + END, "multipart/form-data; boundary=b", 400, "body", "part 1 has no name"),
    (b"--b\r\nx: " + b"y" * 9000 + b"\r\n\r\nz\r\n" + END, "multipart/form-data; boundary=b", 400, "body", "header"),
    (part("x", b"y") * 65 + END, "multipart/form-data; boundary=b", 400, "body", "more than 64 parts"),
]


@pytest.mark.parametrize(("content", "kind", "status", "param", "words"), FORMS)
async def test_transcriptions(content: bytes, kind: str, status: int, param: str, words: str) -> None:
    async with (
        hosted(spec("speech-to-text"), Listener()) as host,
        direct(build_model_app(host, settings=SETTINGS)) as ask,
    ):
        reply = await ask.post("/v1/audio/transcriptions", content=content, headers={"content-type": kind})
        error = reply.json()["error"]
        assert (reply.status_code, error["param"], words in error["message"]) == (status, param, True), error


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/infer", 405, "POST is"),
        ("PUT", "/infer", 405, "POST is"),
        ("DELETE", "/", 405, "GET"),
        ("GET", "/v1/embeddings", 405, "POST is"),
        ("POST", "/generate", 404, "there is nothing at /generate"),
        ("GET", "/v1/files", 404, "there is nothing at /v1/files"),
        ("GET", "/v1/models/other", 404, "did you mean 'toy'"),
        ("GET", "/versions/2", 400, "version: is '2', and 'toy' has the version '1'"),
        ("GET", "/versions/2/ready", 400, "version: is '2'"),
        ("POST", "/versions/2/infer", 400, "version: is '2'"),
    ],
)
async def test_paths(embedder: httpx.AsyncClient, method: str, path: str, status: int, words: str) -> None:
    reply = await embedder.request(method, path)
    error = reply.json()["error"]
    assert (reply.status_code, words in (error["message"] if path.startswith("/v1") else error)) == (status, True), (
        error
    )
    assert ("allow" in reply.headers) == (status == 405)


async def test_a_body_without_a_length_is_counted_while_it_arrives(embedder: httpx.AsyncClient) -> None:
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        while True:
            sent += 100_000
            yield b" " * 100_000

    reply = await embedder.post("/infer", content=endless())
    assert reply.status_code == 413
    assert sent <= 500_000


async def test_what_changes_nothing_is_accepted() -> None:
    idle = {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logprobs": False,
        "n": 1,
        "user": "me",
        "logit_bias": {},
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "stop": None,
        "seed": None,
        "max_tokens": None,
        "store": False,
        "stream_options": None,
        "metadata": None,
    }
    async with (
        hosted(spec("text-generation"), Talker()) as host,
        direct(build_model_app(host, settings=SETTINGS)) as ask,
    ):
        reply = await ask.post("/v1/chat/completions", json=chat({**HELLO, "name": "me"}, **idle))
        assert reply.status_code == 200, reply.text
