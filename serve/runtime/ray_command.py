"""Ray's command as the image has it: the nodes that it starts fork their workers."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

from serve.runtime import fork_server
from serve.settings import Settings
from serve.telemetry.export import exporter_modules


def main() -> None:
    """Do what `ray` does."""
    workers: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if sys.argv[1:2] == ["start"] and "--help" not in sys.argv:
        folder = Path(tempfile.mkdtemp(prefix="rh-"))
        fork_server.start(folder, modules=exporter_modules(Settings.from_environment()))
        workers = fork_server.employed()
    with workers:
        from ray.scripts import scripts

        scripts.main()
