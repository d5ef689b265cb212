"""A scrape of one node gets that node's metrics, in the words that it asked for."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serve.errors import RoundhouseError
from serve.telemetry.devices import Device
from serve.telemetry.endpoint import node_server
from serve.telemetry.metrics import ReplicaMetrics
from tests.scraping import OPENMETRICS, parse


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    def devices() -> list[Device]:
        return [Device("0", 10.0, 80.0, None)]

    with node_server(tmp_path / "metrics", port=0, host="127.0.0.1", devices=devices) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_scrape_gets_what_the_nodes_processes_recorded(url: str, tmp_path: Path):
    assert httpx.get(f"{url}/metrics").status_code == 200, "before there is a folder"
    ReplicaMetrics.of("a", folder=tmp_path / "metrics").requests.ended("openai", "ok", 0.1, None)
    reply = httpx.get(f"{url}/metrics", headers={"accept": OPENMETRICS})
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    told = [sample for sample in parse(reply.text) if sample.name == "roundhouse_requests_total" and sample.value]
    assert [(sample.labels["model"], sample.value) for sample in told] == [("a", 1)]
    assert httpx.get(f"{url}/metrics").headers["content-type"].startswith("text/plain")


def test_a_scrape_gets_the_gpus_of_the_node(url: str):
    told = {
        sample.name: sample.value for sample in parse(httpx.get(f"{url}/metrics", headers={"accept": OPENMETRICS}).text)
    }
    assert told == {"roundhouse_device_memory_used_bytes": 10, "roundhouse_device_memory_size_bytes": 80}


def test_another_path_says_which_there_is(url: str):
    reply = httpx.get(url)
    assert (reply.status_code, reply.text) == (404, "there is /metrics\n")


def test_a_port_that_is_none_is_told(tmp_path: Path):
    with pytest.raises(RoundhouseError, match="port 70000 cannot be listened on"):
        node_server(tmp_path, port=70_000, host="127.0.0.1")


def test_a_port_that_is_taken_is_told(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RoundhouseError, match=f"port {port} cannot be listened on .* another with --port"):
            node_server(tmp_path, port=port, host="127.0.0.1")
