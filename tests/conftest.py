"""How tests run: an example that takes long on a busy machine is no failure, and a run that passes leaves nothing."""

from __future__ import annotations

import contextlib
import getpass
import os
import tempfile
from pathlib import Path

from hypothesis import settings

from serve.applications import ENVIRONMENT

# What computes here shares its cores, with the tests of another process at least, as replicas do.
os.environ.setdefault("GOMP_SPINCOUNT", ENVIRONMENT["GOMP_SPINCOUNT"])

settings.register_profile("roundhouse", deadline=None)
settings.load_profile("roundhouse")


def pytest_unconfigure() -> None:
    """Remove the folder of all runs, which pytest leaves, where no run has left anything in it."""
    with contextlib.suppress(OSError):
        Path(tempfile.gettempdir(), f"pytest-of-{getpass.getuser()}").rmdir()
