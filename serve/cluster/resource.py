"""What a Model object asks for and what is said of it: the decisions of the controller, as functions of values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve.applications import (
    MODEL_VARIABLE,
    Attempt,
    application_name,
    attempt_of,
    declared_in,
    declared_text,
    serve_config,
    variables_of,
)
from serve.cluster.crd import FINALIZER
from serve.declaration import InvalidDeclaration, parse_declaration
from serve.spec import ModelSpec

_RETRY_FIRST_S = 15.0
_RETRY_MOST_S = 900.0
_RETRY_DOUBLINGS = 6
# Linux starts no process with an argument of 128 KiB or more, and Ray adds to the one that it writes variables in.
_LARGEST_VARIABLE = 100_000


@dataclass(frozen=True, slots=True)
class Declared:
    """One Model object, read.

    Args:
        spec: None where it is wrong.
        problem: Why, in a sentence; empty where it is right.
        deleting: Whether it is on its way out.
        status: As it stands in the object.
    """

    name: str
    generation: int
    version: str
    spec: ModelSpec | None
    problem: str
    deleting: bool
    finalizers: tuple[str, ...]
    status: Mapping[str, Any]
    uid: str = ""

    @property
    def is_held(self) -> bool:
        """Return whether it waits for its application to go before it does."""
        return FINALIZER in self.finalizers


@dataclass(frozen=True, slots=True)
class Application:
    """What Ray Serve says of one application.

    Args:
        status: As `ray.serve.schema.ApplicationStatus`.
        config: As it was deployed; empty where Ray does not say.
        deployed_at: Unix time, seconds.
        wanted: Replicas that there should be.
        running: Replicas that answer.
        waiting: Replicas that have no node yet.
        leaving: Of each replica that goes on on a node that is being drained until another replaces it, that node.
        held: Of each placed replica, its node and what it takes there.
    """

    name: str
    status: str
    message: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    deployed_at: float = 0.0
    wanted: int = 0
    running: int = 0
    waiting: int = 0
    leaving: tuple[str, ...] = ()
    held: tuple[tuple[str, Mapping[str, float]], ...] = ()


@dataclass(frozen=True, slots=True)
class Observed:
    """What runs.

    Args:
        applications: By name.
        nodes: Node id -> its resources as Ray counts them (`CPU`, `GPU`, `memory` in bytes).
        phases: Model -> how far the gateway says it is, and its sentence.
    """

    applications: Mapping[str, Application] = field(default_factory=dict)
    nodes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    phases: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def workers(self) -> dict[str, Mapping[str, float]]:
        """The nodes that replicas are placed on: the head has no CPU to give."""
        return {node: resources for node, resources in self.nodes.items() if resources.get("CPU")}

    @property
    def leaving(self) -> set[str]:
        """The nodes that are being drained, as far as their replicas tell: Ray places nothing on them."""
        return {node for application in self.applications.values() for node in application.leaving}


def read(model: Mapping[str, Any]) -> Declared:
    """Return what a Model object (as the API server gives it) declares."""
    metadata = model["metadata"]
    spec, problem = _spec_of(metadata["name"], model.get("spec", {}))
    return Declared(
        name=metadata["name"],
        generation=metadata.get("generation", 0),
        version=metadata.get("resourceVersion", ""),
        spec=spec,
        problem=problem,
        deleting="deletionTimestamp" in metadata,
        finalizers=tuple(metadata.get("finalizers", ())),
        status=model.get("status", {}),
        uid=metadata.get("uid", ""),
    )


def _spec_of(name: str, declared: Mapping[str, Any]) -> tuple[ModelSpec | None, str]:
    """Return a spec, or None and what is wrong with it."""
    try:
        document = json.dumps({"models": [{"name": name, **declared}]}).encode()
        [spec] = parse_declaration(document, path=Path("spec"), base_dir=None).models
        # Ray writes it as JSON once more.
        size = len(json.dumps(declared_text(spec)))
    except InvalidDeclaration as error:
        return None, "; ".join(_sentence(problem) for problem in error.problems)
    except RecursionError:
        return None, "spec: nested too deeply to be read"
    if size > _LARGEST_VARIABLE:
        return None, (
            f"spec: takes {size} bytes of a replica's environment, at most {_LARGEST_VARIABLE}; "
            "put what is large into a file that options name"
        )
    return spec, ""


def _sentence(problem: Any) -> str:
    place = problem.path.replace("models[0]", "spec").replace("spec.name", "metadata.name")
    hint = f"; did you mean {problem.suggestion}?" if problem.suggestion else ""
    return f"{place}: {problem.message}{hint}"


def desired(models: Sequence[Declared], observed: Observed, *, gateway_replicas: int, now: float) -> dict[str, Any]:
    """Return the whole Ray Serve config.

    A Model that an edit made wrong goes on as it last was right, which Ray's own config remembers.
    """
    specs: list[ModelSpec] = []
    attempts: dict[str, Attempt] = {}
    for model in sorted(models, key=lambda model: model.name):
        application = observed.applications.get(application_name(model.name))
        spec = None if model.deleting else model.spec or _last_right(application)
        if spec is not None:
            specs.append(spec)
            attempts[model.name] = _attempt(spec, application, now)
    return serve_config(specs, gateway_replicas=_gateways(gateway_replicas, observed), attempts=attempts)


def _gateways(most: int, observed: Observed) -> int:
    """Return how many gateways there shall be: while nodes are drained, none more than there are others.

    There is one a node at most. Where a node is drained whose successor comes once it is gone, as KubeRay has it, a
    gateway's replacement finds no place: the drain would last until its deadline, and break off what the old one has.
    """
    leaving = observed.leaving
    return max(1, min(most, len(observed.workers.keys() - leaving))) if leaving else most


def _last_right(application: Application | None) -> ModelSpec | None:
    try:
        return declared_in(application.config) if application is not None and application.config else None
    except (ValueError, LookupError):
        return None


def _attempt(spec: ModelSpec, application: Application | None, now: float) -> Attempt:
    """Return which attempt at starting this is: the one that runs, or the next where it began long enough ago.

    A changed variable replaces replicas, so the time is only ever written with an attempt.
    """
    fresh = Attempt(0, int(now))
    if application is None or application.status == "DELETING":
        return fresh
    if variables_of(application.config).get(MODEL_VARIABLE) != declared_text(spec):
        return fresh
    attempt = attempt_of(application.config)
    if application.status != "DEPLOY_FAILED":
        return attempt
    wait_s = min(_RETRY_MOST_S, _RETRY_FIRST_S * 2 ** min(attempt.number, _RETRY_DOUBLINGS))
    is_due = attempt.began is None or now >= attempt.began + wait_s
    return Attempt(attempt.number + 1, int(now)) if is_due else attempt


def changes(config: Mapping[str, Any], observed: Observed) -> set[str]:
    """Return the applications that run otherwise than the config says; empty where there is nothing to do.

    What Ray adds of its own is not looked at: it returns a config with every default written out.
    """
    wanted = {application["name"]: application for application in config["applications"]}
    running = {name: app.config for name, app in observed.applications.items() if app.status != "DELETING"}
    edited = {name for name in wanted.keys() & running.keys() if not _within(wanted[name], running[name])}
    return edited | (wanted.keys() ^ running.keys())


def _within(part: Any, whole: Any) -> bool:
    if isinstance(part, Mapping):
        if not isinstance(whole, Mapping):
            return False
        # These are taken whole: a key that is gone must go there as well.
        return all(key in whole and _within_key(key, part[key], whole[key]) for key in part)
    if isinstance(part, list):
        return (
            isinstance(whole, list)
            and len(part) == len(whole)
            and all(_within(one, other) for one, other in zip(part, whole, strict=True))
        )
    return bool(part == whole)


def _within_key(key: str, part: Any, whole: Any) -> bool:
    return bool(part == whole) if key in ("args", "user_config", "env_vars") else _within(part, whole)


def is_gone(model: Declared, observed: Observed) -> bool:
    """Return whether a Model that is being deleted has nothing left in Ray."""
    return application_name(model.name) not in observed.applications


# Status


def status_of(model: Declared, observed: Observed, *, public_url: str, now: str) -> dict[str, Any]:
    """Return the status that a Model should have.

    Args:
        public_url: Of the inference service, without a slash at its end.
        now: RFC 3339, for conditions that change.
    """
    application = observed.applications.get(application_name(model.name))
    phase, message = _phase(model, application, observed)
    wanted = application.wanted if application else 0
    running = application.running if application else 0
    gpus = (model.spec.resources.gpus if model.spec else 0.0) * running
    conditions = [
        _accepted(model),
        _ready(phase, message, application),
        _progressing(model, phase, message, application, observed),
        _degraded(model, application, observed),
    ]
    return {
        "observedGeneration": model.generation,
        "phase": phase,
        "message": message,
        "replicas": wanted,
        "readyReplicas": running,
        "ready": f"{running}/{wanted}",
        "gpus": f"{gpus:g}",
        "url": f"{public_url}/v2/models/{model.name}",
        "conditions": [_dated(condition, model, now) for condition in conditions],
    }


def status_without_ray(model: Declared, sentence: str, *, now: str) -> dict[str, Any]:
    """Return the status that a Model should have while Ray cannot be asked: what is known without, the rest as it was.

    What runs goes on without Ray's head, so that nothing is said of whether a model answers.

    Args:
        sentence: Why Ray cannot be asked.
        now: As in `status_of`.
    """
    known = [_accepted(model), _condition("Progressing", None, "RayUnavailable", sentence)]
    conditions = {each["type"]: each for each in model.status.get("conditions", ())}
    conditions |= {each["type"]: _dated(each, model, now) for each in known}
    phase = {"phase": "Queued", "message": sentence} if model.spec else {"phase": "Failed", "message": model.problem}
    before = model.status if "observedGeneration" in model.status else phase
    return {**before, "conditions": list(conditions.values())}


def _phase(model: Declared, application: Application | None, observed: Observed) -> tuple[str, str]:
    if model.deleting:
        return "Draining", "what is in flight is finished" if application else "its application is gone"
    if application is not None and application.running:
        return "Ready", "" if model.spec else "an edit is wrong, and what was before answers"
    if model.spec is None and application is None:
        return "Failed", model.problem
    if application is None:
        return "Queued", "Ray has not taken it yet"
    if _fails(model, application, observed):
        return "Failed", _why(model, application, observed)
    if application.waiting:
        missing = shortage(model, observed)
        return "Queued", missing or "waiting for a place on a worker"
    phase, message = observed.phases.get(model.name, ("starting", ""))
    if phase in ("ready", "queued"):
        phase = "starting"
    return phase.capitalize(), message


def _fails(model: Declared, application: Application | None, observed: Observed) -> bool:
    """Return whether a model does not start: Ray gave up, or none runs and what was tried last has failed.

    Of an application that once ran Ray says no more than that, and tries again for ever.
    """
    if application is None:
        return False
    told = observed.phases.get(model.name, ("", ""))[0]
    return application.status == "DEPLOY_FAILED" or (told == "failed" and not application.running)


def _why(model: Declared, application: Application, observed: Observed) -> str:
    """Return why an application failed: what its replica said, or the last line of what Ray says."""
    phase, message = observed.phases.get(model.name, ("", ""))
    if phase == "failed" and message:
        return message
    lines = [line.strip() for line in application.message.splitlines() if line.strip()]
    return lines[-1] if lines else "it does not start"


def shortage(model: Declared, observed: Observed) -> str:
    """Return what is missing for one more replica of a model, or an empty text where a node has room."""
    if model.spec is None:
        return ""
    resources = model.spec.resources
    needs = {"GPU": resources.gpus, "CPU": resources.cpus, "memory": float(resources.memory or 0)}
    needs = {name: amount for name, amount in needs.items() if amount}
    free = _free(observed)
    if any(all(room.get(name, 0.0) >= amount for name, amount in needs.items()) for room in free.values()):
        return ""
    # The node that lacks the fewest kinds of things is the one to tell of; among those, the one with most of them.
    lacking = [
        {name: room.get(name, 0.0) for name, amount in needs.items() if room.get(name, 0.0) < amount}
        for room in free.values()
    ] or [dict.fromkeys(needs, 0.0)]
    nearest = min(lacking, key=lambda missing: (len(missing), -sum(missing.values())))
    told = ", ".join(f"needs {_amount(name, needs[name])}, {_amount(name, nearest[name])} free" for name in nearest)
    return f"{told} on the worker with most room; {len(free)} worker{'' if len(free) == 1 else 's'}"


def _free(observed: Observed) -> dict[str, dict[str, float]]:
    leaving = observed.leaving
    free = {node: dict(resources) for node, resources in observed.workers.items() if node not in leaving}
    for application in observed.applications.values():
        for node, held in application.held:
            for name, amount in held.items():
                if node in free:
                    free[node][name] = free[node].get(name, 0.0) - amount
    return free


def _amount(name: str, amount: float) -> str:
    if name == "memory":
        return f"{amount / 2**30:.3g} GiB of memory"
    return f"{round(amount, 4):g} {name}{'' if amount == 1 else 's'}"


def _condition(kind: str, holds: bool | None, reason: str, message: str) -> dict[str, Any]:
    return {"type": kind, "status": "Unknown" if holds is None else str(holds), "reason": reason, "message": message}


def _accepted(model: Declared) -> dict[str, Any]:
    if model.spec is None:
        return _condition("Accepted", False, "InvalidSpec", model.problem)
    return _condition("Accepted", True, "Valid", "The declaration is right.")


def _ready(phase: str, message: str, application: Application | None) -> dict[str, Any]:
    if phase == "Ready" and application is not None:
        told = f"{application.running} of {application.wanted} replicas answer."
        return _condition("Ready", True, "Serving", told)
    return _condition("Ready", False, phase, message or f"The model is {phase.lower()}.")


def _progressing(
    model: Declared, phase: str, message: str, application: Application | None, observed: Observed
) -> dict[str, Any]:
    if phase == "Draining":
        return _condition("Progressing", True, "Draining", message)
    if application is None or (model.spec is None and phase != "Ready"):
        reason = "InvalidSpec" if model.spec is None else "Queued"
        return _condition("Progressing", model.spec is not None, reason, message)
    if _fails(model, application, observed):
        return _condition("Progressing", True, "BackOff", "It is tried again, at growing intervals.")
    if application.waiting:
        missing = shortage(model, observed)
        return _condition("Progressing", True, "WaitingForResources", missing or "A replica waits for a place.")
    if not _is_complete(application):
        return _condition("Progressing", True, "Starting", message or "A replica is starting.")
    return _condition("Progressing", False, "Complete", "Every replica runs what is declared.")


def _degraded(model: Declared, application: Application | None, observed: Observed) -> dict[str, Any]:
    if model.spec is None:
        return _condition("Degraded", True, "InvalidSpec", model.problem)
    well = _condition("Degraded", False, "AsExpected", "Nothing is wrong.")
    if application is None:
        return well
    if _fails(model, application, observed):
        return _condition("Degraded", True, "LoadFailed", _why(model, application, observed))
    before = _told_before(model, "Degraded")
    failed = before.get("reason") == "LoadFailed" and before["observedGeneration"] == model.generation
    if failed and not _is_complete(application):
        # That it is being tried again mends nothing yet, and why it failed is what people look for meanwhile.
        return _condition("Degraded", True, "LoadFailed", before["message"])
    if application.status == "UNHEALTHY":
        return _condition("Degraded", True, "ReplicaLost", application.message or "A replica died; another is coming.")
    return well


def _is_complete(application: Application) -> bool:
    """Return whether every replica that there should be runs what is declared."""
    return application.status != "DEPLOYING" and application.running >= application.wanted


def _dated(condition: dict[str, Any], model: Declared, now: str) -> dict[str, Any]:
    """Return a condition with the time of its last change, which is kept while it holds."""
    before = _told_before(model, condition["type"])
    since = before["lastTransitionTime"] if before.get("status") == condition["status"] else now
    return condition | {"lastTransitionTime": since, "observedGeneration": model.generation}


def _told_before(model: Declared, kind: str) -> Mapping[str, Any]:
    """Return a condition as it stands in the object; empty where it has none."""
    return next((old for old in model.status.get("conditions", ()) if old["type"] == kind), {})
