"""`roundhouse trace`: where a request's time went, drawn in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.table import Table
from rich.text import Text

from serve.runtime.predict import get

_LONGEST_NAME = 34
_NARROWEST = 16
_COLOURS = {"server": "bold", "client": "dim", "read": "cyan", "queue": "yellow", "prepare": "blue", "respond": "cyan"}


def fetch_request(url: str, request_id: str) -> dict[str, Any]:
    """Return how a request went.

    Raises:
        RequestFailed: Nobody remembers it, or nobody answers.
    """
    told: dict[str, Any] = get(f"{url}/v2/requests/{quote(request_id, safe='')}")
    return told


def render_request(told: dict[str, Any]) -> None:
    """Print a request's spans as bars below each other, the whole request as the width."""
    console = Console(highlight=False)
    hops: Sequence[dict[str, Any]] = told["hops"]
    when = datetime.fromtimestamp(hops[0]["at"], UTC).isoformat(timespec="milliseconds")
    last = hops[-1]
    console.print(
        f"{told['request_id']}: {last['model']}, {last['outcome']}, {when}, trace {told['trace_id']}", soft_wrap=True
    )
    if last["batch_sizes"]:
        console.print(f"It ran in batches of {', '.join(map(str, last['batch_sizes']))} items.")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(max_width=_LONGEST_NAME, no_wrap=True, overflow="ellipsis")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    spans = [span for hop in hops for span in hop["spans"]]
    begin = min(span["at"] for span in spans)
    whole = max(span["at"] + span["seconds"] for span in spans) - begin or 1e-9
    width = max(_NARROWEST, console.width - _LONGEST_NAME - 2 * len("12345.00 ms"))
    for depth, span in _tree(spans):
        error = Text(f"  {span['error']}", "red") if span["error"] else Text("")
        colour = _COLOURS.get(span["name"], _COLOURS.get(span["kind"], "green"))
        table.add_row(
            Text("  " * depth + span["name"]),
            f"{span['seconds'] * 1000:.2f} ms",
            Text(bar(span["at"] - begin, span["seconds"], whole, width=width), colour) + error,
        )
    console.print(table)


def bar(offset: float, length: float, whole: float, *, width: int) -> str:
    """Return a bar that begins and ends where its part of the whole does; one that is too short to see is a `|`."""
    first = min(width - 1, int(offset / whole * width))
    cells = round((offset + length) / whole * width) - first
    return " " * first + ("█" * cells if cells > 0 else "|")


def _tree(spans: Sequence[dict[str, Any]], parent: str | None = None, depth: int = 0) -> Iterator[tuple[int, Any]]:
    """Yield each span with its depth, children in order of time below their parent."""
    known = {span["span_id"] for span in spans}
    for span in sorted(spans, key=lambda one: float(one["at"])):
        if span["parent_id"] == parent or (parent is None and span["parent_id"] not in known):
            yield depth, span
            yield from _tree([one for one in spans if one is not span], span["span_id"], depth + 1)
