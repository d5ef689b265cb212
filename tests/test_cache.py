"""What several processes build once appears whole or not at all, whoever dies."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from serve.cache import CacheFull, build_once

PARTS = 20
spawn = multiprocessing.get_context("spawn")


def fill(folder: Path) -> None:
    """Write parts that name the building process, and leave a mark outside that this process built."""
    for number in range(PARTS):
        (folder / f"part-{number}").write_text(str(os.getpid()))
    (folder.parent / f"built-by-{os.getpid()}").touch()


def race(cache_dir: Path, barrier: Barrier) -> None:
    barrier.wait()
    folder = build_once(cache_dir, "weights", fill)
    assert len(list(folder.iterdir())) == PARTS


def die_halfway(cache_dir: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "part-0").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    build_once(cache_dir, "weights", build)


def run(target, *arguments) -> multiprocessing.Process:
    process = spawn.Process(target=target, args=arguments)
    process.start()
    return process


def test_racing_processes_build_once_and_all_see_it_whole(tmp_path: Path):
    barrier = spawn.Barrier(4)
    processes = [run(race, tmp_path, barrier) for _ in range(4)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    (mark,) = tmp_path.glob("built-by-*")
    writers = {part.read_text() for part in (tmp_path / "weights").iterdir()}
    assert writers == {mark.name.removeprefix("built-by-")}


def test_a_builder_that_is_killed_leaves_nothing_complete_and_nothing_behind(tmp_path: Path):
    killed = run(die_halfway, tmp_path)
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert not (tmp_path / "weights").exists()

    folder = build_once(tmp_path, "weights", fill)
    assert {part.read_text() for part in folder.iterdir()} == {str(os.getpid())}
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"weights", ".weights.lock", f"built-by-{os.getpid()}"}


def test_a_waiting_process_builds_when_the_builder_is_killed(tmp_path: Path):
    """The first holds the lock until it is killed, while another already waits for it."""
    holding = spawn.Event()
    holder = run(hold, tmp_path, holding)
    assert holding.wait(60)
    barrier = spawn.Barrier(2)
    waiter = run(race, tmp_path, barrier)
    barrier.wait(60)
    holder.kill()
    waiter.join(60)
    holder.join(60)
    assert waiter.exitcode == 0
    assert len(list((tmp_path / "weights").iterdir())) == PARTS


def hold(cache_dir: Path, holding) -> None:
    def build(folder: Path) -> None:
        (folder / "part-0").write_text("half")
        holding.set()
        signal.pause()

    build_once(cache_dir, "weights", build)


def test_a_builder_that_raises_leaves_nothing_and_the_next_one_builds(tmp_path: Path):
    def fail(folder: Path) -> None:
        (folder / "part-0").write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        build_once(tmp_path, "a/weights", fail)
    assert {path.name for path in (tmp_path / "a").iterdir()} <= {".weights.lock"}
    assert len(list(build_once(tmp_path, "a/weights", fill).iterdir())) == PARTS


def test_a_full_disk_names_the_cache_and_leaves_nothing(tmp_path: Path):
    def overflow(folder: Path) -> None:
        (folder / "part").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(
        CacheFull, match=rf"the cache {tmp_path} is full: \d+ MB were left when weights/one was removed"
    ):
        build_once(tmp_path, "weights/one", overflow)
    assert [path.name for path in (tmp_path / "weights").iterdir()] == [".one.lock"]


def test_what_is_complete_is_not_built_again(tmp_path: Path):
    build_once(tmp_path, "weights", fill)

    def never(folder: Path) -> None:
        raise AssertionError("built twice")

    assert build_once(tmp_path, "weights", never) == tmp_path / "weights"


def test_keys_that_share_a_beginning_do_not_disturb_each_other(tmp_path: Path):
    def build(folder: Path) -> None:
        (folder / "outer").touch()
        build_once(tmp_path, "model.v2", lambda inner: (inner / "inner").touch())
        assert (folder / "outer").exists()

    assert (build_once(tmp_path, "model", build) / "outer").exists()
    assert (tmp_path / "model.v2" / "inner").exists()
