"""`roundhouse top`: rates and times from two scrapes, and what it shows of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from serve.cli import main
from serve.runtime import top
from serve.runtime.top import Counted, counted, quantile, rows
from serve.telemetry.exposition import exposed
from serve.telemetry.metrics import ReplicaMetrics
from tests.platforms import Answers, answering, platform

INDEX = [
    {"name": "a", "task": "python", "phase": "ready", "message": "", "ready_replicas": 2, "target_replicas": 3},
    {"name": "b", "task": "python", "phase": "loading", "message": "", "ready_replicas": 0, "target_replicas": 1},
]


def scrape(folder: Path) -> str:
    return exposed(folder, "text/plain")[0].decode()


def test_a_scrape_is_summed_by_model(tmp_path: Path):
    for model, count in (("a", 2), ("a", 3), ("b", 1)):
        metrics = ReplicaMetrics.of(model, folder=tmp_path)
        for _ in range(count):
            metrics.requests.ended("openai", "ok", 0.02, None)
        metrics.requests.ended("open_inference", "overloaded", 0.001, None)
        metrics.items.holds(queued=count, queued_bytes=9, running=1)
    found = counted(scrape(tmp_path))
    assert (found["a"].requests, found["a"].errors, found["a"].queued) == (7, 2, 5)
    assert (found["a"].seconds[0.01], found["a"].seconds[0.025], found["a"].seconds[float("inf")]) == (0, 5, 5)
    assert (found["b"].requests, found["b"].errors) == (2, 1)


def test_a_row_is_what_was_added_between_two_scrapes():
    before = Counted(requests=10, errors=1, seconds={0.1: 9, 0.5: 9, float("inf"): 9}, queued=50, memory_bytes=1)
    now = Counted(requests=30, errors=2, seconds={0.1: 18, 0.5: 28, float("inf"): 28}, queued=4, memory_bytes=2**20)
    row, other = rows(INDEX, {"a": before}, {"a": now}, seconds=4.0)
    assert (row.model, row.phase, row.ready_replicas, row.wanted_replicas) == ("a", "ready", 2, 3)
    assert (row.requests_per_s, row.errors_per_s) == (5, 0.25)
    assert row.p50_s == pytest.approx(0.1 + 0.4 * 0.5 / 10)
    assert row.p99_s == pytest.approx(0.1 + 0.4 * 9.81 / 10)
    assert (row.queued, row.memory_bytes) == (4, 2**20)
    assert (other.requests_per_s, other.p50_s, other.p99_s) == (0, None, None)


def test_counts_that_began_anew_are_no_negative_rate():
    row = rows(INDEX[:1], {"a": Counted(100, 9)}, {"a": Counted(3, 1)}, seconds=2.0)[0]
    assert (row.requests_per_s, row.errors_per_s) == (0, 0)


BOUNDS = (0.1, 0.5, 2.0, float("inf"))


@given(st.lists(st.integers(0, 50), min_size=4, max_size=4), st.floats(0.01, 1))
def test_a_quantile_lies_in_the_bucket_that_reaches_it(counts: list[int], share: float):
    buckets = {bound: float(sum(counts[: place + 1])) for place, bound in enumerate(BOUNDS)}
    found = quantile(buckets, share)
    assume(sum(counts))
    assert found is not None
    place = next(place for place, bound in enumerate(BOUNDS) if buckets[bound] >= share * sum(counts))
    lower = BOUNDS[place - 1] if place else 0.0
    assert lower <= found <= min(BOUNDS[place], 2.0) + 1e-9


@given(st.lists(st.integers(0, 50), min_size=4, max_size=4), st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_larger_share_has_no_smaller_quantile(counts: list[int], one: float, other: float):
    assume(sum(counts))
    buckets = {bound: float(sum(counts[: place + 1])) for place, bound in enumerate(BOUNDS)}
    low, high = sorted((one, other))
    assert quantile(buckets, low) <= quantile(buckets, high) + 1e-9  # type: ignore[operator]


def test_of_nothing_there_is_no_quantile():
    assert quantile({}, 0.5) is None
    assert quantile({0.1: 0.0, float("inf"): 0.0}, 0.5) is None


@pytest.fixture
def answers(tmp_path: Path) -> Answers:
    """A platform at which 3 requests are answered between two scrapes."""
    metrics = ReplicaMetrics.of("a", folder=tmp_path / "metrics")

    def scraped() -> tuple[int, str]:
        for _ in range(3):
            metrics.requests.ended("openai", "ok", 0.02, None)
        return 200, scrape(tmp_path / "metrics")

    return {"/metrics": scraped, "/v2/repository/index": (200, INDEX)}


def run(answers: Answers, folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(top, "REFRESH_S", 0.01)
    with platform(answers, folder, monkeypatch):
        return main(["top", *words])


def test_once_prints_a_table_and_ends(
    answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run(answers, tmp_path, monkeypatch, "--once") == 0
    heading, a, b = capsys.readouterr().out.splitlines()
    assert heading.split() == ["model", "phase", "replicas", "requests/s", "errors/s", "p50", "p99", "queue", "memory"]
    assert a.split()[:3] == ["a", "ready", "2/3"]
    assert a.split()[4:8] == ["0.0", "18", "ms", "25"]
    assert b.split()[:7] == ["b", "loading", "0/1", "0.0", "0.0", "-", "-"]


def test_json_has_a_line_a_refresh(
    answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run(answers, tmp_path, monkeypatch, "--json", "--once") == 0
    [line] = capsys.readouterr().out.splitlines()
    first, second = json.loads(line)
    assert first["model"] == "a"
    assert first["requests_per_s"] > 0
    assert 0.01 < first["p50_s"] < 0.025
    assert second["p99_s"] is None


def test_it_goes_on_until_it_is_interrupted_and_ends_well(answers: Answers, capsys: pytest.CaptureFixture[str]):
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    with answering(answers) as port:
        top.top(f"http://127.0.0.1:{port}", once=False, as_json=True, pause=pause)
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert pauses == [2.0, 2.0, 2.0]


def test_a_platform_that_keeps_no_metrics_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    answers = {"/metrics": (404, {"error": "no metrics are kept here"})}
    assert run(answers, tmp_path, monkeypatch, "--once") == 1
    assert "no metrics are kept here" in capsys.readouterr().err
