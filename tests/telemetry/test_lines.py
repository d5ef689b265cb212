"""Whatever is told, an event is one line: JSON that parses, or text that moves no cursor."""

from __future__ import annotations

import json
import logging
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.telemetry.lines import (
    LONGEST,
    Event,
    as_json,
    as_plain,
    as_text,
    clean,
    fields_of,
    form_of,
    parsed,
    renderer,
)

AT = 1_769_860_800.0  # 2026-01-31T12:00:00Z
STRANGE = ["\x1b[2J\x1b[31m", "a\r\nb", "\u2028", "\x85", "\x9b31m", "\ud800", "\u202e", "\x00", "|"]
ANY_TEXT = st.text(st.characters(), max_size=60) | st.sampled_from([*STRANGE, 'File "x", line 1, in y'])
ANY_VALUE = st.recursive(
    ANY_TEXT | st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=9),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(ANY_TEXT, below, max_size=3),
    max_leaves=8,
)


class Strange(Exception):
    """An exception that clients' words are in, or that has none."""

    def __init__(self, text: str, *, mute: bool) -> None:
        super().__init__(text)
        self.mute = mute

    def __str__(self) -> str:
        if self.mute:
            raise ValueError
        return str(self.args[0])


@st.composite
def strange_errors(draw: st.DrawFn) -> BaseException:
    error = Strange(draw(ANY_TEXT), mute=draw(st.booleans()))
    try:
        if draw(st.booleans()):
            raise error from Strange(draw(ANY_TEXT), mute=draw(st.booleans()))
        raise error
    except Strange as caught:
        return caught


EVENTS = st.builds(
    Event,
    st.floats(0, 4e9),
    st.sampled_from([10, 20, 25, 30, 40, 50]),
    ANY_TEXT,
    ANY_TEXT,
    st.dictionaries(ANY_TEXT | st.sampled_from(["message", "exception", "time"]), ANY_VALUE, max_size=4).map(fields_of),
    st.none() | strange_errors(),
)
ABOUT = st.dictionaries(st.sampled_from(["model", "component", "request_id"]), ANY_TEXT.map(clean))


def told(message: str = "slow", **fields: Any) -> dict[str, Any]:
    return as_plain(Event(AT, logging.WARNING, "serve.host", message, fields_of(fields)), {"model": "minilm"})


@given(EVENTS, ABOUT)
def test_an_event_is_one_line_of_json(event: Event, about: dict[str, str]):
    line = as_json(as_plain(event, about))
    assert line.splitlines() == [line]
    assert not [letter for letter in line if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")]
    found = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert {"time", "level", "logger", "message", *about} <= found.keys()
    assert about.items() <= found.items()
    assert ("exception" in found) == (event.error is not None)
    assert parsed(line) == found


@given(EVENTS, ABOUT, st.booleans())
def test_an_event_is_one_line_of_text(event: Event, about: dict[str, str], terminal: bool):
    line = as_text(as_plain(event, about), terminal=terminal)
    assert line.splitlines() == [line]
    assert not [letter for letter in line if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")]


@given(EVENTS)
def test_colour_is_all_that_a_terminal_is_told_to_do(event: Event):
    line = as_text(as_plain(event, {}), terminal=True, colour=True)
    for code in ("2", "33", "31", "1;31", "36", "0"):
        line = line.replace(f"\x1b[{code}m", "")
    assert "\x1b" not in line


@given(st.dictionaries(ANY_TEXT, ANY_VALUE, max_size=4))
def test_a_line_of_json_from_elsewhere_can_be_shown(event: dict[str, Any]):
    line = as_text(fields_of(event) | {"exception": "none"}, terminal=True)
    assert line.splitlines() == [line]


def test_json_has_the_fields_in_their_order():
    assert as_json(told("slow\nvery", rows=3)) == (
        '{"time":"2026-01-31T12:00:00.000Z","level":"warning","logger":"serve.host","message":"slow\\nvery",'
        '"model":"minilm","rows":3}'
    )


def test_text_says_whose_it_is_first():
    assert as_text(told("slow\nvery", rows=3, why="no room", path="a")) == (
        'minilm | 2026-01-31T12:00:00.000Z WARNING slow\\nvery rows=3 why="no room" path=a'
    )


def test_a_terminal_shows_time_level_model_and_message():
    words = as_text(told(), terminal=True).split()
    assert words[1:] == ["WARNING", "minilm", "slow"]
    assert len(words[0]) == len("12:00:00.000")


def test_an_exception_is_one_field_of_json_and_its_innermost_frames_in_text():
    def burst() -> None:
        raise ValueError("burst\x1b[2J")

    try:
        burst()
    except ValueError as error:
        event = as_plain(Event(AT, logging.ERROR, "x", "the model raised", {}, error), {})
    found = event["exception"]
    assert (found["type"], found["message"]) == ("ValueError", "burst\\x1b[2J")
    assert found["stack"].splitlines()[0] == "Traceback (most recent call last):"
    assert "ValueError: burst\\x1b[2J (test_lines.py:" in as_text(event)
    assert " burst < test_lines.py:" in as_text(event)


def test_what_is_long_is_cut_and_says_so():
    event = told("x" * 10 * LONGEST, field="y" * 10 * LONGEST, many=list(range(1000)))
    assert event["message"].endswith(f"({9 * LONGEST} characters more)")
    assert len(as_json(event)) < 3 * LONGEST


def test_the_stack_keeps_its_innermost_frames():
    def deeper(depth: int) -> None:
        if not depth:
            raise RuntimeError("at the bottom" + "!" * LONGEST)
        deeper(depth - 1)

    try:
        deeper(900)
    except RuntimeError as error:
        stack = as_plain(Event(AT, 40, "x", "m", {}, error), {})["exception"]["stack"]
    assert "raise RuntimeError" in stack
    assert len(stack) < 40_000


def test_no_field_of_an_event_takes_the_place_of_one_of_ours():
    event = as_plain(Event(AT, 20, "x", "m", fields_of({"model": "other", "time": 1, "exception": 2})), {"model": "a"})
    assert (event["model"], event["model_"], event["time_"], event["exception_"]) == ("a", "other", 1, 2)


@pytest.mark.parametrize(
    ("log_format", "is_terminal", "form"),
    [("auto", True, "text"), ("auto", False, "json"), ("text", False, "text"), ("json", True, "json")],
)
def test_auto_is_text_for_people_and_json_for_programs(log_format: str, is_terminal: bool, form: str):
    assert form_of(log_format, is_terminal=is_terminal) == form
    line = renderer(log_format, is_terminal=is_terminal, colour=True)(told())
    assert line.startswith("{") == (form == "json")
    assert ("\x1b" in line) == (form == "text" and is_terminal)


def test_no_colour_is_none_on_a_terminal_either():
    assert "\x1b" not in renderer("text", is_terminal=True, colour=False)(told())


@pytest.mark.parametrize("line", ["", "plain", "{", "[1]", '{"a": 1}', '{"time": "x"}', '{"message": "\\ud800"}'])
def test_what_is_no_event_is_none(line: str):
    assert parsed(line) is None
