"""The log of a process of ours that Ray starts: a file beside Ray's own, of whose chatter it has nothing."""

from __future__ import annotations

import atexit
import builtins
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from ray.serve._private import logging_utils

from serve.settings import Settings
from serve.telemetry.lines import renderer
from serve.telemetry.logs import Log, LogFile, to_stream

#: Folder of these files, in that of Ray's logs.
FOLDER = "roundhouse"


def begin_log(settings: Settings, name: str, about: Mapping[str, str]) -> Log:
    """Have what this process tells through `logging` written to `roundhouse/NAME.log` among Ray's logs.

    Args:
        about: Fields of every line.
    """
    give_back_streams()
    render = renderer(settings.log_format, is_terminal=False)
    log = Log(render, _file(name), level=settings.log_level, about=about)
    atexit.register(log.flush)
    return log


def _file(name: str) -> Callable[[str], None]:
    try:
        return LogFile(Path(logging_utils.get_serve_logs_dir()).with_name(FOLDER) / f"{name}.log")
    except OSError:
        return to_stream(sys.stderr)


def give_back_streams() -> None:
    """Let what a model prints go to this process's own output again, a file of Ray's that is written at once.

    With its log apart from the output, Ray 2.60 makes a line of its log of each printed line. A thousand of them wait
    there for an error, and all of them are lost where Ray's level is above `info`.
    """
    builtins.print = logging_utils.buildin_print
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, logging_utils.StreamToLogger):
            setattr(sys, name, stream._original_object)
