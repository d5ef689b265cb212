"""A collector that takes spans by OTLP, as the one of a real site would, and hands them on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import httpx

from loadtests.observe.processes import running

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
    command = [
        *(agent, "start", "--otlp-grpc-endpoint", f"127.0.0.1:{grpc_port}"),
        *("--otlp-http-endpoint", f"127.0.0.1:{http_port}", "--exporter", "otlp"),
        *("--otlp-exporter-endpoint", onward, "--otlp-exporter-protocol", "http"),
        *("--debug-log", "traces"),
    ]

    def answers() -> bool:
        httpx.get(f"http://127.0.0.1:{http_port}/", timeout=2)
        return True

    def failed(end: str) -> Exception:
        return CollectorFailed(f"the collector did not start; {end}")

    with running(command, log=log, within_s=_READY_WITHIN_S, answers=answers, failed=failed):
        yield
