"""Real load on a model makes Ray start another replica, and whoever asks why is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Running, running_platform
from tests.e2e.test_platform import wait_until
from tests.scraping import OPENMETRICS, Samples, parse

pytestmark = pytest.mark.e2e

CLASS = """
import time
import numpy as np
from serve.models.base import Signature, TensorSpec

class Sleeper:
    signature = Signature(
        inputs=(TensorSpec("x", "FP32", (-1,), "a number"),),
        outputs=(TensorSpec("y", "FP32", (-1,), "the same number"),),
        example={"x": np.float32(1)},
    )

    def predict(self, batch):
        time.sleep(0.2)
        return [{"y": item["x"]} for item in batch]
"""
DECLARATION = """
models:
  - name: sleeper
    task: python
    source: file:model.py
    options: {class: Sleeper}
    scaling: {min_replicas: 1, max_replicas: 2, target_ongoing_requests: 2}
  - name: fixed
    task: python
    source: file:model.py
    options: {class: Sleeper}
"""
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}
# Replicas tell of their requests every ten seconds, and Ray waits thirty more.
SCALED_WITHIN_S = 90.0


class Load:
    """As many requests at once as there are threads, until the end."""

    def __init__(self, url: str, threads: int) -> None:
        self._url = url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._stop.is_set():
                with suppress(httpx.HTTPError):
                    client.post(self._url, json=BODY)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A platform whose `sleeper` has been under load until a second replica answered."""
    folder = tmp_path_factory.mktemp("scaling")
    (folder / "model.py").write_text(CLASS)
    declaration = folder / "models.yaml"
    declaration.write_text(DECLARATION)
    with running_platform(declaration, folder) as running:
        running.wait_for("sleeper")
        running.wait_for("fixed")
        with Load(f"{running.url}/v2/models/sleeper/infer", threads=6):
            wait_until(lambda: explained(running)["replicas"]["ready"] == 2, within_s=SCALED_WITHIN_S)
            wait_until(lambda: "max_replicas holds" in explained(running)["holds"])
        yield running


def explained(running: Running, model: str = "sleeper") -> Any:
    return httpx.get(f"{running.url}/v2/models/{model}/explain", timeout=30).raise_for_status().json()


def test_the_decision_is_explained_with_the_load(platform: Running):
    told = explained(platform)
    [decision] = told["decisions"]
    assert (decision["from"], decision["to"], decision["reason"]) == (1, 2, "load")
    assert decision["inputs"]["ongoing_requests"] > 2
    assert decision["inputs"]["lasted_s"] > 20
    assert decision["sentence"].startswith("1 -> 2 at ")
    assert told["bounds"] == {"min_replicas": 1, "max_replicas": 2}


def test_the_command_says_the_same(platform: Running):
    done = platform.command("explain", "sleeper")
    assert done.returncode == 0, done.stderr
    assert "sleeper: 2 wanted, 2 ready; 1 to 2 allowed" in done.stdout
    assert "1 -> 2 at " in done.stdout
    at = explained(platform)["decisions"][0]["at"]
    found = json.loads(platform.command("explain", "sleeper", "--at", at, "--json").stdout)
    assert found["to"] == 2
    wrong = platform.command("explain", "slepper")
    assert (wrong.returncode, "did you mean 'sleeper'?" in wrong.stderr) == (1, True)


def test_metrics_tell_the_decision_the_bounds_and_the_machine(platform: Running):
    text = httpx.get(f"{platform.url}/metrics", headers={"accept": OPENMETRICS}).text
    scrape = Samples(parse(text))
    assert scrape("scaling_decisions_total", model="sleeper", direction="up", reason="load") == 1
    assert scrape("scaling_replicas", model="sleeper", state="wanted") == 2
    assert scrape("scaling_replicas", model="sleeper", state="ready") == 2
    assert scrape("scaling_bound", model="sleeper", bound="max") == 2
    assert scrape("scaling_target", model="sleeper") == 2
    assert scrape("scaling_load", model="sleeper") > 0
    assert scrape("scaling_replicas", model="fixed", state="ready") == 1
    assert not scrape.found("scaling_load", model="fixed")
    total, free = (scrape("cluster_capacity", resource="cpu", state=state) for state in ("total", "free"))
    assert 0 <= free < total <= 4096


def test_a_number_that_is_fixed_says_so(platform: Running):
    told = explained(platform, "fixed")
    assert told["holds"].startswith("the number is fixed")
    assert told["replicas"]["ready"] == 1


def test_top_shows_both_models(platform: Running):
    done = platform.command("top", "--once", "--json")
    assert done.returncode == 0, done.stderr
    found = {row["model"]: row for row in json.loads(done.stdout)}
    assert (found["sleeper"]["ready_replicas"], found["fixed"]["phase"]) == (2, "ready")
    assert found["sleeper"]["memory_bytes"] > 0
