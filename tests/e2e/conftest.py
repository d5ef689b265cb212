"""The platforms that several files of end-to-end tests look at, each started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.observed import Observed, observing
from tests.e2e.running import ROOT, Running, running_platform
from tests.otlp import Collector, collecting

DOUBLE = """
import time
import numpy as np
from opentelemetry import trace
from serve.models.base import Signature, TensorSpec

class Double:
    signature = Signature(
        inputs=(TensorSpec("x", "FP32", (-1, -1), "numbers"),),
        outputs=(TensorSpec("y", "FP32", (-1, -1), "numbers"),),
        example={"x": np.array([1, 2], np.float32)},
    )

    def predict(self, batch):
        with trace.get_tracer("mine").start_as_current_span("own code"):
            time.sleep(0.002)
        return [ValueError("odd") if item["x"][0] < 0 else {"y": item["x"] * 2} for item in batch]
"""
DECLARED = "  - {name: double, task: python, source: 'file:model.py', options: {class: Double}}\n"


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """The collector of the catalog's spans."""
    with collecting() as found:
        yield found


@pytest.fixture(scope="session")
def catalog(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Running]:
    """The default catalog and a model of a user's, all ready; it records the traces of those who ask for it."""
    folder = tmp_path_factory.mktemp("catalog")
    (folder / "model.py").write_text(DOUBLE)
    declaration = folder / "models.yaml"
    declaration.write_text((ROOT / "models.yaml").read_text() + DECLARED)
    more = {"ROUNDHOUSE_TRACING_ENDPOINT": collector.url, "ROUNDHOUSE_TRACING_RATIO": "0"}
    with running_platform(declaration, folder, more) as running:
        for name in ("minilm", "smollm2", "efficientnet", "whisper", "forecaster", "vad", "double"):
            running.wait_for(name)
        yield running


@pytest.fixture(scope="session")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    """A platform that has been asked everything that there is to see, and is not asked any more."""
    with observing(tmp_path_factory.mktemp("observed")) as found:
        yield found
