"""A program beside a platform: started with a log of its own, waited for, and ended."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx


@contextlib.contextmanager
def running(
    command: Sequence[str | Path],
    *,
    log: Path,
    within_s: float,
    answers: Callable[[], bool],
    failed: Callable[[str], Exception],
) -> Iterator[None]:
    """Run a program until the block ends.

    Args:
        log: Takes its output.
        within_s: Seconds in which it has to answer.
        answers: Whether it does; an httpx.HTTPError says that it does not.
        failed: Makes what is raised where it does not, of how its log ends.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        if not _comes_up(process, within_s, answers):
            raise failed(f"its log, {log}, ends:\n{log.read_text()[-1000:]}")
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


def _comes_up(process: subprocess.Popen[bytes], within_s: float, answers: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if answers():
                return True
        time.sleep(0.1)
    return False
