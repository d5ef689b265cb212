"""A process that has imported what every worker needs and forks, because each worker would import for seconds.

Ray's controller, its proxies and every replica are workers of the same node. Forked from here they start in a tenth of
a second instead of several, and share the imported pages. Linux only; nothing here starts a thread before a fork, which
`serve` checks.
"""

from __future__ import annotations

import array
import contextlib
import functools
import gc
import importlib
import importlib.util
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from serve.runtime.launcher import FORKED, SCRIPT_VARIABLE, SOCKET_VARIABLE, send_order
from serve.runtime.setup_worker import SCRIPT_VARIABLE as SETUP_VARIABLE

#: Elsewhere system libraries do not survive a fork.
CAN_FORK = sys.platform == "linux"

LAUNCHER = Path(__file__).with_name("launcher.py")
_SETUP = Path(__file__).with_name("setup_worker.py")

# What Ray imports itself, and what replicas need, as far as it can be had before Ray is.
_BEFORE_RAY = (
    "numpy",
    "grpc",
    "requests",
    "jsonschema",
    "aiohttp",
    "uvicorn.main",
    "serve.api.gateway_app",
    "serve.host",
)
_RAY = (
    "ray.serve._private.controller",
    "ray.serve._private.haproxy",
    "ray.serve._private.proxy",
    "ray.serve._private.replica",
    "serve.runtime.fallback",
    "serve.runtime.replica",
)
# Ray's core reads these once, when it is imported; they are the same for every worker of one node and driver.
_READ_ONCE = ("RAY_JOB_ID", "RAY_RAYLET_PID")
_FIRST_JOB = "01000000"
_PAUSE_S = 1.0


def start(folder: Path, *, modules: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a fork server whose socket is in `folder`, and name it in the environment for the launchers.

    Args:
        folder: Of a short path: Unix sockets allow about a hundred bytes.
        modules: To import besides, while nobody waits for a fork.
    """
    address = folder / "fork"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen(64)
    os.environ[SOCKET_VARIABLE] = str(address)
    os.environ[SCRIPT_VARIABLE] = _rays("default_worker.py")
    os.environ[SETUP_VARIABLE] = _rays("setup_worker.py")
    with listener, (folder / "fork.log").open("wb") as log:
        return subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "serve.runtime.fork_server", str(listener.fileno()), str(os.getpid()), *modules],
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


@contextlib.contextmanager
def employed() -> Iterator[None]:
    """Have the raylet that is started here take its workers from this process's fork server.

    Neither `ray.init` nor `ray start` has an argument for it; Ray 2.60's private node and parameters have.
    """
    from ray._private import node, parameter

    params, start_raylet = parameter.RayParams, node.Node.start_raylet

    def start_and_announce(self: Any, *arguments: Any, **named: Any) -> None:
        start_raylet(self, *arguments, **named)
        _announce(self.all_processes["raylet"][0].process.pid)

    node.Node.start_raylet = start_and_announce
    parameter.RayParams = functools.partial(params, worker_path=str(LAUNCHER), setup_worker_path=str(_SETUP))
    try:
        yield
    finally:
        parameter.RayParams, node.Node.start_raylet = params, start_raylet


def _rays(script: str) -> str:
    """Return what Ray would have started, found without importing Ray."""
    found = importlib.util.find_spec("ray")
    if found is None or found.origin is None:
        raise ImportError("Ray is not installed")
    return str(Path(found.origin).with_name("_private") / "workers" / script)


def _announce(raylet_pid: int) -> None:
    """Let the fork server of this process import Ray, now that the raylet is known, before anybody asks for a fork."""
    order = {"environment": {"RAY_JOB_ID": _FIRST_JOB, "RAY_RAYLET_PID": str(raylet_pid)}}
    # Where it has died, each worker is started as Ray starts it.
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
        connection.connect(os.environ[SOCKET_VARIABLE])
        send_order(connection, order)


def serve(listener: socket.socket, *, parent: int, modules: Sequence[str]) -> None:
    """Fork a worker for each launcher that connects, until the parent ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    waiting = [*_BEFORE_RAY, *modules]
    while os.getppid() == parent:
        # The models' own modules are large: they wait for a pause in which no fork is likely to be asked for.
        is_early = len(waiting) > len(modules)
        ready, _, _ = select.select([listener], [], [], 0 if is_early else _PAUSE_S)
        if ready:
            connection, _ = listener.accept()
            with connection:
                _obey(listener, connection)
        elif is_early or (waiting and "ray" in sys.modules):
            with contextlib.suppress(Exception):  # the replica that needs it will say so
                importlib.import_module(waiting.pop(0))


def _obey(listener: socket.socket, connection: socket.socket) -> None:
    try:
        order, streams = _receive(connection)
    except (OSError, ValueError):
        return  # the launcher died; the raylet asks again
    _import_ray(order["environment"])
    if "arguments" in order:
        _fork(listener, connection, order, streams)


def _import_ray(environment: dict[str, str]) -> None:
    if "ray" not in sys.modules:
        os.environ.update({name: environment[name] for name in _READ_ONCE if name in environment})
        _leave_unseeded()
        for name in _RAY:
            importlib.import_module(name)


def _leave_unseeded() -> None:
    """Have Ray name its actor classes from the system's randomness while they are imported.

    Ray's core draws identifiers from one pool a process, seeded when first used. Forks would inherit it seeded, all
    draw the same identifiers, and the node would fall apart. Importing draws from it for nothing else.
    """
    import ray.actor
    from ray._raylet import ActorClassID

    class Unseeded:
        @staticmethod
        def from_random() -> ActorClassID:
            return ActorClassID(os.urandom(ActorClassID.size()))

    ray.actor.ActorClassID = Unseeded


def _fork(listener: socket.socket, connection: socket.socket, order: dict[str, Any], streams: Sequence[int]) -> None:
    if threading.active_count() != 1:
        raise RuntimeError(f"a library started a thread before a fork: {threading.enumerate()}")
    gc.freeze()
    try:
        forked = os.fork()
    except OSError:  # there may be no more processes; the launcher hears of no fork, and starts the worker itself
        forked = -1
    if forked == 0:
        listener.close()
        _become(order, streams, connection)
        sys.exit()
    for stream in streams:
        os.close(stream)
    if forked > 0:
        with contextlib.suppress(OSError):
            connection.sendall(FORKED)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], Sequence[int]]:
    streams = array.array("i")
    size = streams.itemsize * 3
    head, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(size))
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            streams.frombytes(data[:size])
    with connection.makefile("rb") as reader:
        body = reader.read(int.from_bytes(head, "little"))
    return json.loads(body), streams


def _become(order: dict[str, Any], streams: Sequence[int], connection: socket.socket) -> None:
    """Turn this fork into the worker that the launcher was asked for; returns when the worker has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)
    os.chdir(order["folder"])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    known = {name: os.environ.get(name) for name in _READ_ONCE}
    os.environ.clear()
    os.environ.update(order["environment"])

    script = order["environment"][SCRIPT_VARIABLE]
    if known != {name: os.environ.get(name) for name in _READ_ONCE}:
        os.execv(sys.executable, [sys.executable, script, *order["arguments"]])  # noqa: S606 - another driver's worker
    _reseed()
    # What ends this worker closes the connection before its last words are written: the watch has one of its own.
    threading.Thread(target=_end_with, args=(connection.dup(),), name="launcher", daemon=True).start()
    sys.argv = [script, *order["arguments"]]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _reseed() -> None:
    """Give this fork random numbers of its own; Python's and the system's are so already."""
    import numpy as np

    np.random.seed(int.from_bytes(os.urandom(4), "little"))


def _end_with(connection: socket.socket) -> None:
    """End this worker when its launcher is killed."""
    with contextlib.suppress(OSError):
        while connection.recv(1):
            pass
    os._exit(1)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), parent=int(sys.argv[2]), modules=sys.argv[3:])
