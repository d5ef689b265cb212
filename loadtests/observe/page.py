"""The dashboards without Grafana: a page of Grafana's own components, built with npm, served and photographed."""

from __future__ import annotations

import contextlib
import functools
import gzip
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError

from loadtests.observe.traces import Traces
from serve.telemetry.dashboards import dashboards

SOURCES = Path(__file__).parent / "page"
HOW_TO_GET = "the page of the dashboards wants npm; on Debian and Ubuntu: apt-get install npm"
#: Of the page's rows, px, and of what stands above them.
_ROW, _HEAD = 38, 60
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class PageFailed(Exception):
    """The page could not be built or photographed; the message says why and what helps."""


def built(work: Path) -> Path:
    """Return the folder of the page, built from its sources and the package's dashboards.

    Args:
        work: Keeps what npm installs, about 500 MB, between builds.

    Raises:
        PageFailed: There is no npm, or it failed.
    """
    if shutil.which("npm") is None:
        raise PageFailed(HOW_TO_GET)
    work.mkdir(parents=True, exist_ok=True)
    for source in SOURCES.iterdir():
        shutil.copy(source, work)
    wanted, installed = (SOURCES / "package.json").read_text(), work / "installed.json"
    if not installed.exists() or installed.read_text() != wanted:
        _run("npm", "install", "--no-package-lock", "--legacy-peer-deps", "--ignore-scripts", "--no-audit", folder=work)
        installed.write_text(wanted)
    page = work / "page"
    _run(
        *("node_modules/.bin/esbuild", "page.jsx", "--bundle", "--minify", "--outfile=page/page.js"),
        *(
            "--loader:.svg=dataurl",
            "--loader:.woff2=dataurl",
            "--loader:.ttf=empty",
            "--define:process.env.NODE_ENV='production'",
        ),
        *("--define:global=window", "--alias:react-custom-scrollbars-2=./scrollbars.js", "--log-level=error"),
        folder=work,
    )
    shutil.copy(SOURCES / "index.html", page)
    _add_dashboards(page / "dashboards")
    return page


def _add_dashboards(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    found = dashboards()
    for one in found:
        (folder / one.name).write_text(one.text)
    (folder / "names.json").write_text(json.dumps([one.name.removesuffix(".json") for one in found]))


def _run(*command: str, folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PageFailed(f"{command[0]} failed in {folder}:\n{(done.stderr or done.stdout)[-2000:]}")


class _Requests(http.server.SimpleHTTPRequestHandler):
    """The page's files, the traces' pages, and where a collector hands spans over."""

    traces: Traces

    def do_GET(self) -> None:
        """Answer a page."""
        if not self.path.startswith("/traces"):
            return super().do_GET()
        return self._answer(self.traces.page(self.path.removeprefix("/traces").strip("/")).encode(), "text/html")

    def do_POST(self) -> None:
        """Take spans in."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            self.traces.add(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
        except (DecodeError, gzip.BadGzipFile) as error:
            self.send_error(400, f"this is no OTLP export: {error}")
        else:
            self._answer(b"", "application/x-protobuf")

    def _answer(self, body: bytes, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", f"{content_type}; charset=utf-8" if body else content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the terminal for what matters."""


@contextlib.contextmanager
def served(page: Path, port: int, traces: Traces) -> Iterator[str]:
    """Serve the page and the traces on this machine only; yield their address.

    Raises:
        OSError: The port is taken.
    """
    requests = functools.partial(type("Requests", (_Requests,), {"traces": traces}), directory=str(page))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), requests) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()


def height_px(text: str) -> int:
    """Return how high the page of a dashboard is (pure)."""
    places = [panel["gridPos"] for panel in json.loads(text)["panels"]]
    return int(max(place["y"] + place["h"] for place in places)) * _ROW + _HEAD


def photograph(url: str, path: Path, *, width_px: int, height: int) -> None:
    """Write a picture of a page once everything that it asks for has come.

    Raises:
        PageFailed: There is no browser, or it failed.
    """
    program = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if program is None:
        raise PageFailed("pictures want a browser; on Debian and Ubuntu: apt-get install chromium")
    path.parent.mkdir(parents=True, exist_ok=True)
    _run(
        *(
            program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--hide-scrollbars",
        ),
        *("--virtual-time-budget=30000", f"--window-size={width_px},{height}", f"--screenshot={path.resolve()}", url),
        folder=path.parent,
    )
