"""From a models.yaml to specs, or to every problem in it at once, each with its place and the likely fix."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from serve.errors import SpecError
from serve.spec import (
    NAME_PATTERN,
    OPTIONS,
    RULES,
    SHA256_PATTERN,
    ModelSpec,
    PlatformSpec,
    Rule,
    Strict,
    source_scheme,
)
from serve.yaml_tree import MAX_BYTES, Loc, Node, Problem, format_path, read_tree, shorten

_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "list_type": "a list, each item after a dash,",
}
_PATTERNS = {
    NAME_PATTERN: "takes small letters, digits and hyphens, with a letter or digit at both ends",
    SHA256_PATTERN: "is not 64 hexadecimal digits in small letters",
}
_SYNONYMS = {"gpu": "cuda", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
#: Raised by the specs as a whole; found here field by field.
_TOLD_APART = frozenset({"options", "rules", "names"})


@dataclass(frozen=True, slots=True)
class Declaration:
    """What a models.yaml declares.

    Args:
        models: The specs, in the order of the file.
        path: The file.
        base_dir: The folder that relative `file:` sources are resolved against: the file's own.
    """

    models: tuple[ModelSpec, ...]
    path: Path
    base_dir: Path


class InvalidDeclaration(SpecError):
    """A declaration with problems; its message is a line for each.

    Args:
        problems: All of them, in the order of the file.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


def load_declaration(path: str | Path) -> Declaration:
    """Read a declaration.

    Raises:
        InvalidDeclaration: The file cannot be read or holds any problem.
    """
    return parse_declaration(read_declaration(path), path=Path(path), base_dir=Path(path).resolve().parent)


def read_declaration(path: str | Path, *, again: bool = False) -> bytes:
    """Return the bytes of a declaration; of one that is too large, no more than shows that.

    Args:
        again: It will be read once more: what is no regular file, and might be waited for, is refused.

    Raises:
        InvalidDeclaration: The file cannot be read.
    """
    try:
        with open(path, "rb", opener=_open_at_once if again else None) as file:
            if again and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(
                    "it is no regular file, and is read again at every edit (`check` and `render` take a pipe)"
                )
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise InvalidDeclaration([Problem(str(path), None, None, "", _unreadable(path, error))]) from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _unreadable(path: str | Path, error: Exception) -> str:
    if isinstance(error, IsADirectoryError):
        hint = "; it holds models.yaml: name that" if (Path(path) / "models.yaml").is_file() else ""
        return f"is a folder{hint}"
    reasons = {FileNotFoundError: "no such file", PermissionError: "may not be read by this user"}
    return next((text for kind, text in reasons.items() if isinstance(error, kind)), f"cannot be read: {error}")


def parse_declaration(data: bytes, *, path: Path, base_dir: Path | None) -> Declaration:
    """Read a declaration from the bytes of the file `path`.

    Args:
        base_dir: None where the models run on other machines: a `file:` source is then not looked for, and is absolute.

    Raises:
        InvalidDeclaration: It holds any problem.
    """
    root, problems = read_tree(data, str(path))
    models: tuple[ModelSpec, ...] = ()
    if root is None or (root.kind == "scalar" and root.scalar is None and not root.text):
        if not problems:
            problems.append(Problem(str(path), 1, 1, "", "is empty; begin with `models:` and a list below it"))
    elif root.kind != "mapping":
        if not (root.damaged or root.reported):
            problems.append(
                Problem(str(path), root.line, root.column, "", f"{_kind(root)} where the mapping `models:` belongs")
            )
    else:
        models = _Check(str(path), root, base_dir, problems).run()
    if problems:
        raise InvalidDeclaration(sorted(problems, key=lambda p: (p.line or 0, p.column or 0)))
    return Declaration(models=models, path=path, base_dir=base_dir or Path("/"))


class _Check:
    """One pass over one document: the fields, then the options, then what holds between fields, models and files."""

    def __init__(self, file: str, root: Node, base_dir: Path | None, problems: list[Problem]) -> None:
        self._problems = problems
        self._file = file
        self._root = root
        self._base_dir = base_dir
        self._data = root.data()
        self._wrong: set[Loc] = set()

    def run(self) -> tuple[ModelSpec, ...]:
        """Add to the problems; the result counts only where there are none."""
        whole: list[ErrorDetails] = []
        models: tuple[ModelSpec, ...] = ()
        try:
            models = tuple(PlatformSpec.model_validate(self._data).models)
        except ValidationError as error:
            details = error.errors(include_url=False)
            whole = [detail for detail in details if detail["type"] in _TOLD_APART]
            for detail in details:
                if detail["type"] not in _TOLD_APART:
                    self._tell(detail, PlatformSpec)
        declared = self._data.get("models")
        for index, model in enumerate(declared if isinstance(declared, list) else []):
            if isinstance(model, dict):
                self._check_options(index, model)
                self._check_rules(index, model)
                self._check_file(index, model)
        self._check_names()
        for detail in [] if self._problems else whole:
            self._add(detail["loc"], detail["msg"])
        return models

    def _check_options(self, index: int, model: Mapping[str, Any]) -> None:
        task, options = model.get("task"), model.get("options", {})
        if not (isinstance(task, str) and task in OPTIONS and isinstance(options, dict)):
            return
        try:
            OPTIONS[task].model_validate(options)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                self._tell(detail, OPTIONS[task], under=("models", index, "options"))

    def _check_rules(self, index: int, model: Mapping[str, Any]) -> None:
        at: Loc = ("models", index)
        for rule in RULES:
            reads = [(*at, *path.split(".")) for path in rule.reads]
            if not all(map(self._sound, reads)):
                continue
            message = rule.broken(
                *(_value(model, path) for path in rule.reads), *(model.get(key) is not None for key in rule.given)
            )
            if message:
                self._blame(rule, at, reads, message)

    def _blame(self, rule: Rule, at: Loc, reads: Sequence[Loc], message: str) -> None:
        place = (*at, *rule.place.split("."))
        written = next((loc for loc in (place, *reads) if self._find(loc)), place)
        self._add(place, message, pointing_at=written)

    def _check_file(self, index: int, model: Mapping[str, Any]) -> None:
        loc: Loc = ("models", index, "source")
        source = model.get("source")
        if not isinstance(source, str) or not self._sound(loc) or source_scheme(source) != "file":
            return
        if self._base_dir is None:
            if not source.startswith("file:/"):
                self._add(loc, f"{shorten(source)!r} is relative; on a cluster a file: source is absolute")
            return
        wanted = self._base_dir / source.partition(":")[2]
        try:
            there = wanted.exists()
        except (OSError, ValueError):
            there = False
        if not there:
            near = _near_file(wanted)
            suggestion = source.removesuffix(wanted.name) + near if near and source.endswith(wanted.name) else None
            self._add(loc, f"{shorten(str(wanted))!r} does not exist", suggestion=suggestion)

    def _check_names(self) -> None:
        first: dict[str, Loc] = {}
        declared = self._data.get("models")
        for index, model in enumerate(declared if isinstance(declared, list) else []):
            loc: Loc = ("models", index, "name")
            name = model.get("name") if isinstance(model, dict) else None
            if not isinstance(name, str):
                continue
            if name in first:
                other = self._find(first[name])
                where = f"{format_path(first[name][:-1])}" + (f" on line {other.line}" if other else "")
                self._add(loc, f"{shorten(name, 40)!r} is already the name of {where}")
            else:
                first[name] = loc

    def _tell(self, detail: ErrorDetails, schema: type[Strict], under: Loc = ()) -> None:
        """Put one finding of pydantic in our words, unless it only follows from what is known."""
        loc = (*under, *detail["loc"])
        self._wrong.add(loc)
        if detail["type"] == "extra_forbidden":
            if not self._reported(loc[:-1]):
                self._add(loc, "unknown key", suggestion=self._near_key(loc, schema, detail["loc"]), at_key=True)
            return
        node = self._find(loc)
        if self._reported(loc) or self._lost(loc, node, missing=detail["type"] == "missing"):
            return
        message, suggestion = _explain(detail, node)
        self._add(loc, message, suggestion=suggestion)

    def _reported(self, loc: Loc) -> bool:
        return any(node.reported for node in self._along(loc))

    def _lost(self, loc: Loc, node: Node | None, *, missing: bool) -> bool:
        """Tell whether what is not there may be on a line that could not be read."""
        return list(self._along(loc))[-1].damaged if missing else bool(node and node.kind == "scalar" and node.damaged)

    def _near_key(self, loc: Loc, schema: type[Strict], steps: Sequence[str | int]) -> str | None:
        written = str(loc[-1])
        parent = self._find(loc[:-1])
        part = _part(schema, steps[:-1])
        here = tuple(_keys(part)) if part else ()
        snake = _snake(written)
        best = snake if snake in here else None
        if best is None and len(loc) > 2:
            model = self._find(loc[:2])
            task = model.child("task") if model else None
            best = _all_keys(task.text if task else "").get(snake)
        best = best or _near(snake, here)
        return None if parent and best in parent.entries else best

    def _along(self, loc: Loc) -> Iterator[Node]:
        """Yield the nodes that a path passes, as far as it leads."""
        node: Node | None = self._root
        yield self._root
        for step in loc:
            node = node.child(step) if node else None
            if node is None:
                return
            yield node

    def _find(self, loc: Loc) -> Node | None:
        nodes = list(self._along(loc))
        return nodes[-1] if len(nodes) == len(loc) + 1 else None

    def _sound(self, loc: Loc) -> bool:
        """Tell whether the value at a path, or its default, can be relied on."""
        nodes = list(self._along(loc))
        if self._reported(loc) or any(loc[: n + 1] in self._wrong for n in range(len(loc))):
            return False
        return len(nodes) == len(loc) + 1 or not nodes[-1].damaged

    def _add(
        self,
        loc: Sequence[str | int],
        message: str,
        *,
        suggestion: str | None = None,
        at_key: bool = False,
        pointing_at: Loc | None = None,
    ) -> None:
        loc = tuple(loc)
        value, node = self._find(loc), list(self._along(pointing_at or loc))[-1]
        if at_key and (parent := self._find(loc[:-1])):
            node = parent.keys[str(loc[-1])]
        shown = shorten(value.data()) if value else None
        self._problems.append(Problem(self._file, node.line, node.column, format_path(loc), message, shown, suggestion))


def _value(model: Mapping[str, Any], path: str) -> Any:
    """Return what a model declares at a dotted path, or the default."""
    head, _, rest = path.partition(".")
    if not rest:
        return model[head] if head in model else ModelSpec.model_fields[head].get_default(call_default_factory=True)
    part = model.get(head, {})
    return part[rest] if rest in part else getattr(ModelSpec.model_fields[head].default, rest)


def _explain(detail: ErrorDetails, node: Node | None) -> tuple[str, str | None]:
    """Return what is wrong and what may have been meant."""
    kind, context = detail["type"], detail.get("ctx", {})
    value = node.data() if node else None
    written = repr(shorten(value, 60)) if isinstance(value, str) else (node.text if node else "")
    if kind == "missing":
        return "the key is required and missing", None
    if kind in _WANTED and node:
        return f"{_kind(node)} where {_WANTED[kind]} belongs", _converted(kind, node)
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        return f"{written or 'nothing'} is not one of {', '.join(allowed)}", _near_value(value, allowed)
    if kind == "string_pattern_mismatch":
        return f"{written} {_PATTERNS[context['pattern']]}", _near_text(str(value), context["pattern"])
    if kind == "string_too_long":
        return f"is {len(str(value))} characters long; at most {context['max_length']}", None
    if kind == "string_too_short":
        return "is empty", None
    bounds = {
        "greater_than_equal": ("is below the least,", "ge"),
        "greater_than": ("is not above", "gt"),
        "less_than_equal": ("is above the most,", "le"),
        "less_than": ("is not below", "lt"),
    }
    if kind in bounds:
        words, bound = bounds[kind]
        return f"{shorten(written, 40)} {words} {context[bound]:g}", None
    return detail["msg"], context.get("suggestion")


def _kind(node: Node) -> str:
    if node.kind != "scalar":
        return "a mapping" if node.kind == "mapping" else "a list"
    if node.scalar is None:
        return "nothing"
    if isinstance(node.scalar, str):
        return f"the text {shorten(node.scalar, 60)!r}"
    return node.text if isinstance(node.scalar, bool) else f"the number {shorten(node.text, 40)}"


def _converted(kind: str, node: Node) -> str | None:
    """Return the value of the wanted type that is written almost like this one."""
    value = node.scalar
    if node.kind != "scalar" or value is None:
        return None
    if kind == "string_type":
        return f'"{node.text}"'
    if kind == "bool_type":
        word = node.text.strip().lower()
        return (
            "true" if word in {"true", "yes", "on", "1"} else "false" if word in {"false", "no", "off", "0"} else None
        )
    text = re.sub(r"[\s_,]", "", node.text)
    if kind in {"int_type", "int_from_float"} and re.fullmatch(r"[-+]?[0-9]{1,18}(\.0*)?", text, re.ASCII):
        return str(int(text.partition(".")[0]))
    if kind == "float_type" and re.fullmatch(r"[-+]?[0-9]{1,18}(\.[0-9]+)?", text, re.ASCII):
        return text
    return None


def _near_value(value: Any, allowed: Sequence[str]) -> str | None:
    if not isinstance(value, str):
        return None
    word = value.strip().lower()
    synonym = _SYNONYMS.get(word)
    return synonym if synonym in allowed else _near(word.replace("_", "-"), tuple(allowed))


def _near_text(value: str, pattern: str) -> str | None:
    if len(value) > 100:
        return None
    lower = value.strip().lower()
    near = re.sub(r"[^a-z0-9]+", "-", lower, flags=re.ASCII).strip("-") if pattern == NAME_PATTERN else lower
    return near if re.fullmatch(pattern, near, re.ASCII) else None


def _near_file(wanted: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        return _near(wanted.name, tuple(entry.name for entry in islice(wanted.parent.iterdir(), 1000)))
    return None


@lru_cache(maxsize=1024)
def _near(word: str, known: tuple[str, ...]) -> str | None:
    if len(word) > 100:
        return None
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.6)), None)


def _snake(key: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key[:200]).replace("-", "_").lower()


def _keys(part: type[Strict]) -> dict[str, Any]:
    """Return the keys of a part of the schema, as they are written, with their types."""
    return {field.alias or name: field.annotation for name, field in part.model_fields.items()}


def _part(schema: type[Strict], steps: Sequence[str | int]) -> type[Strict] | None:
    """Return the part of the schema that a path leads to, or None where any key is allowed."""
    part: Any = schema
    for step in steps:
        part = _keys(part).get(step) if isinstance(step, str) else get_args(part)[0]
        if part is None:
            return None
    return part if isinstance(part, type) and issubclass(part, Strict) else None


def _all_keys(task: str) -> dict[str, str]:
    """Return key -> dotted path into a model, for every key of the schema and of the task's options."""
    paths = {key: key for key in _keys(ModelSpec)}
    parts = {key: kind for key, kind in _keys(ModelSpec).items() if isinstance(kind, type) and issubclass(kind, Strict)}
    if task in OPTIONS:
        parts["options"] = OPTIONS[task]
    for name, part in parts.items():
        paths |= {key: f"{name}.{key}" for key in _keys(part) if key not in paths}
    return paths
