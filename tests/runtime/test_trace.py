"""A bar stands where its part of the whole was, and a request's spans stand below each other as they belong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.runtime.trace import bar, render_request


@given(first=st.floats(0, 1), second=st.floats(0, 1), width=st.integers(2, 100))
def test_a_bar_is_never_wider_than_the_whole_and_never_nothing(first: float, second: float, width: int):
    begin, end = sorted((first, second))
    drawn = bar(begin, end - begin, 1.0, width=width)
    assert 1 <= len(drawn) <= width
    assert drawn.strip(" ")


def test_bars_of_parts_that_follow_each_other_do():
    assert bar(0, 5, 10, width=10) == "█████"
    assert bar(5, 5, 10, width=10) == "     █████"
    assert bar(5, 0.01, 10, width=10) == "     |"


def span(name: str, own: str, parent: str, at: float, seconds: float, error: str | None = None) -> dict[str, object]:
    told = {"name": name, "kind": "internal", "span_id": own, "parent_id": parent, "at": at, "seconds": seconds}
    return told | {"error": error, "events": [], "attributes": {}}


def test_a_request_is_drawn_as_a_tree(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    spans = [
        span("respond", "d", "a", 13.0, 1.0),
        span("POST /infer", "a", "client", 10.0, 4.0),
        span("queue", "b", "a", 10.0, 1.0),
        span("compute", "c", "a", 11.0, 2.0, "prediction_failed"),
        span("prepare", "e", "b", 10.5, 0.5),
    ]
    monkeypatch.setenv("COLUMNS", "100")
    hop = {"at": 10.0, "model": "m", "outcome": "prediction_failed", "batch_sizes": [3], "spans": spans}
    render_request({"request_id": "mine", "trace_id": "t" * 32, "hops": [hop]})
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"mine: m, prediction_failed, 1970-01-01T00:00:10.000+00:00, trace {'t' * 32}"
    assert told[1] == "It ran in batches of 3 items."
    assert [line.strip().split()[0] for line in told[2:]] == ["POST", "queue", "prepare", "compute", "respond"]
    assert [len(line) - len(line.lstrip()) for line in told[2:]] == [0, 2, 4, 2, 2]
    assert "prediction_failed" in told[5]
