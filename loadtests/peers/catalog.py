"""Who takes part: how each peer is started, asked and understood."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from loadtests.peers.client import Exchange
from loadtests.peers.environments import ROOT, WORK, python_of

HERE = Path(__file__).parent
SERVERS = HERE / "servers"

#: Largest difference of a value from the bare model's that is still its own answer: distinct texts differ by far more.
_TOLERANCE = 1e-3

Answer = Sequence[float]


@dataclass(frozen=True, slots=True)
class Route:
    """One way to ask a server.

    Args:
        name: Told beside the peer's name where a server has several ways.
        body: Of one input (a text, or four numbers), the JSON of a request.
        answer: Of a response's JSON, the row of numbers.
    """

    name: str
    path: str
    body: Callable[[Any], Any]
    answer: Callable[[Any], Answer]

    def exchange(self, given: Any, expected: Answer) -> Exchange:
        """Return the request for one input, and the check that an answer is that input's."""
        body = json.dumps(self.body(given)).encode()
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        probes = [(at, float(expected[at])) for at in range(0, len(expected), max(1, len(expected) // 4))]
        size, answer = len(expected), self.answer

        def check(data: bytes) -> bool:
            try:
                row = answer(orjson.loads(data))
            except (ValueError, KeyError, IndexError, TypeError):
                return False
            return len(row) == size and all(abs(row[at] - value) <= _TOLERANCE for at, value in probes)

        return Exchange(head.encode() + body, check)


@dataclass(frozen=True, slots=True)
class Start:
    """What starts a server: a command, its environment, and the folder that it runs in."""

    command: Sequence[str | Path]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to serve.

    Args:
        requirements: The environment's file under `requirements/`, without suffix; None is the project's own.
        start: (python, model, port) -> how to start it, model being `minilm` or `noop`.
        routes: Of a model, the ways to ask for it; none where it takes no part.
    """

    name: str
    label: str
    requirements: str | None
    start: Callable[[Path, str, int], Start]
    routes: Callable[[str], Sequence[Route]]

    def python(self) -> Path:
        return Path(sys.executable) if self.requirements is None else python_of(self.requirements)


#: One compute thread, and no word on each request, for all.
COMMON = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(SERVERS),
    "HF_HUB_OFFLINE": "1",
    "BENTOML_DO_NOT_TRACK": "true",
}


def _rows(name: str, datatype: str) -> Callable[[Any], Any]:
    """Return the Open Inference Protocol's request for one row."""

    def body(given: Any) -> Any:
        values = given if isinstance(given, list) else [given]
        shape = [1, len(given)] if isinstance(given, list) else [1]
        return {"inputs": [{"name": name, "datatype": datatype, "shape": shape, "data": values}]}

    return body


def _plain(model: str, path: str) -> Sequence[Route]:
    if model == "minilm":
        return (Route("", path, lambda text: {"text": text}, lambda body: body["embedding"]),)
    return (Route("", path, lambda row: {"x": row}, lambda body: body["y"]),)


def _roundhouse(declaration: str = "{model}.yaml") -> Callable[[Path, str, int], Start]:
    folders = {"ROUNDHOUSE_CACHE_DIR": str(WORK / "cache"), "ROUNDHOUSE_STATE_DIR": str(WORK / "state")}

    def start(python: Path, model: str, port: int) -> Start:
        command = [python.parent / "roundhouse", "up", HERE / declaration.format(model=model), "--port", str(port)]
        return Start(command, {**folders, "PYTHONPATH": str(ROOT)})

    return start


def _embedding(body: Any) -> Answer:
    outputs = {output["name"]: output["data"] for output in body["outputs"]}
    data = outputs["embedding"]
    return data[0] if isinstance(data[0], list) else data  # type: ignore[no-any-return]


def _flat(body: Any) -> Answer:
    data = body["outputs"][0]["data"]
    return data[0] if isinstance(data[0], list) else data  # type: ignore[no-any-return]


def _roundhouse_routes(model: str) -> Sequence[Route]:
    if model == "noop":
        return (Route("", "/v2/models/noop/infer", _rows("x", "FP32"), _flat),)
    return (
        Route("", "/v2/models/minilm/infer", _rows("text", "BYTES"), _embedding),
        Route(
            "gateway",
            "/v1/embeddings",
            lambda text: {"model": "minilm", "input": text},
            lambda body: body["data"][0]["embedding"],
        ),
    )


def _fastapi(kind: str) -> Callable[[Path, str, int], Start]:
    return lambda python, model, port: Start([python, SERVERS / "fastapi_server.py", model, kind, str(port)])


def _flask(*arguments: str) -> Callable[[Path, str, int], Start]:
    return lambda python, model, port: Start(
        [python, "-m", "gunicorn", *arguments, "--bind", f"127.0.0.1:{port}", f"flask_server:{model}()"]
    )


def _script(name: str, **environment: str) -> Callable[[Path, str, int], Start]:
    return lambda python, model, port: Start([python, SERVERS / name, model, str(port)], environment)


def _mlserver_start(python: Path, model: str, port: int) -> Start:
    folder = WORK / "mlserver" / model
    folder.mkdir(parents=True, exist_ok=True)
    implementation = "MiniLM" if model == "minilm" else "Noop"
    batching = {"max_batch_size": 32, "max_batch_time": 0.005} if model == "minilm" else {}
    settings = {"name": model, "implementation": f"mlserver_runtime.{implementation}", **batching}
    (folder / "model-settings.json").write_text(json.dumps(settings))
    own = {"host": "127.0.0.1", "http_port": port, "grpc_port": 0, "metrics_port": port, "parallel_workers": 0}
    (folder / "settings.json").write_text(json.dumps({**own, "debug": False, "metrics_endpoint": None}))
    return Start([python.parent / "mlserver", "start", folder])


def _mlserver_routes(model: str) -> Sequence[Route]:
    name, datatype = ("text", "BYTES") if model == "minilm" else ("x", "FP32")
    return (Route("", f"/v2/models/{model}/infer", _rows(name, datatype), _flat),)


def _bentoml_start(python: Path, model: str, port: int) -> Start:
    service = "bentoml_service:" + ("MiniLM" if model == "minilm" else "Noop")
    home = {"BENTOML_HOME": str(WORK / "bentoml")}
    command = [python.parent / "bentoml", "serve", service, "--host", "127.0.0.1", "--port", str(port)]
    return Start([*command, "--working-dir", SERVERS], home)


def _bentoml_routes(model: str) -> Sequence[Route]:
    if model == "minilm":
        return (Route("", "/embed", lambda text: {"texts": [text]}, lambda body: body[0]),)
    return (Route("", "/echo", lambda row: {"x": row}, lambda body: body["y"]),)


def _kserve_routes(model: str) -> Sequence[Route]:
    path = f"/v1/models/{model}:predict"
    return (Route("", path, lambda given: {"instances": [given]}, lambda body: body["predictions"][0]),)


PEERS = (
    Peer("roundhouse", "Roundhouse", None, _roundhouse(), _roundhouse_routes),
    Peer(
        "roundhouse-two",
        "Roundhouse, two replicas",
        None,
        _roundhouse("{model}-two.yaml"),
        lambda model: _roundhouse_routes(model)[:1] if model == "minilm" else (),
    ),
    Peer(
        "fastapi",
        "FastAPI, own asyncio batcher",
        "fastapi",
        _fastapi("batcher"),
        lambda model: _plain(model, "/embed" if model == "minilm" else "/echo"),
    ),
    Peer("mlserver", "MLServer", "mlserver", _mlserver_start, _mlserver_routes),
    Peer("litserve", "LitServe", "litserve", _script("litserve_server.py"), lambda model: _plain(model, "/predict")),
    Peer("bentoml", "BentoML", "bentoml", _bentoml_start, _bentoml_routes),
    Peer(
        "rayserve",
        "Ray Serve, as documented",
        "rayserve",
        _script("rayserve_server.py"),
        lambda model: _plain(model, f"/{model}"),
    ),
    Peer(
        "rayserve-tuned",
        "Ray Serve, throughput + HAProxy",
        "rayserve",
        _script(
            "rayserve_server.py",
            RAY_SERVE_ENABLE_HA_PROXY="1",
            RAY_SERVE_THROUGHPUT_OPTIMIZED="1",
            RAY_worker_niceness="0",
        ),
        lambda model: _plain(model, f"/{model}"),
    ),
    Peer(
        "flask-sync",
        "Flask, gunicorn sync x2",
        "flask",
        _flask("--workers", "2"),
        lambda model: _plain(model, "/embed" if model == "minilm" else "/echo"),
    ),
    Peer(
        "flask-threads",
        "Flask, gunicorn gthread x2",
        "flask",
        _flask("--workers", "2", "--worker-class", "gthread", "--threads", "16"),
        lambda model: _plain(model, "/embed" if model == "minilm" else "/echo"),
    ),
    Peer(
        "fastapi-pool",
        "FastAPI, thread pool",
        "fastapi",
        _fastapi("pool"),
        lambda model: _plain(model, "/embed" if model == "minilm" else "/echo"),
    ),
    Peer("kserve", "KServe SDK", "kserve", _script("kserve_server.py"), _kserve_routes),
)
