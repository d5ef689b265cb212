"""The values of the chart: their schema, defaults and reference."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from charts.generate import generated
from charts.values import defaults, values_schema
from serve.settings import Settings
from tests.chart.rendering import CHART, HELMS, refusal


@pytest.mark.parametrize("path", generated(), ids=lambda path: path.name)
def test_what_the_chart_holds_of_the_package_is_current(path):
    assert path.read_text() == generated()[path], "run `make charts`"


def test_the_defaults_are_those_of_the_schema():
    assert yaml.safe_load((CHART / "values.yaml").read_text()) == defaults()


def test_the_readme_names_every_value():
    table = (CHART / "README.md").read_text()
    for key, part in values_schema()["properties"].items():
        if key != "global":
            assert f"| `{key}.{next(iter(_named(part)))}`" in table if "$ref" in part else f"| `{key}` |" in table


def _named(part: dict[str, Any]) -> dict[str, Any]:
    first: dict[str, Any] = values_schema()["$defs"][part["$ref"].rpartition("/")[2]]["properties"]
    return {key: value for key, value in first.items() if "$ref" not in value} or {
        f"{key}.{below}": value for key, inner in first.items() for below, value in _named(inner).items()
    }


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        if "properties" in schema and schema.get("type") == "object":
            yield schema
        for below in schema.values():
            yield from _parts(below)
    elif isinstance(schema, list):
        for below in schema:
            yield from _parts(below)


def test_no_part_takes_an_unknown_key():
    parts = list(_parts(values_schema()))
    assert len(parts) > 20
    assert not [part["properties"].keys() for part in parts if part["additionalProperties"] is not False]


def test_every_value_is_described():
    for part in _parts(values_schema()):
        for key, value in part["properties"].items():
            assert "description" in value or "$ref" in value, key


@pytest.mark.parametrize("program", HELMS)
@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"imagePullSecret": []}, "imagePullSecret"),
        ({"ray.workerGroups.cpu.gpu": 1}, "gpu"),
        ({"ray.workerGroups.Big": {}}, "Big"),
        ({"ray.workerGroups.cpu.gpus": 0.5}, "gpus"),
        ({"cache.type": "nfs"}, "type"),
        ({"settings.cacheDir": "/tmp"}, "cacheDir"),
        ({"models": [{"name": "a", "task": "forecast", "source": "hf:m/x", "replicas": 2}]}, "replicas"),
        ({"models": [{"name": "A", "task": "forecast", "source": "hf:m/x"}]}, "name"),
        ({"models": [{"name": "a", "task": "forecast", "source": "ftp://m"}]}, "source"),
        ({"models": [{"name": "a", "task": "forecast", "source": "hf:m/x", "options": {"beam_size": 2}}]}, "beam_size"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_value_that_the_schema_does_not_know_is_refused_with_its_place(program, values, place):
    assert place in refusal(values, program)


def test_the_schema_is_read_by_both_helms():
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"


def test_every_setting_that_is_no_place_of_a_pod_can_be_given():
    given = {each["alias"] for each in _aliases()}
    assert given == set(values_schema()["$defs"]["PlatformSettings"]["properties"])


def _aliases() -> Iterator[dict[str, str]]:
    for name in Settings.model_fields:
        first, *rest = name.split("_")
        if name not in {"cache_dir", "state_dir", "host", "port", "proxies_url", "metrics_dir"}:
            yield {"alias": first + "".join(word.capitalize() for word in rest)}
