"""A Lease has one holder, whatever is lost on the way and whatever the clocks say."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.cluster.kube import WRITE_S, ApiUnavailable, Cluster, Missing, connect
from serve.cluster.leader import DURATION_S, MARGIN_S, Leadership
from tests.cluster.fakes import NOW, Clock, FakeApi, Faults


@pytest.fixture(scope="module")
def running() -> Iterator[FakeApi]:
    api = FakeApi(Faults())
    with api.running():
        yield api


@pytest.fixture
def api(running: FakeApi) -> FakeApi:
    running.faults.away = set()
    running.before_each = lambda: None
    running.leases = {"lease": {"metadata": {"name": "lease", "resourceVersion": "1"}}}
    return running


def leader(api: FakeApi, identity: str, clock: Clock) -> Leadership:
    return Leadership(api.cluster(), name="lease", identity=identity, clock=clock, now=lambda: NOW)


def test_the_first_to_ask_holds_it_and_the_other_waits(api: FakeApi) -> None:
    clock = Clock()
    first, second = leader(api, "first", clock), leader(api, "second", clock)
    assert first.renew()
    assert not second.renew()
    assert (first.holds, second.holds) == (True, False)
    spec = api.leases["lease"]["spec"]
    assert (spec["holderIdentity"], spec["leaseTransitions"]) == ("first", 1)


def test_a_holder_that_no_longer_renews_stops_before_another_begins(api: FakeApi) -> None:
    clock = Clock()
    first, second = leader(api, "first", clock), leader(api, "second", clock)
    first.renew()
    second.renew()
    clock.seconds = DURATION_S - WRITE_S
    assert not first.holds, "a write that it began now could end after another's first"
    clock.seconds = DURATION_S
    assert not second.renew()
    clock.seconds += 1
    assert second.renew()
    assert api.leases["lease"]["spec"]["leaseTransitions"] == 2
    assert not first.renew()


def test_one_that_gives_it_up_is_followed_at_once(api: FakeApi) -> None:
    clock = Clock()
    first, second = leader(api, "first", clock), leader(api, "second", clock)
    first.renew()
    assert not second.renew()
    first.give_up()
    assert not first.holds
    assert second.renew()
    first.give_up()
    assert api.leases["lease"]["spec"]["holderIdentity"] == "second"


def test_an_api_server_that_is_away_costs_the_lease_only_when_it_has_run_out(api: FakeApi) -> None:
    clock = Clock()
    first = leader(api, "first", clock)
    first.renew()
    api.faults.away = {"api"}
    clock.seconds = 5
    with pytest.raises(ApiUnavailable):
        first.renew()
    assert first.holds
    clock.seconds = DURATION_S
    assert not first.holds


def test_without_a_lease_nobody_leads(api: FakeApi) -> None:
    clock = Clock()
    first = leader(api, "first", clock)
    first.renew()
    api.leases.clear()
    with pytest.raises(Missing):
        first.renew()
    assert not first.holds


def test_a_slow_look_at_the_lease_brings_its_end_no_nearer(api: FakeApi) -> None:
    clock = Clock()
    first, second = leader(api, "first", clock), leader(api, "second", clock)
    first.renew()

    def renewed_meanwhile() -> None:
        api.before_each = lambda: None
        clock.seconds = WRITE_S
        first.renew()

    api.before_each = renewed_meanwhile
    assert not second.renew()
    clock.seconds = WRITE_S + DURATION_S
    assert not second.renew()
    clock.seconds += 1
    assert second.renew()


TURNS = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["renew", "give up", "cut off"]), st.integers(0, 60))
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=TURNS)
def test_two_never_hold_it(api: FakeApi, turns: list[tuple[str, str, int]]) -> None:
    api.leases = {"lease": {"metadata": {"name": "lease", "resourceVersion": "1"}}}
    clock = Clock()
    leaders = {identity: leader(api, identity, clock) for identity in "abc"}
    for identity, action, seconds in turns:
        one = leaders[identity]
        api.faults.away = {"api"} if action == "cut off" else set()
        try:
            if action == "give up":
                one.give_up()
            else:
                one.renew()
        except ApiUnavailable:
            pass
        assert sum(each.holds for each in leaders.values()) <= 1
        clock.seconds += seconds


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=TURNS, each_takes_s=st.integers(0, int(WRITE_S)))
def test_no_write_ends_after_anothers_first(api: FakeApi, turns: list[tuple[str, str, int]], each_takes_s: int) -> None:
    api.leases = {"lease": {"metadata": {"name": "lease", "resourceVersion": "1"}}}
    clock = Clock()
    leaders = {identity: leader(api, identity, clock) for identity in "abc"}
    ends = dict.fromkeys(leaders, float("-inf"))

    def take_time() -> None:
        clock.seconds += each_takes_s

    api.before_each = take_time
    for identity, action, seconds in turns:
        api.faults.away = {"api"} if action == "cut off" else set()
        with contextlib.suppress(ApiUnavailable):
            leaders[identity].renew()
        for one, each in leaders.items():
            if each.holds:
                assert all(clock.seconds > end for other, end in ends.items() if other != one)
                ends[one] = clock.seconds + WRITE_S
        clock.seconds += seconds
    assert WRITE_S < MARGIN_S


@pytest.mark.parametrize("call", ["get_lease", "put_lease", "list_models", "write_status", "delete_models"])
def test_nothing_is_asked_twice(api: FakeApi, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {
        "clusters": [{"name": "c", "cluster": {"server": api.url}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "current-context": "c",
    }
    file = tmp_path / "config"
    file.write_text(json.dumps(known))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))
    arguments = {
        "get_lease": (["lease"], {}),
        "put_lease": (["lease", {}], {"metadata": {}}),
        "write_status": (["model", {}], {"version": "1"}),
    }
    positional, named = arguments.get(call, ([], {}))
    cluster = Cluster(connect(""), "here")
    api.faults.away, api.faults.hung_up = {"api"}, 0
    with pytest.raises(ApiUnavailable):
        getattr(cluster, call)(*positional, **named)
    assert api.faults.hung_up == 1
