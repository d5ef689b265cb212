"""`GET /v2/models/<name>/explain`: why a model has the replicas that it has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from serve.api.directory import ModelScaling, ModelStatus
from serve.autoscaling.decisions import Look, holds
from serve.autoscaling.kept import Kept
from serve.spec import ModelSpec


def explanation(status: ModelStatus, kept: Kept, *, now: float) -> dict[str, Any]:
    """Return a model's replicas, what was decided of them and what holds their number, in JSON values.

    Args:
        now: Unix time, seconds.
    """
    scaling = status.scaling
    bounds = {"min_replicas": scaling.min_replicas, "max_replicas": scaling.max_replicas}
    look = None if scaling.is_fixed or kept.look is None else kept.look.told()
    return {
        "model": status.name,
        "replicas": status.replicas,
        "bounds": bounds,
        "target_ongoing_requests": scaling.target_ongoing_requests,
        "look": look,
        "holds": holds(kept.look, **bounds, now=now),
        "decisions": [decision.told() for decision in kept.decisions],
    }


def unscaled(spec: ModelSpec) -> dict[str, Any]:
    """Return the explanation of a model in one process that nothing scales."""
    target = spec.scaling.target_ongoing_requests
    status = ModelStatus(spec.name, spec.task, ready_replicas=1, scaling=ModelScaling(target_ongoing_requests=target))
    return explanation(status, Kept(), now=0.0) | {"holds": "it runs in this one process, and nothing scales it"}


def example(name: str) -> dict[str, Any]:
    """Return an explanation for the documents."""
    before = Look(
        at=1_767_268_867.0,
        ongoing_requests=6.2,
        window_s=30.0,
        target_ongoing_requests=2.0,
        asked_replicas=4,
        wanted_replicas=1,
        running_replicas=1,
        min_replicas=1,
        max_replicas=3,
        upscale_delay_s=30.0,
        downscale_delay_s=600.0,
        lasted_s=30.0,
    )
    after = replace(before, at=before.at + 1, wanted_replicas=3, lasted_s=0.0)
    scaling = ModelScaling(starting=2, min_replicas=1, max_replicas=3, target_ongoing_requests=2.0)
    status = ModelStatus(name, "", ready_replicas=1, target_replicas=3, scaling=scaling)
    return explanation(status, Kept(look=before).after(after), now=after.at)
