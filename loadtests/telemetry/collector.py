"""A collector that takes spans and does nothing with them, in a process whose CPU nobody counts."""

from __future__ import annotations

import sys
import time
from concurrent import futures
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service


class Sink(service.TraceServiceServicer):
    """Answers that all is well, after a while."""

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's name
        time.sleep(self._wait_s)
        return messages.ExportTraceServiceResponse()


def main() -> None:
    """Listen on a port of 127.0.0.1 until the process is ended; the second argument is the seconds of an answer."""
    server = grpc.server(futures.ThreadPoolExecutor(2))
    service.add_TraceServiceServicer_to_server(Sink(float(sys.argv[2])), server)
    server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
