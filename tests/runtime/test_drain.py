"""A worker that leaves waits for whoever takes its replicas over, and only for that."""

from __future__ import annotations

import http.client
import http.server
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray import _raylet
from ray.exceptions import RpcError

from serve.runtime import drain
from serve.runtime.drain import DrainError, drain_node, proxies_here
from serve.runtime.front import haproxy_binary
from serve.runtime.local import free_ports, has_haproxy
from tests.e2e.running import wait_until

NOBODY = "head.invalid:6379 is no name any more: the platform is going, and nobody takes the replicas over"


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "_NAMELESS_S", 0.0)
    monkeypatch.setattr(drain, "_POLL_S", 0.01)
    monkeypatch.setattr(drain, "proxies_here", list)  # this machine may have those of others


def test_a_head_whose_name_is_gone_is_not_waited_for() -> None:
    said: list[str] = []
    drain_node("head.invalid:6379", address="127.0.0.1", deadline_s=600, say=said.append)
    assert said[-1] == NOBODY


def test_a_head_that_is_away_is_waited_for_until_the_deadline() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        head = f"127.0.0.1:{taken.getsockname()[1]}"
        said: list[str] = []
        with pytest.raises(DrainError, match=f"control store at {head} does not answer"):
            drain_node(head, address="127.0.0.1", deadline_s=1, say=said.append)
    assert len(said) == 1 and said[0].endswith("; waiting for it")


def test_a_head_that_goes_for_good_while_replicas_are_left_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray's control store took the request, and went.
    monkeypatch.setattr(drain, "_ask_to_drain", lambda *_: None)
    monkeypatch.setattr(drain, "replicas_here", lambda: [1])
    said: list[str] = []
    drain_node("head.invalid:6379", address="127.0.0.1", deadline_s=600, say=said.append)
    assert said[-1] == NOBODY


def test_a_name_that_cannot_be_asked_for_is_no_loss_while_the_head_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        answers = iter([("127.0.0.1", port)])
        left = iter([[1], [1], [1], []])
        monkeypatch.setattr(drain, "_LAST_REQUESTS_S", 0.0)
        monkeypatch.setattr(drain, "_ask_to_drain", lambda *_: None)
        monkeypatch.setattr(drain, "_address_of", lambda _: next(answers, None))
        monkeypatch.setattr(drain, "replicas_here", lambda: next(left))
        said: list[str] = []
        drain_node(f"head:{port}", address="127.0.0.1", deadline_s=600, say=said.append)
    assert said[-1] == "0 replicas left"


def test_replicas_are_not_hurried_until_the_deadline_is_near_and_then_end_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray stops a replica without a successor once the deadline that it knows is as near as the replica's own grace."""
    asked: list[float] = []
    monkeypatch.setattr(drain, "_ask_to_drain", lambda _head, _address, deadline_s: asked.append(deadline_s))
    monkeypatch.setattr(drain, "replicas_here", lambda: [] if 0.0 in asked else [1, 2])
    said: list[str] = []
    drain_node("127.0.0.1:1", address="127.0.0.1", deadline_s=2, say=said.append)
    longest_grace_s = 86_400.0  # the bound of a model's deadline_ms
    assert asked[0] > longest_grace_s + 2 and asked[1:] == [0.0]
    assert said[-2:] == [
        "the deadline is near, and 2 replicas are left: Ray stops what nobody has taken over",
        "0 replicas left",
    ]


def test_replicas_that_do_not_end_are_left_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "_ask_to_drain", lambda *_: None)
    monkeypatch.setattr(drain, "replicas_here", lambda: [1])
    said: list[str] = []
    drain_node("127.0.0.1:1", address="127.0.0.1", deadline_s=1, say=said.append)
    assert said[-1] == "the deadline has passed, and 1 replica is left"


def test_a_head_that_is_away_when_the_deadline_is_near_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def ask(_head: str, _address: str, deadline_s: float) -> None:
        asked.append(deadline_s)
        if asked.count(0.0) == 1:
            raise drain._HeadIsAway("away")

    monkeypatch.setattr(drain, "_ask_to_drain", ask)
    monkeypatch.setattr(drain, "_address_of", lambda _: ("127.0.0.1", 1))
    monkeypatch.setattr(drain, "replicas_here", lambda: [] if asked.count(0.0) == 2 else [1])
    said: list[str] = []
    drain_node("127.0.0.1:1", address="127.0.0.1", deadline_s=2, say=said.append)
    assert said[-2:] == ["away; waiting for it", "0 replicas left"]


def test_an_error_of_rays_own_is_told_as_a_head_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        def __init__(self, address: str) -> None:
            self.address = address

        def get_all_node_info(self, timeout: float) -> dict[str, object]:
            raise RpcError(f"no answer in {timeout:g} s")

    monkeypatch.setattr(_raylet, "GcsClient", Client)
    with socket.create_server(("127.0.0.1", 0)) as server:
        head = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(DrainError, match=f"control store at {head} does not answer: no answer in 10 s"):
            drain_node(head, address="127.0.0.1", deadline_s=0.1, say=lambda _: None)


def test_a_head_that_stands_still_in_the_middle_is_one_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    thawed = threading.Event()
    monkeypatch.setattr(drain, "_TALK_S", 0.05)
    monkeypatch.setattr(drain, "_drained", lambda *_: thawed.wait())
    with socket.create_server(("127.0.0.1", 0)) as server:
        head = f"127.0.0.1:{server.getsockname()[1]}"
        try:
            with pytest.raises(DrainError, match=f"control store at {head} does not answer: no answer in 0.05 s"):
                drain_node(head, address="127.0.0.1", deadline_s=0.1, say=lambda _: None)
        finally:
            thawed.set()


class Slow(http.server.BaseHTTPRequestHandler):
    """Answers once it is let."""

    protocol_version = "HTTP/1.1"
    asked = threading.Event()
    let = threading.Event()

    def do_GET(self) -> None:
        if self.path == "/slow":
            self.asked.set()
            self.let.wait(30)
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        """Keep silent."""


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """An HAProxy as Ray starts it, before a server, and its port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (port,) = free_ports(1)
        config = tmp_path / "haproxy.cfg"
        config.write_text(
            f"""defaults
    mode http
    timeout client 60s
    timeout server 60s
    timeout connect 5s
listen all
    bind 127.0.0.1:{port}
    server one 127.0.0.1:{server.server_port}
"""
        )
        process = subprocess.Popen([haproxy_binary(), "-db", "-f", str(config)], stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: _takes_connections(port))
            yield process, port
        finally:
            process.kill()
            process.wait()
            server.shutdown()


@pytest.mark.skipif(not has_haproxy(), reason="HAProxy is for Linux")
def test_what_the_proxy_was_asked_is_answered_before_it_ends(
    proxy: tuple[subprocess.Popen[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, port = proxy
    monkeypatch.setattr(drain, "proxies_here", lambda: [one for one in proxies_here() if one.pid == process.pid])
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    client.request("GET", "/quick")
    assert client.getresponse().read() == b"ok"
    client.request("GET", "/slow")
    assert Slow.asked.wait(30)
    leaving = threading.Thread(
        target=drain_node,
        args=("head.invalid:6379",),
        kwargs={"address": "127.0.0.1", "deadline_s": 60, "say": lambda _: None},
    )
    leaving.start()
    wait_until(lambda: not _takes_connections(port))
    assert leaving.is_alive()
    Slow.let.set()
    answer = client.getresponse()
    assert (answer.status, answer.headers["connection"], answer.read()) == (200, "close", b"ok")
    leaving.join(30)
    assert not leaving.is_alive()
    assert process.wait(30) == 0


def _takes_connections(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_proxy_that_does_not_end_is_left_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "proxies_here", lambda: [psutil.Process()])  # has no end
    monkeypatch.setattr(signal, "SIGUSR1", signal.SIGCONT)
    monkeypatch.setattr(drain, "_LAST_ANSWERS_S", 0.1)
    said: list[str] = []
    drain_node("head.invalid:6379", address="127.0.0.1", deadline_s=1, say=said.append)
    assert said[-1] == "the deadline has passed, and requests are left"
