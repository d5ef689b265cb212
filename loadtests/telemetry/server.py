"""One model behind the replica's own HTTP server, watched as much as the comparison wants."""

from __future__ import annotations

import asyncio
import gc
import sys
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from serve.api.model_app import build_model_app
from serve.api.server import server_config
from serve.declaration import load_declaration
from serve.host import Host
from serve.runtime.replica import SWITCH_INTERVAL_S
from serve.settings import Settings
from serve.telemetry.export import start_tracing
from serve.telemetry.metrics import ReplicaMetrics

#: Share of requests that are recorded; None has no metrics either.
MODES: dict[str, float | None] = {"unwatched": None, "metrics": 0.0, "1 %": 0.01, "100 %": 1.0}


def main() -> None:
    """Serve until the process is ended: declaration, port, mode, the collector's URL and a folder for metrics."""
    declaration, port, mode, collector, folder = sys.argv[1:]
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(Path(declaration), int(port), mode, collector, Path(folder)))


async def _serve(declaration: Path, port: int, mode: str, collector: str, folder: Path) -> None:
    (spec,) = load_declaration(declaration).models
    ratio = MODES[mode]
    settings = Settings(
        metrics_dir=folder if ratio is not None else None,
        tracing_endpoint=collector if ratio else None,
        tracing_ratio=ratio or 0.0,
    )
    metrics = ReplicaMetrics.of(spec.name, folder=settings.metrics_dir)
    if ratio is None:
        _silence(metrics)
    tracer = start_tracing(settings, instance="replica", model=spec.name).tracer
    host = Host(spec, settings=settings, base_dir=declaration.parent, metrics=metrics, tracer=tracer)
    await host.load()
    gc.freeze()  # as the process that replicas are forked from does
    app = build_model_app(host, settings=settings, tracer=tracer)
    await uvicorn.Server(server_config(app, host="127.0.0.1", port=port, keep_alive_s=60)).serve()


def _silence(metrics: Any) -> None:
    """Have every verb do nothing."""

    def nothing(*_: object, **__: object) -> None:
        pass

    for part in (metrics, metrics.items, metrics.streams, metrics.requests, metrics.load):
        for name in dir(type(part)):
            if not name.startswith("_") and name not in ("of", "private") and callable(getattr(part, name)):
                setattr(part, name, nothing)


if __name__ == "__main__":
    main()
