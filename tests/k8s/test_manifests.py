"""What a cluster needs around the chart is valid."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "k8s"
FILES = sorted(FOLDER.rglob("*.yaml"))
VALUES = [path for path in FILES if path.name.endswith("values.yaml")]
TOOLS = ROOT / ".tools" / "bin"
SCHEMA = json.loads((ROOT / "charts" / "roundhouse" / "values.schema.json").read_text())


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize(
    "path", [path for path in FILES if path not in VALUES], ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_every_document_says_what_it_is(path):
    for document in documents(path):
        assert document["apiVersion"]
        assert document["kind"]


def test_kind_forwards_the_port_that_its_comment_names():
    (path,) = [path for path in FILES if path.parent.name == "kind"]
    (port,) = yaml.safe_load(path.read_text())["nodes"][0]["extraPortMappings"]
    assert f"service.nodePort={port['containerPort']}:" in path.read_text()
    assert f"http://127.0.0.1:{port['hostPort']}" in path.read_text()


def test_values_are_those_that_the_chart_takes():
    (application,) = documents(FOLDER / "argocd" / "application.yaml")
    _, release = documents(FOLDER / "flux" / "helmrelease.yaml")
    given = [document for path in VALUES for document in documents(path)]
    given += [application["spec"]["source"]["helm"]["valuesObject"], release["spec"]["values"]]
    assert len(given) >= 7
    for values in given:
        jsonschema.validate(values, SCHEMA)


def test_git_holds_the_chart_where_the_examples_look_for_it():
    (application,) = documents(FOLDER / "argocd" / "application.yaml")
    repository, release = documents(FOLDER / "flux" / "helmrelease.yaml")
    chart = release["spec"]["chart"]["spec"]
    assert (ROOT / application["spec"]["source"]["path"] / "Chart.yaml").exists()
    assert (ROOT / chart["chart"] / "Chart.yaml").exists()
    assert chart["sourceRef"]["name"] == repository["metadata"]["name"]


def test_argo_cd_leaves_the_definition_to_the_hook():
    (application,) = documents(FOLDER / "argocd" / "application.yaml")
    assert application["spec"]["source"]["helm"]["skipCrds"] is True
    assert "SkipDryRunOnMissingResource=true" in application["spec"]["syncPolicy"]["syncOptions"]


def test_the_secrets_of_the_vault_are_those_that_the_values_name():
    made = {
        document["spec"]["target"]["name"]: document
        for document in documents(FOLDER / "external-secrets" / "secrets.yaml")
    }
    (values,) = documents(FOLDER / "external-secrets" / "values.yaml")
    token = made.pop(values["ray"]["token"]["existingSecret"])
    assert [entry["secretKey"] for entry in token["spec"]["data"]] == ["auth_token"]
    assert set(made) == {entry["secretRef"]["name"] for entry in values["extraEnvFrom"]}


@pytest.mark.parametrize("name", ["time-slicing", "mps"])
def test_the_device_plugin_is_told_to_share(name):
    (config,) = documents(FOLDER / "gpu-sharing" / f"{name}.yaml")
    (shared,) = yaml.safe_load(config["data"]["config.yaml"])["sharing"].values()
    assert shared["resources"] == [{"name": "nvidia.com/gpu", "replicas": 4}]


@pytest.mark.parametrize("site", ["small", "large"])
def test_an_overlay_renders(site, tmp_path):
    shutil.copytree(FOLDER / "overlays", tmp_path / "k8s" / "overlays")
    shutil.copytree(ROOT / "charts", tmp_path / "charts")
    built = subprocess.run(
        [
            str(TOOLS / "kubectl"), "kustomize", "--enable-helm", "--helm-command", str(TOOLS / "helm"),
            "--load-restrictor", "LoadRestrictionsNone", str(tmp_path / "k8s" / "overlays" / site),
        ],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    objects = list(yaml.safe_load_all(built.stdout))
    workers = [each for each in objects if each["kind"] == "Deployment" and "worker" in each["metadata"]["name"]]
    values = yaml.safe_load((FOLDER / "overlays" / site / "values.yaml").read_text())
    assert len(workers) == len(values["ray"]["workerGroups"])
    assert {each["metadata"]["namespace"] for each in workers} == {"roundhouse"}
    patched = {each["spec"]["progressDeadlineSeconds"] for each in workers}
    of_the_chart = (
        yaml.safe_load((ROOT / "charts" / "roundhouse" / "values.yaml").read_text())["ray"]["drainSeconds"] + 600
    )
    assert patched == ({3600} if site == "large" else {of_the_chart})
    (definition,) = [each for each in objects if each["kind"] == "CustomResourceDefinition"]
    assert definition["metadata"]["name"] == "models.roundhouse.dev"
    # A hook without Helm is an object like any other: the Job before an uninstall would delete every Model at once.
    assert not [each["metadata"] for each in objects if "helm.sh/hook" in each["metadata"].get("annotations", {})]
    assert not [each["metadata"] for each in objects if each["kind"] in ("Job", "ClusterRole")]


def test_every_link_leads_somewhere():
    for page in FOLDER.rglob("*.md"):
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
