"""Probes tell a controller that turns from one that hangs, and its counters are Prometheus's."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.cluster.controller import Controller
from serve.cluster.health import serve_health
from tests.cluster.fakes import Clock, FakeApi, FakeRay, world
from tests.cluster.test_controller import controller, converge


@pytest.fixture
def around() -> Iterator[tuple[FakeApi, FakeRay, Controller, Clock, str]]:
    clock = Clock()
    with world() as (api, ray, _):
        one = controller(api, ray)
        server = serve_health(one, leads=lambda: True, port=0, host="127.0.0.1", clock=clock)
        try:
            yield api, ray, one, clock, f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            server.server_close()


def test_it_is_ready_once_it_knows_the_models(around: tuple[FakeApi, FakeRay, Controller, Clock, str]) -> None:
    api, ray, one, _, url = around
    assert httpx.get(f"{url}/readyz").status_code == 503
    converge(one, api, ray)
    assert httpx.get(f"{url}/readyz").status_code == 200


def test_one_that_no_longer_turns_is_not_well(around: tuple[FakeApi, FakeRay, Controller, Clock, str]) -> None:
    *_, one, clock, url = around
    one.counters.last_turn = clock.seconds = 1000.0
    assert httpx.get(f"{url}/healthz").status_code == 200
    clock.seconds += 181
    answer = httpx.get(f"{url}/healthz")
    assert (answer.status_code, answer.text) == (503, "last turn 181 s ago\n")


def test_metrics_are_read_by_prometheus_and_count(around: tuple[FakeApi, FakeRay, Controller, Clock, str]) -> None:
    api, ray, one, _, url = around
    api.put("model")
    converge(one, api, ray)
    told = httpx.get(f"{url}/metrics").text
    samples = {
        (sample.name, sample.labels.get("phase", "")): sample.value
        for family in text_string_to_metric_families(told)
        for sample in family.samples
    }
    assert samples["roundhouse_controller_configs_applied_total", ""] == 1
    assert samples["roundhouse_controller_leads", ""] == 1
    assert samples["roundhouse_models", "Ready"] == 1
    assert samples["roundhouse_controller_passes_total", ""] == one.counters.passes


def test_another_path_says_which_there_are(around: tuple[FakeApi, FakeRay, Controller, Clock, str]) -> None:
    answer = httpx.get(f"{around[-1]}/health")
    assert (answer.status_code, "/healthz" in answer.text) == (404, True)


def test_an_asker_who_goes_before_its_answer_leaves_no_traceback(
    around: tuple[FakeApi, FakeRay, Controller, Clock, str], capsys: pytest.CaptureFixture[str]
) -> None:
    address = httpx.URL(around[-1])
    before = set(threading.enumerate())
    with socket.create_connection((address.host, address.port)) as asker:
        asker.sendall(b"GET /metr")
        asker.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an orderly end
    # One that is answered after it says that its connection was taken; then its thread ends by itself.
    httpx.get(f"{around[-1]}/readyz")
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=60)
    assert capsys.readouterr().err == ""
