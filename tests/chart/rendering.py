"""Renders the chart with the Helms of .tools/bin, and finds the pods in what comes out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "roundhouse"
CASES = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))
HELMS = ("helm", "helm3")
OLDEST, NEWEST = "1.31.0", "1.37.0"
RELEASE, NAMESPACE = "rh", "models"


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that an object of the render makes."""

    owner: str
    labels: dict[str, str]
    spec: dict[str, Any]


def helm(program: str, *words: str, version: str = NEWEST) -> subprocess.CompletedProcess[str]:
    """Run `helm template` of the chart."""
    command = [str(ROOT / ".tools" / "bin" / program), "template", RELEASE, str(CHART), "--namespace", NAMESPACE]
    return subprocess.run(
        [*command, "--kube-version", version, *words], capture_output=True, text=True, timeout=60, check=False
    )


def notes(case: str) -> str:
    """Return what an install says at its end."""
    command = [str(ROOT / ".tools" / "bin" / "helm"), "install", RELEASE, str(CHART), "--namespace", NAMESPACE]
    words = ["--dry-run=client", "--kubeconfig", "/dev/null", "--values", str(given(case))]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.partition("NOTES:")[2]


def given(case: str) -> Path:
    """Return the values of a case."""
    return CHART / "ci" / f"{case}-values.yaml"


@cache
def text(case: str, program: str = "helm", version: str = NEWEST) -> str:
    """Return what a case renders to."""
    done = helm(program, "--values", str(given(case)), version=version)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def objects(case: str, program: str = "helm", version: str = NEWEST) -> list[dict[str, Any]]:
    """Return the objects that a case renders to."""
    return [each for each in yaml.load_all(text(case, program, version), yaml.CSafeLoader) if each]


def refusal(values: dict[str, Any], program: str) -> str:
    """Return why the chart refuses values."""
    words = [word for key, value in values.items() for word in ("--set-json", f"{key}={json.dumps(value)}")]
    done = helm(program, *words)
    assert done.returncode == 1, done.stdout[:500]
    assert "Error: " in done.stderr
    return done.stderr


def only(case: str, kind: str) -> dict[str, Any]:
    """Return the one object of a kind."""
    [found] = of(case, kind)
    return found


def of(case: str, kind: str) -> list[dict[str, Any]]:
    """Return the objects of a kind."""
    return [each for each in objects(case) if each["kind"] == kind]


def pods(rendered: Iterable[dict[str, Any]]) -> Iterator[Pod]:
    """Yield the pods that objects make."""
    for each in rendered:
        owner = f"{each['kind']}/{each['metadata']['name']}"
        if each["kind"] == "Pod":
            yield Pod(owner, each["metadata"]["labels"], each["spec"])
        elif each["kind"] == "RayService":
            cluster = each["spec"]["rayClusterConfig"]
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                yield _of_template(f"{owner}/{group.get('groupName', 'head')}", group["template"])
        elif "template" in each.get("spec", {}):
            yield _of_template(owner, each["spec"]["template"])


def _of_template(owner: str, template: dict[str, Any]) -> Pod:
    return Pod(owner, template["metadata"]["labels"], template["spec"])


def environment(pod: Pod) -> dict[str, str]:
    """Return the variables of a pod's container that have a value of their own."""
    return {each["name"]: each["value"] for each in pod.spec["containers"][0].get("env", ()) if "value" in each}
