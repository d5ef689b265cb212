"""Workers that are forked must differ in what makes them different, and share what they may share."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks only where they are safe")

# Imports as the fork server does, then forks twice; each fork writes what it draws.
DRAW = """
import os
from serve.runtime import fork_server
fork_server._import_ray({"RAY_JOB_ID": "01000000", "RAY_RAYLET_PID": str(os.getpid())})
from ray._raylet import WorkerID
import threading
assert threading.active_count() == 1, threading.enumerate()
for _ in range(3):
    if os.fork() == 0:
        print(WorkerID.from_random().hex(), flush=True)
        os._exit(0)
    os.wait()
"""


def test_forks_draw_identifiers_of_their_own():
    environment = {**os.environ, "RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DRAW], capture_output=True, text=True, env=environment, timeout=120, check=True
    )
    drawn = [line for line in done.stdout.split() if len(line) == 56]
    assert len(drawn) == 3
    assert len(set(drawn)) == 3


def test_the_server_ends_with_its_parent(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from serve.runtime import fork_server\n"
        f"process = fork_server.start(Path({str(tmp_path)!r}), modules=[])\n"
        "print(process.pid)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    pid = int(done.stdout)
    import psutil

    try:
        psutil.Process(pid).wait(timeout=60)
    except psutil.NoSuchProcess:
        return


def test_without_a_server_a_worker_starts_as_ray_starts_it(tmp_path: Path):
    script = tmp_path / "worker.py"
    script.write_text("import sys; print('started with', sys.argv[1:])")
    from serve.runtime.fork_server import LAUNCHER
    from serve.runtime.launcher import SCRIPT_VARIABLE, SOCKET_VARIABLE

    environment = {**os.environ, SOCKET_VARIABLE: str(tmp_path / "nobody"), SCRIPT_VARIABLE: str(script)}
    done = subprocess.run(
        [sys.executable, str(LAUNCHER), "--a", "b"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=True,
    )
    assert "started with ['--a', 'b']" in done.stdout


def test_a_launcher_that_dies_does_not_end_the_server(tmp_path: Path):
    from serve.runtime import fork_server

    process = fork_server.start(tmp_path, modules=[])
    try:
        for junk in (b"", b"\xff" * 4, (3).to_bytes(8, "little") + b"{}x"):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(tmp_path / "fork"))
                connection.sendall(junk) if junk else None
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(tmp_path / "fork"))
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""  # taken, and let go of
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_a_launcher_that_gets_no_fork_starts_the_worker_itself(tmp_path: Path):
    """As where the server may start no more processes, or dies with the order in its hands."""
    from serve.runtime.fork_server import LAUNCHER
    from serve.runtime.launcher import SCRIPT_VARIABLE, SOCKET_VARIABLE

    script = tmp_path / "worker.py"
    script.write_text("import sys; print('started with', sys.argv[1:])")
    environment = {**os.environ, SOCKET_VARIABLE: str(tmp_path / "fork"), SCRIPT_VARIABLE: str(script)}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "fork"))
        listener.listen()
        launcher = subprocess.Popen([sys.executable, str(LAUNCHER), "--a"], env=environment, stdout=subprocess.PIPE)
        connection, _ = listener.accept()
        while b"arguments" not in connection.recv(2**20):
            pass
        connection.close()
        assert launcher.communicate(timeout=60)[0] == b"started with ['--a']\n"


# Forks a worker that fails, as one does that cannot reach its raylet.
FAIL = """
import os, sys
from pathlib import Path
from serve.runtime import fork_server, launcher
fork_server._import_ray = lambda _: None
fork_server.start(Path(sys.argv[1]), modules=[])
os.environ[launcher.SCRIPT_VARIABLE] = sys.argv[2]
import subprocess
subprocess.run([sys.executable, fork_server.LAUNCHER], timeout=100)
"""


def test_a_forked_worker_that_fails_says_why(tmp_path: Path):
    script = tmp_path / "worker.py"
    script.write_text("raise ConnectionError('the raylet is away')")
    environment = {**os.environ, "RAY_JOB_ID": "01000000", "RAY_RAYLET_PID": str(os.getpid())}
    command = [sys.executable, "-c", FAIL, str(tmp_path), str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert "ConnectionError: the raylet is away" in done.stderr
    assert "fork_server.py" in done.stderr
