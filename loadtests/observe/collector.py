"""A collector that takes spans by OTLP, as the one of a real site would, and hands them on."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

PROGRAM = Path(__file__).parents[2] / ".tools" / "observe" / "bin" / "python"
_READY_WITHIN_S = 15.0


class CollectorFailed(Exception):
    """The collector is not installed or did not start; the message says which."""


@contextlib.contextmanager
def running_collector(folder: Path, *, grpc_port: int, http_port: int, onward: str) -> Iterator[None]:
    """Run a collector on this machine.

    Args:
        folder: Of its log.
        onward: The OTLP server over HTTP that spans are handed to.

    Raises:
        CollectorFailed: It is not installed, or ended.
    """
    agent = next(PROGRAM.parents[1].glob("lib/python3*/site-packages/rotel/rotel-agent"), None)
    if agent is None:
        raise CollectorFailed("the collector is not installed; `make observe` installs it")
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "collector.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(agent, "start", "--otlp-grpc-endpoint", f"127.0.0.1:{grpc_port}"),
                *("--otlp-http-endpoint", f"127.0.0.1:{http_port}", "--exporter", "otlp"),
                *("--otlp-exporter-endpoint", onward, "--otlp-exporter-protocol", "http"),
                *("--debug-log", "traces"),
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait(process, http_port, log)
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _READY_WITHIN_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{port}/", timeout=2)
            return
        time.sleep(0.1)
    raise CollectorFailed(f"the collector did not start; its log, {log}, ends:\n{log.read_text()[-1000:]}")
