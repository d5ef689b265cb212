"""`make observe`: Prometheus, a collector of traces and a page of the dashboards beside a running platform."""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx

from loadtests.observe.collector import CollectorFailed, running_collector
from loadtests.observe.page import PageFailed, built, served
from loadtests.observe.prometheus import PrometheusFailed, running_prometheus
from loadtests.observe.traces import Traces

WORK = Path(__file__).parents[1] / ".work" / "observe"
ROUNDHOUSE = [sys.executable, "-m", "serve.cli"]


def main() -> int:
    """Start everything, say where it is, and end it on Ctrl-C."""
    parser = argparse.ArgumentParser(prog="make observe ARGS=...", description=__doc__)
    parser.add_argument("--port", type=int, default=8000, help="the platform's; default: 8000")
    parser.add_argument("--prometheus-port", type=int, default=9090, help="default: 9090")
    parser.add_argument("--page-port", type=int, default=3000, help="of the dashboards and traces; default: 3000")
    parser.add_argument(
        "--otlp-port", type=int, default=4317, help="of OTLP over gRPC, HTTP is the next; default: 4317"
    )
    parser.add_argument("--interval-s", type=float, default=5.0, help="between two scrapes; default: 5")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        require_free(options)
        observe(options)
    except (CollectorFailed, PrometheusFailed, PortTaken) as error:
        print(f"observe: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


class PortTaken(Exception):
    """Something listens already where one of ours should; the message names the option that helps."""


def require_free(options: argparse.Namespace) -> None:
    """Return if every port is free.

    Raises:
        PortTaken: One is not.
    """
    for name in ("prometheus_port", "page_port", "otlp_port"):
        port = getattr(options, name)
        for each in (port, port + 1) if name == "otlp_port" else (port,):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", each)) == 0:
                    option = f"--{name.replace('_', '-')}"
                    raise PortTaken(f"port {each} is taken; choose another: make observe ARGS='{option} {port + 10}'")


def observe(options: argparse.Namespace) -> None:
    """Run until interrupted."""
    with contextlib.ExitStack() as running:
        prometheus = running.enter_context(
            running_prometheus(
                WORK / "prometheus",
                target=f"127.0.0.1:{options.port}",
                port=options.prometheus_port,
                interval_s=options.interval_s,
                rules=rules(),
            )
        )
        traces = Traces()
        page = running.enter_context(served(page_folder(), options.page_port, traces))
        running.enter_context(
            running_collector(
                WORK / "collector", grpc_port=options.otlp_port, http_port=options.otlp_port + 1, onward=page
            )
        )
        print(told(options, prometheus.url, page), flush=True)
        signal.pause()


def rules() -> list[Path]:
    """Write what Prometheus records and alerts on; return where."""
    path = WORK / "rules.yml"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([*ROUNDHOUSE, "rules"], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"observe: no alerts here: {done.stderr.strip()}", file=sys.stderr)
        return []
    path.write_text(done.stdout)
    return [path]


def page_folder() -> Path:
    """Return the folder of the dashboards' page, or an empty one where it cannot be built."""
    try:
        print("Building the page of the dashboards (a minute and 500 MB on a first run)", flush=True)
        return built(WORK / "page")
    except PageFailed as error:
        print(f"observe: no dashboards here: {error}", file=sys.stderr)
        empty = WORK / "no-page"
        empty.mkdir(parents=True, exist_ok=True)
        return empty


def told(options: argparse.Namespace, prometheus: str, page: str) -> str:
    """Return what to look at and what to do next."""
    endpoint = f"http://127.0.0.1:{options.otlp_port}"
    platform = f"http://127.0.0.1:{options.port}"
    lines = [
        f"Prometheus    {prometheus}  (alerts: {prometheus}/alerts)",
        f"Dashboards    {page}?prometheus={prometheus}",
        f"Traces        {page}traces",
        f"Collector     {endpoint} (gRPC), {options.otlp_port + 1} (HTTP)",
        "",
        *([] if is_up(platform) else [f"Nothing answers on {platform} yet; start it in another shell:"]),
        "With every request traced:",
        f"  ROUNDHOUSE_TRACING_ENDPOINT={endpoint} ROUNDHOUSE_TRACING_RATIO=1 make serve",
        "Then send it something:",
        '  .venv/bin/roundhouse predict minilm "The locomotive turns on the table."',
        "In a Grafana of your own: `roundhouse dashboards export FOLDER`, and a Prometheus data source.",
        "Ctrl-C ends all of it; what was recorded stays in loadtests/.work/observe.",
    ]
    return "\n".join(lines)


def is_up(platform: str) -> bool:
    """Return whether a platform answers."""
    try:
        return httpx.get(f"{platform}/v2/health/live", timeout=2).is_success
    except httpx.HTTPError:
        return False


if __name__ == "__main__":
    sys.exit(main())
