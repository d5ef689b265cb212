"""`roundhouse status`: the models of a running platform, asked of its gateway."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from serve.runtime.predict import parsed, send
from serve.runtime.state import Running

PHASE_COLOURS = {"ready": "green", "failed": "red", "queued": "dim", "draining": "yellow"}


def fetch_status(url: str) -> list[dict[str, Any]]:
    """Return every declared model with its phase and replicas.

    Raises:
        RequestFailed: The gateway does not answer.
    """
    return list(parsed(send("POST", f"{url}/v2/repository/index")))


def render_status(running: Running, models: list[dict[str, Any]]) -> None:
    """Print the platform and its models as a table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("model", "task", "phase", "replicas", ""):
        table.add_column(heading)
    for model in models:
        phase = model["phase"]
        replicas = f"{model['ready_replicas']}/{model['target_replicas']}"
        table.add_row(
            model["name"], model["task"], Text(phase, PHASE_COLOURS.get(phase, "cyan")), replicas, model["message"]
        )
    console = Console(highlight=False)
    console.print(f"{running.url}, process {running.pid}, following {running.file}\n")
    console.print(table)
