"""What only the platform around an application knows: it is handed in, so that nothing here depends on Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from serve.api.directory import Capacity, ModelStatus
from serve.autoscaling.kept import NO_COUNTS, Kept
from serve.telemetry import instruments as named
from serve.telemetry.devices import Device, device_samples
from serve.telemetry.instruments import Sample


@dataclass(frozen=True, slots=True)
class Insight:
    """Where to ask.

    Args:
        kept: Returns what is kept of a model's scaling; may block.
        capacity: Returns what the machines have, from memory.
        devices: Returns this machine's GPUs as they are now; may block.
    """

    kept: Callable[[str], Kept]
    capacity: Callable[[], Capacity]
    devices: Callable[[], Sequence[Device]]


#: Of an application that nothing is around.
NO_INSIGHT = Insight(kept=lambda _: Kept(), capacity=dict, devices=list)


def samples(models: Sequence[ModelStatus], insight: Insight) -> Iterator[Sample]:
    """Yield what is found out of the whole platform and of this machine when metrics are asked for."""
    for status in models:
        yield from _of_model(status)
    for resource, states in insight.capacity().items():
        for state, amount in states.items():
            yield Sample(named.CLUSTER_CAPACITY, "", (resource, state), amount)
    yield from device_samples(insight.devices())


def _of_model(status: ModelStatus) -> Iterator[Sample]:
    name, scaling = status.name, status.scaling
    for state, count in status.replicas.items():
        yield Sample(named.SCALING_REPLICAS, name, (state,), count)
    for bound, count in (("min", scaling.min_replicas), ("max", scaling.max_replicas)):
        yield Sample(named.SCALING_BOUND, name, (bound,), count)
    if scaling.is_fixed:
        return
    yield Sample(named.SCALING_TARGET, name, (), scaling.target_ongoing_requests)
    if scaling.ongoing_requests is not None:
        yield Sample(named.SCALING_LOAD, name, (), scaling.ongoing_requests)
    for key in NO_COUNTS:
        yield Sample(named.SCALING_DECISIONS, name, key, scaling.decisions.get(".".join(key), 0))
