"""What a model prints goes where its process prints, and what our code logs beside Ray's own logs."""

from __future__ import annotations

import builtins
import io
import json
import logging
import sys
from pathlib import Path

import pytest
from ray.serve._private import logging_utils

from serve.runtime.events import begin_log, give_back_streams
from serve.settings import Settings


def redirected(output: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redirect what is printed as Ray Serve does in a replica whose own output is `output`."""
    for name in ("stdout", "stderr"):
        held = logging_utils.StreamToLogger(logging.getLogger("nobody"), logging.INFO, output)
        monkeypatch.setattr(sys, name, held)
    monkeypatch.setattr(builtins, "print", logging_utils.redirected_print)


def test_what_is_printed_is_not_held_back(monkeypatch: pytest.MonkeyPatch):
    output = io.StringIO()
    redirected(output, monkeypatch)
    for words in ("hello", "again"):
        give_back_streams()
        print(words)
        print("bad", file=sys.stderr)
    assert output.getvalue() == "hello\nbad\nagain\nbad\n"


def test_what_is_logged_is_in_a_file_beside_rays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logging_utils, "get_serve_logs_dir", lambda: str(tmp_path / "logs" / "serve"))
    log = begin_log(Settings(log_level="info"), "model-a_x1", {"model": "a"})
    with log:
        logging.getLogger("users.model").info("read")
        logging.getLogger("ray.serve").warning("of Ray")
    (line,) = (tmp_path / "logs" / "roundhouse" / "model-a_x1.log").read_text().splitlines()
    assert json.loads(line)["message"] == "read"
    assert json.loads(line)["model"] == "a"


def test_a_folder_that_cannot_be_written_leaves_the_log_on_the_processs_own_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "taken").touch()
    monkeypatch.setattr(logging_utils, "get_serve_logs_dir", lambda: str(tmp_path / "taken" / "serve"))
    with begin_log(Settings(log_format="text"), "model-a_x1", {"model": "a"}):
        logging.getLogger("users.model").warning("read")
    assert capsys.readouterr().err.endswith(" WARNING read\n")
