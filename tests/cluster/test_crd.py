"""The Model resource says what models.yaml's schema says, in what Kubernetes allows."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from serve.cluster import crd
from serve.cluster.crd import custom_resource_definition
from serve.schema import json_schema
from serve.spec import OPTIONS, RULES, ModelSpec, Rule, Task

FORBIDDEN = {"$ref", "$defs", "anyOf", "oneOf", "const", "default", "additionalProperties"}
OPTIONS_OF = {"python": {"class": "M"}}

VLLM_ALONE: list[dict[str, Any]] = [
    {"quantization": "fp8_per_block"},
    {"kv_cache_dtype": "fp8_e4m3"},
    {"enable_prefix_caching": False},
    {"enforce_eager": True},
]

#: Field -> values that between them break every rule that reads it; None is left out.
VALUES: dict[str, list[Any]] = {
    "task": list(get_args(Task)),
    "source": ["package:a", "file:/a", "hf:a/b", "s3://a/b", "gs://a/b", "https://a/b"],
    "sha256": [None, "0" * 64],
    "revision": [None, "main"],
    "device": [None, "auto", "cpu", "cuda"],
    "resources.gpus": [None, 0.0, 0.5, 1.0, 2.0],
    "scaling.min_replicas": [None, 1, 2],
    "scaling.max_replicas": [None, 1, 2],
    "batching.max_batch_size": [None, 1, 2000],
    "batching.max_queue": [None, 1, 2000],
    "batching.max_batch_cost": [None, 1],
    "objectives.latency_ms": [None, 100.0, 70_000.0],
    "deadline_ms": [None, 50.0, 80_000.0],
    "options": [
        None,
        {"engine": "roundhouse"},
        *({"engine": "vllm"} | more for more in ({}, *VLLM_ALONE)),
        *VLLM_ALONE,
    ],
}


class Text(str):
    """A string with CEL's methods."""

    __slots__ = ()

    def matches(self, pattern: str) -> bool:
        return re.search(pattern, self) is not None

    def find(self, pattern: str) -> Text:  # type: ignore[override]
        found = re.search(pattern, self)
        return Text(found[0] if found else "")

    def size(self) -> int:
        return len(self)

    def substring(self, begin: int) -> Text:
        return Text(self[begin:])

    startsWith, endsWith = str.startswith, str.endswith


def holds(rule: str, value: Any) -> bool:
    """Evaluate a CEL rule of the resource, as far as its rules use CEL."""

    def has(path: str) -> bool:
        found: Any = value
        for step in path.split("."):
            found = found.get(step) if isinstance(found, Mapping) else None
        return found is not None

    rule = re.sub(r"has\(self\.([\w.]+)\)", r"has('\1')", rule)
    rule = re.sub(r"(?<!\w)\((\([^?]*?\)|self.endsWith\('Ki'\)) \? (\S+) : ([^)]*)\)", r"(\2 if \1 else \3)", rule)
    rule = re.sub(r"\[(self\.find\('[^']*'\))\]\.all\(part, (.*)\)\)$", r"all(\2 for part in [\1]))", rule)
    rule = re.sub(r"!(?!=)", " not ", rule).replace("&&", " and ").replace("||", " or ")
    names = {"self": _as_cel(value), "has": has, "double": float, "string": Text, "int": int, "type": type}
    return bool(eval(rule, names))


def _as_cel(value: Any) -> Any:
    if isinstance(value, Mapping):
        return SimpleNamespace(**{key: _as_cel(part) for key, part in value.items()})
    return Text(value) if isinstance(value, str) else value


def declared(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model with these fields, by their dotted paths, and what every model has."""
    model: dict[str, Any] = {"task": "forecast", "source": "package:a"}
    for path, value in fields.items():
        if value is not None:
            *parents, last = path.split(".")
            part = model
            for step in parents:
                part = part.setdefault(step, {})
            part[last] = value
    given = model.get("options", {}) if model["task"] == "text-generation" else OPTIONS_OF.get(model["task"], {})
    return model | {"options": given}


def broken(fields: Mapping[str, Any]) -> list[Rule]:
    """Return the rules of serve.spec that a model with these fields breaks."""
    defaults = ModelSpec.model_validate({"name": "a", **declared({})})

    def value(path: str) -> Any:
        given = fields.get(path)
        return attrgetter(path)(defaults) if given is None else given

    return [
        rule
        for rule in RULES
        if rule.broken(*map(value, rule.reads), *(fields.get(field) is not None for field in rule.given))
    ]


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


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.place)
def test_every_rule_of_a_model_has_its_counterpart(schema: dict[str, Any], rule: Rule) -> None:
    counterparts = [each["rule"] for each in schema["properties"]["spec"]["x-kubernetes-validations"]]
    names = (*rule.reads, *rule.given)
    assert set(names) <= VALUES.keys(), "give VALUES what breaks the rule, and crd.py its counterpart in CEL"
    seen_alone = False
    for values in itertools.product(*(VALUES[name] for name in names)):
        fields = dict(zip(names, values, strict=True))
        wrong = broken(fields)
        seen_alone |= wrong == [rule]
        refused = [each for each in counterparts if not holds(each, declared(fields))]
        assert bool(refused) == bool(wrong), fields
    assert seen_alone, "VALUES has nothing that breaks this rule alone"


def test_a_rule_without_a_counterpart_makes_no_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crd, "RULES", (*RULES, Rule("limits.max_items", ("limits.max_items",), lambda _: None)))
    with pytest.raises(KeyError, match="max_items"):
        custom_resource_definition()


@pytest.mark.parametrize(("gpus", "taken"), [(0.5, True), (1.0, True), (1.5, False), (2.0, True)])
def test_a_fraction_of_gpus_is_of_one(schema: dict[str, Any], gpus: float, taken: bool) -> None:
    rules = [each["rule"] for each in schema["properties"]["spec"]["x-kubernetes-validations"]]
    assert all(holds(rule, declared({"resources.gpus": gpus})) for rule in rules) == taken


def test_texts_are_as_long_as_a_declaration_takes_them(schema: dict[str, Any]) -> None:
    spec = schema["properties"]["spec"]["properties"]
    longest = {name: part["maxLength"] for name, part in spec.items() if "maxLength" in part}
    assert longest == {"revision": 128}
    assert not any("maxLength" in part for part in spec["options"]["properties"].values())


def admitted(schema: dict[str, Any], quantity: str) -> bool:
    memory = schema["properties"]["spec"]["properties"]["resources"]["properties"]["memory"]
    if len(quantity) > memory["maxLength"] or not re.search(memory["pattern"], quantity):
        return False
    return all(holds(each["rule"], Text(quantity)) for each in memory["x-kubernetes-validations"])


def taken(quantity: str) -> bool:
    try:
        ModelSpec.model_validate({"name": "a", **declared({"resources.memory": quantity})})
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize(
    ("quantity", "right"),
    [
        ("0", False), ("0Gi", False), ("0.0", False), ("1.5", False), ("1.0", True), ("1.5k", True), ("1.0001k", False),
        ("1.00010M", True), ("1.1Gi", False), ("1.5Gi", True), ("0.0625Ki", True), ("0.00048828125Ki", False),
        ("512Mi", True), ("1048576Ti", True), ("1048577Ti", False), ("1P", False), ("0" * 30 + "1", False),
    ],
)  # fmt: skip
def test_a_quantity_is_admitted_where_a_declaration_takes_it(
    schema: dict[str, Any], quantity: str, right: bool
) -> None:
    assert (admitted(schema, quantity), taken(quantity)) == (right, right)


FRACTIONS = st.integers(1, 12).flatmap(
    lambda digits: st.one_of(
        st.integers(0, 10**digits - 1), st.integers(0, 2**digits - 1).map(lambda n: n * 5**digits)
    ).map(lambda number: f".{number:0{digits}d}")
)


@given(st.integers(0, 3), st.just("") | FRACTIONS, st.sampled_from(["", *"kMGT", "Ki", "Mi", "Gi", "Ti"]))
def test_quantities_are_the_same_here_and_there(schema: dict[str, Any], whole: int, part: str, suffix: str) -> None:
    quantity = f"{whole}{part}{suffix}"
    assert admitted(schema, quantity) == taken(quantity)
