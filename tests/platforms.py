"""A platform's HTTP answers from a table, and the word that `roundhouse up` leaves of itself, for commands to find."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from serve.runtime import state
from serve.settings import Settings

#: Path -> status and body; a string goes as it is, anything else as JSON. A function is called for each request.
Answers = Mapping[str, tuple[int, Any] | Callable[[], tuple[int, Any]]]


@contextlib.contextmanager
def answering(answers: Answers) -> Iterator[int]:
    """Yield the port on which the answers are given."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answers.get(self.path, (404, {"error": f"nothing at {self.path}"}))
            status, told = found() if callable(found) else found
            body = (told if isinstance(told, str) else json.dumps(told)).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def platform(answers: Answers, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have the command line find a running platform that gives these answers."""
    monkeypatch.setenv("ROUNDHOUSE_STATE_DIR", str(folder))
    with answering(answers) as port:
        monkeypatch.setenv("ROUNDHOUSE_PORT", str(port))
        url = f"http://127.0.0.1:{port}"
        created = psutil.Process().create_time()
        settings = Settings.from_environment()
        state.write(settings, state.Running(pid=os.getpid(), created=created, url=url, file="models.yaml", logs=""))
        yield
