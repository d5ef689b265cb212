"""What Ray Serve is told of models, as plain values, so that a laptop and a cluster tell it the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from serve.spec import ModelSpec

GATEWAY = "gateway"
DEPLOYMENT = "model"
MODEL_VARIABLE = "RH_MODEL"
ATTEMPT_VARIABLE = "RH_ATTEMPT"
BEGAN_VARIABLE = "RH_ATTEMPT_BEGAN"

# The Host bounds its queue in items and bytes and answers 429 itself; Ray's own bound would answer without a reason.
MAX_ONGOING_REQUESTS = 100_000

#: States of Ray Serve's replicas in which they answer: also while one is moved, or a new controller gets to know it.
ANSWERING = frozenset({"RUNNING", "UPDATING", "RECOVERING", "PENDING_MIGRATION"})

_MODEL_PREFIX = "model-"
# How long a replica that leaves goes on answering, so that every node's HAProxy has been told of it.
_LEAVING_S = 10.0
_SHORTEST_GRACE_S = 10.0
# A gateway waits for models' answers. Most have this deadline, so that few edits change it.
_GATEWAY_GRACE_S = 60.0

#: What Ray, Ray Serve and models' libraries read from every node's environment, beside what differs between machines.
ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": f"{_LEAVING_S:g}",
    # The gateway's application stands in the proxy that answers for what has no replica.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.runtime.fallback:middlewares",
    # Ray's spans, and those of a model's own code, join the traces that ours began, and begin none.
    "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "serve.runtime.ray_spans:processors",
    "RAY_SERVE_TRACING_SAMPLING_RATIO": "0",
    # Ten rounds of the controller a second are most of what an idle platform would use; two are as good to a person.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # Ray Serve's counters have no reader but a scraper of Ray's own metrics, who comes every ten seconds or more.
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
    # Workers that Ray starts ahead belong to no driver yet, and could not be forked from one that does.
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    # Ray would give the workers a 28th of the weight of its own processes. Here they are HAProxy, the gateways and the
    # models: each burst of an agent or a raylet would hold requests up for seconds where cores are few.
    "RAY_worker_niceness": "0",
    # What processes use, for Ray's dashboard and its own metrics: looking that up is most of what an idle node does.
    "REPORTER_UPDATE_INTERVAL_MS": "10000",
    # Many that start at once on few cores would be given up, and started again.
    "RAY_worker_register_timeout_seconds": "120",
    "RAY_agent_register_timeout_ms": "180000",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_DEDUP_LOGS": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A replica raises its own thread count to what its model declares; everything else needs one.
    "OMP_NUM_THREADS": "1",
    # Between two products a team's threads wait awake for some tens of microseconds. The default's milliseconds would
    # keep, beside another busy process, the one that is waited for from its core.
    "GOMP_SPINCOUNT": "5000",
    "TOKENIZERS_PARALLELISM": "false",
    # glibc would give large buffers back after each batch and fault them in again for the next.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**26),
}


class Attempt(NamedTuple):
    """One try at starting a model.

    Args:
        number: From 0; a higher one makes Ray try again.
        began: Unix time, seconds; None where it is not known. It stays with the attempt: what Ray tells is the time of
            the last config, whichever application that changed.
    """

    number: int = 0
    began: int | None = None


def application_name(model: str) -> str:
    """Return the name of a model's Ray Serve application."""
    return f"{_MODEL_PREFIX}{model}"


def model_of(application: str) -> str | None:
    """Return the model whose application this is; None for the gateway's and for what is not ours."""
    return application.removeprefix(_MODEL_PREFIX) if application.startswith(_MODEL_PREFIX) else None


def route_prefix(model: str) -> str:
    """Return where a model's application is mounted."""
    return f"/v2/models/{model}"


def deployment_options(spec: ModelSpec) -> dict[str, Any]:
    """Return the options of a model's one deployment but its number of replicas.

    No runtime_env: Ray would set one up before each replica starts, and on one machine nothing needs it.
    """
    actor: dict[str, Any] = {"num_cpus": spec.resources.cpus}
    if spec.resources.gpus:
        actor["num_gpus"] = spec.resources.gpus
    if spec.resources.memory:
        actor["memory"] = spec.resources.memory
    return {
        "name": DEPLOYMENT,
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "health_check_period_s": 10,
        # A replica that replaces another answers before the old one goes, and one that fails leaves it in place.
        # A GPU that is full has no room for both: the new one would wait for ever.
        "max_surge_percent": 0 if spec.resources.gpus else 100,
        "graceful_shutdown_timeout_s": _grace_s(_SHORTEST_GRACE_S, spec),
        "ray_actor_options": actor,
    }


def _grace_s(shortest_s: float, *specs: ModelSpec) -> float:
    """Return how long a replica may take to leave, so that the last request for one of these models has its time."""
    return _LEAVING_S + max([shortest_s, *(spec.deadline_ms / 1000 for spec in specs)])


def replica_options(spec: ModelSpec) -> dict[str, Any]:
    """Return how many replicas a model's deployment has; changing them restarts none that stays."""
    scaling = spec.scaling
    if scaling.min_replicas == scaling.max_replicas:
        return {"num_replicas": scaling.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": scaling.target_ongoing_requests,
            "policy": {"policy_function": "serve.runtime.policy:NotedPolicy"},
        }
    }


def live_options(spec: ModelSpec) -> dict[str, Any]:
    """Return what replicas that run take over from an edit (Ray's `user_config`), in JSON values."""
    return spec.model_dump(mode="json", include={"objectives"}, exclude_none=True)


def gateway_entry(spec: ModelSpec) -> dict[str, Any]:
    """Return what the gateway has to know of a declared model, in JSON values."""
    fields = dict.fromkeys(("name", "task", "description", "revision", "scaling"), True)
    return spec.model_dump(mode="json", include={**fields, "limits": {"max_request_bytes"}})


def serve_config(
    specs: Sequence[ModelSpec],
    *,
    gateway_replicas: int = 1,
    log_level: str = "WARNING",
    attempts: Mapping[str, Attempt] | None = None,
) -> dict[str, Any]:
    """Return a whole Ray Serve config (the body of `PUT /api/serve/applications/`, and KubeRay's `serveConfigV2`).

    A model's declaration travels in the environment of its replicas, without `scaling` and `objectives`. In the
    application's arguments an edit would have Ray 2.60 build the application anew, and route nothing to it for those
    seconds; so, it replaces replicas one by one. An edit of `scaling` or `objectives` alone restarts none.

    Args:
        attempts: Model -> which attempt at starting it this is.
    """
    quiet = {"enable_access_log": False, "log_level": log_level}
    gateway = {
        "name": GATEWAY,
        "route_prefix": "/",
        "import_path": "serve.runtime.gateway:cluster_application",
        "args": {},
        "deployments": [
            {
                "name": GATEWAY,
                "num_replicas": gateway_replicas,
                "max_ongoing_requests": MAX_ONGOING_REQUESTS,
                # A little of a CPU keeps it off the head, which has none; one a node makes each a way in.
                "max_replicas_per_node": 1,
                "graceful_shutdown_timeout_s": _grace_s(_GATEWAY_GRACE_S, *specs),
                "ray_actor_options": {"num_cpus": 0.01},
                "user_config": {"models": [gateway_entry(spec) for spec in specs]},
                "logging_config": quiet,
            }
        ],
    }
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000, "keep_alive_timeout_s": 120},  # noqa: S104 - a pod's own network
        "logging_config": quiet,
        "applications": [
            gateway,
            *(_model_application(spec, quiet, (attempts or {}).get(spec.name, Attempt())) for spec in specs),
        ],
    }


def declared_text(spec: ModelSpec) -> str:
    """Return a declaration as it travels in the environment of a model's replicas."""
    told = spec.model_dump(mode="json", by_alias=True, exclude={"scaling", "objectives"})
    return json.dumps(told, sort_keys=True, separators=(",", ":"))


def _model_application(spec: ModelSpec, logging: dict[str, Any], attempt: Attempt) -> dict[str, Any]:
    variables = {MODEL_VARIABLE: declared_text(spec)}
    if attempt.number:
        variables[ATTEMPT_VARIABLE] = str(attempt.number)
    if attempt.began is not None:
        variables[BEGAN_VARIABLE] = str(attempt.began)
    options = deployment_options(spec) | replica_options(spec)
    options |= {"user_config": live_options(spec), "logging_config": logging}
    options["ray_actor_options"]["runtime_env"] = {"env_vars": variables}
    return {
        "name": application_name(spec.name),
        "route_prefix": route_prefix(spec.name),
        "import_path": "serve.runtime.replica:cluster_application",
        "args": {},
        "deployments": [options],
    }


def variables_of(application: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the variables of a model's replicas in an application of a Ray Serve config; empty where it has none."""
    deployment: Mapping[str, Any] = next(iter(application.get("deployments") or ()), {})
    options = deployment.get("ray_actor_options") or {}
    return (options.get("runtime_env") or {}).get("env_vars") or {}


def attempt_of(application: Mapping[str, Any]) -> Attempt:
    """Return which attempt an application of a Ray Serve config is."""
    variables = variables_of(application)
    began = variables.get(BEGAN_VARIABLE)
    return Attempt(int(variables.get(ATTEMPT_VARIABLE, 0)), None if began is None else int(began))


def declared_in(application: Mapping[str, Any]) -> ModelSpec:
    """Return the model that an application of a Ray Serve config was made of.

    Raises:
        ValueError, LookupError: It is not of this module's making.
    """
    deployment = application["deployments"][0]
    spec = json.loads(variables_of(application)[MODEL_VARIABLE])
    scaling = deployment.get("autoscaling_config") or {}
    count = deployment.get("num_replicas")
    bounds = scaling or {"min_replicas": count, "max_replicas": count}
    kept = {key: bounds[key] for key in ("min_replicas", "max_replicas", "target_ongoing_requests") if key in bounds}
    return ModelSpec.model_validate(spec | {"scaling": kept} | deployment["user_config"])
