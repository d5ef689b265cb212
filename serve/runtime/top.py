"""`roundhouse top`: what the models of a running platform do, from what it tells of itself twice."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from serve.runtime.predict import RequestFailed, send
from serve.runtime.status import PHASE_COLOURS, fetch_status

REFRESH_S = 2.0


@dataclass(slots=True)
class Counted:
    """What one scrape tells of a model.

    Args:
        requests, errors: Answered or given up, and those of them that are no answers.
        seconds: Upper bound -> answers that took no longer.
    """

    requests: float = 0.0
    errors: float = 0.0
    seconds: dict[float, float] = field(default_factory=lambda: defaultdict(float))
    queued: float = 0.0
    memory_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """What one model did between two scrapes; None where nothing was answered."""

    model: str
    phase: str
    ready_replicas: int
    wanted_replicas: int
    requests_per_s: float
    errors_per_s: float
    p50_s: float | None
    p99_s: float | None
    queued: float
    memory_bytes: float


def top(base_url: str, *, once: bool, as_json: bool, pause: Callable[[float], None] = time.sleep) -> None:
    """Show the models every two seconds, until Ctrl-C.

    Args:
        once: Show them one time.
        as_json: Print a line of JSON instead of a table.
        pause: Waits for seconds.

    Raises:
        RequestFailed: The platform does not answer, or keeps no metrics.
    """
    with contextlib.suppress(KeyboardInterrupt), _shown(as_json) as show:
        for rows in _watched(base_url, pause):
            show(rows)
            if once:
                return


def _watched(base_url: str, pause: Callable[[float], None]) -> Iterator[list[Row]]:
    before, since = _scraped(base_url), time.monotonic()
    while True:
        pause(REFRESH_S)
        now, at = _scraped(base_url), time.monotonic()
        yield rows(fetch_status(base_url), before, now, seconds=at - since)
        before, since = now, at


def _scraped(base_url: str) -> Mapping[str, Counted]:
    response = send("GET", f"{base_url}/metrics", headers={"accept": "text/plain"})
    if response.status_code != 200:
        raise RequestFailed(f"{base_url}/metrics answers {response.status_code}: {response.text[:200]}")
    return counted(response.text)


def counted(text: str) -> Mapping[str, Counted]:
    """Return what a Prometheus text tells of each model."""
    found: dict[str, Counted] = defaultdict(Counted)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            model = found[sample.labels.get("model", "")]
            if sample.name == "roundhouse_requests_total":
                model.requests += sample.value
                model.errors += sample.value if sample.labels["outcome"] != "ok" else 0.0
            elif sample.name == "roundhouse_request_duration_seconds_bucket" and sample.labels["status"] == "ok":
                model.seconds[float(sample.labels["le"])] += sample.value
            elif sample.name == "roundhouse_queue_depth":
                model.queued += sample.value
            elif sample.name == "roundhouse_process_memory_bytes":
                model.memory_bytes += sample.value
    return found


def rows(
    models: Sequence[Mapping[str, Any]], before: Mapping[str, Counted], now: Mapping[str, Counted], *, seconds: float
) -> list[Row]:
    """Return what each model did between two scrapes, `seconds` apart (pure).

    Args:
        models: As the repository index lists them.
    """
    return [_row(model, before.get(model["name"]), now.get(model["name"]), seconds) for model in models]


def _row(model: Mapping[str, Any], before: Counted | None, now: Counted | None, seconds: float) -> Row:
    before, now = before or Counted(), now or Counted()
    grown = {bound: max(0.0, count - before.seconds.get(bound, 0.0)) for bound, count in now.seconds.items()}
    return Row(
        model=model["name"],
        phase=model["phase"],
        ready_replicas=model["ready_replicas"],
        wanted_replicas=model["target_replicas"],
        requests_per_s=max(0.0, now.requests - before.requests) / seconds,
        errors_per_s=max(0.0, now.errors - before.errors) / seconds,
        p50_s=quantile(grown, 0.5),
        p99_s=quantile(grown, 0.99),
        queued=now.queued,
        memory_bytes=now.memory_bytes,
    )


def quantile(buckets: Mapping[float, float], share: float) -> float | None:
    """Return the value below which a share of what a histogram counted lies, as Prometheus estimates it.

    Args:
        buckets: Upper bound -> how many are no larger; infinity is one of them.
        share: Above 0, at most 1.

    Returns:
        Within a bucket its part of the way; of those beyond the last bound, that bound; None where nothing was counted.
    """
    bounds = sorted(buckets)
    total = buckets[bounds[-1]] if bounds else 0.0
    if not total:
        return None
    lower = below = 0.0
    for bound in bounds:
        if buckets[bound] >= share * total:
            if math.isinf(bound):
                return lower
            return lower + (bound - lower) * (share * total - below) / (buckets[bound] - below)
        lower, below = bound, buckets[bound]
    return lower


@contextlib.contextmanager
def _shown(as_json: bool) -> Iterator[Callable[[Sequence[Row]], None]]:
    """Yield what shows rows: in place on a terminal, else one after the other."""
    console = Console(highlight=False)
    if as_json:
        yield _print_json
    elif console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield lambda found: live.update(_table(found), refresh=True)
    else:
        yield lambda found: console.print(_table(found))


def _print_json(found: Sequence[Row]) -> None:
    sys.stdout.write(json.dumps([asdict(row) for row in found]) + "\n")
    sys.stdout.flush()


def _table(found: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model")
    table.add_column("phase")
    for heading in ("replicas", "requests/s", "errors/s", "p50", "p99", "queue", "memory"):
        table.add_column(heading, justify="right")
    for row in found:
        table.add_row(
            row.model,
            Text(row.phase, PHASE_COLOURS.get(row.phase, "cyan")),
            f"{row.ready_replicas}/{row.wanted_replicas}",
            f"{row.requests_per_s:.1f}",
            Text(f"{row.errors_per_s:.1f}", "red" if row.errors_per_s else ""),
            _time(row.p50_s),
            _time(row.p99_s),
            f"{row.queued:g}",
            f"{row.memory_bytes / 2**20:.0f} MiB",
        )
    return table


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return (
        f"{seconds:.1f} s"
        if seconds >= 1
        else f"{seconds * 1000:.0f} ms"
        if seconds >= 0.01
        else f"{seconds * 1000:.1f} ms"
    )
