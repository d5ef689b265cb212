"""A real Prometheus beside a platform: its configuration, its process, its answers."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from loadtests.observe.processes import running

HOW_TO_GET = "Prometheus is not installed; on Debian and Ubuntu: apt-get install prometheus"
_READY_WITHIN_S = 60.0


def configuration(target: str, *, interval_s: float, rules: Sequence[Path] = ()) -> str:
    """Return the text of a prometheus.yml (pure).

    Args:
        target: Whose /metrics is read, HOST:PORT.
        interval_s: Between two readings, at least a millisecond.
        rules: Files of rules.
    """
    interval = f"{round(interval_s * 1000)}ms"
    return yaml.safe_dump(
        {
            "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
            "storage": {"exemplars": {"max_exemplars": 10_000}},
            "rule_files": [str(path) for path in rules],
            "scrape_configs": [{"job_name": "roundhouse", "static_configs": [{"targets": [target]}]}],
        },
        sort_keys=False,
    )


class PrometheusFailed(Exception):
    """Prometheus is not there, did not start or refused a question; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A Prometheus that answers at `url`."""

    url: str

    def at(self, expr: str, when: float) -> list[dict[str, Any]]:
        """Return the series of an expression at one time, seconds since the epoch."""
        found: list[dict[str, Any]] = self._ask("query", query=expr, time=when)["result"]
        return found

    def over(self, expr: str, *, start: float, end: float, step_s: float) -> list[dict[str, Any]]:
        """Return the series of an expression between two times."""
        told = self._ask("query_range", query=expr, start=start, end=end, step=step_s)
        found: list[dict[str, Any]] = told["result"]
        return found

    def exemplars(self, expr: str, *, start: float, end: float) -> list[dict[str, Any]]:
        """Return the exemplars of the series that an expression reads."""
        found: list[dict[str, Any]] = self._ask("query_exemplars", query=expr, start=start, end=end)
        return found

    def _ask(self, what: str, **parameters: Any) -> Any:
        response = httpx.get(f"{self.url}/api/v1/{what}", params=parameters, timeout=30)
        told = response.json()
        if told["status"] != "success":
            raise PrometheusFailed(f"{parameters['query']}: {told['error']}")
        return told["data"]


@contextlib.contextmanager
def running_prometheus(
    folder: Path, *, target: str, port: int, interval_s: float, rules: Sequence[Path] = ()
) -> Iterator[Prometheus]:
    """Run a Prometheus that reads a platform's metrics and keeps exemplars.

    Args:
        folder: Of its configuration, data and log.
        port: Where it listens, on this machine only.
        target, interval_s, rules: As in `configuration`.

    Raises:
        PrometheusFailed: It is not installed or did not become ready.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise PrometheusFailed(HOW_TO_GET)
    folder.mkdir(parents=True, exist_ok=True)
    file, log = folder / "prometheus.yml", folder / "prometheus.log"
    file.write_text(configuration(target, interval_s=interval_s, rules=rules))
    url = f"http://127.0.0.1:{port}"
    command = [
        *(program, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"),
        *(f"--web.listen-address=127.0.0.1:{port}", "--enable-feature=exemplar-storage"),
        "--storage.tsdb.retention.time=7d",
    ]

    def answers() -> bool:
        return httpx.get(f"{url}/-/ready", timeout=2).status_code == 200

    def failed(end: str) -> Exception:
        return PrometheusFailed(f"Prometheus did not become ready; {end}")

    with running(command, log=log, within_s=_READY_WITHIN_S, answers=answers, failed=failed):
        yield Prometheus(url)
