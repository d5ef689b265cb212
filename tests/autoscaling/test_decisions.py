"""What becomes a decision, and that its sentence and the one about what holds say what is so."""

from __future__ import annotations

from datetime import UTC, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.autoscaling.decisions import decided, holds, read_decision, read_look
from tests.looks import look, looks

NOW = look().at


def test_more_load_is_told_with_what_it_was_decided_on():
    decision = decided(look(), look(at=NOW + 1, wanted_replicas=3, ongoing_requests=9.0))
    assert decision is not None
    assert (decision.at, decision.reason, decision.direction) == (NOW, "load", "up")
    assert decision.sentence() == (
        "1 -> 3 at 12:01:07 UTC: 6.2 ongoing requests over 30 s, target 2 a replica, at most 3"
    )
    assert decision.sentence(timezone(timedelta(hours=2), "EET")).startswith("1 -> 3 at 14:01:07 EET: ")


def test_less_load_is_told_with_the_lower_bound():
    before = look(wanted_replicas=3, running_replicas=3, asked_replicas=1, ongoing_requests=1.0)
    decision = decided(before, look(at=NOW + 1, wanted_replicas=1))
    assert decision is not None
    assert (decision.reason, decision.direction) == ("idle", "down")
    assert decision.sentence(UTC) == (
        "3 -> 1 at 12:01:07 UTC: 1 ongoing request over 30 s, target 2 a replica, at least 1"
    )


@pytest.mark.parametrize(("wanted", "bounds", "now"), [(1, (2, 5), 2), (3, (1, 2), 2)])
def test_a_bound_that_moved_is_told_as_that(wanted: int, bounds: tuple[int, int], now: int):
    after = look(at=NOW + 1, wanted_replicas=now, min_replicas=bounds[0], max_replicas=bounds[1])
    decision = decided(look(wanted_replicas=wanted), after)
    assert decision is not None
    assert (decision.at, decision.reason) == (NOW + 1, "bound")
    assert decision.sentence() == (f"{wanted} -> {now} at 12:01:08 UTC: its bounds are now {bounds[0]} to {bounds[1]}")


def test_a_bound_that_moved_does_not_hide_a_load_that_asked_for_as_much():
    decision = decided(look(max_replicas=2), look(wanted_replicas=3, max_replicas=3))
    assert decision is not None
    assert decision.reason == "load"


@given(looks(), looks())
def test_only_a_changed_number_is_a_decision_and_it_reads_as_it_was_told(before, now):
    decision = decided(before, now)
    assert (decision is None) == (before.wanted_replicas == now.wanted_replicas)
    if decision is not None:
        assert (decision.before, decision.after) == (before.wanted_replicas, now.wanted_replicas)
        assert read_decision(decision.told()) == decision
        assert decision.told()["sentence"].startswith(f"{decision.before} -> {decision.after} at ")
        assert (decision.reason == "idle") <= (decision.direction == "down")
        assert (decision.reason == "load") <= (decision.direction == "up")


@given(looks())
def test_a_look_reads_as_it_was_told(one):
    assert read_look(one.told()) == one


def said(at: float = NOW, **changed) -> str:
    one = look(**changed)
    return holds(one, min_replicas=one.min_replicas, max_replicas=one.max_replicas, now=at)


LOAD = "by 6.2 ongoing requests over 30 s, target 2 a replica"


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"lasted_s": 12.0},
            f"it goes from 1 to 3 once more are asked for during 30 s, 12 s so far: 4 are asked for, {LOAD}",
        ),
        (
            {"wanted_replicas": 3, "asked_replicas": 1, "lasted_s": 35.4},
            f"it goes from 3 to 1 once fewer are asked for during 600 s, 35 s so far: 1 is asked for, {LOAD}",
        ),
        ({"wanted_replicas": 3}, f"scaling.max_replicas holds it at 3: 4 are asked for, {LOAD}"),
        ({"asked_replicas": 0}, f"scaling.min_replicas holds it at 1: 0 are asked for, {LOAD}"),
        ({"asked_replicas": 1}, f"nothing is to change: 1 is asked for, {LOAD}"),
        ({"running_replicas": 0}, "no replica answers yet, so no load is known; 1 stay wanted"),
        (
            {"min_replicas": 2, "max_replicas": 2},
            "the number is fixed: scaling.min_replicas and scaling.max_replicas are both 2",
        ),
    ],
)
def test_what_holds_is_told(changed: dict, sentence: str):
    assert said(**changed) == sentence


def test_a_wait_goes_on_after_the_look_and_not_beyond_its_end():
    assert "14 s so far" in said(NOW + 2, lasted_s=12.0)
    assert "30 s so far" in said(NOW + 40, lasted_s=12.0)


def test_a_look_that_nobody_followed_says_that_nobody_looks():
    assert said(NOW + 100).startswith("its load was last looked at 100 s ago; nothing scales until")
    assert "has not been looked at yet" in holds(None, min_replicas=1, max_replicas=2, now=NOW)


@given(looks(), st.floats(0, 40))
def test_a_bound_is_named_where_it_holds_and_nowhere_else(one, later):
    told = holds(one, min_replicas=one.min_replicas, max_replicas=one.max_replicas, now=one.at + later)
    is_there = one.running_replicas > 0 and one.bounded(one.asked_replicas) == one.wanted_replicas
    assert ("max_replicas holds" in told) == (is_there and one.asked_replicas > one.max_replicas)
    assert ("min_replicas holds" in told) == (is_there and one.asked_replicas < one.min_replicas)
