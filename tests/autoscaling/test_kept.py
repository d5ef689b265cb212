"""What is kept of a model's scaling is bounded, counts everything, and is written down no oftener than it is news."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from serve.autoscaling.kept import MOST_DECISIONS, Kept, read_kept
from tests.looks import look, looks

AT = look().at


def after(seen) -> Kept:
    kept = Kept()
    for one in seen:
        kept = kept.after(one)
    return kept


@given(st.lists(looks(), max_size=12))
def test_every_change_is_kept_newest_first_and_counted(seen):
    kept = after(seen)
    changes = [
        (a.wanted_replicas, b.wanted_replicas) for a, b in pairwise(seen) if a.wanted_replicas != b.wanted_replicas
    ]
    assert [(one.before, one.after) for one in kept.decisions] == changes[::-1]
    assert sum(kept.counts.values()) == len(changes)
    ups = sum(count for (direction, _), count in kept.counts.items() if direction == "up")
    assert ups == sum(a < b for a, b in changes)
    assert kept.look == (seen[-1] if seen else None)


@given(st.lists(looks(), max_size=12))
def test_it_reads_as_it_was_told(seen):
    kept = after(seen)
    told = json.loads(json.dumps(kept.told()))
    assert read_kept(told, json.loads(json.dumps([decision.told() for decision in kept.decisions]))) == kept
    assert read_kept(told) == replace(kept, decisions=())


def test_the_oldest_decisions_go_and_stay_counted():
    kept = after(look(at=AT + n, wanted_replicas=1 + n % 2) for n in range(2 * MOST_DECISIONS))
    assert len(kept.decisions) == MOST_DECISIONS
    assert kept.decisions[0].at == AT + 2 * MOST_DECISIONS - 2
    assert sum(kept.counts.values()) == 2 * MOST_DECISIONS - 1


def test_news_is_a_decision_another_load_a_wait_that_begins_or_ten_seconds():
    first = Kept().after(look(lasted_s=0.0))
    assert first.is_news(Kept())
    assert not first.is_news(first)
    for changed in ({"at": AT + 9}, {"ongoing_requests": 6.2001}):
        assert not first.after(look(lasted_s=0.0, **changed)).is_news(first)
    for changed in (
        {"at": AT + 10}, {"ongoing_requests": 6.3}, {"lasted_s": 1.0}, {"wanted_replicas": 2}, {"asked_replicas": 5},
        {"running_replicas": 2}, {"max_replicas": 4},
    ):  # fmt: skip
        assert first.after(look(**{"lasted_s": 0.0, **changed})).is_news(first), changed


def test_a_wait_that_goes_on_is_no_news():
    waiting = Kept().after(look(lasted_s=5.0))
    assert not waiting.after(look(lasted_s=6.0, at=AT + 1)).is_news(waiting)
