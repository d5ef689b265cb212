"""YAML as a tree that knows its places and its limits, because a problem without a line is half a problem."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import yaml

MAX_BYTES = 2**20
MAX_DEPTH = 32
MAX_VALUES = 100_000
MAX_SYNTAX_ERRORS = 20

Loc = tuple[str | int, ...]

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BREAK = re.compile(r"\r\n|\r|\n")
# What no YAML may hold, and the line and paragraph separators, which YAML 1.1 counts as lines and editors do not.
_UNPRINTABLE = re.compile(r"[^\t\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_PLAIN_KEY = re.compile(r"[A-Za-z_][\w-]*", re.ASCII)

# The YAML 1.2 core schema; what 1.1 readers (Helm's among them) take for something else is refused as unclear.
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+", re.ASCII)
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", re.ASCII)
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_UNCLEAR_BOOL = re.compile(r"y|n|yes|no|on|off", re.IGNORECASE)
_UNCLEAR_INT = re.compile(r"[-+]?(0o?[0-9]+|0b[01_]+|[0-9][0-9]*_[0-9_]*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a file.

    Args:
        file: The file, as it was named.
        line: Counted from 1; None where it is the file as a whole.
        column: Counted from 1, in characters; None like `line`.
        path: Where in the document: `models[2].batching.max_batch_size`, or empty.
        message: What is wrong; no full stop.
        value: What stands there, cut short if it is long.
        suggestion: What may have been meant.
    """

    file: str
    line: int | None
    column: int | None
    path: str
    message: str
    value: Any = None
    suggestion: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return its fields as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}:{self.column}"
        parts = [place, self.path, self.message] if self.path else [place, self.message]
        hint = f"; did you mean {self.suggestion}?" if self.suggestion else ""
        return ": ".join(parts) + hint


@dataclass(slots=True, eq=False)
class Node:
    """A value and its place; `entries` and `keys` belong to a mapping, `items` to a sequence, `scalar` to the rest.

    Args:
        line: Of its first character, counted from 1.
        size: Values in it, aliases counted as often as they are used.
        height: Levels below it.
        text: A scalar as it is written.
        reported: A problem of this very value is known, so whatever follows from it is not told again.
        damaged: A line inside could not be read, so that what is missing here may be on it.
    """

    kind: Literal["scalar", "sequence", "mapping"]
    line: int
    column: int
    size: int = 1
    height: int = 0
    text: str = ""
    scalar: Any = None
    items: list[Node] = field(default_factory=list)
    entries: dict[str, Node] = field(default_factory=dict)
    keys: dict[str, Node] = field(default_factory=dict)
    reported: bool = False
    damaged: bool = False

    def data(self) -> Any:
        """Return it as dicts, lists, str, int, float, bool and None."""
        if self.kind == "mapping":
            return {key: node.data() for key, node in self.entries.items()}
        return [node.data() for node in self.items] if self.kind == "sequence" else self.scalar

    def child(self, step: str | int) -> Node | None:
        """Return what one step of a path leads to, or None."""
        if isinstance(step, int):
            return self.items[step] if step < len(self.items) else None
        return self.entries.get(step)


def format_path(loc: Loc) -> str:
    """Write a path as people do: `models[2].options["top k"]`."""
    written = ""
    for step in loc:
        if isinstance(step, int):
            written += f"[{step}]"
        elif _PLAIN_KEY.fullmatch(step):
            written += f".{step}" if written else step
        else:
            written += f"[{json.dumps(shorten(step))}]"
    return written


def shorten(value: Any, limit: int = 200) -> Any:
    """Return a JSON value as it is, or the beginning of its JSON text where that is longer than `limit` characters."""
    if isinstance(value, str):
        return value if len(value) <= limit else value[:limit] + "..."
    if isinstance(value, float) and value - value != 0:
        return str(value)
    if isinstance(value, dict | list) or (isinstance(value, int) and value.bit_length() > 64):
        text = "".join(_first_pieces(value, limit))
        return value if len(text) <= limit else text[:limit] + "..."
    return value


def _first_pieces(value: Any, limit: int) -> Iterator[str]:
    length = 0
    for piece in json.JSONEncoder(ensure_ascii=False).iterencode(value):
        yield piece
        length += len(piece)
        if length > limit:
            return


def read_tree(data: bytes, file: str) -> tuple[Node | None, list[Problem]]:
    """Read one YAML document.

    A line that is no YAML is reported and set aside, so that the rest is read all the same.

    Returns:
        The root (None where there is none to speak of) and the problems found so far, in no order.
    """
    if len(data) > MAX_BYTES:
        return None, [Problem(file, None, None, "", f"is larger than {MAX_BYTES // 2**20} MiB; is it a declaration?")]
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return None, [Problem(file, 1, 1, "", "is UTF-16; save it as UTF-8")]
    text = data.decode("utf-8-sig", errors="surrogateescape")
    lines = _BREAK.split(text)
    problems = [
        Problem(file, number, bad.start() + 1, "", _unprintable(bad.group()))
        for number, line in enumerate(lines, start=1)
        if (bad := _UNPRINTABLE.search(line))
    ]
    lines = [_UNPRINTABLE.sub("\ufffd", line) for line in lines]
    damaged: dict[int, bool] = {}
    for _ in range(MAX_SYNTAX_ERRORS):
        composer = _Composer(file, damaged)
        try:
            root = composer.compose("\n".join(lines))
        except yaml.MarkedYAMLError as error:
            syntax = _SyntaxFault(error, lines, composer.quoted)
            problems.append(Problem(file, syntax.line + 1, syntax.column + 1, "", syntax.message))
            damaged |= syntax.set_aside(lines)
        else:
            return root, problems + composer.problems
    problems.append(
        Problem(file, len(lines), 1, "", f"more than {MAX_SYNTAX_ERRORS} lines are no YAML; is it a declaration?")
    )
    return None, problems


def _unprintable(character: str) -> str:
    if 0xDC80 <= ord(character) <= 0xDCFF:
        return f"byte 0x{ord(character) - 0xDC00:02x} is not UTF-8; save the file as UTF-8"
    return f"the character U+{ord(character):04X} is not allowed; write it as an escape in double quotes"


class _SyntaxFault:
    """What a YAML reader stumbled over, in words, and the lines to set aside so that reading can go on."""

    def __init__(self, error: yaml.MarkedYAMLError, lines: list[str], quoted: yaml.ScalarEvent | None) -> None:
        context, problem = error.context or "", error.problem or "is no YAML"
        mark = error.context_mark if re.search("flow|quoted|simple key", context) else error.problem_mark
        mark = mark or error.problem_mark
        self.line, self.column = (mark.line, mark.column) if mark else (0, 0)
        self.line = min(self.line, len(lines) - 1)
        if not lines[self.line].strip():
            # The reader stumbles over the end of the text, or over what was set aside before.
            self.line = self._line_above(lines) or 0
            self.column = max(lines[self.line].rfind("["), lines[self.line].rfind("{"), _indent(lines[self.line]))
        if quoted and quoted.start_mark and quoted.end_mark and quoted.end_mark.line == self.line:
            # A forgotten quotation mark swallows lines up to the next one, where the reader stumbles.
            self.line, self.column = quoted.start_mark.line, quoted.start_mark.column
            self.message = "the quotation mark is not closed on its line"
            return
        above = self._line_above(lines)
        if "mapping values are not allowed" in problem and above is not None and not _has_key(lines[above]):
            self.line, self.column = above, _indent(lines[above])
            self.message = "no colon after the key"
        else:
            self.message = self._explain(context, problem, lines[self.line])

    def _line_above(self, lines: list[str]) -> int | None:
        above = (n for n in range(self.line - 1, -1, -1) if lines[n].strip() and not lines[n].lstrip().startswith("#"))
        return next(above, None)

    def _explain(self, context: str, problem: str, line: str) -> str:
        character = line[self.column : self.column + 1]
        if "\t" in line[: len(line) - len(line.lstrip())] or (character == "\t" and "token" in problem):
            self.column = line.index("\t")
            return "a tab; YAML indents with spaces"
        if "mapping values are not allowed" in problem:
            return "a line indented too far, or a second `: ` on it; text that holds `: ` takes quotes"
        if "flow" in context:
            return f"{character!r} is not closed, or a comma is missing after it"
        if "quoted" in context and "end of stream" in problem:
            return "the quotation mark is not closed"
        if "simple key" in context:
            return "no colon after the key"
        if "cannot start any token" in problem:
            return f"text that begins with {character!r} takes quotes"
        return f"is no YAML: {problem}" + (f" {context}" if context else "")

    def set_aside(self, lines: list[str]) -> dict[int, bool]:
        """Empty the faulty line and what hangs below it, in place; return their numbers, counted from 0.

        A dash stays, so that an item keeps its place in its list; such a line has the value True.
        """
        indent = _indent(lines[self.line])
        dash = re.match(r"[ \t]*-(?= )", lines[self.line])
        numbers = [self.line]
        for number in range(self.line + 1, len(lines)):
            rest = lines[number].strip()
            if rest and _indent(lines[number]) <= indent and rest[0] not in "]}":
                break
            numbers.append(number)
        for number in numbers:
            lines[number] = ""
        if dash and not re.fullmatch(r"[ \t]*-", dash.string.rstrip()):
            lines[self.line] = dash.group().replace("\t", " ")
        return {number: bool(lines[number]) for number in numbers}


def _indent(line: str) -> int:
    """Return the column of a line's first word, a leading dash counted as space."""
    return len(line) - len(re.sub(r"^[ \t]*(- +)*", "", line))


def _has_key(line: str) -> bool:
    return bool(re.search(r":(\s|$)", line))


@dataclass(slots=True)
class _Frame:
    """A collection that is being read."""

    node: Node
    anchor: str | None
    key: Node | None = None


class _Composer:
    """Builds nodes from YAML events without recursion, and reports what is YAML but not for a declaration."""

    def __init__(self, file: str, damaged: dict[int, bool]) -> None:
        self.problems: list[Problem] = []
        self._file = file
        self._damaged = damaged
        self._frames: list[_Frame] = []
        self._anchors: dict[str, Node | None] = {}
        self._root: Node | None = None
        self._size = 0
        #: The last quoted text that goes over several lines.
        self.quoted: yaml.ScalarEvent | None = None

    def compose(self, text: str) -> Node | None:
        """Return the root; raises `yaml.MarkedYAMLError` where the text is no YAML."""
        documents = 0
        for event in yaml.parse(text, Loader=_LOADER):
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents == 2:
                    self._report(self._node("scalar", event), "a second document begins; one file is one declaration")
                    break
            elif isinstance(event, yaml.CollectionStartEvent):
                if not self._open(event):
                    return None
            elif isinstance(event, yaml.CollectionEndEvent):
                self._close(event)
            elif isinstance(event, yaml.AliasEvent | yaml.ScalarEvent):
                node = self._alias(event) if isinstance(event, yaml.AliasEvent) else self._scalar(event)
                self._place(node)
                if self._size > MAX_VALUES:
                    self._report(node, f"the document holds more than {MAX_VALUES} values, aliases written out")
                    return None
        return self._root

    def _report(self, node: Node, message: str, *, suggestion: str | None = None, value: Any = None) -> None:
        path = format_path(self._path())
        self.problems.append(Problem(self._file, node.line, node.column, path, message, shorten(value), suggestion))
        node.reported = True

    def _path(self) -> Loc:
        steps: list[str | int] = []
        for frame in self._frames:
            if frame.node.kind == "sequence":
                steps.append(len(frame.node.items))
            elif frame.key is not None:
                steps.append(frame.key.text)
        return tuple(steps)

    def _node(self, kind: Literal["scalar", "sequence", "mapping"], event: yaml.Event) -> Node:
        mark = event.start_mark
        return Node(kind, mark.line + 1, mark.column + 1) if mark else Node(kind, 1, 1)

    def _open(self, event: yaml.CollectionStartEvent) -> bool:
        node = self._node("mapping" if isinstance(event, yaml.MappingStartEvent) else "sequence", event)
        if len(self._frames) >= MAX_DEPTH:
            self._report(node, f"nested deeper than {MAX_DEPTH} levels")
            return False
        self._refuse_tag(event, node)
        self._frames.append(_Frame(node, event.anchor))
        if event.anchor:
            self._anchors[event.anchor] = None
        return True

    def _close(self, event: yaml.Event) -> None:
        frame = self._frames.pop()
        frame.node.damaged = self._spans_damage(frame.node.line - 1, event.end_mark.line if event.end_mark else 0)
        if frame.anchor:
            self._anchors[frame.anchor] = frame.node
        self._place(frame.node)

    def _spans_damage(self, first: int, last: int) -> bool:
        above = first - 1
        while self._damaged.get(above) is False:
            above -= 1
        return above in self._damaged or any(number in self._damaged for number in range(first, last + 1))

    def _alias(self, event: yaml.AliasEvent) -> Node:
        name = event.anchor or ""
        known = self._anchors.get(name)
        if known is None:
            node = self._node("scalar", event)
            inside = name in self._anchors
            self._report(node, f"*{name} " + ("holds itself" if inside else "is not defined above"))
            return node
        self._size += known.size - 1
        if len(self._frames) + known.height > MAX_DEPTH:
            node = self._node("scalar", event)
            self._report(node, f"nested deeper than {MAX_DEPTH} levels")
            return node
        return known

    def _scalar(self, event: yaml.ScalarEvent) -> Node:
        node = self._node("scalar", event)
        node.text = event.value
        node.damaged = not event.value and self._spans_damage(node.line - 1, node.line)
        self._refuse_tag(event, node)
        if event.style in ("'", '"') and event.start_mark and event.end_mark:
            self.quoted = event if event.start_mark.line < event.end_mark.line else self.quoted
        is_key = bool(self._frames) and self._frames[-1].node.kind == "mapping" and self._frames[-1].key is None
        if event.implicit[0] and not is_key:
            node.scalar = self._resolve(node)
        else:
            node.scalar = event.value
        if event.anchor:
            self._anchors[event.anchor] = node
        return node

    def _resolve(self, node: Node) -> Any:
        text = node.text
        if _NULL.fullmatch(text):
            return None
        if _BOOL.fullmatch(text):
            return text.lower() == "true"
        if _INT.fullmatch(text) and len(text) <= 40:
            return int(text, 16 if "x" in text else 10)
        if _UNCLEAR_BOOL.fullmatch(text):
            meant = "true" if text.lower() in {"y", "yes", "on"} else "false"
            self._report(
                node,
                f"{text} is text to some YAML readers and {meant} to others",
                value=text,
                suggestion=f'{meant} or "{text}"',
            )
        elif _UNCLEAR_INT.fullmatch(text) and len(text) <= 40:
            self._report(
                node,
                f"{text} is a different value to different YAML readers",
                value=text,
                suggestion=f'{_plain_digits(text)} or "{text}"',
            )
        elif _FLOAT.fullmatch(text):
            number = float(text)
            if number - number == 0:
                return number
            self._report(node, f"{shorten(text, 40)} is too large a number", value=text)
        elif _NOT_FINITE.fullmatch(text):
            self._report(node, f"{text} is not a finite number", value=text)
        return text

    def _refuse_tag(self, event: yaml.NodeEvent, node: Node) -> None:
        tag = getattr(event, "tag", None)
        if tag and tag != "!":
            self._report(node, "tags have no place here; text takes quotes, and nothing else needs a tag", value=tag)

    def _place(self, node: Node) -> None:
        """Put a finished node where it belongs."""
        self._size += 1
        if not self._frames:
            self._root = self._root or node
            return
        frame = self._frames[-1]
        parent = frame.node
        if parent.kind == "sequence":
            parent.items.append(node)
        elif frame.key is None:
            frame.key = node if node.kind == "scalar" else self._no_key(node)
            return
        else:
            self._enter(parent, frame.key, node)
            frame.key = None
        parent.size += node.size
        parent.height = max(parent.height, node.height + 1)

    def _no_key(self, node: Node) -> Node:
        self._report(node, "a list or a mapping cannot be a key")
        return Node("scalar", node.line, node.column, reported=True)

    def _enter(self, parent: Node, key: Node, node: Node) -> None:
        if key.reported:
            return
        if key.text == "<<":
            self._report(key, "merge keys are not read; write the keys out, or alias a whole value")
        elif key.text in parent.keys:
            first = parent.keys[key.text].line
            self._report(key, f"key is given twice in one mapping, first on line {first}", value=node.data())
        else:
            parent.entries[key.text] = node
            parent.keys[key.text] = key


def _plain_digits(text: str) -> str:
    """Return how a number of an unclear form is written plainly."""
    digits = text.replace("_", "")
    sign, digits = ("-", digits[1:]) if digits.startswith("-") else ("", digits.lstrip("+"))
    for prefix, base in (("0b", 2), ("0o", 8)):
        if digits.startswith(prefix) and all(c in "01234567"[:base] for c in digits[2:]) and digits[2:]:
            return sign + str(int(digits[2:], base))
    return sign + (digits.lstrip("0o") or "0")
