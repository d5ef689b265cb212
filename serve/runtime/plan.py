"""What has to change between two declarations, decided apart from doing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Changes:
    """What to deploy and what to remove; every other model is left alone."""

    deploy: tuple[ModelSpec, ...]
    remove: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.deploy or self.remove)


def diff(running: Mapping[str, ModelSpec], wanted: Sequence[ModelSpec]) -> Changes:
    """Return what turns `running` into `wanted`, in the order of `wanted`."""
    names = {spec.name for spec in wanted}
    return Changes(
        deploy=tuple(spec for spec in wanted if running.get(spec.name) != spec),
        remove=tuple(name for name in running if name not in names),
    )


def shortages(specs: Sequence[ModelSpec], *, cpus: int, memory_bytes: int, gpus: float) -> tuple[str, ...]:
    """Return what a person should know of models that ask for more than this machine has.

    Cores and memory are shared rather than waited for; a GPU that is not there is waited for.
    """
    asked_cpus = sum(spec.resources.cpus * spec.scaling.max_replicas for spec in specs)
    asked_memory = sum((spec.resources.memory or 0) * spec.scaling.max_replicas for spec in specs)
    asked_gpus = sum(spec.resources.gpus * spec.scaling.min_replicas for spec in specs)
    notes = []
    if asked_cpus > cpus:
        notes.append(f"the models ask for {asked_cpus:g} CPU cores and this machine has {cpus}: they share")
    if asked_memory > memory_bytes:
        notes.append(
            f"the models ask for {asked_memory / 2**30:.1f} GiB of memory and "
            f"{memory_bytes / 2**30:.1f} GiB are free: they may run out"
        )
    if asked_gpus > gpus:
        names = ", ".join(spec.name for spec in specs if spec.resources.gpus)
        notes.append(
            f"the models ask for {asked_gpus:g} GPUs and this machine has {gpus:g}: {names} may wait for ever; "
            "give them less of resources.gpus"
        )
    return tuple(notes)
