"""A line has the identifiers of its request, and nobody waits for it to be written."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve.telemetry.lines import LONGEST_LINE, Event, as_json
from serve.telemetry.logs import REQUEST, Log, LogFile, LogHandler, Writer, access, request_fields
from serve.telemetry.traceparent import TraceIds

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {b"x-request-id": b"order-7", b"traceparent": f"00-{TRACE}-{SPAN}-01".encode()}

logger = logging.getLogger("tests.model")


class Output:
    """What was written; blocks while it is told to."""

    def __init__(self) -> None:
        self.text = ""
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Event()
        self.broken = False

    def __call__(self, lines: str) -> None:
        self.entered.set()
        assert self.go.wait(20)
        if self.broken:
            raise BrokenPipeError
        self.text += lines

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]


@contextlib.contextmanager
def logging_to(output: Output, level: str = "info", **about: str) -> Iterator[Log]:
    with Log(as_json, output, level=level, about=about) as log:
        yield log


def event(message: str = "m") -> Event:
    return Event(0.0, logging.INFO, "x", message, {})


def test_what_is_logged_is_written_with_its_fields():
    output = Output()
    with logging_to(output, model="minilm", replica="r1"):
        logger.info("read %d rows", 3, extra={"rows": 3, "where": {"file": "a"}})
    (found,) = output.events()
    assert found.pop("time")
    assert found == {
        "level": "info",
        "logger": "tests.model",
        "message": "read 3 rows",
        "model": "minilm",
        "replica": "r1",
        "rows": 3,
        "where": {"file": "a"},
    }


def test_the_level_is_the_least_severe_line_and_libraries_are_quiet():
    output = Output()
    with logging_to(output, "debug"):
        logger.debug("own")
        logging.getLogger("httpx").info("GET /")
    with logging_to(output, "error"):
        logger.warning("not told")
        logging.getLogger("urllib3").warning("not told")
    assert [found["message"] for found in output.events()] == ["own"]


def test_arguments_that_do_not_fit_lose_no_line():
    output = Output()

    class Mute:
        def __str__(self) -> str:
            raise ValueError

    writer = Writer(as_json, output, about={})
    for given in ({"msg": "%d of %d", "args": (1,)}, {"msg": "%s", "args": (Mute(),)}, {"msg": "fine", "mute": Mute()}):
        LogHandler(writer).handle(logging.makeLogRecord(given))
    assert writer.flush()
    first, second, third = output.events()
    assert first["message"].startswith("%d of %d (its arguments do not fit: ")
    assert second["message"].startswith("%s (its arguments do not fit: ")
    assert third["mute"] == "its text cannot be told (ValueError)"


def test_after_its_end_logging_is_as_before():
    root = logging.getLogger()
    before = (root.level, [*root.handlers])
    with logging_to(Output(), "error"):
        assert (root.level, [*root.handlers]) != before
    assert (root.level, [*root.handlers]) == before


async def test_lines_of_requests_at_once_each_have_their_own_identifiers():
    output = Output()

    async def answer(number: int) -> None:
        REQUEST.set(({b"x-request-id": str(number).encode()}, None))
        await asyncio.sleep(0)
        logger.info("%d", number)
        await asyncio.gather(asyncio.create_task(below(number)))

    async def below(number: int) -> None:
        logger.info("%d", number)

    with logging_to(output):
        await asyncio.gather(*(asyncio.create_task(answer(number)) for number in range(20)))
        logger.info("of no request")
    *of_requests, last = output.events()
    assert len(of_requests) == 40
    assert all(found["message"] == found["request_id"] for found in of_requests)
    assert "request_id" not in last


@pytest.mark.parametrize(
    ("headers", "passage", "found"),
    [
        ({}, None, {}),
        (HEADERS, None, {"request_id": "order-7", "trace_id": TRACE, "span_id": SPAN}),
        ({b"traceparent": b"nonsense", b"x-request-id": b""}, None, {}),
        ({b"x-request-id": b"a\r\n\x1b[2Jb\xff"}, None, {"request_id": "a\\r\n\\x1b[2Jb\xff"}),
        ({}, SimpleNamespace(model="minilm"), {"model": "minilm"}),
        (
            HEADERS,
            SimpleNamespace(model="", trace=TraceIds(b"\1" * 16, b"\2" * 8)),
            {"request_id": "order-7", "trace_id": "01" * 16, "span_id": "02" * 8},
        ),
    ],
)
def test_the_identifiers_are_the_spans_of_this_process_or_else_the_callers(headers, passage, found):
    assert request_fields((headers, passage)) == found


def test_an_identifier_is_cut():
    found = request_fields(({b"x-request-id": b"x" * 10_000}, None))
    assert len(found["request_id"]) < 200


def test_nobody_waits_for_what_is_slow_and_what_is_dropped_is_told():
    output = Output()
    output.go.clear()
    writer = Writer(as_json, output, about={})
    writer.put(event("first"), None)
    assert output.entered.wait(20)
    for number in range(1000):
        writer.put(event(str(number)), None, most_waiting=10)
    output.go.set()
    assert writer.flush()
    first, told, *written = output.events()
    assert [found["message"] for found in (first, *written)] == ["first", *map(str, range(10))]
    assert (told["level"], told["dropped"]) == ("warning", 990)
    writer.put(event("after"), None)
    assert writer.flush()
    assert output.events()[-1]["message"] == "after"


def test_lines_that_cannot_be_written_are_counted_and_told_when_they_can():
    output = Output()
    output.broken = True
    writer = Writer(as_json, output, about={})
    for _ in range(3):
        writer.put(event(), None)
        assert writer.flush()
    output.broken = False
    writer.put(event("again"), None)
    assert writer.flush()
    first, second = output.events()
    assert (first["message"], second["dropped"]) == ("again", 3)


def test_drops_that_go_on_are_told_once_in_a_while():
    output = Output()
    output.go.clear()
    writes = 0

    def write(lines: str) -> None:
        nonlocal writes
        output(lines)
        if "dropped" not in lines:
            writes += 1
            writer.drop(1)

    writer = Writer(as_json, write, about={}, clock=lambda: 0.0)
    for _ in range(2000):
        writer.put(event(), None)
    output.go.set()
    assert writer.flush()
    told = [found["dropped"] for found in output.events() if "dropped" in found]
    assert len(told) == 2
    assert sum(told) == writes > 4


def test_access_lines_leave_room_for_what_went_wrong():
    output = Output()
    output.go.clear()
    with logging_to(output):
        for _ in range(5000):
            access({"method": "POST", "route": "/infer", "status": 200})
        logger.error("bad")
        output.go.set()
    written = output.events()
    assert [found["message"] for found in written if found["level"] == "error"] == ["bad"]
    assert sum(found["message"] == "POST /infer 200" for found in written) < 5000
    assert [found["dropped"] for found in written if "dropped" in found]


def test_a_line_of_many_fields_is_bounded():
    output = Output()
    with logging_to(output):
        logger.info("big", extra={f"field{n}": "x" * 8000 for n in range(100)})
    assert len(output.text) < LONGEST_LINE
    (found,) = output.events()
    assert found["message"] == "big"
    assert "characters in all" in found["left_out"]


def test_a_file_begins_anew_at_its_size_and_the_one_before_is_kept(tmp_path: Path):
    path = tmp_path / "below" / "a.log"
    write = LogFile(path, most_bytes=100)
    for number in range(30):
        write(f"line {number:02}\n")
    kept = path.with_name("a.log.1").read_text() + path.read_text()
    assert kept == "".join(f"line {number:02}\n" for number in range(30 - len(kept) // 8, 30))
    assert path.stat().st_size <= 100
    LogFile(path)("more\n")
    assert path.read_text().endswith("line 29\nmore\n")
