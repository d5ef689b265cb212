"""Every panel of the dashboards shows something of a real run, read by a real Prometheus."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from typing import Any

import pytest

from loadtests.observe.prometheus import HOW_TO_GET, Prometheus
from tests.e2e.observed import MODELS, TRACE, Observed
from tests.queries import Panel, panels, whole

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason=HOW_TO_GET),
]

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
def run(observed: Observed) -> Run:
    assert observed.prometheus
    return Run(observed.prometheus, observed.start, observed.end)


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
