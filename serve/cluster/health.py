"""What probes and Prometheus ask of a controller."""

from __future__ import annotations

import http.server
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from serve.cluster.controller import Controller

_STUCK_S = 180.0


def metrics(controller: Controller, *, leads: bool) -> str:
    """Return the controller's counters in Prometheus's text format."""
    counters = controller.counters
    lines = [
        "# TYPE roundhouse_controller_passes_total counter",
        f"roundhouse_controller_passes_total {counters.passes}",
        "# TYPE roundhouse_controller_errors_total counter",
        f"roundhouse_controller_errors_total {counters.errors}",
        "# TYPE roundhouse_controller_configs_applied_total counter",
        f"roundhouse_controller_configs_applied_total {counters.applied}",
        "# TYPE roundhouse_controller_statuses_written_total counter",
        f"roundhouse_controller_statuses_written_total {counters.statuses}",
        "# TYPE roundhouse_controller_pass_seconds_total counter",
        f"roundhouse_controller_pass_seconds_total {counters.seconds:.3f}",
        "# TYPE roundhouse_controller_leads gauge",
        f"roundhouse_controller_leads {int(leads)}",
        "# TYPE roundhouse_models gauge",
        *(f'roundhouse_models{{phase="{phase}"}} {count}' for phase, count in sorted(counters.phases.items())),
    ]
    return "\n".join([*lines, ""])


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell of what broke here: an asker who has gone is no mistake, and its traceback looks like one."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def serve_health(
    controller: Controller,
    *,
    leads: Callable[[], bool],
    port: int,
    host: str = "0.0.0.0",  # noqa: S104 - the kubelet asks from outside the pod
    clock: Callable[[], float] = time.monotonic,
) -> http.server.ThreadingHTTPServer:
    """Answer `/healthz` (its loop turns), `/readyz` (it knows the Models) and `/metrics` on a thread of its own."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, metrics(controller, leads=leads()))
            elif self.path == "/healthz":
                turned = clock() - controller.counters.last_turn
                self._answer(200 if turned < _STUCK_S else 503, f"last turn {turned:.0f} s ago\n")
            elif self.path == "/readyz":
                synced = controller.store.synced.is_set()
                self._answer(200 if synced else 503, "ready\n" if synced else "the Models are not known yet\n")
            else:
                self._answer(404, "there are /healthz, /readyz and /metrics\n")

        def _answer(self, status: int, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Probes are not worth a line each."""

    server = _Server((host, port), Handler)
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
    return server
