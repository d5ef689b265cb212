"""From whatever state, after whatever death, what runs becomes what the Models say."""

from __future__ import annotations

import copy
import datetime
import json
import resource
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qs

import pytest
import ray.serve.schema

from serve.applications import application_name, variables_of
from serve.cluster.controller import Controller, NotLeading, Store
from serve.cluster.kube import ApiUnavailable
from serve.cluster.leader import DURATION_S, Leadership
from serve.cluster.resource import Observed
from serve.cluster.targets import Target, TargetUnavailable
from tests.cluster.fakes import MODELS, NOW, Clock, FakeApi, FakeRay, Faults, world

World = tuple[FakeApi, FakeRay, Faults]


class Leads:
    """A leadership that is held until a test takes it away."""

    holds = True

    def renew(self) -> bool:
        return self.holds

    def give_up(self) -> None:
        pass


class Falters:
    """A target that fails as nobody foresaw, and then works until the controller has been told to stop."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.observed = 0
        self.stop: Callable[[], None]

    def observe(self) -> Observed:
        self.observed += 1
        if self.observed == 1:
            raise KeyError("unforeseen")
        return self._target.observe()

    def apply(self, config: Mapping[str, Any]) -> None:
        self._target.apply(config)
        self.stop()


@pytest.fixture
def around() -> Iterator[World]:
    with world() as found:
        yield found


def controller(api: FakeApi, ray: FakeRay, leads: Any = None, **how: Any) -> Controller:
    how = {"gateway_replicas": 1, "public_url": "http://models", "now": lambda: NOW} | how
    return Controller(api.cluster(), ray.target(), leads or Leads(), **how)


def turn(one: Controller, api: FakeApi) -> bool:
    """Do what the watch and the loop do in a moment: take over what there is, and act on it once."""
    one.store.replace(*api.cluster().list_models())
    return one.reconcile()


def converge(one: Controller, api: FakeApi, ray: FakeRay) -> None:
    for _ in range(20):
        settled = turn(one, api)
        if settled and not any(entry["status"] in ("DEPLOYING", "DELETING") for entry in ray.applications.values()):
            return
        ray.settle()
    raise AssertionError("it does not come to rest")


def state(api: FakeApi, ray: FakeRay) -> dict[str, Any]:
    """Return all that should be the same, whatever happened on the way."""
    return {
        "running": {name: entry["deployed_app_config"] for name, entry in ray.applications.items()},
        "models": {
            name: (model["spec"], model["metadata"]["finalizers"], model["status"]["phase"])
            for name, model in api.models.items()
        },
    }


def test_the_fake_answers_as_ray_does(around: World) -> None:
    api, ray_api, _ = around
    api.put("one")
    converge(controller(api, ray_api), api, ray_api)
    told = ray_api.details()
    assert set(told) <= set(ray.serve.schema.ServeInstanceDetails.model_fields)
    for entry in told["applications"].values():
        entry.pop("deployed_app_config")
        ray.serve.schema.ApplicationDetails(**entry)
    ray.serve.schema.ServeDeploySchema.model_validate(ray_api.configs[-1])


def test_models_come_change_and_go_and_what_stays_is_not_told_again(around: World) -> None:
    api, ray_api, _ = around
    one = controller(api, ray_api)
    api.put("stays")
    api.put("changes")
    converge(one, api, ray_api)
    stays = ray_api.applications[application_name("stays")]["deployed_app_config"]
    told = len(ray_api.configs)
    assert turn(one, api)
    assert len(ray_api.configs) == told
    api.put("changes", description="new")
    api.put("comes")
    converge(one, api, ray_api)
    api.delete("changes")
    turn(one, api)
    assert "changes" in api.models, "its application is still there"
    converge(one, api, ray_api)
    assert set(ray_api.applications) == {"gateway", application_name("stays"), application_name("comes")}
    assert set(api.models) == {"stays", "comes"}
    for config in ray_api.configs:
        assert stays in config["applications"]
    assert {model["status"]["phase"] for model in api.models.values()} == {"Ready"}


def test_a_wrong_model_is_told_and_leaves_the_others_alone(around: World) -> None:
    api, ray_api, _ = around
    api.put("right")
    api.put("wrong", source="package:../../etc")
    converge(controller(api, ray_api), api, ray_api)
    conditions = {each["type"]: each for each in api.models["wrong"]["status"]["conditions"]}
    assert (conditions["Accepted"]["status"], conditions["Ready"]["status"]) == ("False", "False")
    assert "source" in conditions["Accepted"]["message"]
    assert api.models["right"]["status"]["phase"] == "Ready"
    assert application_name("wrong") not in ray_api.applications
    assert {event["involvedObject"]["name"] for event in api.events if event["type"] == "Warning"} == {"wrong"}


@pytest.mark.parametrize("depth", [40, 1_200, 5_000])
def test_a_model_that_is_nested_too_deeply_leaves_the_others_alone(around: World, depth: int) -> None:
    api, ray_api, _ = around
    api.put("right")
    api.put("deep", task="python", source="file:/a.py", options={"class": "X", "arguments": {"a": "DEEP"}})
    one = controller(api, ray_api)
    listed = json.dumps(api.answer("GET", f"{MODELS}?limit=500", None, None)[1]).encode()
    api.instead[MODELS] = 200, listed.replace(b'"DEEP"', b'{"a":' * depth + b"1" + b"}" * depth)
    turn(one, api)
    api.instead.clear()
    conditions = {each["type"]: each for each in api.models["deep"]["status"]["conditions"]}
    assert conditions["Accepted"]["status"] == "False"
    assert "nested" in conditions["Accepted"]["message"]
    assert set(ray_api.applications) == {"gateway", application_name("right")}


def test_an_edit_during_a_pass_is_told_of_by_the_next(around: World) -> None:
    api, ray_api, _ = around
    one = controller(api, ray_api)
    api.put("one")
    converge(one, api, ray_api)

    def edit() -> None:
        api.put("one", description="edited while Ray was asked")
        one.store.put(copy.deepcopy(api.models["one"]))

    ray_api.when_asked = edit
    before = copy.deepcopy(api.models["one"]["status"])
    one.reconcile()
    assert api.models["one"]["status"] == before
    assert before["observedGeneration"] == 1
    ray_api.when_asked = lambda: None
    converge(one, api, ray_api)
    assert api.models["one"]["status"]["observedGeneration"] == 2
    assert len(ray_api.configs) == 2


@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_a_model_whose_writes_are_refused_leaves_the_others_alone(
    around: World, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    api, ray_api, _ = around
    api.put("a")
    api.put("z")
    one = controller(api, ray_api)
    api.refused = {"a": status}
    for _ in range(4):
        turn(one, api)
        ray_api.settle()
    assert api.models["z"]["status"]["phase"] == "Ready"
    assert application_name("a") not in ray_api.applications, "nothing would hold the Model until it is gone"
    assert one.counters.errors >= 4
    assert len([record for record in caplog.records if "denied 'a'" in record.getMessage()]) == 1
    api.put("a", description="new")
    turn(one, api)
    assert len([record for record in caplog.records if "denied 'a'" in record.getMessage()]) == 2
    api.refused = {}
    converge(one, api, ray_api)
    assert api.models["a"]["status"]["phase"] == "Ready"


@pytest.mark.parametrize("status", [401, 429, 500, 503])
def test_an_api_server_that_takes_no_write_is_tried_again(around: World, status: int) -> None:
    api, ray_api, _ = around
    api.put("a")
    api.refused = {"a": status}
    with pytest.raises(ApiUnavailable, match=f"refuses PATCH .*{status}"):
        turn(controller(api, ray_api), api)


def test_a_model_that_does_not_start_is_degraded(around: World) -> None:
    api, ray_api, _ = around
    ray_api.broken = {application_name("bad")}
    api.put("good")
    api.put("bad")
    one = controller(api, ray_api)
    for _ in range(4):
        turn(one, api)
        ray_api.settle()
    conditions = {each["type"]: each["status"] for each in api.models["bad"]["status"]["conditions"]}
    assert conditions == {"Accepted": "True", "Ready": "False", "Progressing": "True", "Degraded": "True"}
    assert api.models["good"]["status"]["phase"] == "Ready"


def test_a_model_that_does_not_start_is_tried_again_while_others_are_edited(around: World) -> None:
    api, ray_api, _ = around
    seconds = Clock()
    one = Controller(
        api.cluster(),
        ray_api.target(),
        Leads(),
        gateway_replicas=1,
        public_url="http://models",
        now=lambda: NOW + datetime.timedelta(seconds=seconds()),
    )
    ray_api.broken = {application_name("bad")}
    api.put("bad")
    api.put("good")
    for turned in range(20):
        seconds.seconds += 5
        ray_api.deployed_at = (NOW + datetime.timedelta(seconds=seconds())).timestamp()
        api.put("good", description=str(turned))
        turn(one, api)
        ray_api.settle()
    bad = ray_api.applications[application_name("bad")]
    assert variables_of(bad["deployed_app_config"])["RH_ATTEMPT"] == "2"
    good = ray_api.applications[application_name("good")]
    assert "RH_ATTEMPT" not in variables_of(good["deployed_app_config"])


# One that comes is held and told of twice, one that changes once, one that goes is let go; Events, and one config.
WRITES = 8


def history(api: FakeApi, ray_api: FakeRay) -> None:
    """Bring about that everything is to be done at once: one to come, one to change, one to go, one to leave alone."""
    converge(controller(api, ray_api), api, ray_api)
    api.put("comes")
    api.put("changes", description="new")
    api.delete("goes")


@pytest.mark.parametrize("last_write", range(WRITES))
def test_it_may_die_after_any_write(around: World, last_write: int) -> None:
    api, ray_api, faults = around
    for name in ("stays", "changes", "goes"):
        api.put(name)
    history(api, ray_api)
    stays = ray_api.applications[application_name("stays")]
    faults.writes_left = last_write
    dying = controller(api, ray_api)
    for _ in range(8):
        try:
            turn(dying, api)
        except (ApiUnavailable, TargetUnavailable):
            break
        ray_api.settle()
    assert faults.writes_left == 0
    faults.writes_left = None
    converge(controller(api, ray_api), api, ray_api)
    found = state(api, ray_api)
    assert set(found["models"]) == {"stays", "changes", "comes"}
    assert {phase for *_, phase in found["models"].values()} == {"Ready"}
    assert set(found["running"]) == {"gateway", *(application_name(name) for name in found["models"])}
    assert ray_api.applications[application_name("stays")] == stays
    with world() as (other_api, other_ray, _):
        for name in ("stays", "changes", "comes"):
            other_api.put(name, **({"description": "new"} if name == "changes" else {}))
        converge(controller(other_api, other_ray), other_api, other_ray)
        assert found == state(other_api, other_ray)


def test_no_write_of_that_history_was_left_out(around: World) -> None:
    api, ray_api, _ = around
    for name in ("stays", "changes", "goes"):
        api.put(name)
    history(api, ray_api)
    api.asked.clear()
    ray_api.asked.clear()
    converge(controller(api, ray_api), api, ray_api)
    assert len(api.writes()) + len(ray_api.writes()) == WRITES


@pytest.mark.parametrize("server", ["api", "ray"])
def test_a_server_that_is_away_is_an_error_and_then_goes_on(around: World, server: str) -> None:
    api, ray_api, faults = around
    one = controller(api, ray_api)
    api.put("one")
    one.store.replace(*api.cluster().list_models())
    faults.away = {server}
    with pytest.raises((ApiUnavailable, TargetUnavailable)):
        one.reconcile()
    faults.away = set()
    converge(one, api, ray_api)
    assert api.models["one"]["status"]["phase"] == "Ready"


def test_a_pass_that_ends_as_nobody_foresaw_is_told_and_followed_by_another(
    around: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("random.uniform", lambda *_: 0.0)
    api, ray_api, _ = around
    api.put("one")
    target = Falters(ray_api.target())
    one = Controller(api.cluster(), target, Leads(), gateway_replicas=1, public_url="http://models", now=lambda: NOW)
    target.stop = one.stop
    one.run()
    assert application_name("one") in ray_api.applications
    assert one.counters.errors == 1
    (told,) = [record for record in caplog.records if record.exc_info]
    assert "KeyError" in told.getMessage()


def conditions_of(api: FakeApi, name: str) -> dict[str, tuple[str, str]]:
    return {each["type"]: (each["status"], each["reason"]) for each in api.models[name]["status"]["conditions"]}


def test_while_ray_is_away_what_is_known_without_it_is_told(around: World) -> None:
    api, ray_api, faults = around
    one = controller(api, ray_api)
    for name in ("stays", "spoilt"):
        api.put(name)
    converge(one, api, ray_api)
    faults.away = {"ray"}
    api.put("spoilt", task="nonsense")
    api.put("wrong", task="nonsense")
    api.put("new")
    with pytest.raises(TargetUnavailable):
        turn(one, api)
    away = ("Unknown", "RayUnavailable")
    well = {"Accepted": ("True", "Valid"), "Ready": ("True", "Serving"), "Degraded": ("False", "AsExpected")}
    assert conditions_of(api, "stays") == well | {"Progressing": away}
    assert conditions_of(api, "spoilt") == well | {"Accepted": ("False", "InvalidSpec"), "Progressing": away}
    assert conditions_of(api, "wrong") == {"Accepted": ("False", "InvalidSpec"), "Progressing": away}
    assert conditions_of(api, "new") == {"Accepted": ("True", "Valid"), "Progressing": away}
    stays, spoilt, wrong, new = (api.models[name]["status"] for name in ("stays", "spoilt", "wrong", "new"))
    assert (stays["phase"], spoilt["phase"], spoilt["observedGeneration"]) == ("Ready", "Ready", 1)
    assert (wrong["phase"], "task" in wrong["message"]) == ("Failed", True)
    assert (new["phase"], "does not answer" in new["message"]) == ("Queued", True)
    written = len(api.writes())
    with pytest.raises(TargetUnavailable):
        turn(one, api)
    assert len(api.writes()) == written
    faults.away = set()
    converge(one, api, ray_api)
    assert conditions_of(api, "new") == conditions_of(api, "stays") == well | {"Progressing": ("False", "Complete")}


def test_a_config_that_ray_refuses_is_told_to_those_that_it_would_have_changed(around: World) -> None:
    api, ray_api, _ = around
    one = controller(api, ray_api)
    api.put("stays")
    api.put("lost")
    converge(one, api, ray_api)
    ray_api.takes_configs = False
    api.put("new")
    (deployment,) = ray_api.applications[application_name("lost")]["deployments"].values()
    deployment["replicas"] = []
    with pytest.raises(TargetUnavailable, match="answers 400 to PUT"):
        turn(one, api)
    assert conditions_of(api, "new")["Progressing"] == ("Unknown", "RayUnavailable")
    assert "not this one" in api.models["new"]["status"]["message"]
    assert conditions_of(api, "stays")["Progressing"] == ("False", "Complete")
    assert conditions_of(api, "lost")["Ready"][0] == "False"


def test_who_does_not_lead_writes_nothing(around: World) -> None:
    api, ray_api, _ = around
    leads = Leads()
    leads.holds = False
    api.put("one")
    with pytest.raises(NotLeading):
        turn(controller(api, ray_api, leads), api)
    assert api.writes() == ray_api.writes() == []


def test_of_two_controllers_one_writes_at_a_time(around: World) -> None:
    api, ray_api, _ = around
    api.leases["lease"] = {"metadata": {"name": "lease", "resourceVersion": "1"}}
    clock = Clock()

    def leader(identity: str) -> Leadership:
        return Leadership(api.cluster(), name="lease", identity=identity, clock=clock, now=lambda: NOW)

    first, second = leader("first"), leader("second")
    one, other = controller(api, ray_api, first), controller(api, ray_api, second)
    api.put("model")
    assert first.renew()
    for _ in range(30):
        clock.seconds += DURATION_S / 10
        second.renew()
        assert not (first.holds and second.holds)
        for each in (one, other):
            try:
                turn(each, api)
            except NotLeading:
                continue
        ray_api.settle()
    assert second.holds
    assert api.models["model"]["status"]["phase"] == "Ready"
    assert len(ray_api.configs) == 1


def model(version: int, uid: str = "u", **more: Any) -> dict[str, Any]:
    metadata = {"name": "m", "uid": uid, "resourceVersion": str(version), "generation": version}
    return {"metadata": metadata, "spec": {"task": "voice-activity", "source": "package:silero_vad", **more}}


def versions(store: Store) -> list[tuple[str, str]]:
    return [(declared.uid, declared.version) for declared in store.declared()]


def test_a_model_that_has_gone_does_not_come_back() -> None:
    store = Store()
    store.put(model(10))
    store.put(model(11), gone=True)
    store.put(model(10))
    assert versions(store) == []
    store.replace([model(10)], "12")
    assert versions(store) == []
    store.put(model(13, uid="next"))
    store.put(model(10))
    store.put(model(11), gone=True)
    assert versions(store) == [("next", "13")]
    store.replace([], "14")
    store.put(model(13, uid="next"))
    assert versions(store) == []


def test_an_older_list_takes_nothing_back() -> None:
    store = Store()
    store.replace([model(10)], "20")
    store.put(model(30))
    store.replace([model(10)], "25")
    assert versions(store) == [("u", "30")]
    store.replace([], "29")
    assert versions(store) == [("u", "30")], "it was written after that list"
    store.replace([], "31")
    store.replace([model(30)], "30")
    assert versions(store) == []


def test_what_a_watch_has_lost_is_found_by_the_next_list(around: World) -> None:
    api, ray_api, _ = around
    clock = Clock()
    one = controller(api, ray_api, clock=clock)
    asked = []

    def lose() -> None:
        asked.append(clock.seconds)
        clock.seconds += 60
        if len(asked) == 2:
            api.put("lost")
            api.forget_changes()
        if one.store.declared() or len(asked) == 30:
            one.stop()

    api.when_watched = lose
    one.watch()
    assert [declared.name for declared in one.store.declared()] == ["lost"]


def test_a_connection_that_no_longer_brings_a_watch_is_left(around: World) -> None:
    api, _, _ = around
    held = threading.Event()
    api.when_watched = held.wait
    with pytest.raises(ApiUnavailable, match="timed out"):
        next(api.cluster().watch_models("1", silence_s=0.05))
    held.set()
    (_, path) = api.asked[-1]
    assert int(parse_qs(path)["timeoutSeconds"][0]) <= 60, "nor does a longer silence mean that nothing has changed"


class Turns(threading.Event):
    """What a loop waits for; it notes what it found, and stops the loop when it has seen enough."""

    def __init__(self, one: Controller) -> None:
        super().__init__()
        self._one = one
        self.found: list[bool] = []

    def wait(self, timeout: float | None = None) -> bool:
        if self._one.store.synced.is_set():
            self.found.append(self.is_set())
            if not self.is_set() or len(self.found) == 5:
                self._one.stop()
        return self.is_set()


def test_who_does_not_lead_waits_until_something_changes(around: World) -> None:
    api, ray_api, _ = around
    leads = Leads()
    leads.holds = False
    one = controller(api, ray_api, leads)
    one.store.changed = turns = Turns(one)
    one.run()
    assert turns.found[-1] is False


def test_the_store_never_goes_back_in_time() -> None:
    store = Store()
    store.put(model(10, description="new"))
    store.put(model(9, description="old"))
    (declared,) = store.declared()
    assert declared.version == "10"
    store.put(model(8), gone=True)
    assert len(store.declared()) == 1
    store.put(model(7, uid="another"))
    (declared,) = store.declared()
    assert (declared.uid, declared.version) == ("another", "7")
    store.put(model(12, uid="another"), gone=True)
    assert store.declared() == []


def test_a_thousand_models_take_one_pass(around: World, record_property: Any) -> None:
    api, ray_api, _ = around
    for number in range(1000):
        api.put(f"model-{number}")
    one = controller(api, ray_api)
    began = resource.getrusage(resource.RUSAGE_SELF)
    converge(one, api, ray_api)
    ended = resource.getrusage(resource.RUSAGE_SELF)
    record_property("cpu_s", ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime)
    assert len(ray_api.configs) == 1
    assert len(ray_api.applications) == 1001
    assert all(model["status"]["conditions"] for model in api.models.values())
    api.asked.clear()
    assert turn(one, api)
    assert api.writes() == []
