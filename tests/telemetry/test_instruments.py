"""Names are what OpenTelemetry and Prometheus agree on, and every value of a label is known beforehand."""

from __future__ import annotations

import re
from pathlib import Path

from serve.api.errors import INTERNAL, TABLE
from serve.telemetry.instruments import ALL, FAULTS, GATEWAY, MEMORY, OUTCOMES, REPLICA, UNIT_WORDS, markdown_table


def test_outcomes_are_the_codes_of_the_errors():
    assert set(OUTCOMES) == {"ok", INTERNAL.code, *(told.code for _, told in TABLE)}


def test_faults_are_what_is_told_as_one_of_the_server_or_as_too_much():
    assert {
        told.code for told in (INTERNAL, *(each for _, each in TABLE)) if told.status in {429, *range(500, 600)}
    } == FAULTS


def test_names_follow_the_conventions_and_are_unique():
    for one in ALL:
        assert re.fullmatch(r"roundhouse(\.[a-z]+(_[a-z]+)*)+", one.name), one.name
        assert one.unit in UNIT_WORDS or re.fullmatch(r"1|\{[a-z]+\}", one.unit), one.unit
        assert not one.exposed_name.endswith("_total"), "the exposition adds it"
        assert one.description.endswith(".")
        assert "model" not in one.labels
    assert len({one.exposed_name for one in ALL}) == len(ALL)
    assert next(one for one in ALL if one.name == "roundhouse.request.duration").exposed_name == (
        "roundhouse_request_duration_seconds"
    )


def test_histograms_have_ascending_bounds_and_nothing_else_has_any():
    for one in ALL:
        assert (one.kind == "histogram") == bool(one.bounds), one.name
        assert list(one.bounds) == sorted(set(one.bounds))
        assert one.kind == "histogram" or not one.exemplars


def test_a_model_has_few_series_whatever_happens():
    counted = sum(
        len(one.bounds) + 3 if one.bounds else 1 for one in (*REPLICA, *GATEWAY, MEMORY) for _ in one.series()
    )
    assert counted < 700


def test_the_page_holds_the_table():
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    begin, end = "<!-- table: serve.telemetry.instruments.markdown_table() -->\n", "<!-- end of table -->"
    assert page[page.index(begin) + len(begin) : page.index(end)].strip() == markdown_table().strip(), (
        "put what `serve.telemetry.instruments.markdown_table()` returns between the marks in docs/metrics.md"
    )
