"""What a Model asks for, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.applications import Attempt, application_name, serve_config, variables_of
from serve.cluster.crd import FINALIZER
from serve.cluster.resource import Application, Declared, Observed, changes, desired, is_gone, read, shortage, status_of

NOW = 1_000_000.0
URL = "http://models"


def model(name: str = "one", *, deleting: bool = False, **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "uid": f"uid-{name}", "generation": 2, "resourceVersion": "7", "finalizers": [FINALIZER]}
    if deleting:
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    return {"metadata": metadata, "spec": {"task": "voice-activity", "source": "package:silero_vad"} | spec}


def config_of(*models: dict[str, Any], observed: Observed | None = None, now: float = NOW) -> dict[str, Any]:
    return desired([read(each) for each in models], observed or Observed(), gateway_replicas=1, now=now)


def running(config: dict[str, Any], **changed: Any) -> Observed:
    """Return what Ray says once a config runs."""
    return Observed(
        applications={
            entry["name"]: replace(
                Application(entry["name"], "RUNNING", config=entry, deployed_at=NOW, wanted=1, running=1), **changed
            )
            for entry in config["applications"]
        }
    )


def status(declared: Declared, observed: Observed) -> dict[str, Any]:
    return status_of(declared, observed, public_url=URL, now="2026-01-02T00:00:00Z")


def conditions(declared: Declared, observed: Observed) -> dict[str, tuple[str, str]]:
    return {each["type"]: (each["status"], each["reason"]) for each in status(declared, observed)["conditions"]}


@pytest.mark.parametrize(
    ("most", "leaving", "wanted"),
    [
        (3, (), 3),
        (3, ("n1",), 2),
        (3, ("n1", "n1"), 2),
        (3, ("n1", "n2", "n3"), 1),
        (2, ("n3",), 2),
        (1, ("n1",), 1),
        (4, ("gone",), 3),
    ],
)
def test_a_gateway_that_goes_and_whose_successor_has_no_node_is_not_replaced(
    most: int, leaving: tuple[str, ...], wanted: int
):
    nodes = {"head": {"CPU": 0.0}} | {name: {"CPU": 4.0} for name in ("n1", "n2", "n3")}
    applications = {"model-a": Application("model-a", "RUNNING", leaving=leaving)}
    config = desired([], Observed(applications=applications, nodes=nodes), gateway_replicas=most, now=NOW)
    assert config["applications"][0]["deployments"][0]["num_replicas"] == wanted


def test_a_model_is_its_object_with_its_name():
    declared = read(model("cat", options={"threshold": 0.7}))
    assert declared.spec is not None
    assert (declared.spec.name, declared.spec.options["threshold"]) == ("cat", 0.7)
    assert (declared.problem, declared.generation, declared.is_held) == ("", 2, True)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"tsk": "x"}, "spec.tsk"),
        ({"task": "voice-activty"}, "did you mean voice-activity?"),
        ({"source": "file:model.py"}, "on a cluster a file: source is absolute"),
        ({"scaling": {"min_replicas": 3}}, "spec.scaling.max_replicas"),
        ({"options": {"treshold": 0.5}}, "spec.options.treshold"),
        ({"resources": {"memory": "2GB"}}, "spec.resources.memory"),
    ],
)
def test_a_wrong_model_says_where_and_what_is_meant(spec: dict[str, Any], sentence: str):
    declared = read(model(**spec))
    assert declared.spec is None
    assert sentence in declared.problem
    assert "models[0]" not in declared.problem


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(depth):
        found = {"a": found}
    return found


@pytest.mark.parametrize("depth", [40, 1_200, 5_000])
def test_a_model_that_is_nested_too_deeply_is_its_own_problem(depth: int):
    python = {"task": "python", "source": "file:/a.py", "options": {"class": "X", "arguments": nested(depth)}}
    declared = read(model("deep", **python))
    assert declared.spec is None
    assert "nested" in declared.problem
    assert status(declared, Observed())["phase"] == "Failed"


@pytest.mark.parametrize("text", ["x" * 100_000, '"' * 30_000])
def test_a_model_that_no_process_could_be_started_with_is_refused(text: str):
    python = {"task": "python", "source": "file:/a.py", "options": {"class": "X", "arguments": {"a": text}}}
    declared = read(model(**python))
    assert declared.spec is None
    assert "of a replica's environment, at most 100000" in declared.problem
    python["options"]["arguments"] = {"a": text[: len(text) // 2]}
    assert read(model(**python)).spec is not None


def test_an_absolute_file_is_not_looked_for():
    assert read(model(source="file:/models/on/another/machine")).spec is not None


def test_a_wrong_model_leaves_the_others_alone():
    config = config_of(model("good"), model("bad", task="nonsense"))
    assert [entry["name"] for entry in config["applications"]] == ["gateway", "model-good"]


def test_a_model_that_an_edit_made_wrong_goes_on_as_it_was():
    before = config_of(model(scaling={"min_replicas": 2, "max_replicas": 3}, options={"threshold": 0.3}))
    after = config_of(model(task="nonsense"), observed=running(before))
    assert after == before
    declared = read(model(task="nonsense"))
    assert status(declared, running(before))["phase"] == "Ready"
    told = conditions(declared, running(before))
    assert told["Accepted"] == ("False", "InvalidSpec")
    assert told["Degraded"] == ("True", "InvalidSpec")


def test_a_model_on_its_way_out_is_left_out_and_held_until_it_is_gone():
    leaving = read(model(deleting=True))
    before = running(config_of(model()))
    assert [entry["name"] for entry in config_of(model(deleting=True))["applications"]] == ["gateway"]
    assert not is_gone(leaving, before)
    assert status(leaving, before)["phase"] == "Draining"
    assert is_gone(leaving, running(config_of()))


@given(st.lists(st.sampled_from("abcdef"), unique=True), st.lists(st.sampled_from("abcdef"), unique=True))
def test_what_runs_differs_exactly_where_the_models_do(before: list[str], after: list[str]):
    observed = running(config_of(*map(model, before)))
    assert changes(config_of(*map(model, after), observed=observed), observed) - {"gateway"} == {
        application_name(name) for name in set(before) ^ set(after)
    }


@pytest.mark.parametrize(
    "edit", [{"options": {"threshold": 0.9}}, {"scaling": {"max_replicas": 2}}, {"resources": {"cpus": 2}}]
)
def test_any_edit_is_a_difference(edit: dict[str, Any]):
    observed = running(config_of(model()))
    assert not changes(config_of(model(), observed=observed), observed)
    assert changes(config_of(model(**edit), observed=observed), observed)


def test_what_ray_adds_of_its_own_is_no_difference():
    config = config_of(model())
    entries = [
        entry | {"runtime_env": {}, "deployments": [each | {"placement": None} for each in entry["deployments"]]}
        for entry in config["applications"]
    ]
    assert not changes(config, running({"applications": entries}))


def test_an_application_that_nobody_declared_is_a_difference():
    observed = running(serve_config([]))
    extra = Observed(applications=dict(observed.applications) | {"other": Application("other", "RUNNING")})
    assert changes(config_of(), extra)


def attempt(config: dict[str, Any]) -> int:
    return int(variables_of(config["applications"][1]).get("RH_ATTEMPT", 0))


def test_a_model_that_failed_is_tried_again_at_growing_intervals():
    waits = []
    config, deployed = config_of(model()), NOW
    for _ in range(8):
        failed = running(config, status="DEPLOY_FAILED", running=0)
        wait = next(
            s for s in range(2000) if attempt(config_of(model(), observed=failed, now=deployed + s)) > attempt(config)
        )
        waits.append(wait)
        deployed += wait
        config = config_of(model(), observed=failed, now=deployed)
    assert waits == [15, 30, 60, 120, 240, 480, 900, 900]


def test_a_model_that_failed_for_weeks_is_tried_on():
    entry = serve_config([read(model()).spec], attempts={"one": Attempt(5000, int(NOW))})["applications"][1]
    failed = running({"applications": [entry]}, status="DEPLOY_FAILED", running=0)
    assert attempt(config_of(model(), observed=failed, now=NOW + 899)) == 5000
    assert attempt(config_of(model(), observed=failed, now=NOW + 900)) == 5001


def test_edits_of_others_put_off_no_attempt():
    failed = running(config_of(model()), status="DEPLOY_FAILED", running=0, deployed_at=NOW + 15)
    assert attempt(config_of(model(), observed=failed, now=NOW + 14)) == 0
    assert attempt(config_of(model(), observed=failed, now=NOW + 15)) == 1


def test_what_says_not_when_it_began_is_left_alone_until_it_fails():
    known = serve_config([read(model()).spec])
    assert config_of(model(), observed=running(known), now=NOW + 1000) == known
    failed = running(known, status="DEPLOY_FAILED", running=0)
    assert attempt(config_of(model(), observed=failed, now=NOW)) == 1


def test_one_that_is_declared_again_before_it_is_gone_begins_anew():
    failed = running(config_of(model()), status="DEPLOY_FAILED", running=0)
    leaving = running(config_of(model(), observed=failed, now=NOW + 100), status="DELETING")
    again = config_of(model(), observed=leaving, now=NOW + 1000)
    assert attempt(again) == 0
    assert again == config_of(model(), now=NOW + 1000)


def test_an_edit_begins_the_attempts_anew():
    config = config_of(model())
    failed = running(config, status="DEPLOY_FAILED", running=0)
    second = config_of(model(), observed=failed, now=NOW + 100)
    assert attempt(second) == 1
    assert attempt(config_of(model(options={"threshold": 0.9}), observed=running(second), now=NOW + 200)) == 0


def test_an_attempt_that_worked_is_not_taken_back():
    failed = running(config_of(model()), status="DEPLOY_FAILED", running=0)
    second = config_of(model(), observed=failed, now=NOW + 100)
    assert config_of(model(), observed=running(second), now=NOW + 1000) == second


def app(**changed: Any) -> Observed:
    return Observed(applications={application_name("one"): replace(Application("model-one", "RUNNING"), **changed)})


def test_ready():
    declared = read(model(resources={"gpus": 0.5}))
    found = status(declared, app(wanted=2, running=2))
    assert (found["phase"], found["replicas"], found["readyReplicas"], found["gpus"]) == ("Ready", 2, 2, "1")
    assert found["url"] == "http://models/v2/models/one"
    assert found["observedGeneration"] == 2
    assert conditions(declared, app(wanted=2, running=2)) == {
        "Accepted": ("True", "Valid"),
        "Ready": ("True", "Serving"),
        "Progressing": ("False", "Complete"),
        "Degraded": ("False", "AsExpected"),
    }


def test_a_failure_is_told_by_its_last_line_or_by_the_replica():
    failed = app(status="DEPLOY_FAILED", message="Traceback\n  File x\nValueError: garbage\n", wanted=1)
    assert status(read(model()), failed)["message"] == "ValueError: garbage"
    told = replace(failed, phases={"one": ("failed", "the weights are garbage")})
    assert status(read(model()), told)["message"] == "the weights are garbage"
    assert conditions(read(model()), told)["Degraded"] == ("True", "LoadFailed")


def test_a_replica_that_was_lost_and_does_not_start_again_is_a_failure_and_no_lack_of_room():
    lost = replace(app(status="RUNNING", wanted=1, waiting=1), phases={"one": ("failed", "the cache is full")})
    assert (status(read(model()), lost)["phase"], status(read(model()), lost)["message"]) == (
        "Failed",
        "the cache is full",
    )
    found = conditions(read(model()), lost)
    assert (found["Progressing"], found["Degraded"]) == (("True", "BackOff"), ("True", "LoadFailed"))


def test_a_failed_edit_of_a_model_that_answers_is_ready_and_degraded():
    found = conditions(read(model()), app(status="DEPLOY_FAILED", message="no", wanted=1, running=1))
    assert (found["Ready"][0], found["Degraded"]) == ("True", ("True", "LoadFailed"))


def test_what_failed_is_degraded_for_the_same_reason_until_what_is_declared_runs():
    failed = replace(app(status="DEPLOYING", wanted=1), phases={"one": ("failed", "the cache is full")})
    told = model() | {"status": status(read(model()), failed)}
    again = replace(failed, phases={"one": ("starting", "")})
    [degraded] = [each for each in status(read(told), again)["conditions"] if each["type"] == "Degraded"]
    assert (degraded["status"], degraded["reason"], degraded["message"]) == ("True", "LoadFailed", "the cache is full")
    assert status(read(told), again)["phase"] == "Starting"
    told |= {"status": status(read(told), again)}
    lost = replace(again, applications=app(status="UNHEALTHY", wanted=1).applications)
    assert conditions(read(told), lost)["Degraded"] == ("True", "LoadFailed")
    assert conditions(read(told), app(status="DEPLOYING", wanted=1, running=1))["Degraded"][0] == "True"
    assert conditions(read(told), app(wanted=1, running=1))["Degraded"] == ("False", "AsExpected")


def test_what_failed_is_forgotten_with_an_edit_and_with_its_application():
    failed = replace(app(status="DEPLOYING", wanted=1), phases={"one": ("failed", "the cache is full")})
    told = model() | {"status": status(read(model()), failed)}
    edited = told | {"metadata": told["metadata"] | {"generation": 3}}
    assert conditions(read(edited), app(status="DEPLOYING", wanted=1))["Degraded"] == ("False", "AsExpected")
    assert conditions(read(told), Observed())["Degraded"] == ("False", "AsExpected")


def test_phases_come_from_the_gateway():
    loading = replace(app(status="DEPLOYING", wanted=1), phases={"one": ("downloading", "3 of 9 MB")})
    found = status(read(model()), loading)
    assert (found["phase"], found["message"]) == ("Downloading", "3 of 9 MB")


def test_what_does_not_fit_names_the_missing_amount():
    observed = replace(
        app(status="DEPLOYING", wanted=1, waiting=1),
        nodes={"a": {"CPU": 4.0, "GPU": 1.0}, "b": {"CPU": 4.0}},
    )
    holder = Application("model-two", "RUNNING", held=(("a", {"CPU": 1, "GPU": 0.5}),))
    observed = replace(observed, applications=dict(observed.applications) | {"model-two": holder})
    declared = read(model(resources={"gpus": 1}))
    found = status(declared, observed)
    assert found["phase"] == "Queued"
    assert "needs 1 GPU, 0.5 GPUs free" in found["message"]
    assert conditions(declared, observed)["Progressing"] == ("True", "WaitingForResources")


def test_what_is_missing_for_one_more_replica_is_told_while_others_answer():
    observed = replace(app(status="DEPLOYING", wanted=2, running=1, waiting=1), nodes={"a": {"CPU": 4.0}})
    found = status(read(model(resources={"gpus": 1})), observed)
    progressing = next(each for each in found["conditions"] if each["type"] == "Progressing")
    assert (found["phase"], progressing["reason"]) == ("Ready", "WaitingForResources")
    assert "needs 1 GPU, 0 GPUs free" in progressing["message"]


def test_a_worker_that_is_being_drained_has_no_room_for_anybody():
    waiting = app(status="DEPLOYING", wanted=1, waiting=1).applications
    one = Application("model-two", "RUNNING", running=1, leaving=("b",), held=(("b", {"CPU": 1}),))
    full = Application("model-three", "RUNNING", running=1, held=(("a", {"CPU": 4}),))
    nodes = {"a": {"CPU": 4.0}, "b": {"CPU": 4.0}}
    found = status(read(model()), Observed({**waiting, "model-two": one, "model-three": full}, nodes=nodes))
    assert (found["phase"], found["message"]) == (
        "Queued",
        "needs 1 CPU, 0 CPUs free on the worker with most room; 1 worker",
    )


def test_what_fits_is_no_shortage():
    observed = Observed(nodes={"a": {"CPU": 4.0, "GPU": 1.0, "memory": 2.0**33}})
    assert shortage(read(model(resources={"gpus": 0.5, "memory": "4Gi"})), observed) == ""
    assert "10 GiB of memory, 8 GiB of memory free" in shortage(read(model(resources={"memory": "10Gi"})), observed)
    assert shortage(read(model()), Observed()) != ""


def test_a_condition_keeps_its_time_while_it_holds():
    first = status(read(model()), app(wanted=1, running=1))
    again = read(model() | {"status": first})
    later = status_of(again, app(wanted=1, running=1), public_url=URL, now="2027-01-01T00:00:00Z")
    assert later == first
    lost = status_of(again, app(wanted=1), public_url=URL, now="2027-01-01T00:00:00Z")
    assert {each["type"]: each["lastTransitionTime"][:4] for each in lost["conditions"]} == {
        "Accepted": "2026", "Ready": "2027", "Progressing": "2027", "Degraded": "2026",
    }  # fmt: skip
