"""What Ray's policy is asked and answers, noted: no answer is another for it, and nothing decided is lost."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve._private.common import DeploymentID
from ray.serve.autoscaling_policy import _apply_autoscaling_config, default_autoscaling_policy
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from serve.applications import application_name, replica_options
from serve.autoscaling.kept import Kept
from serve.runtime import scribe
from serve.runtime.scribe import Scribe
from tests.toys import spec

NOW = 1_767_268_867.0


def config(**changed: Any) -> AutoscalingConfig:
    """What a model's declaration makes Ray do."""
    scaling = {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 2.0, **changed}
    return AutoscalingConfig(**replica_options(spec(scaling=scaling))["autoscaling_config"])


def context(
    requests: float, *, wanted: int = 1, running: int = 1, at: float = NOW, model: str = "a", **changed: Any
) -> AutoscalingContext:
    """What Ray asks its policy with."""
    options = config(**changed)
    return AutoscalingContext(
        deployment_id=DeploymentID("model", application_name(model)),
        deployment_name="model",
        app_name=application_name(model) if model else "gateway",
        current_num_replicas=running,
        target_num_replicas=wanted,
        running_replicas=[],
        total_num_requests=requests,
        total_queued_requests=0.0,
        aggregated_metrics=None,
        raw_metrics=None,
        capacity_adjusted_min_replicas=options.min_replicas,
        capacity_adjusted_max_replicas=options.max_replicas,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=at,
        config=options,
    )


class Store:
    """The control store of a test, and the clock of what writes there."""

    def __init__(self) -> None:
        self.stored: dict[str, Kept] = {}
        self.writes = 0
        self.is_away = False
        self.now = NOW

    def read(self, model: str) -> Kept:
        if self.is_away:
            raise ConnectionError("the store is away")
        return self.stored.get(model, Kept())

    def write(self, model: str, kept: Kept, written: Kept) -> None:
        if self.is_away:
            raise ConnectionError("the store is away")
        assert written == self.stored.get(model, Kept())
        self.writes += 1
        self.stored[model] = kept

    def scribe(self) -> Scribe:
        return Scribe(read=self.read, write=self.write, clock=lambda: self.now)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    found = Store()
    of_test = found.scribe()
    monkeypatch.setattr(scribe, "of_this_process", lambda: of_test)
    return found


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The errors that Ray's log has."""
    found: list[str] = []

    def handle(record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            found.append(record.getMessage())

    monkeypatch.setattr(logging.getLogger("ray.serve"), "handle", handle)
    return found


def policy() -> Any:
    """The policy as Ray's controller has it: pickled, made again and called."""
    return _resolve_policy_callable(config().policy)


@given(requests=st.floats(0, 1e4), running=st.integers(0, 9), wanted=st.integers(1, 9))
def test_the_answer_is_rays_own(requests: float, running: int, wanted: int):
    ctx = context(requests, wanted=wanted, running=running)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scribe, "of_this_process", Store().scribe)
        assert policy()(ctx) == default_autoscaling_policy(ctx)


def test_a_note_that_fails_changes_no_answer_and_is_told_once(told: list[str], monkeypatch: pytest.MonkeyPatch):
    def broken() -> None:
        raise RuntimeError("no scribe")

    monkeypatch.setattr(scribe, "of_this_process", broken)
    asked = policy()
    for _ in range(3):
        assert asked(context(6.2)) == default_autoscaling_policy(context(6.2))
    assert told == ["Scaling goes on, but why is not written down."]


def test_what_ray_decides_is_found_with_the_load_that_it_was_decided_on(store: Store, monkeypatch: pytest.MonkeyPatch):
    at = [0.0]
    monkeypatch.setattr("ray.serve.autoscaling_policy.time", SimpleNamespace(time=lambda: at[0]))
    asked = policy()
    around = _apply_autoscaling_config(asked)
    wanted, state = 1, {}
    for second in range(60):
        at[0] = NOW + second
        ctx = context(6.2, wanted=wanted, running=wanted, at=at[0])
        ctx.policy_state = state
        decision, state = around(ctx)
        wanted = max(1, min(3, decision))
    assert wanted == 3
    scribe.of_this_process().write_down()
    kept = store.stored["a"]
    [decision] = kept.decisions
    assert (decision.before, decision.after, decision.reason) == (1, 3, "load")
    assert decision.look.asked_replicas == 4
    assert 30 <= decision.at - NOW < 32
    assert kept.look is not None
    assert kept.look.lasted_s > 0, "4 are asked for and 3 allowed: Ray goes on counting"


def test_the_mailbox_keeps_every_change_and_no_more(store: Store):
    writes = store.scribe()
    for second, wanted in enumerate([1, 1, 2, 2, 2, 3, 1]):
        writes.note(context(6.2, wanted=wanted, at=NOW + second), 4)
    writes.write_down()
    assert [(one.before, one.after, one.at - NOW) for one in store.stored["a"].decisions] == [
        (3, 1, 5), (2, 3, 4), (1, 2, 1),
    ]  # fmt: skip
    assert store.writes == 1


def test_what_stays_as_it_is_is_written_now_and_then(store: Store):
    writes = store.scribe()
    for second in range(25):
        writes.note(context(0.0, at=NOW + second), 0)
        writes.write_down()
    assert store.writes == 3


def test_models_stand_apart_and_what_is_no_model_is_left_out(store: Store):
    writes = store.scribe()
    writes.note(context(1.0, model="a"), 1)
    writes.note(context(2.0, model="b"), 1)
    writes.note(context(3.0, model=""), 1)
    writes.write_down()
    assert {model: kept.look.ongoing_requests for model, kept in store.stored.items() if kept.look} == {"a": 1, "b": 2}


def test_a_new_controller_goes_on_where_the_last_one_ended(store: Store):
    first, second = store.scribe(), store.scribe()
    for at, wanted, scribes in ((0, 1, first), (1, 2, first), (2, 2, second), (3, 3, second)):
        scribes.note(context(6.2, wanted=wanted, at=NOW + at), 4)
        scribes.write_down()
    assert [(one.before, one.after) for one in store.stored["a"].decisions] == [(2, 3), (1, 2)]


def test_what_was_decided_while_the_store_was_away_is_written_when_it_is_back(store: Store, told: list[str]):
    writes = store.scribe()
    writes.note(context(6.2, at=NOW), 4)
    writes.write_down()
    store.is_away = True
    for second, wanted in ((1, 2), (2, 3)):
        writes.note(context(6.2, wanted=wanted, at=NOW + second), 4)
        writes.write_down()
    store.is_away = False
    writes.note(context(6.2, wanted=3, at=NOW + 3), 4)
    writes.write_down()
    assert [(one.before, one.after) for one in store.stored["a"].decisions] == [(2, 3), (1, 2)]
    assert told == ["What was decided of a is not written down yet."]


def test_a_model_that_went_and_came_back_has_the_past_that_is_stored(store: Store):
    writes = store.scribe()
    for second, wanted in ((0, 1), (1, 2)):
        writes.note(context(6.2, wanted=wanted, at=NOW + second), 4)
    writes.write_down()
    store.stored.clear()
    store.now = NOW + 60
    writes.write_down()
    writes.note(context(6.2, wanted=1, at=NOW + 60), 4)
    writes.write_down()
    assert store.stored["a"].decisions == ()
