"""The Model resource says what models.yaml's schema says, in what Kubernetes allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from serve.cluster.crd import custom_resource_definition
from serve.schema import json_schema
from serve.spec import OPTIONS

FORBIDDEN = {"$ref", "$defs", "anyOf", "oneOf", "const", "default", "additionalProperties"}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    (version,) = custom_resource_definition()["spec"]["versions"]
    root: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return root


def parts(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        if isinstance(schema.get("type"), str) or "x-kubernetes-int-or-string" in schema:
            yield schema
        for part in schema.values():
            yield from parts(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from parts(part)


def test_it_is_structural(schema: dict[str, Any]) -> None:
    for part in parts(schema):
        assert not FORBIDDEN & part.keys()


def test_it_has_every_field_of_a_model_but_its_name(schema: dict[str, Any]) -> None:
    model = json_schema()["$defs"]["ModelSpec"]
    spec = schema["properties"]["spec"]
    assert set(spec["properties"]) == set(model["properties"]) - {"name"}
    assert set(spec["required"]) == set(model["required"]) - {"name"}
    options = {field.alias or name for kind in OPTIONS.values() for name, field in kind.model_fields.items()}
    assert set(spec["properties"]["options"]["properties"]) == options


def test_every_field_is_described(schema: dict[str, Any]) -> None:
    for name, part in schema["properties"]["spec"]["properties"].items():
        assert part.get("description"), name


def test_every_option_is_kept_to_the_tasks_that_take_it(schema: dict[str, Any]) -> None:
    rules = " ".join(rule["rule"] for rule in schema["properties"]["spec"]["x-kubernetes-validations"])
    for task, kind in OPTIONS.items():
        for name, field in kind.model_fields.items():
            key = field.alias or name
            assert f"has(self.options.{key})" in rules, f"{task}'s {key} has no rule"
