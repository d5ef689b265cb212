"""Spans that a collector hands over, kept while this runs and shown as trees in a browser."""

from __future__ import annotations

import html
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

_MOST = 500
_STYLE = (
    "<style>body{font:14px sans-serif;margin:16px}td{padding:2px 12px 2px 0;white-space:nowrap;vertical-align:top}"
    ".bar{background:#3274d9;height:10px;min-width:1px}.error{background:#e02f44}code{color:#6e7680}</style>"
)


@dataclass(frozen=True, slots=True)
class Span:
    """One span; times in nanoseconds since the epoch, identifiers in hexadecimal."""

    trace: str
    own: str
    parent: str
    name: str
    service: str
    start_ns: int
    end_ns: int
    is_error: bool
    told: str

    @property
    def ms(self) -> float:
        """Return how long it took, milliseconds."""
        return (self.end_ns - self.start_ns) / 1e6


def spans_of(body: bytes) -> Iterator[Span]:
    """Yield the spans of an OTLP export (pure).

    Raises:
        google.protobuf.message.DecodeError: It is none.
    """
    request = ExportTraceServiceRequest.FromString(body)
    for resource in request.resource_spans:
        names = [one.value.string_value for one in resource.resource.attributes if one.key == "service.name"]
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    trace=span.trace_id.hex(),
                    own=span.span_id.hex(),
                    parent=span.parent_span_id.hex(),
                    name=span.name,
                    service=names[0] if names else "",
                    start_ns=span.start_time_unix_nano,
                    end_ns=span.end_time_unix_nano,
                    is_error=span.status.code == 2,
                    told=", ".join(f"{one.key}={_value(one.value)}" for one in span.attributes),
                )


def _value(value: object) -> str:
    kind = value.WhichOneof("value")  # type: ignore[attr-defined]
    return str(getattr(value, kind)).strip() if kind else ""


def tree(spans: list[Span]) -> Iterator[tuple[int, Span]]:
    """Yield a trace's spans with their depth, each after its parent, siblings by time (pure)."""
    known = {span.own for span in spans}
    below: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda span: span.start_ns):
        below.setdefault(span.parent if span.parent in known else "", []).append(span)
    waiting = [(0, span) for span in reversed(below.get("", []))]
    while waiting:
        depth, span = waiting.pop()
        yield depth, span
        waiting += [(depth + 1, each) for each in reversed(below.get(span.own, []))]


class Traces:
    """The newest traces that were handed over."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: OrderedDict[str, list[Span]] = OrderedDict()

    def add(self, body: bytes) -> None:
        """Take in an OTLP export; raises what `spans_of` does."""
        with self._lock:
            for span in spans_of(body):
                self._found.setdefault(span.trace, []).append(span)
                self._found.move_to_end(span.trace)
            while len(self._found) > _MOST:
                self._found.popitem(last=False)

    def page(self, trace: str = "") -> str:
        """Return the page of one trace, or of all without one."""
        with self._lock:
            found = {name: list(spans) for name, spans in reversed(self._found.items())}
        return _page_of_all(found) if not trace else _page_of_one(trace, found.get(trace, []))


def _page_of_all(found: dict[str, list[Span]]) -> str:
    rows = []
    for name, spans in found.items():
        _, root = next(tree(spans))
        failed = " failed" if any(span.is_error for span in spans) else ""
        cells = (
            f'<a href="/traces/{name}">{name}</a>',
            _text(root.name),
            f"{root.ms:.1f} ms",
            f"{len(spans)} spans{failed}",
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    empty = "<p>No span has come. Start the platform with ROUNDHOUSE_TRACING_ENDPOINT, and send it a request.</p>"
    return f"<title>Traces</title>{_STYLE}<h1>Traces</h1><table>{''.join(rows)}</table>{'' if rows else empty}"


def _page_of_one(name: str, spans: list[Span]) -> str:
    start = min((span.start_ns for span in spans), default=0)
    whole = max((span.end_ns for span in spans), default=1) - start or 1
    rows = []
    for depth, span in tree(spans):
        left, width = (span.start_ns - start) / whole * 400, (span.end_ns - span.start_ns) / whole * 400
        bar = (
            f'<div class="bar{" error" if span.is_error else ""}" style="margin-left:{left:.0f}px;width:{width:.0f}px">'
        )
        title = f'<span style="margin-left:{depth * 20}px">{_text(span.name)}</span> <code>{_text(span.service)}</code>'
        cells = (title, f"{span.ms:.2f} ms", f"{bar}</div>", f"<code>{_text(span.told)}</code>")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    empty = "<p>No span of this trace has come.</p>"
    return (
        f"<title>{_text(name)}</title>{_STYLE}<p><a href='/traces'>all traces</a></p><h1>{_text(name)}</h1>"
        f"<table>{''.join(rows)}</table>{'' if rows else empty}"
    )


def _text(told: str) -> str:
    return html.escape(told)
