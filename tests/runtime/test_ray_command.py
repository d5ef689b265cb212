"""Ray's command as the image has it; that its nodes fork their workers is seen on a cluster (tests/cluster)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from ray import _raylet
from ray._private import node, parameter, services

from serve.runtime import ray_command

COMMAND = [sys.executable, "-c", "from serve.runtime.ray_command import main; main()"]


def ray(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(
        [*COMMAND, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_it_is_rays_own():
    assert ", version 2.60" in ray("--version").stdout


def test_a_setting_that_is_wrong_is_told_in_a_line_and_leaves_nothing(tmp_path: Path):
    before = set(Path("/tmp").glob("rh-*"))
    told = ray("start", "--head", "--block", ROUNDHOUSE_LOG_LEVL="debug")
    assert told.returncode == 1
    assert told.stderr.startswith("ray: ROUNDHOUSE_LOG_LEVL")
    assert "Traceback" not in told.stderr
    assert set(Path("/tmp").glob("rh-*")) <= before


def test_a_worker_waits_for_its_head_before_it_starts_anything():
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{head.getsockname()[1]}"
        worker = subprocess.Popen(
            [*COMMAND, "start", f"--address={address}", "--block"], stderr=subprocess.PIPE, text=True
        )
        try:
            assert worker.stderr is not None
            told = worker.stderr.readline()
            assert told.startswith(f"Ray's head at {address} does not answer: ")
            assert told.endswith("; waiting for it\n")
            head.listen()
            head.settimeout(60)
            head.accept()[0].close()
        finally:
            worker.kill()
            worker.communicate()


def test_a_node_that_has_not_joined_yet_is_asked_for_again(monkeypatch: pytest.MonkeyPatch):
    answers = iter([RuntimeError("Deadline Exceeded"), RuntimeError("no such node"), {"node_id": "abc"}])

    def get_node(_address: str, _node: str) -> dict[str, str]:
        answer = next(answers)
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    monkeypatch.setattr(services, "get_node", get_node)
    monkeypatch.setattr(ray_command, "_POLL_S", 0.0)
    with ray_command._patience():
        assert services.get_node("head:6379", "abc") == {"node_id": "abc"}
    assert services.get_node is get_node


def test_a_node_that_does_not_join_is_told_as_ray_tells_it(monkeypatch: pytest.MonkeyPatch):
    def get_node(_address: str, _node: str) -> None:
        raise RuntimeError("no such node")

    monkeypatch.setattr(services, "get_node", get_node)
    monkeypatch.setattr(ray_command, "_JOIN_S", 0.0)
    with ray_command._patience(), pytest.raises(RuntimeError, match="no such node"):
        services.get_node("head:6379", "abc")


def test_a_node_whose_raylet_has_ended_is_not_waited_for_and_says_what_it_said_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    raylet = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    raylet.wait()
    (tmp_path / "raylet.out").write_text("[I] one\n[C] the port is taken\n/raylet(+0x23) main\n")

    class Node:
        """What Ray's own has of this once it has started its raylet."""

        all_processes: ClassVar[dict[str, object]] = {"raylet": [SimpleNamespace(process=raylet)]}
        _logs_dir = _session_dir = str(tmp_path)
        _node_id = "a" * 56
        _ray_params = parameter.RayParams()

        def start_raylet(self) -> None:
            """Started above."""

    def get_node(_address: str, _node: str) -> None:
        raise RuntimeError("no such node")

    monkeypatch.setattr(node, "Node", Node)
    monkeypatch.setattr(services, "get_node", get_node)
    with ray_command._patience():
        Node().start_raylet()
        with pytest.raises(ray_command.RayletEnded, match="status 3 before the node had joined") as told:
            services.get_node("head:6379", "abc")
    assert str(told.value).endswith("\n[I] one\n[C] the port is taken")


def test_a_raylet_knows_the_ports_that_are_given_before_its_agents_have_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read: dict[str, int] = {}

    class Node:
        """What Ray's own has of this when it starts its raylet."""

        _session_dir, _node_id = str(tmp_path), "a" * 56
        all_processes: ClassVar[dict[str, object]] = {}
        _ray_params = parameter.RayParams(runtime_env_agent_port=6382, dashboard_agent_listen_port=6384)

        def start_raylet(self) -> None:
            for name in (_raylet.RUNTIME_ENV_AGENT_PORT_NAME, _raylet.DASHBOARD_AGENT_LISTEN_PORT_NAME):
                read[name] = _raylet.wait_for_persisted_port(self._session_dir, self._node_id, name)

    monkeypatch.setattr(node, "Node", Node)
    with ray_command._patience():
        Node().start_raylet()
    assert list(read.values()) == [6382, 6384]
