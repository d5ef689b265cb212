"""Our spans as the messages of the OpenTelemetry protocol, made directly: by way of the SDK's they cost three times as
much, and all of it on the processor that runs the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1 import trace_pb2 as messages

from serve.telemetry.spans import Span

_KINDS = {
    "internal": messages.Span.SPAN_KIND_INTERNAL,
    "server": messages.Span.SPAN_KIND_SERVER,
    "client": messages.Span.SPAN_KIND_CLIENT,
}
_FLAGS = messages.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
# Most attributes come again with each request: routes, names, status codes.
_REMEMBERED = 1024
_LEAST, _MOST = -(2**63), 2**63 - 1


def request_of(
    spans: Sequence[Span], *, offset_ns: int, resource: Mapping[str, str], scope: tuple[str, str]
) -> ExportTraceServiceRequest:
    """Return what is sent to a collector (opentelemetry.proto.collector.trace.v1).

    Args:
        offset_ns: Unix time less `time.monotonic_ns`.
        resource: What the process is.
        scope: Name and version of what made the spans.
    """
    request = ExportTraceServiceRequest()
    of_resource = request.resource_spans.add(resource=Resource(attributes=_attributes(resource)))
    told = of_resource.scope_spans.add(scope=InstrumentationScope(name=scope[0], version=scope[1])).spans
    for span in spans:
        _tell(told.add(), span, offset_ns)
    return request


def _tell(message: messages.Span, span: Span, offset_ns: int) -> None:
    message.name = span.name
    message.kind = _KINDS[span.kind]
    message.trace_id = span.trace_id
    message.span_id = span.span_id
    message.start_time_unix_nano = int(span.began * 1e9) + offset_ns
    message.end_time_unix_nano = int(span.ended * 1e9) + offset_ns
    message.flags = _FLAGS
    if span.parent_id:
        message.parent_span_id = span.parent_id
    if span.attributes:
        message.attributes.extend(_attributes(span.attributes))
    for trace_id, span_id in span.links:
        message.links.add(trace_id=trace_id, span_id=span_id, flags=_FLAGS)
    for name, at, attributes in span.events:
        message.events.add(name=name, time_unix_nano=int(at * 1e9) + offset_ns, attributes=_attributes(attributes))
    if span.state:
        message.trace_state = span.state.decode("latin-1")
    if span.error is not None:
        message.status.code = messages.Status.STATUS_CODE_ERROR
        message.status.message = span.error


def _attributes(told: Mapping[str, Any]) -> list[KeyValue]:
    return [
        _known(name, value) if value.__class__ is str else KeyValue(key=name, value=_value(value))
        for name, value in told.items()
    ]


@lru_cache(_REMEMBERED)
def _known(name: str, value: str) -> KeyValue:
    return KeyValue(key=name, value=_value(value))


def _value(value: Any) -> AnyValue:
    """Return a value as its own type; what no message can hold is told as text that it can."""
    match value:
        case str():
            return AnyValue(string_value=value if value.isascii() else value.encode(errors="replace").decode())
        case bool():  # before int, which it is one of
            return AnyValue(bool_value=value)
        case int():
            return AnyValue(int_value=value) if _LEAST <= value <= _MOST else AnyValue(string_value=str(value))
        case float():
            return AnyValue(double_value=value)
        case bytes():
            return AnyValue(bytes_value=value)
        case _:
            return AnyValue(array_value=ArrayValue(values=[_value(each) for each in value]))
