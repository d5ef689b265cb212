"""What the chart renders to, for each of its example values, on both Helms and the oldest and newest Kubernetes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.cluster.commands import LEASE
from serve.settings import Settings
from serve.telemetry.rules import CONTROLLER_JOB, NODE_JOB, PLATFORM_JOB, rules_yaml
from tests.chart.rendering import (
    CASES,
    CHART,
    HELMS,
    NAMESPACE,
    NEWEST,
    OLDEST,
    ROOT,
    Pod,
    environment,
    given,
    helm,
    notes,
    objects,
    of,
    only,
    pods,
    refusal,
    text,
)

#: Kinds of volumes that Pod Security "restricted" allows.
ALLOWED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
CLUSTER_WIDE = {"ClusterRole", "ClusterRoleBinding"}


def not_restricted(pod: Pod) -> Iterator[str]:
    """Yield what Pod Security "restricted" refuses."""
    security = pod.spec["securityContext"]
    if any(pod.spec.get(shared) for shared in ("hostNetwork", "hostPID", "hostIPC")):
        yield "shares a namespace of the node"
    if security.get("runAsNonRoot") is not True or security.get("runAsUser") == 0:
        yield "may run as root"
    if security.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "has no seccomp profile"
    for volume in pod.spec.get("volumes", ()):
        if {*volume} - {"name"} - ALLOWED_VOLUMES:
            yield f"volume {volume['name']}"
    for container in (*pod.spec["containers"], *pod.spec.get("initContainers", ())):
        yield from not_restricted_container(container)


def not_restricted_container(container: dict[str, Any]) -> Iterator[str]:
    """Yield what Pod Security "restricted" refuses of a container."""
    own = container["securityContext"]
    if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
        yield "may gain privileges"
    if own.get("capabilities", {}).get("drop") != ["ALL"] or own["capabilities"].get("add"):
        yield "keeps capabilities"
    if any("hostPort" in port for port in container.get("ports", ())):
        yield "takes a port of the node"


@pytest.mark.parametrize("case", CASES)
def test_both_helms_render_alike_for_the_oldest_and_newest_kubernetes(case):
    def same(program: str, version: str) -> list[dict[str, Any]]:
        made = text(case, program, version)
        # The one value that is drawn anew, with all that follows from it, is the token.
        return [each for each in yaml.load_all(re.sub(r"auth_token: \S+", "", made), yaml.CSafeLoader) if each]

    first = sorted(map(str, same("helm", NEWEST)))
    assert len(first) > 10
    for program in HELMS:
        for version in (OLDEST, NEWEST):
            assert sorted(map(str, same(program, version))) == first


@pytest.mark.parametrize("case", CASES)
def test_every_pod_meets_pod_security_restricted(case):
    found = list(pods(objects(case)))
    assert len(found) >= 5
    allowed = {"volume cache"} if case == "hostpath-cache" else set()
    for pod in found:
        assert set(not_restricted(pod)) <= allowed, pod.owner


@pytest.mark.parametrize("case", CASES)
def test_no_container_writes_to_its_root_and_all_have_bounds(case):
    for pod in pods(objects(case)):
        for container in pod.spec["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, pod.owner
            assert container["resources"]["requests"]["cpu"], pod.owner
            assert container["resources"]["limits"]["memory"], pod.owner


@pytest.mark.parametrize("case", CASES)
def test_names_are_unique_and_short_enough_and_in_the_release(case):
    names = [(each["apiVersion"], each["kind"], each["metadata"]["name"]) for each in objects(case)]
    assert len(names) == len(set(names))
    for each in objects(case):
        assert len(each["metadata"]["name"]) <= 63
        if each["kind"] not in CLUSTER_WIDE and "labels" in each["metadata"]:
            assert each["metadata"]["namespace"] == NAMESPACE
    for pod in pods(objects(case)):
        assert all(len(value) <= 63 for value in pod.labels.values())


def references(pod: Pod) -> Iterator[tuple[str, str]]:
    """Yield the kind and name of each object that a pod names."""
    if "serviceAccountName" in pod.spec:
        yield "ServiceAccount", pod.spec["serviceAccountName"]
    for secret in pod.spec.get("imagePullSecrets", ()):
        yield "Secret", secret["name"]
    for volume in pod.spec.get("volumes", ()):
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"]
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
    for container in pod.spec["containers"]:
        for source in container.get("envFrom", ()):
            yield "Secret", source["secretRef"]["name"]


def test_what_pods_name_is_in_the_render_or_given():
    seen = set()
    for case in CASES:
        there = {(each["kind"], each["metadata"]["name"]) for each in objects(case)}
        written = set(re.findall(r"[\w-]+", given(case).read_text())) if case == "existing-secrets" else set()
        for pod in pods(objects(case)):
            for kind, name in references(pod):
                seen.add(kind)
                assert (kind, name) in there or name in written, f"{case}: {pod.owner} names {kind} {name}"
    assert seen == {"ServiceAccount", "Secret", "PersistentVolumeClaim", "ConfigMap"}


@pytest.mark.parametrize("case", CASES)
def test_mounts_have_volumes_and_probes_have_ports(case):
    for pod in pods(objects(case)):
        volumes = {volume["name"] for volume in pod.spec.get("volumes", ())}
        for container in pod.spec["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", ())} <= volumes
            ports = {port["name"] for port in container.get("ports", ())}
            probes = (container.get(f"{kind}Probe", {}) for kind in ("startup", "readiness", "liveness"))
            asked = {how["port"] for probe in probes for how in probe.values() if isinstance(how, dict)}
            assert asked <= ports, pod.owner


def selected(selector: dict[str, str], made: list[Pod]) -> list[Pod]:
    """Return the pods that a selector of labels takes."""
    return [pod for pod in made if selector.items() <= pod.labels.items()]


@pytest.mark.parametrize("case", [case for case in CASES if case != "kuberay"])
def test_services_reach_ports_of_pods(case):
    made = list(pods(objects(case)))
    for service in of(case, "Service"):
        behind = selected(service["spec"]["selector"], made)
        assert behind
        for port in service["spec"]["ports"]:
            for pod in behind:
                names = {each["name"] for each in pod.spec["containers"][0]["ports"]}
                assert port["targetPort"] in names, service["metadata"]["name"]


@pytest.mark.parametrize("case", CASES)
def test_roles_are_bound_to_accounts_that_exist(case):
    there = {(each["kind"], each["metadata"]["name"]) for each in objects(case)}
    for binding in (*of(case, "RoleBinding"), *of(case, "ClusterRoleBinding")):
        assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) in there
        for subject in binding["subjects"]:
            assert (subject["kind"], subject["name"]) in there


@pytest.mark.parametrize("case", CASES)
def test_policies_and_budgets_select_pods(case):
    made = list(pods(objects(case)))
    for policy in of(case, "NetworkPolicy"):
        assert selected(policy["spec"]["podSelector"]["matchLabels"], made), policy["metadata"]["name"]
    for budget in of(case, "PodDisruptionBudget"):
        assert selected(budget["spec"]["selector"]["matchLabels"], made), budget["metadata"]["name"]


def test_every_setting_reaches_ray_as_the_platform_reads_it():
    heads = [pod for pod in pods(objects("extra")) if pod.owner.startswith("StatefulSet")]
    settings = Settings.from_environment(environment(heads[0]))
    assert settings.log_level == "debug"
    assert settings.max_unpacked_bytes == 214748364800
    assert settings.download_backoff_s == 0.5
    assert settings.allowed_hosts == ("hub.internal", "store.internal")
    assert settings.s3_endpoint == "https://store.internal"


def test_a_variable_of_the_sites_own_takes_the_place_of_the_charts():
    heads = [pod for case in ("default", "extra") for pod in pods(objects(case)) if pod.owner.startswith("StatefulSet")]
    assert [environment(head)["RAY_worker_niceness"] for head in heads] == ["0", "5"]
    names = [each["name"] for each in heads[1].spec["containers"][0]["env"]]
    assert len(set(names)) == len(names)
    assert {"POD_IP", "HTTPS_PROXY", *environment(heads[0])} <= set(names)


@pytest.mark.parametrize(
    ("case", "form", "level", "is_on"),
    [("default", "json", "info", False), ("extra", "text", "debug", True), ("kuberay", "json", "info", False)],
)
def test_every_process_of_ours_logs_as_the_values_say(case, form, level, is_on):
    ours = [pod for pod in pods(objects(case)) if not pod.owner.startswith(("Job/", "Pod/"))]
    assert {pod.owner.partition("/")[0] for pod in ours} >= {"Deployment"}
    assert len(ours) >= 3
    for pod in ours:
        settings = Settings.from_environment(environment(pod))
        assert (settings.log_format, settings.log_level, settings.access_log) == (form, level, is_on), pod.owner


def test_a_model_in_the_values_becomes_the_object_that_it_describes():
    first, second = of("models", "Model")
    assert first["metadata"]["name"] == "minilm"
    assert "name" not in first["spec"]
    assert "revision" not in first["spec"]
    assert first["spec"]["description"] == "1e3"
    assert first["spec"]["batching"]["max_queue_bytes"] == 268435456
    assert second["spec"]["options"]["arguments"] == {"nothing": None, "many": [1, 2]}


def test_an_ingress_leads_to_the_inference_service():
    ingress = only("ingress", "Ingress")
    [rule] = ingress["spec"]["rules"]
    backend = rule["http"]["paths"][0]["backend"]["service"]
    [service] = [each for each in of("ingress", "Service") if each["metadata"]["name"] == backend["name"]]
    assert backend["port"]["number"] in {port["port"] for port in service["spec"]["ports"]}
    assert ingress["spec"]["tls"] == [{"hosts": ["models.example.com"], "secretName": "models-example-com"}]
    assert "--public-url=https://models.example.com" in text("ingress")


def test_a_route_leads_to_the_inference_service():
    route = only("httproute", "HTTPRoute")
    [backend] = route["spec"]["rules"][0]["backendRefs"]
    [service] = [each for each in of("httproute", "Service") if each["metadata"]["name"] == backend["name"]]
    assert backend["port"] in {port["port"] for port in service["spec"]["ports"]}
    assert "--public-url=https://models.example.com" in text("httproute")


def test_a_port_of_the_nodes_is_that_of_the_values():
    [service] = [each for each in of("nodeport", "Service") if each["spec"]["type"] == "NodePort"]
    assert service["spec"]["ports"][0]["nodePort"] == 30080
    assert service["metadata"]["annotations"] == {"example.com/owner": "models"}


def test_only_rays_own_pods_reach_rays_ports():
    made = list(pods(objects("network-policy")))
    policies = {each["metadata"]["name"]: each["spec"] for each in of("network-policy", "NetworkPolicy")}
    closed = policies["rh-roundhouse-deny"]
    assert "ingress" not in closed
    assert {pod.owner for pod in selected(closed["podSelector"]["matchLabels"], made)} == {pod.owner for pod in made}
    [rule] = policies["rh-roundhouse-ray"]["ingress"]
    owners = {pod.owner for pod in selected(rule["from"][0]["podSelector"]["matchLabels"], made)}
    assert owners == {"StatefulSet/rh-roundhouse-head", "Deployment/rh-roundhouse-worker-cpu"}
    [dashboard] = policies["rh-roundhouse-dashboard"]["ingress"]
    assert dashboard["ports"] == [{"protocol": "TCP", "port": 8265}]
    [callers] = policies["rh-roundhouse-inference"]["ingress"]
    assert {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "apps"}}} in callers["from"]
    assert callers["ports"] == [{"protocol": "TCP", "port": 8000}]
    out = policies["rh-roundhouse-egress"]
    assert {"ipBlock": {"cidr": "10.20.0.0/16"}} in out["egress"][2]["to"]
    fetching = {pod.owner for pod in selected(out["podSelector"]["matchLabels"], made)}
    assert fetching == {"Deployment/rh-roundhouse-worker-cpu"}


def test_metrics_are_open_to_those_who_are_named():
    policies = {each["metadata"]["name"]: each["spec"] for each in of("network-policy", "NetworkPolicy")}
    made = list(pods(objects("network-policy")))
    ray = {"StatefulSet/rh-roundhouse-head", "Deployment/rh-roundhouse-worker-cpu"}
    for name, port, owners in (("controller", 8081, {"Deployment/rh-roundhouse-controller"}), ("ray", 6385, ray)):
        policy = policies[f"rh-roundhouse-{name}-metrics"]
        assert policy["ingress"] == [{"from": [SCRAPER], "ports": [{"protocol": "TCP", "port": port}]}]
        assert {pod.owner for pod in selected(policy["podSelector"]["matchLabels"], made)} == owners
    assert "-metrics" not in str([each["metadata"]["name"] for each in of("default", "NetworkPolicy")])


SCRAPER = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}


def monitors() -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each for each in of("monitoring", "PodMonitor")}


def test_nothing_is_monitored_unless_it_is_asked_for():
    assert not {"PodMonitor", "PrometheusRule"} & {each["kind"] for each in objects("default")}
    assert "node-metrics" not in text("default")
    assert "ROUNDHOUSE_TRACING" not in text("default")


def test_every_pod_of_ray_tells_its_own_metrics_at_a_port_of_its_own():
    ray = [pod for pod in pods(objects("monitoring")) if pod.labels.get("roundhouse.dev/ray-node")]
    assert len(ray) == 2
    for pod in ray:
        container = pod.spec["containers"][0]
        [port] = [each["containerPort"] for each in container["ports"] if each["name"] == "node-metrics"]
        assert f"\nroundhouse metrics --port {port} &\n" in container["args"][0]
        assert environment(pod)["ROUNDHOUSE_METRICS_DIR"].startswith("/dev/shm/")
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]


@pytest.mark.parametrize(
    ("name", "job", "owners", "port"),
    [
        ("rh-roundhouse", "roundhouse", {"head", "worker-cpu"}, "node-metrics"),
        ("rh-roundhouse-platform", "roundhouse-platform", {"head"}, "serve"),
        ("rh-roundhouse-controller", "roundhouse-controller", {"controller"}, "health"),
    ],
)
def test_prometheus_finds_each_target_once_by_the_name_that_the_rules_know(
    name: str, job: str, owners: set[str], port: str
):
    monitor = monitors()[name]
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    found = selected(monitor["spec"]["selector"]["matchLabels"], list(pods(objects("monitoring"))))
    assert {pod.owner.rpartition("rh-roundhouse-")[2] for pod in found} == owners
    for pod in found:
        assert port in {each["name"] for each in pod.spec["containers"][0]["ports"]}
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["interval"]) == (port, "15s")
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": job}]
    assert job in {NODE_JOB, PLATFORM_JOB, CONTROLLER_JOB}


def test_what_every_gateway_tells_alike_is_taken_from_one():
    [kept] = monitors()["rh-roundhouse-platform"]["spec"]["podMetricsEndpoints"][0]["metricRelabelings"]
    assert (kept["sourceLabels"], kept["action"]) == (["__name__"], "keep")
    assert re.fullmatch(kept["regex"], "roundhouse_scaling_replicas")
    assert re.fullmatch(kept["regex"], "roundhouse_cluster_capacity")
    assert not re.fullmatch(kept["regex"], "roundhouse_requests_total")


def test_prometheus_is_let_in_at_every_target_and_nobody_else_is():
    policies = {each["metadata"]["name"]: each["spec"] for each in of("monitoring", "NetworkPolicy")}
    open_ports = {
        name: {port["port"] for rule in policy["ingress"] for port in rule["ports"]}
        for name, policy in policies.items()
        if name.endswith("-metrics")
    }
    assert open_ports == {
        "rh-roundhouse-controller-metrics": {8081},
        "rh-roundhouse-ray-metrics": {6385, 6386},
        "rh-roundhouse-platform-metrics": {8000},
    }
    for name in open_ports:
        assert [rule["from"] for rule in policies[name]["ingress"]] == [[SCRAPER]]


def test_the_rules_are_those_that_the_command_prints_with_links_to_the_sites_copy():
    rule = only("monitoring", "PrometheusRule")
    assert rule["spec"] == yaml.safe_load(rules_yaml(runbooks="https://handbook.example.com/roundhouse"))
    assert rule["metadata"]["labels"]["release"] == "prometheus"


def test_each_dashboard_is_a_configmap_that_grafana_finds():
    files = sorted((CHART / "files" / "dashboards").glob("*.json"))
    found = [each for each in of("monitoring", "ConfigMap") if "grafana_dashboard" in each["metadata"]["labels"]]
    assert len(found) == len(files)
    for path, made in zip(files, found, strict=True):
        assert made["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert made["metadata"]["annotations"] == {"grafana_folder": "Models"}
        assert json.loads(made["data"][path.name]) == json.loads(path.read_text())


def test_where_spans_go_reaches_every_pod_of_ray():
    for pod in pods(objects("monitoring")):
        if pod.labels.get("roundhouse.dev/ray-node"):
            told = {key: value for key, value in environment(pod).items() if "TRACING" in key}
            assert told == {
                "ROUNDHOUSE_TRACING_ENDPOINT": "http://collector.observability.svc:4318",
                "ROUNDHOUSE_TRACING_PROTOCOL": "http/protobuf",
                "ROUNDHOUSE_TRACING_RATIO": "0.05",
                "ROUNDHOUSE_TRACING_SLOW_MS": "2000",
                "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "serve.runtime.ray_spans:processors",
                "RAY_SERVE_TRACING_SAMPLING_RATIO": "0",
            }


@pytest.mark.parametrize(
    ("case", "url"),
    [
        ("default", "http://127.0.0.1:8000/v1/embeddings"),
        ("nodeport", "http://NODE:30080/v1/embeddings"),
        ("ingress", "https://models.example.com/v1/embeddings"),
        ("httproute", "https://models.example.com/v1/embeddings"),
    ],
)
def test_the_notes_say_where_to_ask(case, url):
    assert url in notes(case)


def test_everybody_reaches_the_models_and_models_reach_everything_unless_told_otherwise():
    policies = {each["metadata"]["name"]: each["spec"] for each in of("default", "NetworkPolicy")}
    assert "from" not in policies["rh-roundhouse-inference"]["ingress"][0]
    assert not [spec for spec in policies.values() if "Egress" in spec["policyTypes"]]


def test_each_group_has_its_workers_and_its_budget():
    workers = {each["metadata"]["name"]: each["spec"] for each in of("two-groups", "Deployment")}
    assert workers["rh-roundhouse-worker-cpu"]["replicas"] == 4
    assert workers["rh-roundhouse-worker-large"]["replicas"] == 0
    large = workers["rh-roundhouse-worker-large"]["template"]["spec"]
    assert large["containers"][0]["resources"]["requests"] == {"cpu": "30", "memory": "200Gi"}
    assert large["terminationGracePeriodSeconds"] == 480
    assert "--deadline-s 450" in large["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert {
        each["metadata"]["name"]: each["spec"]["maxUnavailable"] for each in of("two-groups", "PodDisruptionBudget")
    } == {
        "rh-roundhouse-worker-cpu": "25%",
        "rh-roundhouse-worker-large": "25%",
    }


def test_gpu_workers_ask_for_their_device_and_tell_ray_of_it():
    workers = {each["metadata"]["name"]: each["spec"]["template"]["spec"] for each in of("gpu", "Deployment")}
    assert "rh-roundhouse-worker-cpu" not in workers
    [a100] = workers["rh-roundhouse-worker-a100"]["containers"]
    assert a100["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert "--num-gpus=4" in a100["args"][0]
    assert '{"accelerator_type:A100": 1}' in a100["args"][0]
    assert workers["rh-roundhouse-worker-a100"]["runtimeClassName"] == "nvidia"
    assert workers["rh-roundhouse-worker-mig"]["containers"][0]["resources"]["limits"]["nvidia.com/mig-3g.40gb"] == "1"


@pytest.mark.parametrize("provider", ["builtin", "kuberay"])
def test_gpu_workers_with_resources_of_their_own_ask_for_their_device_too(provider):
    own = {"requests": {"cpu": "100m", "memory": "1Gi"}, "limits": {"memory": "8Gi"}}
    same = own | {"limits": own["limits"] | {"nvidia.com/gpu": "2"}}
    bare = {"requests": own["requests"]}
    part = {"gpus": 1, "gpuResource": "nvidia.com/mig-3g.40gb", "resources": own}
    groups = {"bare": {"gpus": 2, "resources": bare}, "own": {"gpus": 2, "resources": own}}
    groups |= {"same": {"gpus": 2, "resources": same}, "part": part, "none": {"resources": own}}
    done = helm("helm", "--set-json", f"ray={json.dumps({'provider': provider, 'workerGroups': groups})}")
    assert done.returncode == 0, done.stderr
    made = pods(each for each in yaml.safe_load_all(done.stdout) if each)
    found = {
        pod.owner.rpartition("worker-")[2].rpartition("/")[2]: pod.spec["containers"][0]["resources"] for pod in made
    }
    assert found["own"] == found["same"] == same
    assert found["bare"] == {"requests": bare["requests"], "limits": {"nvidia.com/gpu": "2"}}
    assert found["part"]["limits"] == {"memory": "8Gi", "nvidia.com/mig-3g.40gb": "1"}
    assert found["none"] == own


def test_the_claim_of_the_cache_stays_where_it_is_asked_to():
    claims = {each["metadata"]["name"]: each for each in of("pvc-cache", "PersistentVolumeClaim")}
    cache = claims["rh-roundhouse-cache"]
    assert cache["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep", "team": "models"}
    assert cache["spec"]["resources"]["requests"]["storage"] == "200Gi"
    assert not of("existing-secrets", "PersistentVolumeClaim")
    assert not of("no-persistence", "PersistentVolumeClaim")


@pytest.mark.parametrize("case", CASES)
def test_only_workers_have_the_cache(case):
    for pod in pods(objects(case)):
        component = pod.labels["app.kubernetes.io/component"]
        names = {volume["name"] for volume in pod.spec.get("volumes", ())}
        assert ("cache" in names) == (component == "worker"), pod.owner


def test_a_folder_of_the_nodes_is_not_made_by_root():
    [worker] = [
        pod for pod in pods(objects("hostpath-cache")) if pod.owner.startswith("Deployment/rh-roundhouse-worker")
    ]
    [cache] = [volume for volume in worker.spec["volumes"] if volume["name"] == "cache"]
    assert cache["hostPath"] == {"path": "/var/cache/roundhouse", "type": "Directory"}
    assert "belong to user 10001" in notes("hostpath-cache")


@pytest.mark.parametrize("program", HELMS)
def test_one_worker_keeps_its_cache_on_a_volume_of_its_own(program):
    cache = 'cache={"type":"pvc","accessModes":["ReadWriteOnce"]}'
    assert helm(program, "--set-json", cache, "--set", "ray.workerGroups.cpu.replicas=1").returncode == 0
    assert helm(program, "--set-json", cache, "--set", "cache.existingClaim=mine").returncode == 0


def test_what_a_site_adds_is_there():
    notes = {each["metadata"]["name"]: each for each in of("extra", "ConfigMap")}
    assert notes["site-certificates"]["data"] == {"release": "rh"}
    assert "rh-note" in notes
    images = {pod.spec["containers"][0]["image"] for pod in pods(objects("extra"))}
    assert len(images) == 1
    assert images.pop().startswith("registry.example.com/roundhouse@sha256:0123")
    for each in objects("extra"):
        if each["kind"] != "ConfigMap":
            assert each["metadata"]["labels"]["cost-center"] == "42"
    accounts = {
        each["metadata"]["name"]: each["metadata"].get("annotations", {}) for each in of("extra", "ServiceAccount")
    }
    assert "eks.amazonaws.com/role-arn" in accounts["rh-serving-ray"]
    assert "eks.amazonaws.com/role-arn" not in accounts["rh-serving-controller"]


def test_a_head_that_never_became_ready_is_replaced_by_a_rollback():
    assert only("default", "StatefulSet")["spec"]["podManagementPolicy"] == "Parallel"


def started(pod: Pod, folder: Path, generated: str = "") -> list[str]:
    """Return the words that a Ray pod's shell starts `ray` with."""
    for program in ("ray", "roundhouse"):
        (folder / program).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/{program}.words\n')
        (folder / program).chmod(0o755)
    [script] = pod.spec["containers"][0]["args"]
    variables = {"PATH": f"{folder}:/usr/bin:/bin", "POD_IP": "10.1.2.3", "KUBERAY_GEN_RAY_START_CMD": generated}
    subprocess.run([*pod.spec["containers"][0]["command"], script], env=variables, timeout=60, check=True)
    return (folder / "ray.words").read_text().splitlines()


def test_the_shell_starts_ray_with_what_the_values_say(tmp_path: Path):
    made = {pod.owner: pod for pod in pods(objects("gpu"))}
    words = started(made["Deployment/rh-roundhouse-worker-a100"], tmp_path)
    assert words[0] == "start"
    assert {
        "--address=rh-roundhouse-head:6379",
        "--node-ip-address=10.1.2.3",
        "--num-cpus=16",
        "--num-gpus=4",
        '--resources={"accelerator_type:A100": 1}',
        "--block",
    } <= set(words)
    assert {"--head", "--num-cpus=0", "--port=6379"} <= set(started(made["StatefulSet/rh-roundhouse-head"], tmp_path))


_ENDS_IN_ORDER = """#!/bin/sh
trap 'echo > {folder}/ordered; exit 7' TERM INT
echo $$ > {folder}/begun
while :; do sleep 0.05; done
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_shell_ends_at_once_and_leaves_ray_to_be_killed(tmp_path: Path, number: signal.Signals):
    [head] = [pod for pod in pods(objects("default")) if pod.owner.startswith("StatefulSet")]
    for program, script in (("ray", _ENDS_IN_ORDER.format(folder=tmp_path)), ("roundhouse", "#!/bin/sh\n")):
        (tmp_path / program).write_text(script)
        (tmp_path / program).chmod(0o755)
    [script] = head.spec["containers"][0]["args"]
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "POD_IP": "10.1.2.3"}
    command = [*head.spec["containers"][0]["command"], script]
    # A shell cannot trap what was ignored as it began, and whoever runs the tests in the background ignores SIGINT.
    with subprocess.Popen(command, env=variables, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL)) as shell:
        try:
            until(lambda: (tmp_path / "begun").exists() and (tmp_path / "begun").read_text().strip())
            shell.send_signal(number)
            assert shell.wait(timeout=30) == 0
        finally:
            shell.kill()
    os.kill(int((tmp_path / "begun").read_text()), signal.SIGKILL)
    assert not (tmp_path / "ordered").exists()


def until(holds: Callable[[], bool]) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_shell_starts_ray_by_the_command_that_kuberay_makes(tmp_path: Path):
    [worker] = [pod for pod in pods(objects("kuberay")) if pod.owner == "RayService/rh-roundhouse/gpu"]
    parameters = kuberay()["rayClusterConfig"]["workerGroupSpecs"][1]["rayStartParams"]
    # As the operator does: the parameters in a row, none quoted.
    generated = "ray start " + " ".join(f" --{key}={value} " for key, value in parameters.items())
    words = started(worker, tmp_path, generated)
    assert {"--node-ip-address=10.1.2.3", "--num-gpus=1", '--resources={"accelerator_type:L4": 1}'} <= set(words)


def kuberay() -> dict[str, Any]:
    return only("kuberay", "RayService")["spec"]


def test_kuberay_gets_a_rayservice_in_place_of_the_pods():
    kinds = {each["kind"] for each in objects("kuberay")}
    assert not kinds & {"StatefulSet", "PersistentVolumeClaim", "Service"}
    assert [each["metadata"]["name"] for each in of("kuberay", "Deployment")] == ["rh-roundhouse-controller"]
    name = only("kuberay", "RayService")["metadata"]["name"]
    assert re.fullmatch("[a-z][-a-z0-9]{0,46}", name)
    assert f"--rayservice={name}" in text("kuberay")
    assert "--ray-url" not in text("kuberay")
    # The controller writes it; what the chart wrote as well, each upgrade would take back.
    assert "serveConfigV2" not in kuberay()


def test_the_controller_may_write_only_its_rayservice():
    rules = {each["metadata"]["name"]: each["rules"] for each in of("kuberay", "Role")}["rh-roundhouse-controller"]
    [rule] = [rule for rule in rules if rule["apiGroups"] == ["ray.io"]]
    assert rule["verbs"] == ["get", "patch"]
    assert rule["resourceNames"] == ["rh-roundhouse"]
    for role in of("default", "Role"):
        assert "ray.io" not in str(role["rules"])


def test_a_namespace_has_one_lease_whatever_its_release_is_called():
    name = only("extra", "Lease")["metadata"]["name"]
    assert name == only("default", "Lease")["metadata"]["name"] == LEASE
    assert f"--lease={name}\n" in text("extra")
    rules = {each["metadata"]["name"]: each["rules"] for each in of("extra", "Role")}["rh-serving-controller"]
    assert [rule["resourceNames"] for rule in rules if rule["resources"] == ["leases"]] == [[name]]


def test_kuberays_service_is_where_controller_and_callers_look():
    service = kuberay()["serveService"]
    [port] = service["spec"]["ports"]
    url = f"http://{service['metadata']['name']}.{NAMESPACE}.svc:{port['port']}"
    assert f"--gateway-url={url}" in text("kuberay")
    # KubeRay takes a port over only under the name that the head's own has.
    head = kuberay()["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert port["name"] == "serve"
    assert port["name"] in {each["name"] for each in head["ports"]}
    assert port["nodePort"] == 30080
    assert kuberay()["excludeHeadPodFromServeSvc"] is True


def test_kuberays_cluster_keeps_its_rules():
    cluster = kuberay()["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "rh-roundhouse-ray-token"}
    assert cluster["rayVersion"].startswith("2.60")
    assert cluster["gcsFaultToleranceOptions"]["storage"] == {"size": "2Gi", "storageClassName": "fast"}
    assert cluster["enableInTreeAutoscaling"] is True
    # Ports are KubeRay's to add; without an address of its own, the Service would lead workers to a head that is gone.
    assert cluster["headGroupSpec"]["headService"]["spec"] == {"publishNotReadyAddresses": True}
    cpu, gpu = cluster["workerGroupSpecs"]
    assert (cpu["replicas"], cpu["minReplicas"], cpu["maxReplicas"]) == (2, 2, 6)
    assert (gpu["replicas"], gpu["minReplicas"], gpu["maxReplicas"]) == (0, 0, 3)
    assert gpu["rayStartParams"]["resources"] == """'{"accelerator_type:L4": 1}'"""
    for group in (cluster["headGroupSpec"], cpu, gpu):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert group["template"]["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"
        pod = group["template"]["spec"]
        # The operator adds these itself and refuses what has them, or restarts that are not its own.
        assert not {each["name"] for each in pod["containers"][0]["env"]} & {"RAY_gcs_storage", "RAY_gcs_storage_path"}
        assert "gcs-storage" not in {volume["name"] for volume in pod["volumes"]}
        assert "restartPolicy" not in pod
        assert "KUBERAY_GEN_RAY_START_CMD" in pod["containers"][0]["args"][0]
        # A label with the chart's version would replace the cluster at each upgrade.
        assert "helm.sh/chart" not in group["template"]["metadata"]["labels"]
    assert "$FQ_RAY_IP:6379" in str(cpu["template"]["spec"]["containers"][0]["lifecycle"])


def test_only_the_head_of_kuberay_calls_the_api():
    cluster = kuberay()["rayClusterConfig"]
    assert cluster["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"] is True
    for group in cluster["workerGroupSpecs"]:
        assert group["template"]["spec"]["automountServiceAccountToken"] is False
    assert not list(not_restricted_container(cluster["autoscalerOptions"]))


def test_kuberays_operator_and_the_controller_reach_the_head_and_nobody_else_does():
    policies = {each["metadata"]["name"]: each["spec"] for each in of("kuberay", "NetworkPolicy")}
    [asking, rule] = policies["rh-roundhouse-dashboard"]["ingress"]
    [who] = asking["from"]
    assert who["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "controller"
    assert asking["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert rule["from"] == [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-system"}},
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
        }
    ]
    assert {port["port"] for port in rule["ports"]} == {8000, 8265}


def test_budgets_of_kuberays_pods_count_those_that_stay():
    budgets = {each["metadata"]["name"]: each["spec"] for each in of("kuberay", "PodDisruptionBudget")}
    assert budgets["rh-roundhouse-worker-cpu"]["minAvailable"] == 1
    assert budgets["rh-roundhouse-worker-gpu"]["minAvailable"] == 0
    words = ("--set-json", 'ray={"provider":"kuberay","workerGroups":{"cpu":{"replicas":8}}}')
    done = helm("helm", *words, "--set", "podDisruptionBudget.maxUnavailable=25%")
    [budget] = [each for each in yaml.safe_load_all(done.stdout) if each and each["kind"] == "PodDisruptionBudget"]
    assert budget["spec"]["minAvailable"] == 6


def test_the_definition_stays_where_it_is_asked_to():
    assert "--remove-crd" not in text("no-persistence")
    assert "--remove-crd" in text("default")
    [role] = of("no-persistence", "ClusterRole")
    assert [rule["verbs"] for rule in role["rules"]] == [["patch", "create"]]


SMALL = {"name": "a", "task": "forecast", "source": "hf:m/x"}


@pytest.mark.parametrize("program", HELMS)
@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"models": [SMALL, SMALL]}, "models: a is declared more than once"),
        ({"models": [SMALL | {"source": "file:weights"}]}, "models: a: source file:weights is relative"),
        (
            {"models": [SMALL | {"scaling": {"min_replicas": 3, "max_replicas": 2}}]},
            "models: a: scaling.max_replicas, 2, is below min_replicas, 3",
        ),
        (
            {"models": [SMALL | {"scaling": {"min_replicas": 3}}]},
            "models: a: scaling.max_replicas, 1, is below min_replicas, 3",
        ),
        (
            {"models": [SMALL | {"resources": {"gpus": 0.5}}]},
            "models: a: resources.gpus is 0.5 and no group of ray.workerGroups has GPUs; give one gpus: 1",
        ),
        (
            {"models": [SMALL | {"resources": {"gpus": 4}}], "ray.workerGroups.cpu.gpus": 2},
            "one replica takes 1 CPUs, 4 GPUs, any amount of memory, more than any worker has",
        ),
        (
            {"models": [SMALL | {"resources": {"cpus": 4}}]},
            "more than any worker has beside the gateway's 0.01 CPUs (cpu has 4 CPUs, 0 GPUs, 7600Mi beside Ray)",
        ),
        (
            {"models": [SMALL | {"resources": {"memory": "7601Mi"}}]},
            "one replica takes 1 CPUs, 0 GPUs, 7601Mi of memory, more than any worker has",
        ),
        ({"models": [SMALL | {"resources": {"memory": 2**34}}]}, "more than any worker has"),
        (
            {
                "models": [SMALL | {"resources": {"memory": "4Gi"}}],
                "ray.workerGroups.cpu.resources": {"limits": {"memory": "3G"}},
            },
            "cpu has 4 CPUs, 0 GPUs, 2269Mi beside Ray",
        ),
        ({"ray.workerGroups": {"cpu": {"replicas": 0}}}, "ray.workerGroups has no worker"),
        (
            {"ray.workerGroups.cpu": {"gpus": 2, "resources": {"limits": {"nvidia.com/gpu": 1}}}},
            "ray.workerGroups.cpu: resources.limits has 1 of nvidia.com/gpu and gpus, which Ray counts, is 2",
        ),
        (
            {"ray.workerGroups.cpu": {"resources": {"requests": {"nvidia.com/gpu": "1"}}}},
            "resources.requests has 1 of nvidia.com/gpu and gpus, which Ray counts, is 0",
        ),
        ({"fullnameOverride": "My_models"}, 'every object\'s name would begin with "My_models"'),
        ({"fullnameOverride": "1st"}, "set fullnameOverride to such a name"),
        ({"nameOverride": "a.b"}, "set fullnameOverride to such a name"),
        (
            {"commonLabels": {"app.kubernetes.io/instance": "mine"}},
            "commonLabels has app.kubernetes.io/instance, by which the chart finds its own objects",
        ),
        ({"commonLabels": {"roundhouse.dev/ray-node": "false"}}, "commonLabels has roundhouse.dev/ray-node"),
        ({"extraEnv": [{"name": "RAY_AUTH_MODE", "value": "disabled"}]}, "extraEnv has RAY_AUTH_MODE"),
        ({"extraEnv": [{"name": "RAY_AUTH_TOKEN", "value": "mine"}]}, "extraEnv has RAY_AUTH_TOKEN"),
        ({"extraEnv": [{"name": "RAY_gcs_storage", "value": "memory"}]}, "extraEnv has RAY_gcs_storage, by which"),
        ({"extraEnv": [{"value": "1"}]}, 'extraEnv has an entry without a name, {"value":"1"}'),
        ({"extraEnv": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}, "extraEnv has A twice"),
        ({"extraEnv": [{"name": "RAY_AUTH_TOKEN_PATH", "value": "/a"}]}, "extraEnv has RAY_AUTH_TOKEN_PATH"),
        ({"podDisruptionBudget.maxUnavailable": "0%"}, "podDisruptionBudget.maxUnavailable is 0%: no node"),
        (
            {"gcs.persistence": {"enabled": False, "existingClaim": "mine"}},
            "gcs.persistence.existingClaim is mine and gcs.persistence.enabled is false",
        ),
        (
            {
                "ray.provider": "kuberay",
                "ray.kuberay.autoscaling.enabled": False,
                "ray.workerGroups.cpu.maxReplicas": 4,
            },
            "ray.workerGroups.cpu: maxReplicas, 4, is above replicas, 2, and ray.kuberay.autoscaling.enabled is false",
        ),
        ({"models": [SMALL | {"device": "cuda"}]}, "models: a: device is cuda and resources.gpus is 0"),
        (
            {"models": [SMALL | {"device": "cpu", "resources": {"gpus": 1}}], "ray.workerGroups.cpu.gpus": 1},
            "models: a: resources.gpus is 1 and device is cpu",
        ),
        (
            {"models": [SMALL | {"resources": {"gpus": 1.5}}], "ray.workerGroups.cpu.gpus": 2},
            "models: a: resources.gpus is 1.5, and an amount above 1 is whole",
        ),
        (
            {"models": [SMALL | {"objectives": {"latency_ms": 70000}}]},
            "models: a: objectives.latency_ms, 70000, is above deadline_ms, 60000",
        ),
        ({"monitoring.podMonitor.enabled": True}, "monitoring.enabled is false, so Ray's pods tell nothing"),
        (
            {"monitoring": {"enabled": True, "podMonitor": {"enabled": True}}},
            "networkPolicy.metricsFrom is empty, so no Prometheus is let in",
        ),
        ({"gateway.replicas": 3}, "gateway.replicas is 3 and there are 2 workers at most"),
        (
            {"ray.provider": "kuberay", "ray.workerGroups.cpu.maxReplicas": 4, "gateway.replicas": 5},
            "gateway.replicas is 5 and there are 4 workers at most",
        ),
        ({"ray.workerGroups.cpu.maxReplicas": 5}, "maxReplicas is for ray.provider kuberay"),
        (
            {"ray.provider": "kuberay", "ray.workerGroups.cpu.maxReplicas": 1},
            "ray.workerGroups.cpu: maxReplicas, 1, is below replicas, 2",
        ),
        (
            {"ray.provider": "kuberay", "gcs.persistence.existingClaim": "mine"},
            "gcs.persistence.existingClaim would be written by two heads",
        ),
        ({"cache.type": "hostPath"}, "cache.hostPath is empty"),
        ({"cache.existingClaim": "mine"}, "set cache.type to pvc"),
        (
            {"cache": {"type": "pvc", "accessModes": ["ReadWriteOnce"]}},
            "cache.accessModes is ReadWriteOnce and there are up to 2 workers",
        ),
        (
            {
                "ray": {"provider": "kuberay", "workerGroups": {"cpu": {"replicas": 1, "maxReplicas": 3}}},
                "cache": {"type": "pvc", "accessModes": ["ReadWriteOncePod"]},
            },
            "cache.accessModes is ReadWriteOncePod and there are up to 3 workers",
        ),
        ({"cache.hostPath": "/models"}, "set cache.type to hostPath"),
        ({"ingress.enabled": True}, "ingress.host is empty"),
        ({"httpRoute.enabled": True}, "httpRoute.parentRefs is empty"),
        ({"service.nodePort": 30080}, "set service.type to NodePort"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:40],
)
def test_values_that_contradict_each_other_are_refused_in_a_sentence(program, values, sentence):
    assert sentence in refusal(values, program)


def test_what_to_do_when_it_does_not_go_names_what_is_there():
    page = (ROOT / "docs" / "cluster.md").read_text()
    names = {each["metadata"]["name"].replace(f"{NAMESPACE}-", "rh-") for each in objects("default")}
    named = {*re.findall(r"rh-roundhouse-[a-z]+[-a-z0-9]*|rh-rh-roundhouse-[a-z-]+", page)}
    assert named == {"rh-roundhouse-pre-delete", "rh-rh-roundhouse-hooks", "rh-roundhouse-head-0", "rh-roundhouse-gcs"}
    assert named - {"rh-roundhouse-head-0"} <= names
    assert only("default", "StatefulSet")["metadata"]["name"] == "rh-roundhouse-head"
    reconnect = environment(next(pods(of("default", "StatefulSet"))))["RAY_gcs_rpc_server_reconnect_timeout_s"]
    assert ("ten minutes" in page) == (reconnect == "600")


@pytest.mark.parametrize("program", HELMS)
def test_what_callers_are_told_has_no_slash_at_its_end(program):
    assert (
        "--public-url=https://models.example.com\n"
        in helm(program, "--set", "publicUrl=https://models.example.com/").stdout
    )


@pytest.mark.parametrize("program", HELMS)
def test_a_budget_that_is_turned_off_may_hold_anything(program):
    words = ("--set", "podDisruptionBudget.enabled=false", "--set", "podDisruptionBudget.maxUnavailable=0%")
    assert helm(program, *words).returncode == 0


@pytest.mark.parametrize("program", HELMS)
def test_workers_that_come_by_themselves_begin_with_one_gateway(program):
    words = ("--set-json", 'ray={"provider":"kuberay","workerGroups":{"cpu":{"replicas":0,"maxReplicas":3}}}')
    assert "--gateway-replicas=1\n" in helm(program, *words).stdout
    assert "--gateway-replicas=3\n" in helm(program, *words, "--set", "gateway.replicas=3").stdout


def test_the_notes_warn_of_workers_that_may_not_become_ready():
    assert "is not Ready" in notes("two-groups")
    assert "is not Ready" not in notes("default")


@pytest.mark.parametrize("program", HELMS)
def test_a_model_that_just_fits_is_taken(program):
    words = [
        "--set-json",
        'models=[{"name":"a","task":"forecast","source":"hf:m/x","resources":{"cpus":3.99,"memory":"7600Mi"}}]',
    ]
    assert helm(program, *words).returncode == 0
    whole = ["--set-json", 'models=[{"name":"a","task":"forecast","source":"hf:m/x","resources":{"cpus":4}}]']
    assert helm(program, *whole, "--set", "gateway.replicas=1").returncode == 0


@pytest.mark.parametrize("program", HELMS)
@pytest.mark.parametrize(("version", "taken"), [("1.30.9", False), ("1.31.0", True), ("1.40.0", True)])
def test_kubernetes_before_1_31_is_refused(program, version, taken):
    done = helm(program, version=version)
    assert (done.returncode == 0) is taken
    assert taken or f"needs Kubernetes 1.31 or newer; this is v{version}" in done.stderr
