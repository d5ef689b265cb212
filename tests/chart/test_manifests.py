"""What the chart renders to is valid for every Kubernetes of its range, and what a policy checker finds is meant."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.chart.rendering import CASES, NAMESPACE, RELEASE, ROOT, given, helm, objects, pods, text

CHECKS = ROOT / ".tools" / "checks" / "bin"

#: Kinds that come with a CustomResourceDefinition, which the schemas of Kubernetes do not hold.
CUSTOM = {"Model", "HTTPRoute", "RayService", "PodMonitor", "PrometheusRule"}

#: Check -> (resources that fail it, why that is meant).
MEANT = {
    "CKV_K8S_8": (r"Pod\..*-test$", "a test runs once"),
    "CKV_K8S_9": (r"Pod\..*-test$", "a test runs once"),
    "CKV_K8S_11": ("", "a CPU limit would stall replies while cores idle; requests share them"),
    "CKV_K8S_15": ("", "a release names a version, whose image does not change; image.pullPolicy sets Always"),
    "CKV_K8S_38": (r"-(controller|pre-delete|pre-upgrade|rh-roundhouse-head)$", "these call the Kubernetes API"),
    "CKV_K8S_43": ("", "image.digest takes one; the chart cannot know a site's registry"),
}


def bare_pod(owner: str, labels: dict[str, str], spec: dict[str, Any]) -> dict[str, Any]:
    """Return a pod of a RayService, whose kind neither schemas nor checkers know, as one that they do."""
    name = owner.replace("/", "-").lower()
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels},
        "spec": spec,
    }


def ray_pods() -> list[dict[str, Any]]:
    """Return the pods that KubeRay makes."""
    made = [bare_pod(pod.owner, pod.labels, pod.spec) for pod in pods(objects("kuberay")) if "RayService" in pod.owner]
    assert len(made) == 3
    return made


def distinct() -> list[dict[str, Any]]:
    """Return the objects of all cases, each once, without those of CustomResourceDefinitions.

    Another test tells that they are the same for every version.
    """
    made = [each for case in CASES for each in objects(case) if each["kind"] not in CUSTOM]
    alike = {json.dumps(each | {"data": None} if each["kind"] == "Secret" else each): each for each in made}
    return [*alike.values(), *ray_pods()]


@pytest.mark.parametrize("minor", range(31, 38))
def test_every_object_is_valid(minor, tmp_path: Path):
    made = distinct()
    assert len(made) > 50
    (tmp_path / "all.yaml").write_text(yaml.dump_all(made, Dumper=yaml.CSafeDumper))
    program = [str(CHECKS / "python"), str(CHECKS / "kubernetes-validate")]
    done = subprocess.run(
        [*program, "-k", f"1.{minor}", "--strict", str(tmp_path / "all.yaml")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    told = [line for line in (done.stdout + done.stderr).splitlines() if line]
    assert done.returncode == 0, told
    # A kind that it does not know is only warned of.
    assert not [line for line in told if not line.startswith("INFO")]
    assert len(told) == len(made)


NO_EXTRAS = (
    "ray.provider=kuberay",
    "ray.kuberay.upgradeStrategy=None",
    "ray.kuberay.autoscaling.enabled=false",
)


@pytest.mark.parametrize(
    ("case", "sets"),
    [
        ("kuberay", ()),
        ("kuberay", ("gcs.persistence.enabled=false",)),
        ("existing-secrets", NO_EXTRAS),
        ("extra", NO_EXTRAS),
        ("two-groups", NO_EXTRAS),
    ],
)
def test_a_rayservice_has_only_fields_of_kuberay_1_7(case, sets):
    words = [word for each in sets for word in ("--set", each)]
    done = helm("helm", "--values", str(given(case)), *words)
    assert done.returncode == 0, done.stderr
    [service] = [each for each in yaml.safe_load_all(done.stdout) if each and each["kind"] == "RayService"]
    schema = json.loads((Path(__file__).parent / "rayservice-1.7.schema.json").read_text())
    jsonschema.Draft7Validator(schema).validate(service["spec"])
    storage = service["spec"]["rayClusterConfig"].get("gcsFaultToleranceOptions", {}).get("storage", {})
    assert not ("claimName" in storage and storage.keys() & {"size", "storageClassName", "accessModes"})


def test_what_a_policy_checker_finds_is_meant(tmp_path: Path):
    (tmp_path / "kuberay.yaml").write_text(yaml.safe_dump_all(ray_pods()))
    for case in ("default", "gpu", "network-policy"):
        (tmp_path / f"{case}.yaml").write_text(text(case))
    words = [
        "--framework",
        "kubernetes",
        "--quiet",
        "--skip-download",
        "--output",
        "json",
        "--directory",
        str(tmp_path),
    ]
    done = subprocess.run(
        [str(CHECKS / "python"), str(CHECKS / "checkov"), *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    told = json.loads(done.stdout)
    assert told["summary"]["passed"] > 100
    found = {(each["check_id"], each["resource"]) for each in told["results"]["failed_checks"]}
    assert not [pair for pair in sorted(found) if not re.search(MEANT.get(pair[0], ("$^", ""))[0], pair[1])]
    assert {check for check, _ in found} == set(MEANT)
    assert any(RELEASE in resource for _, resource in found)
