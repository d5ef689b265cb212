"""The Open Inference Protocol v2 over HTTP, as its clients speak it."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
import zlib
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from serve.api.directory import find, version_of
from serve.api.gateway_app import build_gateway_app
from serve.api.model_app import build_model_app
from serve.api.open_inference import near
from serve.errors import ModelNotFound
from serve.settings import Settings
from tests.api.toys import Embedder, Everything, Front, Models, below, direct, hosted, listening, spec

SETTINGS = Settings()


def words(*texts: str, **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": list(texts)}], **more}


@pytest.mark.parametrize("prefix", ["", "/v2/models/toy"])
async def test_answers_with_and_without_its_prefix(prefix: str) -> None:
    async with hosted(spec("text-embedding"), Embedder()) as host:
        app = build_model_app(host, settings=SETTINGS)
        async with direct(below(prefix, app) if prefix else app) as client:
            metadata = (await client.get(prefix or "/")).json()
            assert metadata == {
                "name": "toy",
                "versions": ["1"],
                "platform": "roundhouse_text_embedding",
                "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
                "outputs": [
                    {"name": "embedding", "datatype": "FP32", "shape": [-1, 4]},
                    {"name": "token_count", "datatype": "INT32", "shape": [-1]},
                ],
            }
            assert (await client.get(f"{prefix}/versions/1")).json() == metadata
            assert (await client.get(f"{prefix}/ready")).status_code == 200
            answer = await client.post(
                f"{prefix}/infer", json=words("ab cd", "x", id="7"), headers={"x-request-id": "r"}
            )
            assert answer.json() == {
                "model_name": "toy",
                "model_version": "1",
                "id": "7",
                "outputs": [
                    {"name": "embedding", "datatype": "FP32", "shape": [2, 4], "data": [5, 1, 0.1, -1, 1, 0, 0.1, -1]},
                    {"name": "token_count", "datatype": "INT32", "shape": [2], "data": [2, 1]},
                ],
            }
            assert answer.headers["x-request-id"] == "r"
            chosen = words("x", outputs=[{"name": "token_count"}])
            outputs = (await client.post(f"{prefix}/versions/1/infer", json=chosen)).json()["outputs"]
            assert [output["name"] for output in outputs] == ["token_count"]


async def test_the_prefix_of_another_model_is_not_this_one() -> None:
    async with (
        hosted(spec("text-embedding"), Embedder()) as host,
        direct(below("/v2/models/toy", build_model_app(host, settings=SETTINGS))) as client,
    ):
        answer = await client.post("/v2/models/toys/infer", json=words("x"))
        assert answer.status_code == 404
        assert answer.json() == {"error": "model 'toys' is not declared; did you mean 'toy'?"}


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_bodies_may_be_compressed(encoding: str, pack: Any) -> None:
    async with (
        hosted(spec("text-embedding", limits={"max_request_bytes": 2000}), Embedder()) as host,
        direct(build_model_app(host, settings=SETTINGS)) as client,
    ):
        body = b'{"inputs":[{"name":"text","shape":[1],"datatype":"BYTES","data":["a b"]}]}'
        headers = {"content-encoding": encoding, "accept-encoding": encoding}
        answer = await client.post("/infer", content=pack(body), headers=headers)
        assert answer.headers["content-encoding"] == encoding
        assert answer.json()["outputs"][1]["data"] == [2]
        for damaged, status, told in (
            (pack(body)[:-9], 400, "ends early"),
            (pack(body) + b"x", 400, "followed by other bytes"),
            (body, 400, f"body: is not {encoding}"),
            (pack(b" " * 1_000_000), 413, "expands to more than the 2000 bytes"),
        ):
            answer = await client.post("/infer", content=damaged, headers=headers)
            assert (answer.status_code, told in answer.json()["error"]) == (status, True), answer.text


async def test_a_client_that_merely_can_decompress_gets_plain_answers() -> None:
    async with (
        hosted(spec("text-embedding"), Embedder()) as host,
        direct(build_model_app(host, settings=SETTINGS)) as client,
    ):
        answer = await client.post("/infer", json=words("x"), headers={"accept-encoding": "gzip, deflate, br"})
        assert "content-encoding" not in answer.headers


async def test_tritonclient_works_unchanged() -> None:
    text_host, plain_host = spec("text-embedding"), spec("python", name="everything")
    async with hosted(text_host, Embedder()) as toy, hosted(plain_host, Everything()) as everything:
        models = Models({"toy": "ready", "everything": "ready", "later": "loading"})
        front = Front({host.spec.name: build_model_app(host, settings=SETTINGS) for host in (toy, everything)})
        async with listening(front) as url:
            front.gateway = build_gateway_app(models, settings=SETTINGS, base_url=url)
            await asyncio.to_thread(use_triton, url.removeprefix("http://"))


def use_triton(address: str) -> None:
    client = triton.InferenceServerClient(address, concurrency=2)
    assert client.is_server_live()
    assert not client.is_server_ready()
    assert client.is_model_ready("toy")
    assert client.is_model_ready("toy", "1")
    assert not client.is_model_ready("later")
    assert not client.is_model_ready("absent")
    assert client.get_server_metadata()["name"] == "roundhouse"
    assert client.get_model_metadata("toy")["name"] == "toy"
    assert client.get_model_config("toy")["input"] == [
        {"name": "text", "data_type": "TYPE_STRING", "dims": [], "optional": False}
    ]
    states = {entry["name"]: entry["state"] for entry in client.get_model_repository_index()}
    assert states == {"toy": "READY", "everything": "READY", "later": "LOADING"}
    for verb in (client.load_model, client.unload_model):
        with pytest.raises(InferenceServerException, match="edit the file"):
            verb("toy")

    def text(binary: bool) -> triton.InferInput:
        tensor = triton.InferInput("text", [2], "BYTES")
        tensor.set_data_from_numpy(np.array([b"a b c", "päth".encode()], dtype=object), binary_data=binary)
        return tensor

    for binary in (True, False):
        for outputs in (None, [triton.InferRequestedOutput("token_count", binary_data=binary)]):
            for algorithm in (None, "gzip", "deflate"):
                found = client.infer(
                    "toy",
                    [text(binary)],
                    outputs=outputs,
                    request_id="9",
                    request_compression_algorithm=algorithm,
                    response_compression_algorithm=algorithm,
                )
                assert found.as_numpy("token_count").tolist() == [3, 1]
                assert found.get_response()["id"] == "9"
                assert (found.as_numpy("embedding") is None) == (outputs is not None)
    rows = np.array([[1, 2, 3], [4, 5, 6]])
    for datatype, dtype in (("INT64", np.int64), ("FP16", np.float16), ("BOOL", np.bool_), ("UINT8", np.uint8)):
        tensor = triton.InferInput(f"in_{datatype}", [2, 3], datatype)
        tensor.set_data_from_numpy(rows.astype(dtype))
        output = [triton.InferRequestedOutput(f"out_{datatype}")]
        found = client.infer("everything", [tensor], outputs=output, parameters={"scale": 2})
        assert np.array_equal(found.as_numpy(f"out_{datatype}"), rows.astype(dtype))
    assert client.async_infer("toy", [text(True)]).get_result().as_numpy("token_count").tolist() == [3, 1]
    assert client.get_inference_statistics("toy")["model_stats"][0]["inference_count"] > 2
    assert {entry["name"] for entry in client.get_inference_statistics()["model_stats"]} == {"toy", "everything"}
    with pytest.raises(InferenceServerException, match="loading") as caught:
        client.infer("later", [text(True)])
    assert caught.value.status() == "503"
    client.close()


async def test_triton_timeout_and_header_are_deadlines() -> None:
    model = Embedder()
    async with (
        hosted(spec("text-embedding"), model) as host,
        direct(build_model_app(host, settings=SETTINGS)) as client,
    ):
        model.go.clear()
        try:
            late = await client.post("/infer", json=words("x", parameters={"timeout": 20_000}))
            later = await client.post("/infer", json=words("x"), headers={"x-request-timeout-ms": "20"})
        finally:
            model.go.set()
        assert (late.status_code, later.status_code) == (504, 504)
        assert late.headers["x-should-retry"] == "false"


async def test_a_full_queue_is_429_with_the_time_to_wait() -> None:
    model = Embedder()
    async with (
        hosted(spec("text-embedding", batching={"max_queue": 2}), model) as host,
        direct(build_model_app(host, settings=SETTINGS)) as client,
    ):
        model.go.clear()
        model.started.clear()
        asked = [asyncio.ensure_future(client.post("/infer", json=words("x")))]
        await asyncio.to_thread(model.started.wait)
        try:
            asked += [asyncio.ensure_future(client.post("/infer", json=words("x"))) for _ in range(40)]
            done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            refused = next(iter(done)).result()
        finally:
            model.go.set()
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert (await asked[0]).status_code == 200
        await asyncio.gather(*asked)


async def test_a_draining_model_says_so() -> None:
    async with (
        hosted(spec("text-embedding"), Embedder()) as host,
        direct(build_model_app(host, settings=SETTINGS)) as client,
    ):
        await host.drain(1)
        for answer in (await client.get("/ready"), await client.post("/infer", json=words("x"))):
            assert answer.status_code == 503
            assert "draining" in answer.json()["error"]
            assert int(answer.headers["retry-after"]) >= 1


async def test_the_model_own_failure_is_a_500_without_a_traceback() -> None:
    async with (
        hosted(spec("text-embedding"), Embedder()) as host,
        direct(build_model_app(host, settings=SETTINGS)) as client,
    ):
        answer = await client.post("/infer", json=words("burst"))
        assert answer.status_code == 500
        assert "ValueError: burst" in answer.json()["error"]
        assert "File " not in answer.text


async def test_an_error_nobody_foresaw_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosted(spec("text-embedding"), Embedder()) as host:

        async def broken(*_: Any, **__: Any) -> Any:
            raise RuntimeError("a secret")

        monkeypatch.setattr(host, "infer", broken)
        async with direct(build_model_app(host, settings=SETTINGS)) as client:
            answer = await client.post("/infer", json=words("x"))
            assert answer.status_code == 500
            assert answer.json() == {"error": "internal error; the server's log has the reason"}


async def test_the_work_of_a_client_that_left_is_dropped() -> None:
    model = Embedder()
    async with (
        hosted(spec("text-embedding"), model) as host,
        listening(build_model_app(host, settings=SETTINGS, watch_disconnect=True)) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        model.go.clear()
        model.started.clear()
        first = asyncio.ensure_future(client.post("/infer", json=words("first")))
        await asyncio.to_thread(model.started.wait)
        left = asyncio.ensure_future(client.post("/infer", json=words("left")))
        while not host.stats().queued:
            await asyncio.sleep(0.01)
        left.cancel()
        while host.stats().queued:
            await asyncio.sleep(0.01)
        model.go.set()
        assert (await first).status_code == 200
        assert (await client.post("/infer", json=words("last"))).status_code == 200
    assert "left" not in model.seen
    assert {"first", "last"} <= set(model.seen)


async def test_a_client_may_take_the_version_from_the_index() -> None:
    model_spec = spec("text-embedding", source="hf:some/model", revision="refs/pr/1")
    models = Models({"toy": "ready"}, version=version_of(model_spec.revision))
    async with direct(build_gateway_app(models, settings=SETTINGS, base_url="http://127.0.0.1:9")) as client:
        version = (await client.post("/v2/repository/index")).json()[0]["version"]
    assert version == "refs-pr-1"
    async with (
        hosted(model_spec, Embedder()) as host,
        direct(build_model_app(host, settings=SETTINGS)) as client,
    ):
        answer = await client.post(f"/versions/{version}/infer", json=words("a"))
        assert (answer.status_code, answer.json()["model_version"]) == (200, version)


def test_a_name_as_long_as_a_body_is_compared_by_its_beginning_alone() -> None:
    name = "texd" + "x" * 10**6
    tracemalloc.start()
    try:
        assert near("texd", ["text"]) == "; did you mean 'text'?"
        assert near(name, ["text"]) == "; known are text"
        with pytest.raises(ModelNotFound):
            find(Models({"text": "ready"}), name)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20
