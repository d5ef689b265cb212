"""Where replicas would go."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.cli import main
from serve.cluster.plan import Worker, forecast, workers_of_nodes, workers_of_values
from serve.errors import SpecError
from serve.spec import ModelSpec


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
WORKERS = st.lists(st.tuples(CPUS, st.integers(0, 300), st.integers(0, 4)), max_size=4).map(
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
            shares[placed.worker, gpu].append(min(wanted.gpus, 1))
    for worker in workers:
        assert cpus[worker.name] <= worker.cpus + 1e-9
        assert memory[worker.name] <= worker.memory
        assert all(gpu < worker.gpus for name, gpu in shares if name == worker.name)
    for parts in shares.values():
        assert sum(parts) <= 1 + 1e-9
        assert 1 not in parts or len(parts) == 1
    told = sorted((one.model, one.replica) for one in (*found.placed, *found.unplaced))
    assert told == sorted((s.name, n) for s in specs for n in range(1, s.scaling.max_replicas + 1))
    assert all(one.lacking and all(amount > 0 for amount in one.lacking.values()) for one in found.unplaced)
    assert forecast(specs, workers) == found


def test_shares_fill_one_gpu_before_another_is_opened():
    found = forecast([model("a", gpus=0.5), model("b", gpus=0.5)], [Worker("x", 8, 0, 2), Worker("y", 8, 0, 2)])
    assert [(one.worker, one.gpus) for one in found.placed] == [("x", (0,)), ("x", (0,))]


def test_replicas_without_a_gpu_are_spread():
    found = forecast([model("a", least=2)], [Worker("x", 8, 0, 0), Worker("y", 8, 0, 0)])
    assert [one.worker for one in found.placed] == ["x", "y"]


def test_what_is_always_there_comes_before_what_load_would_add():
    found = forecast([model("a", most=3), model("b")], [Worker("x", 2.5, 0, 0)])
    assert [(one.model, one.replica) for one in found.placed] == [("a", 1), ("b", 1)]
    assert [(one.model, one.replica, one.least) for one in found.unplaced] == [("a", 2, False), ("a", 3, False)]


def test_the_missing_amount_is_of_the_worker_that_comes_nearest():
    (waits,) = forecast([model("a", gpus=2, cpus=4)], [Worker("x", 1, 0, 0), Worker("y", 8, 0, 1)]).unplaced
    assert (waits.nearest, waits.lacking) == ("y", {"GPU": 1.0})


def test_nodes_that_take_no_pods_are_left_out():
    def node(name, **spec):
        room = {"cpu": "3900m", "memory": "2Ki", "nvidia.com/gpu": "2"}
        return {"metadata": {"name": name}, "spec": spec, "status": {"allocatable": room}}

    control = {"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}
    gpu = {"key": "nvidia.com/gpu", "effect": "NoSchedule"}
    nodes = [node("a", taints=[gpu]), node("b", unschedulable=True), node("c", taints=[control])]
    assert workers_of_nodes({"items": nodes}) == [Worker("a", 3.9, 2048, 2)]


@pytest.mark.parametrize("values", [None, {}, {"ray": {"workerGroups": {"a": {"cpus": 1, "memory": "lots"}}}}])
def test_values_without_worker_groups_are_refused(values):
    with pytest.raises(SpecError, match="worker groups"):
        workers_of_values(values)


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
