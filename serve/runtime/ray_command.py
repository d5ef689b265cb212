"""Ray's command as the image has it: nodes of `ray start --block` fork their workers, and are not given up early."""

from __future__ import annotations

import contextlib
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from serve.errors import RoundhouseError

# Less than the startup probes have, so that what Ray has to say is in the log before they end it.
_JOIN_S = 180.0
_POLL_S = 1.0
_CONNECT_S = 3.0
_LAST_LINES = 5


class RayletEnded(RoundhouseError):
    """What makes a node of this machine ended before it had joined; the message has its last words."""


def main() -> None:
    """Do what `ray` does."""
    is_node = sys.argv[1:2] == ["start"] and "--block" in sys.argv
    try:
        with _node(sys.argv[2:]) if is_node else contextlib.nullcontext():
            from ray.scripts import scripts

            scripts.main()
    except RoundhouseError as error:
        sys.exit(f"ray: {error}")


@contextlib.contextmanager
def _node(arguments: Sequence[str]) -> Iterator[None]:
    _await_head(arguments)
    # The fork server imports while this process does.
    with _forked_workers(), _patience():
        yield


def _await_head(arguments: Sequence[str]) -> None:
    """Wait until the head that a worker is to join can be reached.

    Ray gives up after some seconds, and the container would start again, and import all it needs again, on the cores
    that the head may be starting on.
    """
    address = next((word.removeprefix("--address=") for word in arguments if word.startswith("--address=")), "")
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # a head, or what Ray has words for
    told = False
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
            return
        except (ValueError, OverflowError):
            return  # no address, which Ray will say
        except OSError as error:
            if not told:
                sys.stderr.write(f"Ray's head at {address} does not answer: {error}; waiting for it\n")
                told = True
            time.sleep(_POLL_S)


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Let this node take its time to join.

    Ray 2.60's raylet ends unless its agents have imported and told their ports within fifteen seconds, and its command
    unless the raylet has joined within thirty. Where several nodes start on few cores none may, and they would start
    over and over. Neither time can be set; ports that are given are known before the agents tell them.
    """
    from ray._private import node, services

    get_node, start_raylet = services.get_node, node.Node.start_raylet
    started: list[Any] = []

    def get_node_in_time(*arguments: Any, **named: Any) -> Any:
        ends = time.monotonic() + _JOIN_S
        while True:
            try:
                return get_node(*arguments, **named)
            except RuntimeError:
                for each in started:
                    _fail_if_ended(each)
                if time.monotonic() > ends:
                    raise
                time.sleep(_POLL_S)

    def start_raylet_with_ports(self: Any, *arguments: Any, **named: Any) -> None:
        _tell_ports(self)
        start_raylet(self, *arguments, **named)
        started.append(self)

    services.get_node, node.Node.start_raylet = get_node_in_time, start_raylet_with_ports
    try:
        yield
    finally:
        services.get_node, node.Node.start_raylet = get_node, start_raylet


def _fail_if_ended(node: Any) -> None:
    """Raise RayletEnded where there is nothing to wait for."""
    for raylet in node.all_processes.get("raylet", ()):
        status = raylet.process.poll()
        if status is not None:
            log = Path(node._logs_dir) / "raylet.out"
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            last = [line for line in lines if line.startswith("[")][-_LAST_LINES:]  # and not the frames below them
            raise RayletEnded("\n".join([f"its raylet ended with status {status} before the node had joined", *last]))


def _tell_ports(node: Any) -> None:
    """Tell the raylet those ports of its agents that are given, in the files that the agents themselves write."""
    from ray import _raylet

    ray: Any = _raylet  # has no types
    ports = {
        ray.RUNTIME_ENV_AGENT_PORT_NAME: node._ray_params.runtime_env_agent_port,
        ray.DASHBOARD_AGENT_LISTEN_PORT_NAME: node._ray_params.dashboard_agent_listen_port,
    }
    for name, port in ports.items():
        if port:
            ray.persist_port(node._session_dir, node._node_id, name, port)


@contextlib.contextmanager
def _forked_workers() -> Iterator[None]:
    from serve.runtime import fork_server
    from serve.settings import Settings
    from serve.telemetry.export import exporter_modules

    modules = exporter_modules(Settings.from_environment())
    if not fork_server.CAN_FORK:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="rh-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        fork_server.start(Path(folder), modules=modules)
        with fork_server.employed():
            yield
