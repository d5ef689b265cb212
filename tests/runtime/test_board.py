"""What a person or a program that watches `roundhouse up` is told."""

from __future__ import annotations

import io
import logging
import os

import pytest
from rich.console import Console

from serve.api.directory import ModelStatus
from serve.runtime.board import Board, Output


def status(phase: str, message: str = "") -> ModelStatus:
    return ModelStatus(name="a", task="forecast", phase=phase, message=message)


def test_without_a_terminal_each_change_is_a_line():
    output = io.StringIO()
    board = Board(Console(file=output))
    for phase in ("queued", "loading", "loading", "ready"):
        board.show([status(phase)])
    lines = output.getvalue().splitlines()
    assert [line.partition(" s  ")[2] for line in lines] == ["a queued", "a loading", "a ready"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_with_a_log_everything_is_an_event_of_it(caplog: pytest.LogCaptureFixture, is_terminal: bool):
    output = io.StringIO()
    board = Board(Console(file=output, force_terminal=is_terminal), log=logging.getLogger("tests.up"))
    with caplog.at_level(logging.INFO, "tests.up"), board.working("starting"):
        board.say("serving 100% on port 8000")
        board.show([status("loading")])
        board.show([status("failed", "no %s")])
        board.block("\nall\nready\n")
        board.hide()
    assert caplog.messages == ["serving 100% on port 8000", "a loading", "a failed: no %s", "all\nready"]
    assert output.getvalue() == ""


def test_lines_of_a_log_stand_between_its_own():
    output = io.StringIO()
    board = Board(Console(file=output, width=40))
    board.write("\x1b[31mred\x1b[0m [bold]\n" + "x" * 60 + "\n")
    assert output.getvalue() == "red [bold]\n" + "x" * 60 + "\n"


def test_a_terminal_that_is_closed_ends_nothing():
    master, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stream:
        board = Board(Console(file=Output(stream)))
        board.show([status("loading")])
        os.close(master)
        with board.working("stopping"):
            board.say("stopping")
            board.block("stopped")
        board.hide()
