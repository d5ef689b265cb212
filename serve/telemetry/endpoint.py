"""One node's metrics over HTTP, for scrapes that must reach this node: the platform's port may lead to any."""

from __future__ import annotations

import http.server
from collections.abc import Callable, Sequence
from pathlib import Path

from serve.errors import RoundhouseError
from serve.telemetry.devices import Device, device_samples
from serve.telemetry.exposition import exposed

# A scraper that says nothing for so long is let go.
_IDLE_S = 10.0


def node_server(
    folder: Path,
    *,
    port: int,
    host: str = "0.0.0.0",  # noqa: S104 - scrapes come from outside the pod
    devices: Callable[[], Sequence[Device]] = list,
) -> http.server.ThreadingHTTPServer:
    """Return a server of `GET /metrics` that listens and does not answer yet.

    Args:
        folder: Where the node's processes keep their pages; it may not be there yet.
        port: 0 takes a free one.
        devices: Returns this machine's GPUs as they are now.

    Raises:
        RoundhouseError: The port cannot be had.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = _IDLE_S

        def do_GET(self) -> None:
            if self.path.partition("?")[0] == "/metrics":
                found = device_samples(devices())
                self._answer(200, *exposed(folder, self.headers.get("Accept", ""), found))
            else:
                self._answer(404, b"there is /metrics\n", "text/plain; charset=utf-8")

        def _answer(self, status: int, body: bytes, content_type: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Scrapes are not worth a line each."""

    try:
        return http.server.ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise RoundhouseError(f"port {port} cannot be listened on ({error}); choose another with --port") from error


def serve_node(folder: Path, *, port: int, devices: Callable[[], Sequence[Device]]) -> None:
    """Answer scrapes of a node until the process ends; raises as `node_server`."""
    with node_server(folder, port=port, devices=devices) as server:
        server.serve_forever()
