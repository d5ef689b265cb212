"""`roundhouse explain` as an operator meets it."""

from __future__ import annotations

import json
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.api.directory import ModelScaling, ModelStatus
from serve.api.explanation import explanation
from serve.autoscaling.kept import Kept
from serve.cli import main
from serve.errors import InvalidInput
from serve.runtime.explain import decision_at, read_time
from tests.looks import look
from tests.platforms import platform

AT = look().at
SCALING = ModelScaling(starting=1, min_replicas=1, max_replicas=3, target_ongoing_requests=2.0)
STATUS = ModelStatus("minilm", "text-embedding", ready_replicas=2, target_replicas=3, scaling=SCALING)
PATH = "/v2/models/minilm/explain"


def told(*wanted: int) -> dict[str, Any]:
    """What the platform says after a look a minute, at which so many were wanted."""
    kept = Kept()
    for minute, count in enumerate(wanted):
        kept = kept.after(look(at=AT + 60 * minute, wanted_replicas=count))
    return explanation(STATUS, kept, now=AT + 60 * (len(wanted) - 1))


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Any:
    import time

    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def asked(words: list[str], answer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    with platform({PATH: answer}, folder, monkeypatch):
        return main(["explain", *words])


def test_it_tells_the_replicas_what_holds_and_every_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert asked(["minilm"], (200, told(1, 2, 3)), tmp_path, monkeypatch) == 0
    assert capsys.readouterr().out.splitlines() == [
        "minilm: 3 wanted, 1 starting, 2 ready; 1 to 3 allowed",
        "",
        "Now: scaling.max_replicas holds it at 3: 4 are asked for, by 6.2 ongoing requests over 30 s, "
        "target 2 a replica",
        "",
        "Decisions, newest first:",
        "  2026-01-01  2 -> 3 at 12:02:07 UTC: 6.2 ongoing requests over 30 s, target 2 a replica, at most 3",
        "  2026-01-01  1 -> 2 at 12:01:07 UTC: 6.2 ongoing requests over 30 s, target 2 a replica, at most 3",
    ]


def test_json_is_the_platforms_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert asked(["minilm", "--json"], (200, told(1, 2)), tmp_path, monkeypatch) == 0
    assert json.loads(capsys.readouterr().out) == told(1, 2)


@pytest.mark.parametrize(
    ("at", "found"),
    [
        ("2026-01-01T12:02:07Z", "2 -> 3 at 12:02:07"),
        ("2026-01-01T13:02:06+01:00", "1 -> 2 at 12:01:07"),
        (
            "2026-01-01T12:01:06Z",
            "nothing that is kept was decided of minilm at 2026-01-01 12:01:06 UTC or before; the",
        ),
    ],
)
def test_at_tells_what_was_decided_then_or_last_before(
    at: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert asked(["minilm", "--at", at], (200, told(1, 2, 3)), tmp_path, monkeypatch) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert found in line


def test_at_as_json_is_the_decision_or_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for at, count in (("2026-01-01T12:02:00Z", 2), ("2025-01-01T00:00:00Z", None)):
        assert asked(["minilm", "--json", "--at", at], (200, told(1, 2, 3)), tmp_path, monkeypatch) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found and found["to"]) == count


def test_a_model_of_which_nothing_was_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert asked(["minilm"], (200, told(1)), tmp_path, monkeypatch) == 0
    assert "Nothing was decided yet." in capsys.readouterr().out
    assert asked(["minilm", "--at", "23:59"], (200, told(1)), tmp_path, monkeypatch) == 0
    assert "nothing was decided of minilm at " in capsys.readouterr().out


def test_a_number_that_is_fixed_is_shown_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    fixed = ModelStatus(
        "minilm", "text-embedding", ready_replicas=2, target_replicas=2, scaling=ModelScaling(0, 0, 2, 2)
    )
    assert asked(["minilm"], (200, explanation(fixed, Kept(), now=AT)), tmp_path, monkeypatch) == 0
    assert capsys.readouterr().out.splitlines() == [
        "minilm: 2 wanted, 2 ready; fixed at 2",
        "",
        "Now: the number is fixed: scaling.min_replicas and scaling.max_replicas are both 2",
    ]


def test_a_model_that_is_not_there_is_told_in_the_platforms_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    refused = 404, {"error": "model 'minilm' is not declared; did you mean 'minilm2'?"}
    assert asked(["minilm"], refused, tmp_path, monkeypatch) == 1
    assert capsys.readouterr().err == "roundhouse: 404: model 'minilm' is not declared; did you mean 'minilm2'?\n"


def test_without_a_platform_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("ROUNDHOUSE_STATE_DIR", str(tmp_path))
    assert main(["explain", "minilm", "--port", "1"]) == 1
    assert "nothing was started by `roundhouse up` on port 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("at", "said"),
    [
        ("noon", "--at: 'noon' is no time; give 14:05 or 14:05:30 of today, or RFC 3339"),
        ("25:00", "--at: '25:00' is no time"),
        ("2026-01-01T12:00:00", "--at: '2026-01-01T12:00:00' has no time zone; end it with Z"),
        ("", "--at: '' is no time"),
    ],
)
def test_a_time_that_is_none_is_refused_before_anything_is_asked(
    at: str, said: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["explain", "minilm", "--at", at]) == 1
    assert said in capsys.readouterr().err


ZONE = timezone(timedelta(hours=2))
NOON = datetime(2026, 1, 1, 12, tzinfo=ZONE)


@given(st.times())
def test_a_time_of_day_is_of_today_and_here(time: Any):
    time = time.replace(microsecond=0)
    assert read_time(time.strftime("%H:%M:%S"), now=NOON) == datetime.combine(NOON.date(), time, ZONE)
    assert read_time(time.strftime("%H:%M"), now=NOON) == datetime.combine(NOON.date(), time.replace(second=0), ZONE)


@given(st.datetimes(timezones=st.just(ZONE)))
def test_rfc_3339_is_read_as_it_is_written(moment: datetime):
    assert read_time(moment.isoformat(), now=NOON) == moment


@given(st.text(max_size=30))
def test_no_text_is_more_than_refused(text: str):
    try:
        assert read_time(text, now=NOON).tzinfo is not None
    except InvalidInput as error:
        assert re.search(r"is no time|has no time zone", str(error))


@given(st.lists(st.integers(1, 3), min_size=1, max_size=8), st.integers(-120, 1000))
def test_what_was_decided_at_a_time_is_the_newest_that_is_not_later(wanted: list[int], seconds: int):
    answer = told(*wanted)
    moment = datetime.fromtimestamp(AT + seconds, ZONE)
    earlier = [one for one in answer["decisions"] if datetime.fromisoformat(one["at"]) <= moment]
    assert decision_at(answer, moment) == (max(earlier, key=lambda one: one["at"]) if earlier else None)
