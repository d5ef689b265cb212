"""The schema: what it refuses, its canonical form, and the JSON Schema that agrees with it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from pydantic import ValidationError

from serve.schema import json_schema
from serve.spec import OPTIONS, ModelSpec, PlatformSpec, parse_quantity, render_spec, revision_of, source_scheme
from tests.specs import model_specs

MINIMAL = {"name": "minilm", "task": "text-embedding", "source": "package:minilm"}
GENERATION: dict[str, Any] = {"task": "text-generation"}
VLLM = GENERATION | {"options": {"engine": "vllm"}, "resources": {"gpus": 1}}


def spec_of(**changes: Any) -> ModelSpec:
    return ModelSpec.model_validate(MINIMAL | changes)


@pytest.mark.parametrize(
    ("written", "size"),
    [("512Mi", 512 * 2**20), ("1.5Gi", 1536 * 2**20), ("2G", 2 * 10**9), ("1000000", 10**6), ("1k", 1000), (7, 7)],
)
def test_a_quantity_is_exact(written: object, size: int):
    assert parse_quantity(written) == size


@pytest.mark.parametrize(
    "written", ["512MB", "2gi", "0.1Ki", "", "Mi", "-1Mi", "1e3", "²Mi", "1 Gi", "1..5Gi", "9" * 50]
)
def test_what_is_no_quantity_is_refused(written: str):
    with pytest.raises(ValidationError, match="whole quantity of bytes"):
        spec_of(resources={"memory": written})


@pytest.mark.parametrize(
    "source",
    [
        "package:minilm",
        "package:gt.minilm/model/sub",
        "file:models/x",
        "file:/models/x y",
        "hf:org/name",
        "s3://bucket/prefix",
        "gs://bucket",
    ],
)
def test_a_source_has_a_known_scheme_and_form(source: str):
    assert source_scheme(spec_of(source=source).source) == source.partition(":")[0]


@pytest.mark.parametrize(
    "source",
    [
        "",
        "minilm",
        "http://host/x",
        "file:",
        "hf:",
        "s3:bucket/x",
        "https:x",
        "package:../x",
        "package:a/../b",
        "hf:org/..",
        "s3://bucket/../x",
        "gs://bucket//x",
        "https://me:pw@host/x",
    ],
)
def test_another_source_is_refused(source: str):
    with pytest.raises(ValidationError):
        spec_of(source=source, sha256="0" * 64)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scaling": {"min_replicas": 3, "max_replicas": 2}}, "scaling.max_replicas: 2 is below min_replicas, 3"),
        ({"batching": {"max_batch_size": 9, "max_queue": 8}}, "batching.max_batch_size: 9 is above max_queue, 8"),
        ({"task": "forecast", "batching": {"max_batch_cost": 9}}, "batching.max_batch_cost: items of forecast"),
        (
            {"objectives": {"latency_ms": 2000}, "deadline_ms": 1000},
            "objectives.latency_ms: 2000 is above deadline_ms, 1000",
        ),
        ({"objectives": {"latency_ms": 0}}, "greater than 0"),
        ({"objectives": {"latency_ratio": 1}}, "less than 1"),
        ({"objectives": {"availability": 99.9}}, "less than 1"),
        ({"objectives": {"availability": 0.0}}, "greater than 0"),
        ({"objectives": {"latency": 100}}, "Extra inputs"),
        ({"device": "cuda"}, "device: cuda takes a GPU"),
        ({"device": "cpu", "resources": {"gpus": 1}}, "resources.gpus: 1 is reserved"),
        (
            GENERATION | {"options": {"engine": "vllm"}},
            "options.engine: vllm computes on one GPU and resources.gpus is 0",
        ),
        (VLLM | {"resources": {"gpus": 2}}, "options.engine: vllm computes on one GPU and resources.gpus is 2"),
        (VLLM | {"device": "cpu"}, "options.engine: vllm computes on a GPU and device is cpu; leave device out"),
        (VLLM | {"options": {"engine": "vlm"}}, "engine: Input should be 'roundhouse' or 'vllm'"),
        (VLLM | {"options": {"engine": "vllm", "tensor_parallel_size": 2}}, "tensor_parallel_size: Extra inputs"),
        (VLLM | {"options": {"engine": "vllm", "kv_cache_dtype": "int3"}}, "kv_cache_dtype: Input should be"),
        (GENERATION | {"options": {"enforce_eager": False}}, "options.enforce_eager: is read by engine: vllm alone"),
        ({"source": "https://host/x"}, "source: an https: source takes sha256"),
        ({"sha256": "0" * 64}, "sha256: only an https:"),
        ({"revision": "main"}, "revision: only an hf:"),
        ({"resources": {"gpus": 1.5}}, "1.5 is above 1 and not whole"),
        ({"options": {"slots": 4}}, "slots: Extra inputs"),
        ({"task": "python"}, "class: Field required"),
        ({"batching": {"max_wait_ms": float("nan")}}, "finite"),
        ({"batching": {"max_batch_size": "4"}}, "valid integer"),
        ({"batching": {"max_batch_size": True}}, "valid integer"),
        ({"batching": {"max_batch_size": 4.0}}, "valid integer"),
        ({"name": "Minilm"}, "match pattern"),
        ({"name": "m" * 41}, "at most 40"),
        ({"colour": "red"}, "Extra inputs"),
    ],
)
def test_a_wrong_spec_is_refused(changes: dict[str, Any], said: str):
    with pytest.raises(ValidationError) as caught:
        spec_of(**changes)
    assert said in str(caught.value)


def test_fields_that_belong_together_are_accepted_together():
    spec_of(source="https://host/x.tar", sha256="0" * 64)
    spec_of(source="hf:org/name", revision="main")
    spec_of(device="cuda", resources={"gpus": 0.25})
    spec_of(**VLLM | {"device": "cuda", "resources": {"gpus": 0.25}})
    spec_of(batching={"max_batch_size": 8, "max_queue": 8, "max_batch_cost": 100})
    spec_of(scaling={"min_replicas": 2, "max_replicas": 2})


def test_availability_is_always_promised_and_latency_where_it_is_declared():
    assert spec_of().objectives.model_dump() == {"latency_ms": None, "latency_ratio": 0.99, "availability": 0.999}
    assert spec_of(objectives={"latency_ms": 1000}, deadline_ms=1000).objectives.latency_ms == 1000


def test_two_models_of_one_name_are_refused():
    with pytest.raises(ValidationError, match="declared more than once: minilm"):
        PlatformSpec.model_validate({"models": [MINIMAL, MINIMAL]})


def test_options_are_completed_and_typed():
    spec = spec_of(options={"normalize": False})
    assert spec.options == {"pooling": "mean", "normalize": False, "max_tokens": None, "truncate": True}
    assert spec.task_options() == OPTIONS["text-embedding"](normalize=False)  # type: ignore[call-arg]


def test_the_class_of_a_python_model_keeps_its_key():
    spec = spec_of(task="python", options={"class": "Echo", "arguments": {"deep": [1, {"a": None}]}})
    assert render_spec(spec)["options"] == {"class": "Echo", "arguments": {"deep": [1, {"a": None}]}}


def test_equal_models_have_one_revision_however_they_are_written():
    short = spec_of(resources={"memory": "1Gi"}, batching={"max_wait_ms": 2})
    long = spec_of(resources={"memory": 2**30, "cpus": 1.0}, batching={"max_wait_ms": 2.0}, options={"pooling": "mean"})
    assert short == long
    assert revision_of(short) == revision_of(long)


def test_the_order_of_arguments_does_not_change_the_revision():
    first, second = (
        spec_of(task="python", options={"class": "Echo", "arguments": arguments})
        for arguments in ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    )
    assert revision_of(first) == revision_of(second)


def test_a_revision_is_the_same_in_every_process():
    program = f"from serve.spec import *; print(revision_of(ModelSpec(**{MINIMAL!r})))"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == revision_of(spec_of())
    assert re.fullmatch("[0-9a-f]{12}", other.stdout.strip())


@pytest.mark.parametrize(
    "changes",
    [{"name": "other"}, {"deadline_ms": 1}, {"options": {"pooling": "cls"}}, {"limits": {"max_items": 2}}],
)
def test_any_change_changes_the_revision(changes: dict[str, Any]):
    assert revision_of(spec_of(**changes)) != revision_of(spec_of())


@given(model_specs())
def test_the_canonical_form_is_json_and_gives_the_spec_back(spec: ModelSpec):
    rendered = json.loads(json.dumps(render_spec(spec), allow_nan=False))
    again = ModelSpec.model_validate(rendered)
    assert again == spec
    assert revision_of(again) == revision_of(spec)


VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def test_the_json_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(json_schema())


@given(model_specs())
def test_the_json_schema_accepts_what_the_specs_accept(spec: ModelSpec):
    VALIDATOR.validate({"models": [render_spec(spec)]})


def model(**changes: Any) -> dict[str, Any]:
    return {"models": [MINIMAL | changes]}


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"models": [], "x": 1},
        model(colour="red"),
        model(batching={"max_batchsize": 1}),
        model(options={"slots": 4}),
        model(task="text-generation", options={"pooling": "cls"}),
        model(task="python"),
        model(task="python", options={"class": "A", "argument": {}}),
        model(source="http://x/y"),
        model(source="https://x/y"),
        model(sha256="0" * 64),
        model(revision="main"),
        model(task="forecast", batching={"max_batch_cost": 4}),
        model(resources={"memory": "1GB"}),
        model(resources={"memory": 0}),
        model(task="embedding"),
    ],
)
def test_the_json_schema_refuses_what_the_specs_refuse(wrong: dict[str, Any]):
    assert not VALIDATOR.is_valid(wrong)
    with pytest.raises(ValidationError):
        PlatformSpec.model_validate(wrong)


def test_every_mapping_of_the_json_schema_is_closed():
    schema = json_schema()
    parts = [schema, *(part for part in schema["$defs"].values() if "properties" in part)]
    assert len(parts) >= 6 + len(OPTIONS)
    assert all(part["additionalProperties"] is False for part in parts)


def test_every_key_is_described():
    for part in json_schema()["$defs"].values():
        for key, prop in part.get("properties", {}).items():
            assert "description" in prop or "$ref" in prop, key
