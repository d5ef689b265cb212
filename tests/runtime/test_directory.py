"""What was declared, what Ray says and what a replica last said, folded into one status."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from serve.runtime.directory import model_status
from serve.runtime.phases import ReplicaPhase

ENTRY: dict[str, Any] = {
    "name": "a", "task": "python", "description": "", "revision": "refs/pr/1", "limits": {"max_request_bytes": 7}
}  # fmt: skip


def application(status: str, message: str = "", **states: int) -> Any:
    return SimpleNamespace(
        status=status, message=message, deployments={"model": SimpleNamespace(replica_states=dict(states))}
    )


def said(phase: str, message: str = "", done: int = 0, total: int = 0) -> ReplicaPhase:
    return ReplicaPhase("a", "r", phase, message, done, total, 0.0, {})


def test_the_version_is_the_revision_in_one_part_of_a_path():
    assert model_status(ENTRY, None, None).version == "refs-pr-1"


def test_a_request_that_a_replica_tells_is_shown():
    told = replace(said("ready"), request={"inputs": []})
    assert model_status(ENTRY, application("RUNNING", RUNNING=1), told).request == {"inputs": []}


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
    status = model_status(ENTRY, ray, last)
    assert status.phase == phase
    assert message in status.message
    assert status.max_request_bytes == 7


def test_a_change_on_its_way_is_told_apart_from_being_ready():
    assert model_status(ENTRY, application("DEPLOYING", RUNNING=1, STARTING=1), said("loading")).changing
    assert not model_status(ENTRY, application("RUNNING", RUNNING=1), said("ready")).changing
    assert not model_status(ENTRY, application("DEPLOYING", STARTING=1), said("loading")).changing


def test_replicas_are_counted():
    status = model_status(ENTRY, application("RUNNING", RUNNING=2, STARTING=1), None)
    assert (status.ready_replicas, status.target_replicas) == (2, 3)
