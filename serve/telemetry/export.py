"""Sends records to an OTLP collector from a thread of its own, so that one which is slow or gone costs spans alone."""

from __future__ import annotations

import importlib
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from urllib.parse import urlsplit

from serve import __version__
from serve.settings import Settings
from serve.telemetry.metrics import SpanMetrics
from serve.telemetry.recent import Recent
from serve.telemetry.spans import Span, count_of, spans_of
from serve.telemetry.tracing import BatchTrace, Record, RequestRecord, Sampling, Tracer

logger = logging.getLogger(__name__)

_EVERY_S = 1.0
_MOST_WAITING = 4096
_MOST_AT_ONCE = 512
_TIMEOUT_S = 10.0
_TRACES_PATH = "/v1/traces"
_MODULES = {
    "grpc": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http.trace_exporter",
}


@dataclass(frozen=True, slots=True)
class Collector:
    """Where spans go.

    Args:
        endpoint: `http://` or `https://`, host and port; with `http/protobuf`, `/v1/traces` is added where no path is.
        protocol: Of OTLP.
        headers: Sent along, for collectors that ask who calls.
    """

    endpoint: str
    protocol: str = "grpc"
    headers: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Tracing:
    """What a process records requests with: nothing where there is neither a collector nor a folder to remember in."""

    tracer: Tracer | None = None
    exporter: Exporter | None = None

    def close(self) -> None:
        """Send what is held, within two seconds."""
        if self.exporter is not None:
            self.exporter.close()


def collector_of(settings: Settings) -> Collector | None:
    """Return the collector that is set, or None."""
    if settings.tracing_endpoint is None:
        return None
    pairs = (header.partition("=") for header in settings.tracing_headers)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    return Collector(settings.tracing_endpoint, settings.tracing_protocol, headers)


def start_tracing(settings: Settings, *, instance: str, model: str = "", passes_on: bool = False) -> Tracing:
    """Return what this process records requests with; after a fork, as it starts a thread.

    Args:
        instance: Tells this process from others in its spans.
        model, passes_on: As in `Tracer`.
    """
    recent = None if settings.metrics_dir is None else Recent(settings.metrics_dir, instance)
    collector = collector_of(settings)
    if collector is None and recent is None:
        return Tracing()
    connect = None if collector is None else partial(OtlpSender, collector, _resource(instance))
    metrics = SpanMetrics.of(model, folder=settings.metrics_dir)
    exporter = Exporter(connect, recent=recent, metrics=metrics)
    # Where nothing is sent, what is passed on keeps its caller's header, and needs no identifiers of ours.
    passes_on = passes_on and collector is not None
    return Tracing(Tracer(_sampling(settings), exporter.take, model=model, passes_on=passes_on), exporter)


def _resource(instance: str) -> dict[str, str]:
    return {
        "service.name": "roundhouse",
        "service.version": __version__,
        "service.instance.id": instance,
        "host.name": socket.gethostname(),
    }


def _sampling(settings: Settings) -> Sampling:
    """Return what is recorded; where no collector is set, what this node remembers alone."""
    if settings.tracing_endpoint is None:
        return Sampling(ratio=0, follow=False, errors=False)
    slow_ms = settings.tracing_slow_ms
    return Sampling(
        ratio=settings.tracing_ratio,
        slow_s=None if slow_ms is None else slow_ms / 1000,
        errors=settings.tracing_errors,
        baggage=frozenset(settings.tracing_baggage),
        content=settings.tracing_content,
    )


def exporter_modules(settings: Settings) -> Sequence[str]:
    """Return what a process imports to send spans, for one that imports it for others."""
    if settings.tracing_endpoint is None:
        return ()
    return (_MODULES[settings.tracing_protocol], "serve.telemetry.otlp", "serve.telemetry.otel")


class Sender(Protocol):
    """Sends spans in order and waits for the answer, from one thread."""

    def send(self, spans: Sequence[Span]) -> None:
        """Send; raises whatever says that the collector did not take them."""

    def close(self) -> None:
        """Break off what is being sent."""


class Exporter:
    """Holds records until they are sent, at most 4,096; more are dropped and counted.

    Args:
        connect: Makes the sender, on the exporter's thread: what it needs takes a while to import. None sends nothing.
        recent: Where this node remembers requests that have a name; None remembers none.
        metrics: Where spans are counted.
    """

    def __init__(
        self, connect: Callable[[], Sender] | None, *, recent: Recent | None = None, metrics: SpanMetrics
    ) -> None:
        self._connect = connect
        self._recent = recent
        self._metrics = metrics
        self._waiting: deque[Record] = deque()
        self._overflowed = 0  # the event loop alone writes it
        self._overflow_told = 0
        self._wake = threading.Event()
        self._closing = False
        self._is_failing = False
        self._thread = threading.Thread(target=self._run, name="span-exporter", daemon=True)
        self._thread.start()

    def take(self, record: Record) -> None:
        """Hold a record for the next sending, from any thread; never waits."""
        if len(self._waiting) >= _MOST_WAITING:
            self._overflowed += count_of(record)
            return
        self._waiting.append(record)
        if len(self._waiting) == _MOST_AT_ONCE:
            self._wake.set()

    def close(self, timeout_s: float = 2.0) -> None:
        """Send what is held, for `timeout_s` at most, and end."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        sender = None if self._connect is None else self._connect()
        while not (self._closing and not self._waiting):
            is_full = self._wake.wait(_EVERY_S) and not self._closing
            self._wake.clear()
            # What comes while others are sent waits for more: a message costs as much as a hundred requests.
            for _ in range(len(self._waiting) // _MOST_AT_ONCE + (not is_full)):
                self._send(sender)
            self._tell_overflow()
        if sender is not None:
            sender.close()

    def _send(self, sender: Sender | None) -> None:
        """Send some of what is held; what is not taken is dropped, as it would be older with each try."""
        spans: list[Span] = []
        for _ in range(min(len(self._waiting), _MOST_AT_ONCE)):
            record = self._waiting.popleft()
            found = list(spans_of(record))
            if self._recent is not None and isinstance(record, RequestRecord):
                self._recent.keep(record, found)
            if isinstance(record, BatchTrace) or record.is_sampled:
                spans += found
        if sender is None or not spans:
            return
        try:
            sender.send(spans)
        except Exception as error:
            self._metrics.dropped(len(spans))
            if not self._is_failing:
                logger.warning("Spans are dropped: the collector does not take them: %s", error)
            self._is_failing = True
        else:
            self._metrics.exported(len(spans))
            if self._is_failing:
                logger.warning("Spans are taken by the collector again.")
            self._is_failing = False
        self._tell_overflow()

    def _tell_overflow(self) -> None:
        overflowed = self._overflowed
        self._metrics.dropped(overflowed - self._overflow_told)
        self._overflow_told = overflowed


class OtlpSender:
    """Sends by OpenTelemetry's exporters, which retry within ten seconds; they get messages that are ready to go.

    Args:
        resource: What the process is (OpenTelemetry resource attributes).
    """

    def __init__(self, collector: Collector, resource: Mapping[str, str]) -> None:
        self._exporter = otlp_exporter(collector)
        self._export = _message_export(self._exporter, collector.protocol)
        self._resource = resource
        self._endpoint = collector.endpoint

    def send(self, spans: Sequence[Span]) -> None:
        """Send; raises ConnectionError where the collector does not take them."""
        from serve.telemetry.otlp import request_of

        offset_ns = time.time_ns() - time.monotonic_ns()
        if not self._export(
            request_of(spans, offset_ns=offset_ns, resource=self._resource, scope=("roundhouse", __version__))
        ):
            raise ConnectionError(f"{self._endpoint} refused them or did not answer")

    def close(self) -> None:
        """Break off what is being sent."""
        self._exporter.shutdown()


def _message_export(exporter: Any, protocol: str) -> Callable[[bytes], bool]:
    """Return what sends a message as an exporter sends the spans that it encodes, and says whether it was taken."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    from opentelemetry.sdk.trace.export import SpanExportResult

    if protocol == "grpc":
        exporter._translate_data = ExportTraceServiceRequest.FromString
        exporter._count_data = lambda _: 0  # counted by the Exporter
        return lambda message: exporter.export(message) is SpanExportResult.SUCCESS
    client = exporter._client
    return lambda message: bool(client.export(message).success)


def otlp_exporter(collector: Collector) -> Any:
    """Return OpenTelemetry's exporter of spans to a collector."""
    # It tells of every try, and the Exporter tells once.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
    parts = urlsplit(collector.endpoint)
    headers = dict(collector.headers or {})
    make = importlib.import_module(_MODULES[collector.protocol]).OTLPSpanExporter
    if collector.protocol == "grpc":
        return make(collector.endpoint, insecure=parts.scheme == "http", headers=headers, timeout=_TIMEOUT_S)
    path = "" if parts.path.strip("/") else _TRACES_PATH
    return make(collector.endpoint.rstrip("/") + path, headers=headers, timeout=_TIMEOUT_S)
