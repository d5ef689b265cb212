"""Where replicas would go."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from serve.cli import main
from serve.cluster.plan import (
    CHART_GROUPS,
    GROUP_DEFAULTS,
    OBJECT_STORE_BYTES,
    RAY_BYTES,
    Worker,
    forecast,
    workers_of_nodes,
    workers_of_values,
)
from serve.errors import SpecError
from serve.spec import ModelSpec

CHART = Path(__file__).parents[2] / "charts" / "roundhouse"
GIB = 2**30
RAY = OBJECT_STORE_BYTES + RAY_BYTES


def model(name: str, *, least: int = 1, most: int | None = None, **resources: object) -> ModelSpec:
    return ModelSpec.model_validate(
        {
            "name": name,
            "task": "python",
            "source": "file:/m.py",
            "options": {"class": "M"},
            "scaling": {"min_replicas": least, "max_replicas": most or least},
            "resources": {"cpus": 1, **resources},
        }
    )


GPUS = st.sampled_from([0, 0.25, 0.3, 0.5, 0.7, 1, 2, 3])
CPUS = st.sampled_from([0.1, 0.5, 1, 2, 3.3])
MODELS = st.lists(st.tuples(GPUS, CPUS, st.integers(1, 100), st.integers(1, 3), st.integers(0, 3)), max_size=6).map(
    lambda rows: [
        model(f"m{n}", gpus=gpus, cpus=cpus, memory=memory, least=least, most=least + more)
        for n, (gpus, cpus, memory, least, more) in enumerate(rows)
    ]
)
GPU, AMD, MIG = "nvidia.com/gpu", "amd.com/gpu", "nvidia.com/mig-3g.40gb"
KINDS = st.dictionaries(st.sampled_from([GPU, AMD, MIG]), st.integers(0, 4))
WORKERS = st.lists(st.tuples(CPUS, st.integers(0, 300), KINDS), max_size=4).map(
    lambda rows: [Worker(f"w{n}", *row) for n, row in enumerate(rows)]
)


@given(MODELS, WORKERS)
def test_every_replica_is_placed_within_what_its_worker_has_or_explained(specs, workers):
    found = forecast(specs, workers)
    by_name = {spec.name: spec for spec in specs}
    cpus, memory = defaultdict(float), defaultdict(int)
    shares = defaultdict(list)
    for placed in found.placed:
        wanted = by_name[placed.model].resources
        cpus[placed.worker] += wanted.cpus
        memory[placed.worker] += wanted.memory
        assert len(set(placed.gpus)) == (wanted.gpus if wanted.gpus >= 1 else bool(wanted.gpus))
        for gpu in placed.gpus:
            shares[placed.worker, placed.kind, gpu].append(min(wanted.gpus, 1))
    for worker in workers:
        assert cpus[worker.name] <= worker.cpus + 1e-9
        assert memory[worker.name] <= worker.memory
        assert all(gpu < worker.gpus[kind] for name, kind, gpu in shares if name == worker.name)
    for parts in shares.values():
        assert sum(parts) <= 1 + 1e-9
        assert 1 not in parts or len(parts) == 1
    told = sorted((one.model, one.replica) for one in (*found.placed, *found.unplaced))
    assert told == sorted((s.name, n) for s in specs for n in range(1, s.scaling.max_replicas + 1))
    assert all(one.lacking and all(amount > 0 for amount in one.lacking.values()) for one in found.unplaced)
    assert forecast(specs, workers) == found


def test_shares_fill_one_gpu_before_another_is_opened():
    found = forecast(
        [model("a", gpus=0.5), model("b", gpus=0.5)], [Worker("x", 8, 0, {GPU: 2}), Worker("y", 8, 0, {GPU: 2})]
    )
    assert [(one.worker, one.gpus) for one in found.placed] == [("x", (0,)), ("x", (0,))]


def test_replicas_without_a_gpu_are_spread():
    found = forecast([model("a", least=2)], [Worker("x", 8, 0, {}), Worker("y", 8, 0, {})])
    assert [one.worker for one in found.placed] == ["x", "y"]


def test_what_is_always_there_comes_before_what_load_would_add():
    found = forecast([model("a", most=3), model("b")], [Worker("x", 2.5, 0, {})])
    assert [(one.model, one.replica) for one in found.placed] == [("a", 1), ("b", 1)]
    assert [(one.model, one.replica, one.least) for one in found.unplaced] == [("a", 2, False), ("a", 3, False)]


def test_the_missing_amount_is_of_the_worker_that_comes_nearest():
    (waits,) = forecast([model("a", gpus=2, cpus=4)], [Worker("x", 1, 0, {}), Worker("y", 8, 0, {GPU: 1})]).unplaced
    assert (waits.nearest, waits.lacking) == ("y", {"GPU": 1.0})


def node(name, gpus=None, memory="16Gi", **spec):
    room = {"cpu": "3900m", "memory": memory, **({"nvidia.com/gpu": "2"} if gpus is None else gpus)}
    return {"metadata": {"name": name}, "spec": spec, "status": {"allocatable": room}}


def test_nodes_that_take_no_pods_are_left_out():
    control = {"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}
    gpu = {"key": "nvidia.com/gpu", "effect": "NoSchedule"}
    nodes = [node("a", taints=[gpu]), node("b", unschedulable=True), node("c", taints=[control])]
    assert workers_of_nodes({"items": nodes}) == [Worker("a", 3.9, 16 * GIB - RAY, {GPU: 2})]


@pytest.mark.parametrize(
    ("gpus", "kinds"),
    [
        (
            {"nvidia.com/mig-1g.5gb": "7", "nvidia.com/mig-3g.20gb": "1", "nvidia.com/gpu": "0"},
            {"nvidia.com/mig-1g.5gb": 7, "nvidia.com/mig-3g.20gb": 1},
        ),
        ({AMD: 4}, {AMD: 4}),
        ({"nvidia.com/gpu.shared": "4"}, {"nvidia.com/gpu.shared": 4}),
        ({"nvidia.com/gpumem": "40", "hugepages-2Mi": "0"}, {}),
    ],
)
def test_gpus_of_every_device_plugin_are_counted_by_kind(gpus, kinds):
    taint = {"key": next(iter(gpus)), "effect": "NoSchedule"}
    workers = workers_of_nodes([node("a", gpus, taints=[taint] if kinds else [])])
    assert [worker.gpus for worker in workers] == [kinds]


def test_the_gpus_of_a_replica_are_of_one_kind():
    mixed = Worker("x", 8, 0, {GPU: 1, AMD: 2})
    (waits,) = forecast([model("a", gpus=3)], [mixed]).unplaced
    assert waits.lacking == {"GPU": 1.0}
    found = forecast([model("a", gpus=2), model("b", gpus=1)], [mixed])
    assert [(one.model, one.kind, one.gpus) for one in found.placed] == [("a", AMD, (0, 1)), ("b", GPU, (0,))]


def test_the_kind_of_which_least_is_left_is_taken_first():
    found = forecast([model("b", gpus=1), model("a", gpus=2)], [Worker("x", 8, 0, {AMD: 2, GPU: 1})])
    assert [(one.model, one.kind) for one in found.placed] == [("b", GPU), ("a", AMD)]


@pytest.mark.parametrize(
    ("written", "size"),
    [("7e9", 7 * 10**9), ("7E9", 7 * 10**9), ("1.5e+10", 15 * 10**9), ("1E", 10**18), ("8000000000000m", 8 * 10**9)],
)
def test_quantities_are_those_of_kubernetes(written, size):
    (worker,) = workers_of_nodes([node("a", memory=written)])
    assert worker.memory == size - RAY


@pytest.mark.parametrize("written", ["lots", "7e", "7e9Gi", "-1", "1e1000000000"])
def test_what_is_no_quantity_is_refused(written):
    with pytest.raises(SpecError, match="is no quantity"):
        workers_of_nodes([node("a", memory=written)])


def group(**given):
    return {"ray": {"workerGroups": {"cpu": given}}}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (group(cpus=float("inf")), "ray.workerGroups.cpu.cpus: inf is not a number above 0"),
        (group(cpus=float("nan")), "ray.workerGroups.cpu.cpus: nan"),
        (group(cpus="many"), "ray.workerGroups.cpu.cpus: 'many'"),
        (group(gpuResource=7), "ray.workerGroups.cpu.gpuResource: 7 is no text"),
        (group(gpus=0.5), "ray.workerGroups.cpu.gpus: 0.5 is not a whole number"),
        (group(replicas=float("inf")), "ray.workerGroups.cpu.replicas: inf"),
        (group(replicas=10**12), "ray.workerGroups.cpu.replicas: 1000000000000"),
        (group(memory="lots"), "ray.workerGroups.cpu.memory: 'lots' is no quantity"),
        (group(resources={"limits": {"memory": ".inf"}}), "ray.workerGroups.cpu.resources.limits.memory: '.inf'"),
        (group(maxReplicas=4), "ray.workerGroups.cpu.maxReplicas: 4 is above replicas, 2, and only KubeRay"),
        ({"ray": {"provider": "kuberay", **group(maxReplicas=1)["ray"]}}, "maxReplicas: 1 is below replicas, 2"),
        ({"ray": {"workerGroups": {"cpu": 3}}}, "ray.workerGroups.cpu: 3 is not a mapping"),
        ({"ray": ["cpu"]}, "ray: \\['cpu'\\] is not a mapping"),
        ([], "the values: \\[\\] is not a mapping"),
        ({"gateway": {"replicas": -1}}, "gateway.replicas: -1"),
    ],
)
def test_values_that_the_chart_would_not_take_are_refused_by_their_place(values, said):
    with pytest.raises(SpecError, match=said):
        workers_of_values(values)


def test_what_the_values_leave_out_is_what_the_chart_sets():
    two = [Worker("cpu-0", 4.0, 8 * GIB - RAY, {}), Worker("cpu-1", 4.0, 8 * GIB - RAY, {})]
    assert workers_of_values(None) == workers_of_values({}) == two
    assert workers_of_values(group(replicas=2)) == workers_of_values(group(cpus=None, gpus=0)) == two[:2]
    assert workers_of_values(group(replicas=None)) == [Worker("cpu-0", 4.0, 8 * GIB - RAY, {})]
    assert workers_of_values({"ray": {"workerGroups": {"cpu": None, "gpu": {"gpus": 1}}}}) == [
        Worker("gpu-0", 4.0, 8 * GIB - RAY, {GPU: 1})
    ]
    assert workers_of_values({"ray": {"workerGroups": None}}) == []


def test_the_defaults_are_the_charts():
    from charts.values import WorkerGroup

    groups = yaml.safe_load((CHART / "values.yaml").read_text())["ray"]["workerGroups"]
    assert groups.keys() == CHART_GROUPS.keys()
    for name, expected in CHART_GROUPS.items():
        assert {key: groups[name][key] for key in expected} == expected
    defaults = {field.alias: field.default for field in WorkerGroup.model_fields.values()}
    assert {key: defaults[key] for key in GROUP_DEFAULTS} == GROUP_DEFAULTS
    helpers = (CHART / "templates" / "_helpers.tpl").read_text()
    assert re.search(r'dict "replicas" 1 "cpus" 4 "memory" "8Gi" "gpus" 0 ', helpers)
    assert str(OBJECT_STORE_BYTES) in helpers


def test_kuberay_may_add_workers_up_to_the_most():
    scaled = group(replicas=0, maxReplicas=4)["ray"] | {"provider": "kuberay"}
    assert len(workers_of_values({"ray": scaled})) == 4
    with pytest.raises(SpecError, match="maxReplicas: 4 is above replicas, 0"):
        workers_of_values({"ray": scaled | {"kuberay": {"autoscaling": {"enabled": False}}}})


def test_the_limit_of_a_pod_is_its_memory():
    (worker,) = workers_of_values(group(replicas=1, memory="1Gi", resources={"limits": {"memory": "2Gi"}}))
    assert worker.memory == 2 * GIB - RAY


def test_only_as_many_workers_as_there_are_gateways_give_one_a_share():
    values = group(cpus=2) | {"gateway": {"replicas": 1}}
    found = forecast([model("a", least=2, cpus=2)], workers_of_values(values))
    assert [(one.model, one.worker) for one in found.placed] == [("a", "cpu-1")]
    assert [one.lacking for one in found.unplaced] == [{"CPU": 0.01}]
    small = {"ray": {"workerGroups": {"cpu": {"replicas": 1}, "b": {"cpus": 1}}}, "gateway": {"replicas": 1}}
    assert [worker.has_gateway for worker in workers_of_values(small)] == [False, True]


def test_a_model_that_asks_for_all_of_a_workers_memory_does_not_fit_beside_ray():
    workers = workers_of_values(group(replicas=1))
    (waits,) = forecast([model("a", memory="8Gi")], workers).unplaced
    assert waits.lacking == {"memory": RAY}
    assert not forecast([model("a", memory=8 * GIB - RAY)], workers).unplaced


def test_the_command_fails_where_something_does_not_fit(tmp_path, capsys):
    (tmp_path / "m.yaml").write_text(
        "models: [{name: a, task: python, source: 'file:/m.py', options: {class: M}, resources: {cpus: 3}}]"
    )
    values = tmp_path / "v.yaml"
    values.write_text("ray: {workerGroups: {cpu: {replicas: 1, cpus: 2, memory: 1Gi}}}")
    asked = ["plan", "-f", str(tmp_path / "m.yaml"), "--values", str(values)]
    assert main(asked) == 1
    assert "lacks 1.01 CPU on cpu-0" in capsys.readouterr().out
    values.write_text("ray: {workerGroups: {cpu: {replicas: 1, cpus: 4, memory: 1Gi}}}")
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["placed"][0]["worker"] == "cpu-0"


def test_the_command_tells_the_kinds_of_gpus_apart(tmp_path, capsys):
    (tmp_path / "m.yaml").write_text(
        "models: [{name: a, task: python, source: 'file:/m.py', options: {class: M}, resources: {gpus: 1}},"
        " {name: b, task: python, source: 'file:/m.py', options: {class: M}, resources: {gpus: 2}}]"
    )
    (tmp_path / "n.json").write_text(json.dumps({"items": [node("x", {GPU: "1", AMD: "1"})]}))
    assert main(["plan", "-f", str(tmp_path / "m.yaml"), "--nodes", str(tmp_path / "n.json")]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split() == ["a", "1", "x", "0", GPU]
    assert printed[2].startswith("b replica 1 does not fit: lacks 1 GPU on x")


def test_the_command_says_what_ray_takes_of_the_memory(tmp_path, capsys):
    (tmp_path / "m.yaml").write_text(
        "models: [{name: a, task: python, source: 'file:/m.py', options: {class: M}, resources: {memory: 8Gi}}]"
    )
    (tmp_path / "v.yaml").write_text("")
    assert main(["plan", "-f", str(tmp_path / "m.yaml"), "--values", str(tmp_path / "v.yaml")]) == 1
    printed = capsys.readouterr().out
    assert "a replica 1 does not fit: lacks 592 MiB of memory on cpu-0" in printed
    assert "Ray itself takes 592 MiB of memory of each worker" in printed
