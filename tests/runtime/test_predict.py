"""What a person types and what a platform says, as `roundhouse predict` meets them: answers and sentences."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from serve.cli import main

NUMBERS = {
    "name": "toy",
    "platform": "roundhouse_python",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}],
}
TEXT = {**NUMBERS, "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}]}
CHAT = {**TEXT, "platform": "roundhouse_text_generation"}


@contextlib.contextmanager
def platform(told: Any, *, kind: str = "application/json") -> Iterator[tuple[int, list[bytes]]]:
    """Listen as a platform of one model would, and refuse what it is asked; yields the port and the bodies."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say(200, told if isinstance(told, bytes) else json.dumps(told).encode())

        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self._say(400, b'{"error": "no, thank you"}')

        def _say(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server.server_port, bodies
        server.shutdown()


@pytest.fixture(autouse=True)
def state(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUNDHOUSE_STATE_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("metadata", "words", "said"),
    [
        (NUMBERS, ["1,NaN"], "not finite"),
        (NUMBERS, ["1e999"], "not finite"),
        (NUMBERS, ["[" * 100_000], "wants numbers"),
        (NUMBERS, ["one"], "wants numbers"),
        (NUMBERS, ["1,2"], "400: no, thank you"),
        (TEXT, ["a"], "400: no, thank you"),
        (TEXT, ["caf\udce9"], "400: no, thank you"),
        (CHAT, ["caf\udce9"], "400: no, thank you"),
        ({"model_stats": []}, ["1"], "'toy' is no model"),
        ([], ["1"], "'toy' is no model"),
        (b"<html>", ["1"], "200: <html>"),
    ],
)
def test_what_cannot_be_answered_is_a_sentence(
    metadata: Any, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    with platform(metadata) as (port, _):
        assert main(["predict", "toy", *words, "--port", str(port)]) == 1
    assert said in capsys.readouterr().err


def test_a_name_that_no_address_can_hold_is_a_sentence(capsys: pytest.CaptureFixture[str]):
    with platform(NUMBERS) as (port, _):
        assert main(["predict", "a\nb", "1", "--port", str(port)]) == 1
    assert "roundhouse: " in capsys.readouterr().err


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with platform(NUMBERS) as (port, bodies):
        assert main(["predict", "toy", "1,2", "--port", str(port)]) == 1
    assert json.loads(bodies[0])["inputs"][0]["data"] == [[1, 2]]
    assert "no, thank you" in capsys.readouterr().err
