"""What a node tells is the sum of its processes, dead ones included, in the words of Prometheus's own parser."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import psutil
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from prometheus_client.parser import text_string_to_metric_families

from serve.spec import Objectives
from serve.telemetry.exposition import exposed, memory_bytes
from serve.telemetry.metrics import GatewayMetrics, ReplicaMetrics
from serve.telemetry.traceparent import TraceIds
from tests.scraping import Samples, Scrape


def replica(folder: Path, model: str = "a") -> ReplicaMetrics:
    return ReplicaMetrics.of(model, folder=folder)


def test_replicas_of_a_model_are_one_sum_and_models_stand_apart(tmp_path: Path):
    first, second, other = replica(tmp_path), replica(tmp_path), replica(tmp_path, "b")
    for metrics, count in ((first, 1), (second, 2), (other, 4)):
        for _ in range(count):
            metrics.requests.ended("openai", "ok", 0.02, None)
        metrics.items.holds(queued=10 * count, queued_bytes=100 * count, running=count)
        metrics.load.entered("ready")
    scrape = Scrape(tmp_path)
    assert scrape("requests_total", model="a", protocol="openai", outcome="ok") == 3
    assert scrape("requests_total", model="b") == 4
    assert scrape("queue_depth", model="a", kind="item") == 30
    assert scrape("queue_size_bytes", model="b") == 400
    assert scrape("running", model="a") == 3
    assert scrape("model_phase", model="a", phase="ready") == 2
    assert scrape("request_duration_seconds_bucket", model="a", le="0.01") == 0
    assert scrape("request_duration_seconds_bucket", model="a", le="0.025") == 3
    assert scrape("request_duration_seconds_count", model="a") == 3
    assert round(scrape("request_duration_seconds_sum", model="a"), 9) == 0.06


def test_what_a_dead_process_counted_stays_and_what_it_held_does_not(tmp_path: Path):
    metrics = replica(tmp_path)
    metrics.items.holds(5, 500, 1)
    metrics.load.entered("ready")
    metrics.load.loaded(3.0)
    metrics.release()
    scrape = Scrape(tmp_path)
    assert scrape("cold_starts_total", model="a") == 1
    assert scrape("cold_start_duration_seconds_sum", model="a") == 3
    assert scrape("queue_depth") == scrape("model_phase") == scrape("process_memory_bytes") == 0


def test_counters_are_there_before_anything_was_counted_and_histograms_are_not(tmp_path: Path):
    replica(tmp_path)
    scrape = Scrape(tmp_path)
    assert {sample.value for sample in scrape.found("rejected_total")} == {0}
    assert scrape.found("dropped_total", reason="expired", stage="queued")
    assert not scrape.found("request_duration_seconds_bucket")


def test_an_exemplar_is_the_newest_of_all_replicas(tmp_path: Path):
    for metrics, name in ((replica(tmp_path), 1), (replica(tmp_path), 2)):
        metrics.requests.ended("openai", "ok", 0.3, TraceIds(bytes([name]) * 16, bytes([name]) * 8))
    found = Scrape(tmp_path).exemplars("request_duration_seconds")
    assert set(found) == {"0.5"}
    assert found["0.5"].labels == {"trace_id": "02" * 16, "span_id": "02" * 8}
    assert found["0.5"].value == 0.3


def test_plain_prometheus_gets_the_same_without_exemplars(tmp_path: Path):
    replica(tmp_path).requests.ended("openai", "ok", 0.3, TraceIds(b"x" * 16, b"y" * 8))
    text, content_type = exposed(tmp_path, "text/plain")
    assert content_type.startswith("text/plain")
    samples = [sample for family in text_string_to_metric_families(text.decode()) for sample in family.samples]
    told = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    scrape = Scrape(tmp_path)
    assert scrape.content_type.startswith("application/openmetrics-text")
    assert set(told) == scrape.series()
    assert "trace_id" not in text.decode()


def test_gateways_are_summed_and_a_request_without_a_model_has_none(tmp_path: Path):
    for gateway in (GatewayMetrics(tmp_path), GatewayMetrics(tmp_path)):
        gateway.of("a").requests.ended("openai", "ok", 0.1, None)
        gateway.of("").requests.ended("openai", "model_not_found", 0.1, None)
    scrape = Scrape(tmp_path)
    assert scrape("gateway_requests_total", model="a", outcome="ok") == 2
    assert scrape("gateway_requests_total", model="", outcome="model_not_found") == 2
    assert not scrape.found("process_memory_bytes")


def test_what_replicas_and_gateways_both_count_is_one_sum(tmp_path: Path):
    replica(tmp_path).objectives.answered(0.1)
    replica(tmp_path).objectives.failed("overloaded")
    GatewayMetrics(tmp_path).of("a").objectives.failed("model_not_ready")
    scrape = Scrape(tmp_path)
    assert [sample.value for sample in scrape.found("objective_requests_total", objective="availability")] == [1, 2]


def test_what_each_process_tells_alike_is_not_added_up(tmp_path: Path):
    first, second = replica(tmp_path), replica(tmp_path)
    first.objectives.promise(Objectives(availability=0.99))
    second.objectives.promise(Objectives(availability=0.999))
    assert Scrape(tmp_path)("objective_target", objective="availability") == 0.999
    second.release()
    assert Scrape(tmp_path)("objective_target", objective="availability") == 0.99


def test_an_empty_or_absent_folder_has_no_samples(tmp_path: Path):
    assert Scrape(tmp_path).samples == Scrape(tmp_path / "none").samples == []


def test_memory_is_of_each_replica_once(tmp_path: Path):
    replica(tmp_path), replica(tmp_path)
    told = Scrape(tmp_path)("process_memory_bytes", model="a")
    assert 0 < told <= 1.5 * psutil.Process().memory_info().rss
    assert memory_bytes(2**22 + 1) == 0
    assert memory_bytes(os.getpid()) > 0


def told(folder: Path, *begins: str) -> Samples:
    """Return the samples whose lines begin so; to parse all of them hundreds of times would take long."""
    lines = exposed(folder, "text/plain")[0].decode().splitlines(keepends=True)
    families = text_string_to_metric_families("".join(line for line in lines if line.startswith(begins)))
    return Samples([sample for family in families for sample in family.samples])


class Node(RuleBasedStateMachine):
    """Replicas start, count, die and start again; nothing that was counted is ever lost, or counted twice."""

    replicas: Bundle[ReplicaMetrics] = Bundle("replicas")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.counted = {"a": 0, "b": 0}
        self.models: dict[int, str] = {}
        self.peaks = {"a": 0, "b": 0}

    @rule(target=replicas, model=st.sampled_from("ab"))
    def start(self, model: str) -> ReplicaMetrics:
        metrics = replica(self.folder, model)
        self.models[id(metrics)] = model
        self.peaks[model] = max(self.peaks[model], list(self.models.values()).count(model))
        return metrics

    @rule(metrics=replicas, count=st.integers(1, 5))
    def count(self, metrics: ReplicaMetrics, count: int) -> None:
        for _ in range(count):
            metrics.requests.ended("open_inference", "ok", 0.1, None)
        self.counted[self.models[id(metrics)]] += count

    @rule(metrics=consumes(replicas))
    def die(self, metrics: ReplicaMetrics) -> None:
        metrics.release()
        self.models.pop(id(metrics))

    @invariant()
    def nothing_is_lost(self) -> None:
        scrape = told(self.folder, "roundhouse_requests_total{", "roundhouse_request_duration_seconds_count{")
        for model, count in self.counted.items():
            assert scrape("requests_total", model=model) == count
            assert scrape("request_duration_seconds_count", model=model) == count

    @invariant()
    def files_are_no_more_than_processes_at_once(self) -> None:
        assert len(list(self.folder.glob("*.page"))) == sum(self.peaks.values())

    def teardown(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()


TestNode = Node.TestCase
TestNode.settings = settings(max_examples=25, stateful_step_count=20)
