"""Ray's command as the image has it: the nodes that `ray start --block` makes fork their workers."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from serve.errors import RoundhouseError


def main() -> None:
    """Do what `ray` does."""
    is_node = sys.argv[1:2] == ["start"] and "--block" in sys.argv
    try:
        with _forked_workers() if is_node else contextlib.nullcontext():
            from ray.scripts import scripts

            scripts.main()
    except RoundhouseError as error:
        sys.exit(f"ray: {error}")


@contextlib.contextmanager
def _forked_workers() -> Iterator[None]:
    from serve.runtime import fork_server
    from serve.settings import Settings
    from serve.telemetry.export import exporter_modules

    modules = exporter_modules(Settings.from_environment())
    if not fork_server.CAN_FORK:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="rh-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        fork_server.start(Path(folder), modules=modules)
        with fork_server.employed():
            yield
