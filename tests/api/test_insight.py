"""What the platform tells of itself beside what its processes count, as a scrape of the gateway finds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from serve.api.directory import ModelScaling, ModelStatus
from serve.api.gateway_app import build_gateway_app
from serve.api.insight import NO_INSIGHT, Insight
from serve.settings import Settings
from serve.telemetry.devices import Device
from tests.api.toys import direct
from tests.scraping import OPENMETRICS, Samples, parse

CHOSEN = ModelStatus(
    "chosen",
    "python",
    ready_replicas=2,
    target_replicas=4,
    scaling=ModelScaling(
        starting=2,
        draining=1,
        min_replicas=1,
        max_replicas=4,
        target_ongoing_requests=2.5,
        ongoing_requests=9.5,
        decisions={"up.load": 3, "down.idle": 2, "up.bound": 1},
    ),
)
FIXED = ModelStatus("fixed", "python", ready_replicas=2, target_replicas=2, scaling=ModelScaling(0, 0, 2, 2))


class Declared:
    def __init__(self, *models: ModelStatus) -> None:
        self.declared = list(models)

    def models(self) -> Sequence[ModelStatus]:
        return self.declared


async def scraped(folder: Path, models: Declared, insight: Insight = NO_INSIGHT) -> Samples:
    settings = Settings(metrics_dir=folder)
    app = build_gateway_app(models, settings=settings, base_url="http://127.0.0.1:9", insight=insight)
    async with direct(app) as client:
        reply = await client.get("/metrics", headers={"accept": OPENMETRICS})
    return Samples(parse(reply.text))


async def test_a_models_replicas_load_and_decisions_are_told(tmp_path: Path):
    scrape = await scraped(tmp_path, Declared(CHOSEN))
    found = {sample.labels["state"]: sample.value for sample in scrape.found("scaling_replicas", model="chosen")}
    assert found == {"wanted": 4, "starting": 2, "ready": 2, "draining": 1}
    assert scrape("scaling_bound", model="chosen", bound="min") == 1
    assert scrape("scaling_bound", model="chosen", bound="max") == 4
    assert scrape("scaling_load", model="chosen") == 9.5
    assert scrape("scaling_target", model="chosen") == 2.5
    assert scrape("scaling_decisions_total", direction="up", reason="load") == 3
    assert scrape("scaling_decisions_total", direction="down", reason="idle") == 2
    assert scrape("scaling_decisions_total", direction="up", reason="bound") == 1
    assert len(scrape.found("scaling_decisions_total")) == 6, "each is there at 0 before it happens"


async def test_a_number_that_is_fixed_has_replicas_and_bounds_alone(tmp_path: Path):
    scrape = await scraped(tmp_path, Declared(FIXED))
    assert scrape("scaling_replicas", model="fixed", state="ready") == 2
    assert scrape("scaling_bound", model="fixed", bound="max") == 2
    for name in ("scaling_load", "scaling_target", "scaling_decisions_total"):
        assert not scrape.found(name)


async def test_a_load_that_nobody_has_looked_at_is_absent_and_not_nothing(tmp_path: Path):
    scaling = dataclasses.replace(CHOSEN.scaling, ongoing_requests=None)
    scrape = await scraped(tmp_path, Declared(dataclasses.replace(CHOSEN, scaling=scaling)))
    assert not scrape.found("scaling_load")
    assert scrape.found("scaling_target")


async def test_a_model_that_is_removed_leaves_no_gauge(tmp_path: Path):
    models = Declared(CHOSEN, FIXED)
    assert (await scraped(tmp_path, models)).found("scaling_replicas", model="chosen")
    models.declared = [FIXED]
    scrape = await scraped(tmp_path, models)
    assert {sample.labels["model"] for sample in scrape.samples} == {"fixed"}


async def test_what_the_machines_have_is_told_without_a_model(tmp_path: Path):
    capacity = {"cpu": {"total": 8.0, "free": 2.5}, "memory": {"total": 2.0**33, "free": 2.0**32}}
    scrape = await scraped(tmp_path, Declared(), dataclasses.replace(NO_INSIGHT, capacity=lambda: capacity))
    assert scrape("cluster_capacity", model="", resource="cpu", state="free") == 2.5
    assert scrape("cluster_capacity", resource="memory", state="total") == 2**33
    assert not scrape.found("cluster_capacity", resource="gpu")


async def test_gpus_are_told_by_their_number(tmp_path: Path):
    gpus = [Device("0", 2.0**30, 2.0**36, 0.75), Device("1", 0.0, 2.0**36, None)]
    scrape = await scraped(tmp_path, Declared(), dataclasses.replace(NO_INSIGHT, devices=lambda: gpus))
    assert [sample.labels for sample in scrape.found("device_utilization")] == [{"model": "", "device": "0"}]
    assert scrape("device_utilization", device="0") == 0.75
    assert scrape("device_memory_used_bytes", device="0") == 2**30
    assert scrape("device_memory_size_bytes", device="1") == 2**36


async def test_without_a_gpu_there_is_no_series_of_one(tmp_path: Path):
    scrape = await scraped(tmp_path, Declared(FIXED))
    assert not [sample for sample in scrape.samples if "device" in sample.name]
