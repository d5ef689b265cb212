"""An OTLP collector that keeps what it is sent, and one that does not: gRPC and HTTP as the protocol has them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service


@dataclass(frozen=True)
class Received:
    """A span as a collector sees it: ids in hexadecimal, "" for none; times in nanoseconds."""

    name: str
    kind: str
    trace: str
    id: str
    parent: str
    began: int
    ended: int
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]
    links: list[tuple[str, str]]
    is_error: bool
    error: str
    state: str
    resource: dict[str, Any]


class Collector:
    """What a test asks about the spans that arrived.

    Attributes:
        url: Where it listens.
        refuses: Whether it answers with an error.
        hangs: Cleared, it answers nothing until it is set again.
    """

    def __init__(self) -> None:
        self.url = ""
        self.refuses = False
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.headers: list[dict[str, str]] = []
        self._spans: list[Received] = []
        self._more = threading.Condition()

    def take(self, request: Any, headers: dict[str, str]) -> bool:
        self.goes_on.wait(60)
        if self.refuses:
            return False
        found = list(_received(request))
        with self._more:
            self.headers.append(headers)
            self._spans += found
            self._more.notify_all()
        return True

    @property
    def spans(self) -> list[Received]:
        with self._more:
            return list(self._spans)

    def wait_for(self, count: int, *, timeout_s: float = 30) -> list[Received]:
        """Return the spans once there are `count`."""
        with self._more:
            assert self._more.wait_for(lambda: len(self._spans) >= count, timeout_s), [one.name for one in self._spans]
            return list(self._spans)


def _received(request: Any) -> Iterator[Received]:
    for of_resource in request.resource_spans:
        resource = _attributes(of_resource.resource.attributes)
        for scope in of_resource.scope_spans:
            for span in scope.spans:
                yield Received(
                    span.name,
                    {1: "internal", 2: "server", 3: "client"}[span.kind],
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    _attributes(span.attributes),
                    [(event.name, _attributes(event.attributes)) for event in span.events],
                    [(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
                    span.status.code == 2,
                    span.status.message,
                    span.trace_state,
                    resource,
                )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None


@contextlib.contextmanager
def collecting(protocol: str = "grpc", *, port: int = 0) -> Iterator[Collector]:
    """Run a collector on 127.0.0.1."""
    with (_over_grpc if protocol == "grpc" else _over_http)(port) as collector:
        try:
            yield collector
        finally:
            collector.goes_on.set()


@contextlib.contextmanager
def _over_grpc(port: int) -> Iterator[Collector]:
    collector = Collector()

    class Service(service.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            if not collector.take(request, dict(context.invocation_metadata())):
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not today")
            return messages.ExportTraceServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(4))
    service.add_TraceServiceServicer_to_server(Service(), server)
    collector.url = f"http://127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    server.start()
    try:
        yield collector
    finally:
        collector.goes_on.set()
        server.stop(None).wait()


@contextlib.contextmanager
def _over_http(port: int) -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["content-length"]))
            request = messages.ExportTraceServiceRequest.FromString(body)
            headers = {name.lower(): value for name, value in self.headers.items()}
            self.send_response(200 if collector.take(request, headers) else 400)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield collector
    finally:
        collector.goes_on.set()
        server.shutdown()
        thread.join()
        server.server_close()
