"""What was declared, what Ray says and what a replica last said, folded into one status."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from serve.api.directory import ModelStatus
from serve.autoscaling.kept import Kept
from serve.runtime.directory import capacity, model_status
from serve.runtime.phases import ReplicaPhase
from tests.looks import look

ENTRY: dict[str, Any] = {
    "name": "a", "task": "python", "description": "", "revision": "refs/pr/1", "limits": {"max_request_bytes": 7},
    "scaling": {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 2.0},
}  # fmt: skip
FIXED = ENTRY | {"scaling": ENTRY["scaling"] | {"min_replicas": 3}}


def application(status: str, message: str = "", wanted: int = 1, **states: int) -> Any:
    replicas = [{"state": state} for state, count in states.items() for _ in range(count)]
    deployment = {"replicas": replicas, "target_num_replicas": wanted}
    return {"status": status, "message": message, "deployments": {"model": deployment}}


def folded(ray: Any, last: ReplicaPhase | None, entry: dict[str, Any] = ENTRY, kept: Kept | None = None) -> ModelStatus:
    return model_status(entry, ray, last, kept or Kept())


def said(phase: str, message: str = "", done: int = 0, total: int = 0) -> ReplicaPhase:
    return ReplicaPhase("a", "r", phase, message, done, total, 0.0, {})


def test_the_version_is_the_revision_in_one_part_of_a_path():
    assert folded(None, None).version == "refs-pr-1"


def test_a_request_that_a_replica_tells_is_shown():
    told = replace(said("ready"), request={"inputs": []})
    assert folded(application("RUNNING", RUNNING=1), told).request == {"inputs": []}


@pytest.mark.parametrize(
    ("ray", "last", "phase", "message"),
    [
        (None, None, "queued", "waiting"),
        (application("DEPLOYING", STARTING=1), None, "queued", "waiting"),
        (application("DEPLOYING", STARTING=1), said("loading", "weights", 1, 3), "loading", "weights 1 of 3"),
        (application("DEPLOYING"), said("downloading", "x", 2_000_000, 9_000_000), "downloading", "x 2 of 9 MB"),
        (application("DEPLOYING", STARTING=1), said("ready"), "warming", "routing"),
        (application("RUNNING", RUNNING=1), said("ready"), "ready", ""),
        (application("DEPLOYING", RUNNING=1, STARTING=1), said("loading"), "ready", ""),
        (
            application("DEPLOY_FAILED", "why", RUNNING=1),
            None,
            "ready",
            "change failed, and what was before answers: why",
        ),
        (
            application("DEPLOY_FAILED", "a traceback", RUNNING=1),
            said("failed", "its sentence"),
            "ready",
            "its sentence",
        ),
        (application("DEPLOYING", PENDING_MIGRATION=1, STARTING=1), said("loading"), "ready", ""),
        (application("DEPLOYING", RECOVERING=1), said("ready"), "ready", ""),
        (application("DEPLOY_FAILED", "why"), None, "failed", "why"),
        (application("DEPLOY_FAILED", "a traceback"), said("failed", "its sentence"), "failed", "its sentence"),
        (application("UNHEALTHY", STARTING=1), said("ready"), "starting", "another is on its way"),
        (application("DELETING", STOPPING=1), said("ready"), "draining", ""),
    ],
)
def test_a_models_state(ray: Any, last: ReplicaPhase | None, phase: str, message: str):
    status = folded(ray, last)
    assert status.phase == phase
    assert message in status.message
    assert status.max_request_bytes == 7


def test_a_change_on_its_way_is_told_apart_from_being_ready():
    assert folded(application("DEPLOYING", RUNNING=1, STARTING=1), said("loading")).changing
    assert not folded(application("RUNNING", RUNNING=1), said("ready")).changing
    assert not folded(application("DEPLOYING", STARTING=1), said("loading")).changing


def test_replicas_are_counted_by_what_they_do():
    status = folded(application("RUNNING", wanted=4, RUNNING=2, RECOVERING=1, STARTING=1, STOPPING=2), None)
    assert (status.ready_replicas, status.target_replicas) == (3, 4)
    assert (status.scaling.starting, status.scaling.draining) == (1, 2)


def test_bounds_and_target_are_as_declared():
    scaling = folded(None, None).scaling
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 3, 2.0)
    assert not scaling.is_fixed
    assert folded(None, None, FIXED).scaling.is_fixed


def test_load_and_decisions_are_as_kept_and_none_of_a_number_that_is_fixed():
    kept = Kept().after(look(wanted_replicas=1)).after(look(wanted_replicas=3, ongoing_requests=4.5))
    scaling = folded(None, None, kept=kept).scaling
    assert scaling.ongoing_requests == 4.5
    assert {key: count for key, count in scaling.decisions.items() if count} == {"up.load": 1}
    assert folded(None, None).scaling.ongoing_requests is None
    assert folded(None, None, FIXED).scaling.decisions == {}


def test_capacity_is_what_ray_counts():
    total = {"CPU": 8.0, "memory": 100.0, "node:x": 1.0}
    found = capacity(total, {"CPU": 5.5, "memory": 40.0}, machine={})
    assert found == {
        "cpu": {"total": 8, "free": 5.5}, "gpu": {"total": 0, "free": 0}, "memory": {"total": 100, "free": 40},
    }  # fmt: skip
    assert capacity(total, {}, machine={})["cpu"] == {"total": 8, "free": 0}


def test_capacity_of_a_machine_that_ray_was_told_more_of_is_the_machines():
    told = {"CPU": 100_000.0, "GPU": 2.0}
    found = capacity(told, {"CPU": 99_999.0, "GPU": 0.5}, machine={"CPU": 4.0})
    assert found["cpu"] == {"total": 4, "free": 3}
    assert found["gpu"] == {"total": 2, "free": 0.5}
    assert capacity(told, {"CPU": 99_990.0}, machine={"CPU": 4.0})["cpu"]["free"] == 0
