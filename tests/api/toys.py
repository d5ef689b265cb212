"""Toy models of the tasks that have a surface of their own, and a server for them on a free port."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn

from serve.api.directory import ModelStatus
from serve.errors import InvalidInput
from serve.host import Host
from serve.models.base import Item, LoadContext, Signature, Step, TensorSpec
from serve.settings import Settings
from serve.spec import ModelSpec
from serve.telemetry.metrics import ReplicaMetrics
from serve.telemetry.tracing import Tracer

DIMENSIONS = 4


def spec(task: str, name: str = "toy", **fields: Any) -> ModelSpec:
    """Return a spec for a toy of a task."""
    options = {"class": "Toy"} if task == "python" else {}
    return ModelSpec.model_validate({"name": name, "task": task, "source": "file:toy", "options": options, **fields})


class Plain:
    """A model without anything to load."""

    def load(self, context: LoadContext) -> None:
        pass


class Embedder(Plain):
    """The vector of a text is its length, its number of words, and so on; one token a word."""

    signature = Signature(
        inputs=(TensorSpec("text", "BYTES", (-1,), "a text"),),
        outputs=(
            TensorSpec("embedding", "FP32", (-1, DIMENSIONS), "its vector"),
            TensorSpec("token_count", "INT32", (-1,), "its words"),
        ),
        example={"text": b"two words"},
    )

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.started = threading.Event()
        self.seen: list[str] = []

    def prepare(self, item: Item) -> str:
        text = item["text"]
        text = text.decode() if isinstance(text, bytes) else text
        if "poison" in text:
            raise InvalidInput("is poison", place="text")
        return text

    def predict(self, batch: Sequence[str]) -> Sequence[Mapping[str, Any] | Exception]:
        self.started.set()
        assert self.go.wait(20)
        self.seen += batch
        return [
            ValueError("burst")
            if text == "burst"
            else {"embedding": np.float32([len(text), text.count(" "), 0.1, -1]), "token_count": len(text.split())}
            for text in batch
        ]


class Everything(Plain):
    """Gives back an input of each datatype as its output."""

    datatypes = (
        "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
        "FP16", "FP32", "FP64", "BYTES",
    )  # fmt: skip
    signature = Signature(
        inputs=(
            *(TensorSpec(f"in_{d}", d, (-1, -1), "rows", optional=True) for d in datatypes),
            TensorSpec("picture", "BYTES", (-1,), "encoded bytes", optional=True, content="base64"),
        ),
        outputs=(
            *(TensorSpec(f"out_{d}", d, (-1, -1), "the same rows") for d in datatypes),
            TensorSpec("size", "INT32", (-1,), "bytes of the picture"),
        ),
        parameters={"scale": "a number"},
    )

    def predict(self, batch: Sequence[Item]) -> Sequence[Mapping[str, Any]]:
        results = []
        for item in batch:
            result = {name.replace("in_", "out_"): value for name, value in item.items() if name.startswith("in_")}
            if "picture" in item:
                result["size"] = len(item["picture"])
            results.append(result)
        return results


class Talker(Plain):
    """Says the words of the prompt, or of the last message, one a step; `loop` and `silence` go on for ever."""

    slots = 4
    signature = Signature(
        inputs=(TensorSpec("prompt", "BYTES", (-1,), "what to repeat"),),
        outputs=(
            TensorSpec("text", "BYTES", (-1,), "the words"),
            TensorSpec("finish_reason", "BYTES", (-1,), "stop or length"),
            TensorSpec("prompt_tokens", "INT32", (-1,), "tokens"),
            TensorSpec("completion_tokens", "INT32", (-1,), "tokens"),
        ),
        parameters=dict.fromkeys(("max_tokens", "temperature", "top_p", "seed", "stop"), "as in OpenAI's"),
        example={"prompt": b"a b"},
    )

    def __init__(self) -> None:
        self.active: dict[int, dict[str, Any]] = {}
        self.admitted: list[dict[str, Any]] = []
        self.released = threading.Event()
        self._key = 0

    def prepare(self, item: Item) -> dict[str, Any]:
        parameters = dict(item.get("parameters", {}))
        text = item["messages"][-1]["content"] if "messages" in item else item["prompt"]
        text = text.decode() if isinstance(text, bytes) else text
        if "poison" in text:
            raise InvalidInput("is poison", place="prompt")
        if parameters.get("max_tokens", 0) > 1000:
            raise InvalidInput("is above the 1000 that the model has", place="parameters.max_tokens")
        seed = [f"seed={parameters['seed']}"] if "seed" in parameters else []
        return {"words": text.split() + seed, "said": 0, "parameters": parameters}

    def admit(self, prepared: dict[str, Any]) -> int:
        self._key += 1
        self.active[self._key] = prepared
        self.admitted.append(prepared)
        return self._key

    def step(self) -> Sequence[Step]:
        return [self._step(key, state) for key, state in list(self.active.items())]

    def _step(self, key: int, state: dict[str, Any]) -> Step:
        words = state["words"]
        if words[0] in ("loop", "silence"):
            time.sleep(0.001)
            return Step(key, {"text": "again ", "token_ids": [1]} if words[0] == "loop" else None)
        if words[state["said"]] == "crash":
            del self.active[key]
            return Step(key, None, done=True, error=ValueError("crash"))
        part: dict[str, Any] = {"text": words[state["said"]] + " ", "token_ids": [state["said"]]}
        state["said"] += 1
        most = state["parameters"].get("max_tokens", len(words))
        if state["said"] < min(most, len(words)):
            return Step(key, part)
        del self.active[key]
        reason = "stop" if state["said"] == len(words) else "length"
        part |= {"finish_reason": reason, "prompt_tokens": len(words), "completion_tokens": state["said"]}
        return Step(key, part, done=True)

    def release(self, key: int) -> None:
        del self.active[key]
        self.released.set()


class Listener(Plain):
    """Hears the bytes it gets."""

    signature = Signature(
        inputs=(TensorSpec("audio", "BYTES", (-1,), "a sound file", content="base64"),),
        outputs=(
            TensorSpec("text", "BYTES", (-1,), "the words"),
            TensorSpec("duration_s", "FP32", (-1,), "seconds"),
        ),
        parameters={"language": "of the speech"},
        example={"audio": b"RIFF"},
    )

    def predict(self, batch: Sequence[Item]) -> Sequence[Mapping[str, Any] | Exception]:
        return [
            {"text": f"{len(item['audio'])} bytes", "duration_s": len(item["audio"]) / 8}
            if bytes(item["audio"]).startswith(b"RIFF")
            else InvalidInput("is no sound file", place="audio")
            for item in batch
        ]


@contextlib.asynccontextmanager
async def hosted(
    model_spec: ModelSpec, model: Any, metrics_dir: Path | None = None, tracer: Tracer | None = None
) -> AsyncIterator[Host]:
    """Load a toy into a real Host."""
    metrics = ReplicaMetrics.of(model_spec.name, folder=metrics_dir)
    host = Host(model_spec, settings=Settings(), model=model, metrics=metrics, tracer=tracer)
    await host.load()
    try:
        yield host
    finally:
        await host.close()


@contextlib.asynccontextmanager
async def listening(app: Any) -> AsyncIterator[str]:
    """Serve an application on a free port of this machine; yields its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=1))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0)
        assert not serving.done()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving
        listener.close()


@contextlib.asynccontextmanager
async def direct(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Ask an application without a socket."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://test", headers={"accept-encoding": "a, b"}
    ) as client:
        yield client


def below(prefix: str, app: Any) -> Any:
    """Mount an application as Ray does: the whole path, and the prefix in root_path."""

    async def mounted(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan" and scope["path"].startswith(prefix):
            scope = {**scope, "root_path": prefix}
        await app(scope, receive, send)

    return mounted


class Front:
    """Routes as the proxy does: a model's prefix to its application, all else to the gateway."""

    def __init__(self, apps: dict[str, Any]) -> None:
        self.apps = apps
        self.gateway: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        parts = scope["path"].split("/")
        name = parts[3] if parts[1:3] == ["v2", "models"] else ""
        if name in self.apps:
            await below(f"/v2/models/{name}", self.apps[name])(scope, receive, send)
        else:
            await self.gateway(scope, receive, send)


class Models:
    """A directory that a test fills: name -> phase."""

    def __init__(self, phases: dict[str, str], **more: Any) -> None:
        self.phases = phases
        self.more = more

    def models(self) -> list[ModelStatus]:
        return [
            ModelStatus(name=name, task="text-embedding", phase=phase, retry_after_s=3.2, **self.more)
            for name, phase in self.phases.items()
        ]
