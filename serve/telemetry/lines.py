"""Events as lines: JSON for programs, text for people, one line an event whatever is in it."""

from __future__ import annotations

import datetime
import functools
import logging
import math
import re
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import orjson

#: Characters of a message or a field, of a stack, and of an identifier that a client chose; more is cut.
LONGEST, LONGEST_STACK, LONGEST_ID = 8192, 16384, 128
#: Of a whole line, whatever fields it was given.
LONGEST_LINE = 256 * 1024
_LONGEST_KEY = 64
_MOST_MEMBERS = 32
_MOST_DEPTH = 2
_MOST_FRAMES = 40
_FRAMES_IN_TEXT = 3

# What ends a line, moves a cursor, reverses the order of letters or is no character at all.
_UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_UNSAFE_IN_TEXT = re.compile(r"[\t\n]|" + _UNSAFE.pattern)
_NAMED = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}
_BARE = re.compile(r"[^\s\"=]+")
_FRAME = re.compile(r'^ *File "(?:[^"\n]*[/\\])?([^"\n/\\]+)", line (\d+), in (.+)$', re.MULTILINE)

# What text does not repeat: it stands elsewhere in the line, or is the same for all of a process's lines.
_NOT_IN_TEXT = frozenset({"time", "level", "logger", "message", "exception", "component", "revision", "replica"})
_COLOURS = {"debug": "2", "warning": "33", "error": "31", "critical": "1;31"}

#: An event in plain values -> its line, without the end of it.
Render = Callable[[Mapping[str, Any]], str]


class Event(NamedTuple):
    """Something that happened, as it was told.

    Args:
        at: Unix time, seconds.
        level: As in `logging`.
        fields: What else is known of it, in plain values.
        error: What was raised.
    """

    at: float
    level: int
    logger: str
    message: str
    fields: Mapping[str, Any]
    error: BaseException | None = None


def as_plain(event: Event, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return an event in the values that its line has.

    Args:
        about: Fields between the message and the event's own: whose it is. None of the event's own replaces one.
    """
    told: dict[str, Any] = {
        "time": rfc3339(event.at),
        "level": logging.getLevelName(event.level).lower(),
        "logger": clean(event.logger),
        "message": clean(event.message),
        **about,
    }
    for key, value in event.fields.items():
        while key in told or key == "exception":
            key += "_"
        told[key] = value
    if event.error is not None:
        told["exception"] = raised(event.error)
    return told


def as_json(told: Mapping[str, Any]) -> str:
    """Return an event as one line of JSON."""
    return orjson.dumps(told).decode()


def as_text(told: Mapping[str, Any], *, terminal: bool = False, colour: bool = False) -> str:
    """Return an event as one line for people; where it is raised in short.

    Args:
        told: Of `as_plain`, or of a line of JSON that may lack anything.
        terminal: The day and the time zone are known, and whose it is is one column of several.
        colour: With ANSI escapes of ours; it has none of anybody else's.
    """
    paint = _paint if colour else _leave
    level = str(told.get("level", "info"))
    shout = _flat(level.upper())
    whose = _flat(told.get("component") or told.get("model") or "-")
    rest = [_flat(told.get("message", ""))]
    if exception := told.get("exception"):
        rest.append(paint(_in_short(exception), _COLOURS["error"]))
    hidden = _NOT_IN_TEXT if "component" in told else _NOT_IN_TEXT | {"model"}
    fields = " ".join(f"{_flat(key)}={_bare(value)}" for key, value in told.items() if key not in hidden)
    if fields:
        rest.append(paint(fields, "2"))
    if not terminal:
        return " ".join([whose, "|", _flat(told.get("time", "-")), shout, *rest])
    told_level = paint(f"{shout:<7}", _COLOURS.get(level, ""))
    return " ".join([paint(_clock(told.get("time")), "2"), told_level, paint(f"{whose:<12}", "36"), *rest])


def renderer(log_format: str, *, is_terminal: bool, colour: bool = False) -> Render:
    """Return what makes lines of events in a form of the settings, for an output that is a terminal or none."""
    if form_of(log_format, is_terminal=is_terminal) == "json":
        return as_json
    return functools.partial(as_text, terminal=is_terminal, colour=is_terminal and colour)


def form_of(log_format: str, *, is_terminal: bool) -> str:
    """Return `json` or `text`: what `auto` stands for, and the others as they are."""
    if log_format != "auto":
        return log_format
    return "text" if is_terminal else "json"


def parsed(line: str) -> dict[str, Any] | None:
    """Return the event of a line of JSON, or None where it is none."""
    if not line.startswith("{"):
        return None
    try:
        told = orjson.loads(line)
    except ValueError:
        return None
    return told if isinstance(told, dict) and "time" in told and "message" in told else None


def rfc3339(at: float) -> str:
    """Return a Unix time in UTC with milliseconds, such as `2026-01-31T12:00:00.000Z`."""
    moment = datetime.datetime.fromtimestamp(at, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def clean(text: str, most: int = LONGEST) -> str:
    """Return a text whose lines end and tabulate, and which does nothing else to whatever shows it; a long one is cut.

    Args:
        most: Characters.
    """
    if len(text) > most:
        text = f"{text[:most]}... ({len(text) - most} characters more)"
    return text if text.isprintable() else _UNSAFE.sub(_escaped, text)


def plain(value: object, depth: int = _MOST_DEPTH) -> Any:
    """Return a value as JSON has it, bounded in size and depth; what JSON does not know by its `str`."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if depth and isinstance(value, Mapping):
        members = [*value.items()][:_MOST_MEMBERS]
        return {clean(_text(key), _LONGEST_KEY): plain(member, depth - 1) for key, member in members}
    if depth and isinstance(value, list | tuple):
        return [plain(member, depth - 1) for member in value[:_MOST_MEMBERS]]
    return clean(_text(value))


def fields_of(given: Mapping[str, object]) -> dict[str, Any]:
    """Return fields in plain values under names that can be shown."""
    return {clean(key, _LONGEST_KEY): plain(value) for key, value in given.items()}


def raised(error: BaseException) -> dict[str, str]:
    """Return an exception as type, message and stack, the innermost frames of which are kept."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    try:
        stack = "".join(traceback.format_exception(error, limit=-_MOST_FRAMES))
    except Exception as nested:  # an exception group or a cause of a strange kind
        stack = f"its stack cannot be told ({type(nested).__name__})"
    if len(stack) > LONGEST_STACK:
        stack = f"... ({len(stack) - LONGEST_STACK} characters more)\n{stack[-LONGEST_STACK:]}"
    return {"type": clean(name), "message": clean(_text(error)), "stack": clean(stack, 2 * LONGEST_STACK)}


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception as error:
        return f"its text cannot be told ({type(error).__name__})"


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    code = ord(character)
    return _NAMED.get(character) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def _flat(value: object) -> str:
    text = value if isinstance(value, str) else _text(value)
    return text if text.isprintable() else _UNSAFE_IN_TEXT.sub(_escaped, text)


def _bare(value: object) -> str:
    if isinstance(value, str):
        flat = _flat(value)
        return flat if _BARE.fullmatch(flat) else '"' + flat.replace('"', '\\"') + '"'
    return _flat(orjson.dumps(value).decode())


def _in_short(exception: object) -> str:
    if not isinstance(exception, Mapping):
        return _flat(exception)
    frames = _FRAME.findall(str(exception.get("stack", "")))[-_FRAMES_IN_TEXT:]
    where = " < ".join(f"{file}:{line} {function}" for file, line, function in reversed(frames))
    told = f"{exception.get('type')}: {exception.get('message')}"
    return _flat(f"{told} ({where})" if where else told)


def _clock(time: object) -> str:
    """Return the time of day here, with milliseconds."""
    try:
        return datetime.datetime.fromisoformat(str(time)).astimezone().strftime("%H:%M:%S.%f")[:-3]
    except (ValueError, OverflowError, OSError):
        return _flat(time)


def _paint(text: str, codes: str) -> str:
    return f"\x1b[{codes}m{text}\x1b[0m" if codes else text


def _leave(text: str, codes: str) -> str:  # noqa: ARG001 - as `_paint`
    return text
