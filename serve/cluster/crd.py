"""The CustomResourceDefinition of Model, generated from the schema of models.yaml so that the two cannot differ."""

from __future__ import annotations

import json
from typing import Any

from serve.schema import json_schema
from serve.spec import (
    COSTED_TASKS,
    NAME_PATTERN,
    OPTIONS,
    QUANTITY_PATTERN,
    RULES,
    VLLM_OPTIONS,
    ModelSpec,
    parse_quantity,
)

GROUP = "roundhouse.dev"
VERSION = "v1alpha1"
PLURAL = "models"
KIND = "Model"
FINALIZER = f"{GROUP}/application"

_KEPT = ("type", "description", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength")
_MAX_REPLICAS = 2**31 - 1


def custom_resource_definition() -> dict[str, Any]:
    """Return the CustomResourceDefinition (apiextensions.k8s.io/v1), to be applied as it is.

    The API server writes no defaults into a Model: what an object leaves out follows the installed version.
    """
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": "model",
                "shortNames": ["rhm"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": _root()},
                    "subresources": {
                        "status": {},
                        "scale": {
                            "specReplicasPath": ".spec.scaling.min_replicas",
                            "statusReplicasPath": ".status.replicas",
                        },
                    },
                    "additionalPrinterColumns": _columns(),
                }
            ],
        },
    }


def _columns() -> list[dict[str, Any]]:
    def column(name: str, kind: str, path: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "type": kind, "jsonPath": path} | more

    return [
        column("Task", "string", ".spec.task"),
        column("Phase", "string", ".status.phase"),
        column("Ready", "string", ".status.ready"),
        column("GPUs", "string", ".status.gpus"),
        column("Message", "string", ".status.message", priority=1),
        column("Age", "date", ".metadata.creationTimestamp"),
    ]


def _root() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "A model that Roundhouse serves; its name is the model's name in URLs.",
        "required": ["spec"],
        "properties": {"spec": _spec(), "status": _status()},
        "x-kubernetes-validations": [
            {
                "rule": "self.metadata.name.size() <= 40",
                "message": "the name of a model has at most 40 characters",
            },
            {
                "rule": f"self.metadata.name.matches({_cel(NAME_PATTERN)})",
                "message": "the name of a model takes small letters, digits and hyphens",
            },
        ],
    }


def _spec() -> dict[str, Any]:
    definitions = json_schema()["$defs"]
    model = definitions["ModelSpec"]
    properties = {
        name: _structural(schema, definitions) for name, schema in model["properties"].items() if name != "name"
    }
    properties["options"] = _options(definitions)
    return {
        "type": "object",
        "description": "The model as models.yaml declares it, without its name.",
        "required": [name for name in model["required"] if name != "name"],
        "properties": properties,
        "x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in _rules()],
    }


def _structural(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON Schema as Kubernetes takes it: no references, no choices, and what is left out instead of null."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]] | {
            key: value for key, value in schema.items() if key == "description"
        }
    choices = [choice for choice in schema.get("anyOf", ()) if choice.get("type") != "null"]
    if choices:
        described = {"description": schema["description"]} if "description" in schema else {}
        if {choice["type"] for choice in choices} == {"integer", "string"}:
            merged: dict[str, Any] = {"x-kubernetes-int-or-string": True}
            for choice in choices:
                merged |= {key: value for key, value in choice.items() if key in _KEPT and key != "type"}
            return described | merged | (_quantity(merged["maximum"]) if merged["pattern"] == QUANTITY_PATTERN else {})
        schema = choices[0] | described
    result = {key: schema[key] for key in _KEPT if key in schema}
    for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if exclusive in schema:
            result |= {bound: schema[exclusive], exclusive: True}
    if "properties" in schema:
        result["properties"] = {name: _structural(part, definitions) for name, part in schema["properties"].items()}
        if schema.get("required"):
            result["required"] = schema["required"]
    elif schema.get("type") == "object":
        result["x-kubernetes-preserve-unknown-fields"] = True
    return result


def _quantity(most: int) -> dict[str, Any]:
    """Return what a quantity of bytes keeps to besides its pattern, as serve.spec.parse_quantity has it.

    A fraction of a k, M, G or T is whole bytes by its number of digits. One of d digits, the last not 0, is whole in
    2**n bytes where it is a multiple of 5**d and d is at most n; 18 digits are what an integer of CEL holds.
    """
    decimal = "|".join(f"([.][0-9]{{1,{3 * power}}}0*)?{suffix}" for power, suffix in enumerate("kMGT", start=1))
    fives = ", ".join(str(5**digits) for digits in range(19))
    suffixes = ("", *"kMGT", "Ki", "Mi", "Gi", "Ti")
    sizes = ", ".join(f"'{suffix}': {parse_quantity(f'1{suffix}'):.1f}" for suffix in suffixes)
    whole = "is a whole number of bytes, such as 512Mi, 1.5Gi or 1000000"
    rules = [
        ("self.matches('[1-9]') && self.find('^[0-9.]+').size() <= 30", "is at least one byte, in at most 30 digits"),
        (f"self.endsWith('i') || self.matches('^[0-9]+(([.]0+)?|{decimal})$')", whole),
        (
            "!self.endsWith('i') || [self.find('[.][0-9]*[1-9]')].all(part, part == '' || "
            "(part.size() <= (self.endsWith('Ki') ? 11 : 19) && "
            f"int(part.substring(1)) % [{fives}][part.size() - 1] == 0))",
            whole,
        ),
        (
            f"double(self.find('^[0-9.]+')) * {{{sizes}}}[self.find('[kKMGTi]*$')] <= {most:.1f}",
            f"is at most {most} bytes",
        ),
    ]
    return {
        "maxLength": 32,
        "x-kubernetes-validations": [
            {"rule": f"type(self) != string || ({rule})", "message": f"a quantity {message}"} for rule, message in rules
        ],
    }


def _options(definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the options of every task together; rules keep each to its own."""
    properties: dict[str, Any] = {}
    for kind in OPTIONS.values():
        for name, schema in definitions[kind.__name__]["properties"].items():
            found = _structural(schema, definitions)
            if properties.setdefault(name, found) != found:
                raise ValueError(f"options.{name} differs between tasks; the Model resource has one schema for it")
    return {"type": "object", "description": "The task's own options.", "properties": properties}


def _rules() -> list[tuple[str, str]]:
    """Return CEL rules over the spec for what serve.spec says of several fields together, each with its message.

    Raises:
        KeyError: A rule of serve.spec has no counterpart here.
    """
    counterparts = _counterparts()
    gpus = _value("resources.gpus")
    return [
        *(counterparts[rule.place] for rule in RULES),
        (
            f"{gpus} <= 1.0 || {gpus} == double(int({gpus}))",
            "resources.gpus above 1 is whole; only a share of one GPU may be a fraction",
        ),
        (
            "!self.source.startsWith('file:') || self.source.startsWith('file:/')",
            "on a cluster a file: source is absolute",
        ),
        *_option_rules(),
    ]


def _counterparts() -> dict[str, tuple[str, str]]:
    """Return place of a rule of serve.spec -> the same in CEL, and its message."""
    least, most = _value("scaling.min_replicas"), _value("scaling.max_replicas")
    batch, queue = _value("batching.max_batch_size"), _value("batching.max_queue")
    latency, deadline = "objectives.latency_ms", _value("deadline_ms")
    device, gpus = _value("device"), _value("resources.gpus")
    costed = ", ".join(map(_cel, sorted(COSTED_TASKS)))
    vllm = f"({_given('options.engine')} && self.options.engine == 'vllm')"
    return {
        "scaling.max_replicas": (f"{most} >= {least}", "scaling.max_replicas is below scaling.min_replicas"),
        "batching.max_batch_size": (
            f"{batch} <= {queue}",
            "batching.max_batch_size is above batching.max_queue; such a batch could never fill",
        ),
        "batching.max_batch_cost": (
            f"!{_given('batching.max_batch_cost')} || self.task in [{costed}]",
            "batching.max_batch_cost is for tasks whose items have a cost; set max_batch_size",
        ),
        latency: (
            f"!{_given(latency)} || self.{latency} <= {deadline}",
            "objectives.latency_ms is above deadline_ms; no request waits that long for its answer",
        ),
        "device": (
            f"{device} != 'cuda' || {gpus} > 0.0",
            "device cuda takes a GPU; give resources.gpus 1 or a fraction",
        ),
        "resources.gpus": (
            f"{device} != 'cpu' || {gpus} == 0.0",
            "resources.gpus reserves a GPU and device is cpu; leave one out",
        ),
        "options.engine": (
            f"{device} != 'cpu' && {gpus} > 0.0 && {gpus} <= 1.0 || !{vllm}",
            "options.engine vllm computes on one GPU; give resources.gpus 1 or a fraction, and leave device out",
        ),
        **{
            f"options.{option}": (
                f"!{_given(f'options.{option}')} || {vllm}",
                f"options.{option} is read by options.engine vllm alone; set that, or leave this out",
            )
            for option in VLLM_OPTIONS
        },
        "source": (
            "!self.source.startsWith('https:') || has(self.sha256)",
            "an https: source takes sha256, that of the file",
        ),
        "sha256": (
            "!has(self.sha256) || self.source.startsWith('https:')",
            "only an https: source takes sha256",
        ),
        "revision": (
            "!has(self.revision) || self.source.startsWith('hf:')",
            "only an hf: source takes revision",
        ),
    }


def _option_rules() -> list[tuple[str, str]]:
    rules = []
    tasks: dict[str, list[str]] = {}
    for task, kind in OPTIONS.items():
        for name, field in kind.model_fields.items():
            key = field.alias or name
            tasks.setdefault(key, []).append(task)
            if field.is_required():
                rules.append(
                    (f"self.task != {_cel(task)} || {_given(f'options.{key}')}", f"{task} takes options.{key}")
                )
    for key, takers in tasks.items():
        allowed = ", ".join(map(_cel, takers))
        rules.append(
            (f"!{_given(f'options.{key}')} || self.task in [{allowed}]", f"options.{key} is for {' and '.join(takers)}")
        )
    return rules


def _given(path: str) -> str:
    """Return a CEL expression that is true where the dotted path has a value."""
    steps = path.split(".")
    tests = [f"has(self.{'.'.join(steps[: n + 1])})" for n in range(len(steps))]
    return "(" + " && ".join(tests) + ")"


def _value(path: str) -> str:
    """Return a CEL expression of the value at a dotted path, or of its default."""
    field, *rest = path.split(".")
    default: Any = ModelSpec.model_fields[field].default
    for step in rest:
        default = getattr(default, step)
    return f"({_given(path)} ? self.{path} : {_cel(default)})"


def _cel(value: str | float) -> str:
    return json.dumps(value)


def _status() -> dict[str, Any]:
    text = {"type": "string"}
    count = {"type": "integer", "minimum": 0, "maximum": _MAX_REPLICAS}
    condition = {
        "type": "object",
        "required": ["type", "status", "reason", "message", "lastTransitionTime"],
        "properties": {
            "type": text | {"maxLength": 64},
            "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
            "reason": text | {"maxLength": 128},
            "message": text,
            "lastTransitionTime": {"type": "string", "format": "date-time"},
            "observedGeneration": {"type": "integer"},
        },
    }
    return {
        "type": "object",
        "description": "What the controller knows of it.",
        "properties": {
            "observedGeneration": {"type": "integer", "description": "Generation that this status is about."},
            "phase": text | {"description": "How far it is."},
            "message": text | {"description": "What it is doing, or why it is not ready."},
            "replicas": count | {"description": "Replicas that there should be."},
            "readyReplicas": count | {"description": "Replicas that answer."},
            "ready": text | {"description": "Replicas that answer, of those that there should be."},
            "gpus": text | {"description": "GPUs that its replicas hold together."},
            "url": text | {"description": "Where it answers."},
            "conditions": {
                "type": "array",
                "items": condition,
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["type"],
            },
        },
    }
