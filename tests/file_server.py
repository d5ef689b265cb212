"""A small HTTP server in a thread that serves files with Range, and misbehaves as it is told."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Seen:
    """What was asked."""

    path: str
    headers: dict[str, str]


@dataclass
class FileServer:
    """Answers by path; `once` answers come first, one for each request."""

    url: str
    host: str
    port: int
    answers: dict[str, Answer] = field(default_factory=dict)
    once: dict[str, list[Answer]] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        self.seen.append(Seen(handler.path, {name.lower(): value for name, value in handler.headers.items()}))
        queued = self.once.get(path)
        answer = queued.pop(0) if queued else self.answers.get(path, status(404))
        answer(handler)

    def asked(self, path: str) -> list[Seen]:
        return [one for one in self.seen if one.path.partition("?")[0] == path]


@contextmanager
def file_server(context: ssl.SSLContext | None = None, host: str = "localhost") -> Iterator[FileServer]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            try:
                server.answer(self)
            except (BrokenPipeError, ConnectionResetError, ssl.SSLError):
                self.close_connection = True

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        # A client that leaves is no news.
        handle_error = lambda *_: None  # noqa: E731

        def finish_request(self, request, client_address) -> None:
            if context is not None:
                request = context.wrap_socket(request, server_side=True)
            super().finish_request(request, client_address)
            request.close()

    http_server = Server(("127.0.0.1", 0), Handler)
    port = http_server.server_address[1]
    server = FileServer(f"http{'s' if context else ''}://{host}:{port}", host, port)
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http_server.shutdown()
        http_server.server_close()
        thread.join()


def content(
    body: bytes,
    *,
    cut_after: int | None = None,
    ranges: bool = True,
    length: int | None = None,
    headers: dict[str, str] | None = None,
    pause: threading.Event | None = None,
    lie_start: bool = False,
) -> Answer:
    """Answer with a body; `cut_after` closes the connection early, `pause` waits there first."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
        start = int(asked[1]) if asked and ranges else 0
        end = min(int(asked[2]) + 1, len(body)) if asked and ranges and asked[2] else len(body)
        if asked and ranges and start >= len(body):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(body)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        handler.send_response(206 if asked and ranges else 200)
        if asked and ranges:
            handler.send_header("Content-Range", f"bytes {start - lie_start}-{end - 1}/{len(body)}")
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(end - start if length is None else length))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        if cut_after is None:
            handler.wfile.write(body[start:end])
        else:
            handler.wfile.write(body[start : start + cut_after])
            handler.wfile.flush()
            if pause is not None:
                pause.wait(60)
        handler.close_connection = cut_after is not None or length is not None

    return answer


def endless(chunk: bytes, stop: threading.Event, wait_s: float = 0.0) -> Answer:
    """Answer with a body that does not end."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.close_connection = True
        while not stop.wait(wait_s):
            handler.wfile.write(chunk)

    return answer


def status(code: int, headers: dict[str, str] | None = None, body: bytes = b"") -> Answer:
    """Answer with a status."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)

    return answer


def redirect(to: str) -> Answer:
    """Answer with a redirect."""
    return status(302, {"Location": to})


class Line:
    """A TCP line to a server, in a thread, that breaks when its allowance of bytes from the server is used up."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._allowance: int | None = None
        self._lock = threading.Lock()
        self.port = self._listener.getsockname()[1]
        self.sent = b""
        threading.Thread(target=self._accept, daemon=True).start()

    def allow(self, count: int | None) -> None:
        """Let so many bytes more through, or any number."""
        with self._lock:
            self._allowance = count
            self.sent = b""

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            threading.Thread(target=self._pump, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        try:
            while data := source.recv(2**16):
                with self._lock:
                    if up:
                        self.sent += data
                    elif self._allowance is not None:
                        data = data[: self._allowance]
                        self._allowance -= len(data)
                target.sendall(data)
                if not up and self._allowance == 0:
                    break
        except OSError:
            pass
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
