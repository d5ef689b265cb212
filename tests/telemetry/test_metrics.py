"""Each verb moves the instrument that it is named after, and metrics that cannot be published harm nobody."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.spec import Objectives
from serve.telemetry.instruments import KINDS, LOAD_PHASES, OUTCOMES, PHASES, PROTOCOLS, RESULTS
from serve.telemetry.metrics import GatewayMetrics, ObjectiveMetrics, ReplicaMetrics
from tests.scraping import Scrape


def test_what_a_queue_and_its_model_do(tmp_path: Path):
    metrics = ReplicaMetrics.of("a", folder=tmp_path)
    work = metrics.items
    work.batch(3, 0.2)
    work.cost(asked=30, computed=40)
    work.answered(prepare_s=0.01, queue_s=0.02, compute_s=0.03)
    metrics.passed(read_s=0.04, respond_s=0.05)
    work.rejected("queue_full", 2)
    work.dropped("cancelled", queued=3, running=1)
    scrape = Scrape(tmp_path)
    assert scrape("batch_size_sum", kind="item") == 3
    assert scrape("batch_size_bucket", kind="item", le="2.0") == 0
    assert scrape("batch_size_bucket", kind="item", le="4.0") == 1
    assert scrape("batch_duration_seconds_sum", kind="item") == 0.2
    assert (scrape("batch_cost_asked_total"), scrape("batch_cost_computed_total")) == (30, 40)
    told = scrape.nonzero("request_phase_duration_seconds_sum", "phase")
    assert told == {"prepare": 0.01, "queue": 0.02, "compute": 0.03, "read": 0.04, "respond": 0.05}
    assert scrape.nonzero("rejected_total", "reason") == {"queue_full": 2}
    assert scrape.nonzero("dropped_total", "stage") == {"queued": 3, "running": 1}
    assert not scrape.found("batch_size_sum", kind="stream")


def test_tokens_and_the_time_between_them(tmp_path: Path):
    work = ReplicaMetrics.of("a", folder=tmp_path).streams
    work.first_part(0.3, 1)
    work.next_part(0.06, 3)
    work.next_part(9.0, 0)
    work.prompt(11)
    scrape = Scrape(tmp_path)
    assert scrape("time_to_first_token_seconds_sum") == 0.3
    assert scrape("inter_token_latency_seconds_count") == 3
    assert scrape("inter_token_latency_seconds_sum") == pytest.approx(0.06)
    assert scrape("inter_token_latency_seconds_bucket", le="0.025") == 3
    assert scrape.nonzero("tokens_total", "type") == {"output": 4, "input": 11}


def test_a_load_and_where_it_stands(tmp_path: Path):
    load = ReplicaMetrics.of("a", folder=tmp_path).load
    for phase in PHASES:
        load.entered(phase)
        assert Scrape(tmp_path).nonzero("model_phase", "phase") == {phase: 1}
        load.spent(phase, 2.0)
    load.loaded(6.0)
    load.failed("source")
    scrape = Scrape(tmp_path)
    told = scrape.nonzero("model_load_phase_duration_seconds_sum", "phase")
    assert told == dict.fromkeys(LOAD_PHASES, 2.0)
    assert (scrape("cold_starts_total"), scrape("cold_start_duration_seconds_sum")) == (1, 6)
    assert scrape.nonzero("model_load_failures_total", "reason") == {"source": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_every_request_counts_once_by_protocol_and_outcome(tmp_path: Path, kind: str):
    replica, gateway = ReplicaMetrics.of("a", folder=tmp_path), GatewayMetrics(tmp_path).of("a")
    metrics = (replica if kind == "item" else gateway).requests
    prefix = "" if kind == "item" else "gateway_"
    for protocol in PROTOCOLS:
        for outcome in OUTCOMES:
            metrics.ended(protocol, outcome, 0.5, None)
    scrape = Scrape(tmp_path)
    assert {sample.value for sample in scrape.found(f"{prefix}requests_total")} == {1}
    for protocol in PROTOCOLS:
        assert scrape(f"{prefix}request_duration_seconds_count", protocol=protocol, status="ok") == 1
        assert scrape(f"{prefix}request_duration_seconds_count", protocol=protocol, status="error") == len(OUTCOMES) - 1


OWN_DOING = {
    "unsupported_parameter", "payload_too_large", "unsupported_media_type", "invalid_value", "model_not_found",
    "not_found", "method_not_allowed", "client_closed_request",
}  # fmt: skip


def promised(folder: Path, **declared: float) -> ObjectiveMetrics:
    objectives = ReplicaMetrics.of("a", folder=folder).objectives
    objectives.promise(Objectives(**declared))
    return objectives


def kept(folder: Path, objective: str) -> tuple[float, float]:
    """Return how many requests met an objective and how many missed it."""
    scrape = Scrape(folder)
    met, missed = (scrape("objective_requests_total", objective=objective, result=each) for each in RESULTS)
    return met, missed


@pytest.mark.parametrize("outcome", [outcome for outcome in OUTCOMES if outcome != "ok"])
def test_what_is_no_doing_of_the_caller_misses_availability_and_nothing_else_counts(tmp_path: Path, outcome: str):
    promised(tmp_path, latency_ms=100.0).failed(outcome)
    assert kept(tmp_path, "availability") == (0, outcome not in OWN_DOING)
    assert kept(tmp_path, "latency") == (0, 0)


def test_an_answer_meets_availability_and_is_in_time_or_late(tmp_path: Path):
    objectives = promised(tmp_path, latency_ms=250.0)
    for seconds in (0.0, 0.25, 0.2501):
        objectives.answered(seconds)
    assert kept(tmp_path, "availability") == (3, 0)
    assert kept(tmp_path, "latency") == (2, 1)


def test_without_a_promise_of_latency_none_is_counted(tmp_path: Path):
    objectives = promised(tmp_path)
    objectives.answered(1e9)
    assert kept(tmp_path, "availability") == (1, 0)
    assert kept(tmp_path, "latency") == (0, 0)


def test_what_is_promised_is_told_and_an_edit_changes_it(tmp_path: Path):
    objectives = promised(tmp_path, latency_ms=100.0, latency_ratio=0.9, availability=0.99)
    assert Scrape(tmp_path).nonzero("objective_target", "objective") == {"availability": 0.99, "latency": 0.9}
    objectives.promise(Objectives())
    assert Scrape(tmp_path).nonzero("objective_target", "objective") == {"availability": 0.999}
    objectives.answered(1.0)
    assert kept(tmp_path, "latency") == (0, 0)


def test_a_folder_that_cannot_be_written_is_told_and_harms_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "taken").touch()
    metrics = ReplicaMetrics.of("a", folder=tmp_path / "taken")
    metrics.items.batch(1, 0.1)
    assert "not published" in caplog.text
    assert Scrape(tmp_path / "taken").samples == []
