"""Spans reach a real collector in both of its protocols, and a collector in trouble costs spans and nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from serve.settings import Settings
from serve.telemetry.export import Exporter, exporter_modules, start_tracing
from serve.telemetry.metrics import SpanMetrics
from serve.telemetry.passage import Passage
from serve.telemetry.spans import Span
from serve.telemetry.tracing import BatchTrace, RequestTrace
from tests.otlp import collecting
from tests.scraping import Scrape


def batch() -> BatchTrace:
    member = RequestTrace(b"t" * 16, b"", b"", is_sampled=True)
    made = BatchTrace("m", [member], 2)
    made.ran(1.0, 2.0, cost=3, error=None)
    return made


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_collector_gets_what_was_recorded(tmp_path: Path, protocol: str):
    with collecting(protocol) as collector:
        settings = Settings(
            tracing_endpoint=collector.url,
            tracing_protocol=protocol,  # type: ignore[arg-type]
            tracing_headers=("Authorization=Bearer a=b",),
            tracing_ratio=1,
            metrics_dir=tmp_path,
        )
        tracing = start_tracing(settings, instance="replica-1", model="m")
        assert tracing.tracer is not None
        passage = Passage()
        headers = {b"traceparent": b"00-" + b"4b" * 16 + b"-" + b"5c" * 8 + b"-01", b"tracestate": b"vendor=1"}
        passage.trace = tracing.tracer.begin(headers)
        passage.went(arrived=passage.began, launched=passage.began, answered=passage.began + 0.5)
        passage.ended = passage.began + 1
        passage.status = 200
        tracing.tracer.end(passage, {"method": "POST", "path": "/a"}, headers, "/a")
        tracing.close()
        spans = {span.name: span for span in collector.wait_for(5)}
    assert set(spans) == {"POST /a", "read", "queue", "compute", "respond"}
    request = spans["POST /a"]
    assert (request.trace, request.parent, request.kind) == ("4b" * 16, "5c" * 8, "server")
    assert request.state == "vendor=1"
    assert request.ended - request.began == pytest.approx(1e9, abs=1000)
    assert request.attributes["http.response.status_code"] == 200
    assert request.resource["service.name"] == "roundhouse"
    assert request.resource["service.instance.id"] == "replica-1"
    assert spans["respond"].parent == request.id
    assert collector.headers[0]["authorization"] == "Bearer a=b"
    assert Scrape(tmp_path).nonzero("telemetry_spans_total", "result") == {"exported": 5}


def test_without_a_collector_nothing_is_recorded():
    assert start_tracing(Settings(), instance="a").tracer is None
    assert exporter_modules(Settings()) == ()


class Gate:
    """A collector's end that a test holds: it counts, waits or refuses."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self.refuses = False
        self.sent: list[int] = []
        self.is_closed = False

    def send(self, spans: Sequence[Span]) -> None:
        self.entered.set()
        assert self.open.wait(20)
        if self.refuses:
            raise ConnectionError("refused")
        self.sent.append(len(spans))

    def close(self) -> None:
        self.is_closed = True


def test_a_hung_collector_costs_spans_and_no_memory(tmp_path: Path):
    gate = Gate()
    exporter = Exporter(lambda: gate, metrics=SpanMetrics.of("m", folder=tmp_path))
    exporter.take(batch())
    assert gate.entered.wait(20)
    for _ in range(10_000):
        exporter.take(batch())  # returns at once, or this test would never end
    gate.open.set()
    exporter.close(20)
    assert gate.is_closed
    told = Scrape(tmp_path).nonzero("telemetry_spans_total", "result")
    assert told["exported"] == sum(gate.sent)
    assert told["exported"] + told["dropped"] == 10_001
    assert 4096 <= told["exported"] <= 4097
    assert max(gate.sent) <= 512


def test_what_comes_while_others_are_sent_goes_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serve.telemetry.export._EVERY_S", 3600.0)

    class Busy(Gate):
        comes = True

        def send(self, spans: Sequence[Span]) -> None:
            super().send(spans)
            for _ in range(3 if self.comes else 0):
                exporter.take(batch())

    gate = Busy()
    exporter = Exporter(lambda: gate, metrics=SpanMetrics.of("m", folder=tmp_path))
    for _ in range(512):
        exporter.take(batch())
    assert gate.entered.wait(20)
    gate.open.set()
    deadline = time.monotonic() + 20
    while not gate.sent and time.monotonic() < deadline:
        time.sleep(0.01)
    gate.comes = False
    exporter.close(20)
    assert gate.sent == [512, 3]


def test_a_collector_that_refuses_is_told_of_once_and_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    gate = Gate()
    gate.refuses = True
    gate.open.set()
    exporter = Exporter(lambda: gate, metrics=SpanMetrics.of("m", folder=tmp_path))
    for _ in range(1000):
        exporter.take(batch())
    assert gate.entered.wait(20)
    exporter.close(20)
    assert Scrape(tmp_path).nonzero("telemetry_spans_total", "result") == {"dropped": 1000}
    assert [record.message for record in caplog.records] == [
        "Spans are dropped: the collector does not take them: refused"
    ]


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_collector_that_says_no_is_a_drop(tmp_path: Path, protocol: str):
    with collecting(protocol) as collector:
        collector.refuses = True
        settings = Settings(tracing_endpoint=collector.url, tracing_protocol=protocol, metrics_dir=tmp_path)  # type: ignore[arg-type]
        tracing = start_tracing(settings, instance="a", model="m")
        assert tracing.exporter is not None
        tracing.exporter.take(batch())
        tracing.exporter.close(20)
    assert Scrape(tmp_path).nonzero("telemetry_spans_total", "result") == {"dropped": 1}
