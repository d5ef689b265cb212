"""The schema in the forms that editors and readers take, generated so that they cannot differ from what is checked."""

from __future__ import annotations

import json
from typing import Any

from pydantic.json_schema import models_json_schema

from serve.spec import COSTED_TASKS, OPTIONS, QUANTITY_PATTERN, PlatformSpec

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a models.yaml; `options` is that of each model's task."""
    parts = [(part, "validation") for part in (PlatformSpec, *OPTIONS.values())]
    _, document = models_json_schema(parts, ref_template="#/$defs/{model}")  # type: ignore[arg-type]
    definitions = document["$defs"]
    platform = definitions.pop("PlatformSpec")
    definitions["ModelSpec"]["allOf"] = [*_options_by_task(), *_pins_by_scheme(), _costs_by_task()]
    return {"$schema": DIALECT, **platform, "title": "Roundhouse models.yaml", "$defs": definitions}


def _if(field: str, test: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    return {"if": {"properties": {field: test}, "required": [field]}, "then": then}


def _options_by_task() -> list[dict[str, Any]]:
    conditions = []
    for task, options in OPTIONS.items():
        then: dict[str, Any] = {"properties": {"options": {"$ref": f"#/$defs/{options.__name__}"}}}
        if any(field.is_required() for field in options.model_fields.values()):
            then["required"] = ["options"]
        conditions.append(_if("task", {"const": task}, then))
    return conditions


def _pins_by_scheme() -> list[dict[str, Any]]:
    https, hub = {"pattern": "^https:"}, {"pattern": "^hf:"}
    return [
        _if("source", https, {"required": ["sha256"], "properties": {"sha256": {"type": "string"}}}),
        _if("source", {"not": https}, {"properties": {"sha256": {"type": "null"}}}),
        _if("source", {"not": hub}, {"properties": {"revision": {"type": "null"}}}),
    ]


def _costs_by_task() -> dict[str, Any]:
    free = {"properties": {"batching": {"properties": {"max_batch_cost": {"type": "null"}}}}}
    return _if("task", {"not": {"enum": sorted(COSTED_TASKS)}}, free)


_TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "null": "none",
    "object": "mapping",
}
_BOUNDS = {
    "minimum": "at least {:,}",
    "exclusiveMinimum": "above {:,}",
    "maximum": "at most {:,}",
    "exclusiveMaximum": "below {:,}",
    "maxLength": "at most {} characters",
}


def markdown_tables() -> str:
    """Return the reference tables of docs/models-yaml.md: the model, its parts, then the options of each task."""
    definitions = json_schema()["$defs"]
    model = definitions["ModelSpec"]
    sections = [_section("A model", model, definitions)]
    for name, prop in model["properties"].items():
        part = _part(prop, definitions)
        if part:
            sections.append(_section(f"`{name}`", part, definitions))
    for task, options in OPTIONS.items():
        sections.append(_section(f"`options` of `{task}`", definitions[options.__name__], definitions))
    return "\n".join(sections)


def _part(prop: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any] | None:
    part: dict[str, Any] | None = definitions.get(prop.get("$ref", "").rpartition("/")[2])
    return part


def _section(title: str, part: dict[str, Any], definitions: dict[str, Any]) -> str:
    lines = [f"### {title}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
    for key, prop in part["properties"].items():
        below = _part(prop, definitions)
        if below:
            kind, default, meaning = "mapping", "its own", f"{below['description']} See `{key}` below."
        else:
            kind, default, meaning = _type(prop), _default(prop), prop["description"]
        if key in part.get("required", ()):
            default = "required"
        lines.append(f"| `{key}` | {kind} | {default} | {meaning} |")
    return "\n".join([*lines, ""])


def _is_quantity(prop: dict[str, Any]) -> bool:
    return prop.get("pattern") == QUANTITY_PATTERN or any(map(_is_quantity, prop.get("anyOf", ())))


def _default(prop: dict[str, Any]) -> str:
    default = prop.get("default", {})
    if default is None:
        return "none"
    return f"`{default // 2**20}Mi`" if _is_quantity(prop) else f"`{json.dumps(default)}`"


def _type(prop: dict[str, Any]) -> str:
    if _is_quantity(prop):
        optional = " or none" if {"type": "null"} in prop["anyOf"] else ""
        return f"bytes, such as `512Mi` or `1000000`{optional}"
    if "anyOf" in prop:
        return " or ".join(_type(kind) for kind in prop["anyOf"])
    if "enum" in prop:
        return ", ".join(f"`{value}`" for value in prop["enum"])
    bounds = [words.format(prop[bound]) for bound, words in _BOUNDS.items() if bound in prop]
    return " ".join([_TYPES[prop["type"]], " and ".join(bounds)]).strip()
