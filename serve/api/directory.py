"""What the gateway knows of the declared models, so that it can answer for those that cannot answer themselves yet."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Protocol

from serve.errors import ModelNotFound, NotReady

#: Characters of a name that are compared with known ones: of a whole body that would take seconds.
LONGEST_NEAR = 100

#: `cpu`, `gpu` or `memory` (bytes) -> `total` and `free`, of all the platform's machines.
Capacity = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class ModelScaling:
    """How many replicas a model may have, and what is known of how that number is chosen.

    Args:
        starting, draining: Replicas that do not answer yet, and that finish what they have.
        min_replicas, max_replicas: As declared; where they are the same, nothing is chosen.
        target_ongoing_requests: As declared.
        ongoing_requests: What was last decided on, of all replicas; None before that.
        decisions: `up.load` and so on -> how many; empty where nothing is chosen.
    """

    starting: int = 0
    draining: int = 0
    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: float = 16.0
    ongoing_requests: float | None = None
    decisions: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_fixed(self) -> bool:
        """Return whether the number of replicas is declared rather than chosen."""
        return self.min_replicas == self.max_replicas


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One declared model and how far it is.

    Args:
        name: As declared.
        task: As declared.
        description: As declared; may be empty.
        phase: `queued`, `starting`, `downloading`, `loading`, `warming`, `ready`, `draining` or `failed`.
        message: For people: what it is doing, or why it failed; may be empty.
        retry_after_s: Seconds after which asking again makes sense while it is not ready.
        ready_replicas: Replicas that answer.
        target_replicas: Replicas that there should be.
        max_request_bytes: Bytes that a body may have.
        request: A body that `POST /v2/models/<name>/infer` answers, where one is known; the documents show it.
        version: As `version_of` gives it.
        changing: Whether replicas of a changed declaration are on their way, while those before answer.
        scaling: How many replicas there may be, and why.
    """

    name: str
    task: str
    description: str = ""
    phase: str = "queued"
    message: str = ""
    retry_after_s: float = 2.0
    ready_replicas: int = 0
    target_replicas: int = 1
    max_request_bytes: int = 32 * 2**20
    request: Mapping[str, Any] | None = None
    version: str = "1"
    changing: bool = False
    scaling: ModelScaling = ModelScaling()

    @property
    def ready(self) -> bool:
        """Return whether requests are answered."""
        return self.phase == "ready"

    @property
    def replicas(self) -> dict[str, int]:
        """Return how many replicas there are to be (`wanted`), and how many there are in each state."""
        return {
            "wanted": self.target_replicas,
            "starting": self.scaling.starting,
            "ready": self.ready_replicas,
            "draining": self.scaling.draining,
        }


def version_of(revision: str | None) -> str:
    """Return the version that clients name: the declared revision in a form that is one part of a path, or `1`."""
    return re.sub(r"[^\w.-]", "-", revision, flags=re.ASCII) if revision else "1"


class Directory(Protocol):
    """The declared models; called on the event loop for each request, so it answers from memory."""

    def models(self) -> Sequence[ModelStatus]:
        """Return every declared model, in the order of the declaration."""


def find(directory: Directory, name: str) -> ModelStatus:
    """Return the status of a declared model.

    Raises:
        ModelNotFound: None of this name is declared; the error carries near names.
    """
    names = []
    for status in directory.models():
        if status.name == name:
            return status
        names.append(status.name)
    raise ModelNotFound(name, near=get_close_matches(name[:LONGEST_NEAR].lower(), names, n=3, cutoff=0.5))


def not_ready(status: ModelStatus) -> NotReady:
    """Return the error that says why a declared model cannot answer now."""
    why = f": {status.message}" if status.message else ""
    state = "failed to start" if status.phase == "failed" else f"is not ready ({status.phase})"
    return NotReady(f"model {status.name!r} {state}{why}", phase=status.phase, retry_after_s=status.retry_after_s)
