"""Makes docs/images/dashboards: plays the story on a real platform and photographs the dashboards over it."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from urllib.parse import urlencode

from loadtests.observe.page import built, height_px, photograph, served
from loadtests.observe.prometheus import Prometheus, running_prometheus
from loadtests.observe.story import Story, platform, tell
from loadtests.observe.traces import Traces
from loadtests.peers.processes import free_port
from serve.telemetry.dashboards import dashboards

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "images" / "dashboards"
WORK = Path(__file__).parents[1] / ".work" / "observe"
#: Which model a dashboard is shown for; "" is all of them.
_MODELS = {"scaling": ("ranker",), "model": ("smollm2",)}
_WIDTH_PX = 1600
_INTERVAL_S = 2.0


def main() -> None:
    """Play, photograph, and say what happened when."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=15, help="how long the story takes; default: 15")
    options = parser.parse_args()
    page = built(WORK / "page")
    folder = Path(tempfile.mkdtemp(prefix="story-"))
    try:
        port = free_port()
        start = time.time()
        with (
            running_prometheus(
                folder / "prometheus", target=f"127.0.0.1:{port}", port=free_port(), interval_s=_INTERVAL_S
            ) as prometheus,
            platform(folder, port) as story,
        ):
            tell(story, options.minutes)
            photograph_all(page, prometheus, start=start, end=time.time())
        write_events(story)
    finally:
        shutil.rmtree(folder)


def photograph_all(page: Path, prometheus: Prometheus, *, start: float, end: float) -> None:
    """Write a picture of each dashboard, times in seconds since the epoch."""
    with served(page, 0, Traces()) as url:
        for one in dashboards():
            board = one.name.removesuffix(".json")
            for model in _MODELS.get(board, ("",)):
                asked = {
                    "board": board,
                    "prometheus": prometheus.url,
                    "from": start,
                    "to": end,
                    "interval": "20s",
                    **({"model": model} if model else {}),
                }
                path = PICTURES / f"{'-'.join(filter(None, (board, model)))}.png"
                photograph(f"{url}?{urlencode(asked)}", path, width_px=_WIDTH_PX, height=height_px(one.text))
                print(path.relative_to(ROOT), flush=True)


def write_events(story: Story) -> None:
    """Write beside the pictures what happened, in UTC."""
    told = [{"at": time.strftime("%H:%M:%S", time.gmtime(at)), "what": what} for at, what in story.events]
    (PICTURES / "events.json").write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
