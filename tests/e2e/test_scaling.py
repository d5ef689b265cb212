"""Real load on a model makes Ray start another replica, and whoever asks why is told."""

from __future__ import annotations

import json

import pytest

from tests.e2e.observed import Observed, explained
from tests.scraping import Samples, parse

pytestmark = pytest.mark.e2e


def test_the_decision_is_explained_with_the_load(observed: Observed):
    told = explained(observed.platform)
    [decision] = told["decisions"]
    assert (decision["from"], decision["to"], decision["reason"]) == (1, 2, "load")
    assert decision["inputs"]["ongoing_requests"] > 2
    assert decision["inputs"]["lasted_s"] > 20
    assert decision["sentence"].startswith("1 -> 2 at ")
    assert told["bounds"] == {"min_replicas": 1, "max_replicas": 2}


def test_the_command_says_the_same(observed: Observed):
    done = observed.platform.command("explain", "scaled")
    assert done.returncode == 0, done.stderr
    assert "scaled: 2 wanted, 2 ready; 1 to 2 allowed" in done.stdout
    assert "1 -> 2 at " in done.stdout
    at = explained(observed.platform)["decisions"][0]["at"]
    found = json.loads(observed.platform.command("explain", "scaled", "--at", at, "--json").stdout)
    assert found["to"] == 2
    wrong = observed.platform.command("explain", "scalled")
    assert (wrong.returncode, "did you mean 'scaled'?" in wrong.stderr) == (1, True)


def test_metrics_tell_the_decision_the_bounds_and_the_machine(observed: Observed):
    scrape = Samples(parse(observed.metrics))
    assert scrape("scaling_decisions_total", model="scaled", direction="up", reason="load") == 1
    assert scrape("scaling_replicas", model="scaled", state="wanted") == 2
    assert scrape("scaling_replicas", model="scaled", state="ready") == 2
    assert scrape("scaling_bound", model="scaled", bound="max") == 2
    assert scrape("scaling_target", model="scaled") == 2
    assert scrape("scaling_load", model="scaled") > 0
    assert scrape("scaling_replicas", model="slow", state="ready") == 1
    assert not scrape.found("scaling_load", model="slow")
    total, free = (scrape("cluster_capacity", resource="cpu", state=state) for state in ("total", "free"))
    assert 0 <= free < total <= 4096


def test_a_number_that_is_fixed_says_so(observed: Observed):
    told = explained(observed.platform, "slow")
    assert told["holds"].startswith("the number is fixed")
    assert told["replicas"]["ready"] == 1


def test_top_shows_the_models(observed: Observed):
    done = observed.platform.command("top", "--once", "--json")
    assert done.returncode == 0, done.stderr
    found = {row["model"]: row for row in json.loads(done.stdout)}
    assert (found["scaled"]["ready_replicas"], found["slow"]["phase"]) == (2, "ready")
    assert found["scaled"]["memory_bytes"] > 0
