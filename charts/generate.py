"""Writes what the chart holds of the package, and the dashboards of both: `python -m charts.generate [--check]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from charts import dashboards
from charts.values import between_marks, values_schema, values_table
from serve.applications import ENVIRONMENT
from serve.cluster.crd import custom_resource_definition
from serve.telemetry.rules import rules_yaml

ROOT = Path(__file__).parent.parent
CHART = ROOT / "charts" / "roundhouse"
#: The package's own and the chart's.
DASHBOARDS = (ROOT / "serve" / "telemetry" / "dashboards", CHART / "files" / "dashboards")

# A pod has its network to itself, so the replicas' ports can be known ahead.
_PORTS = {
    "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": "30000",
    "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": "30900",
}


def generated() -> dict[Path, str]:
    """Return the files and what they should hold."""
    readme = CHART / "README.md"
    variables = [{"name": name, "value": value} for name, value in (ENVIRONMENT | _PORTS).items()]
    return {
        CHART / "crds" / "model.yaml": yaml.safe_dump(custom_resource_definition(), sort_keys=False, width=120),
        CHART / "files" / "ray-environment.yaml": "\n".join(
            f"- name: {each['name']}\n  value: {json.dumps(each['value'])}" for each in variables
        ),
        CHART / "files" / "rules.yaml": rules_yaml(),
        CHART / "values.schema.json": json.dumps(values_schema(), indent=2) + "\n",
        readme: between_marks(readme.read_text(), values_table()),
        **{folder / name: text for name, text in dashboards.files().items() for folder in DASHBOARDS},
    }


def main(arguments: list[str]) -> int:
    """Write the files, or with `--check` tell which differ."""
    stale = [path for path, text in generated().items() if not path.exists() or path.read_text() != text]
    for path in stale:
        if "--check" in arguments:
            print(f"{path.relative_to(ROOT)} is stale; run `make charts`")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(generated()[path])
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
