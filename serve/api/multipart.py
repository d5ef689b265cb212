"""multipart/form-data (RFC 7578) in memory: the body was already bounded, so nothing needs to be spooled to a disk."""

from __future__ import annotations

from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serve.errors import InvalidInput, UnsupportedMedia

_MOST_PARTS = 64
_MOST_HEADER_BYTES = 8192


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a form; a file where it has a file name."""

    content: bytes
    filename: str | None


def parse_form(content_type: bytes | None, body: bytes) -> dict[str, list[Part]]:
    """Return the parts of a form by name.

    Raises:
        UnsupportedMedia: The content type is not multipart/form-data.
        InvalidInput: The form is damaged or cut short.
    """
    kind, options = parse_options_header(content_type)
    if kind.lower() != b"multipart/form-data":
        told = (content_type or b"nothing").decode("latin-1")
        raise UnsupportedMedia(f"is {told!r:.80}; send multipart/form-data", place="header content-type")
    boundary = options.get(b"boundary")
    if not boundary:
        raise InvalidInput("multipart/form-data without its boundary", place="header content-type")
    collector = _Collector()
    try:
        parser = MultipartParser(boundary, collector.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise InvalidInput(f"the form is damaged: {error}", place="body") from error
    if not collector.ended:
        raise InvalidInput("the form is cut short: its closing boundary is missing", place="body")
    return collector.form


class _Collector:
    """Puts together what the parser calls back with."""

    def __init__(self) -> None:
        self.form: dict[str, list[Part]] = {}
        self.ended = False
        self._headers: dict[bytes, bytes] = {}
        self._field = bytearray()
        self._value = bytearray()
        self._content = bytearray()
        self._parts = 0

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._add_header(self._field, data[start:end]),
            "on_header_value": lambda data, start, end: self._add_header(self._value, data[start:end]),
            "on_header_end": self._end_header,
            "on_part_data": self._add_content,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise InvalidInput(f"the form has more than {_MOST_PARTS} parts", place="body")
        self._headers.clear()
        self._content = bytearray()

    def _add_header(self, into: bytearray, data: bytes) -> None:
        into += data
        if len(into) > _MOST_HEADER_BYTES:
            raise InvalidInput("a header of a part is too long", place="body")

    def _end_header(self) -> None:
        self._headers[bytes(self._field).lower()] = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def _add_content(self, data: bytes, start: int, end: int) -> None:
        self._content += memoryview(data)[start:end]

    def _end(self) -> None:
        disposition, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"name")
        if disposition.lower() != b"form-data" or name is None:
            raise InvalidInput(f"part {self._parts} has no name", place="body")
        filename = options.get(b"filename")
        told = None if filename is None else filename.decode("utf-8", "replace")
        part = Part(bytes(self._content), told)
        self.form.setdefault(name.decode("utf-8", "replace"), []).append(part)

    def _finish(self) -> None:
        self.ended = True
