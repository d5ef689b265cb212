"""What changes between two declarations, and what a machine lacks for one."""

from hypothesis import given
from hypothesis import strategies as st

from serve.runtime.plan import diff, shortages
from serve.spec import ModelSpec, Resources, Scaling


def model(name: str, **fields: object) -> ModelSpec:
    return ModelSpec(name=name, task="python", source="file:x.py", options={"class": "X"}, **fields)  # type: ignore[arg-type]


def test_nothing_changes_when_nothing_changed():
    specs = [model("a"), model("b")]
    assert not diff({spec.name: spec for spec in specs}, list(specs))


def test_only_the_edited_model_is_deployed_again():
    running = {"a": model("a"), "b": model("b")}
    changes = diff(running, [model("a"), model("b", deadline_ms=5.0)])
    assert [spec.name for spec in changes.deploy] == ["b"]
    assert changes.remove == ()


names = st.lists(st.sampled_from("abcdef"), unique=True)


@given(names, names, st.sets(st.sampled_from("abcdef")))
def test_applying_the_difference_gives_what_is_wanted(before: list[str], after: list[str], edited: set[str]):
    running = {name: model(name) for name in before}
    wanted = [model(name, deadline_ms=1.0 if name in edited else 2.0) for name in after]
    changes = diff(running, wanted)
    for name in changes.remove:
        del running[name]
    running.update({spec.name: spec for spec in changes.deploy})
    assert running == {spec.name: spec for spec in wanted}


def test_models_share_cores_rather_than_wait_forever():
    specs = [model(name, resources=Resources(cpus=2.0, memory=2**30), scaling=Scaling(max_replicas=2)) for name in "ab"]
    cores, memory = shortages(specs, cpus=2, memory_bytes=2**30, gpus=0)
    assert "8 CPU cores" in cores
    assert "has 2" in cores
    assert "4.0 GiB" in memory
    assert "1.0 GiB" in memory


def test_a_gpu_that_is_not_there_is_told_with_who_waits():
    (note,) = shortages([model("a", resources=Resources(gpus=0.5)), model("b")], cpus=2, memory_bytes=2**30, gpus=0)
    assert "0.5 GPUs" in note
    assert "a may wait for ever" in note


def test_enough_room_needs_no_note():
    assert shortages([model("a", resources=Resources(gpus=1))], cpus=4, memory_bytes=2**30, gpus=1) == ()
