"""Our spans as the bytes of the OpenTelemetry protocol, most of them written directly: by way of the SDK's objects and
encoder a request's spans cost more than all else about a small request, on the processor that runs the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from struct import Struct
from typing import Any

from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK as _FLAGS
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Status
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Message

from serve.telemetry.spans import Span

_KINDS = {
    "internal": Message.SPAN_KIND_INTERNAL,
    "server": Message.SPAN_KIND_SERVER,
    "client": Message.SPAN_KIND_CLIENT,
}
# Protobuf's wire format: before a field comes its number times eight, and 1, 2 or 5 for 8 bytes, a length, or 4 bytes.
#: trace_id = 1, span_id = 2, start_time_unix_nano = 7, end_time_unix_nano = 8 and flags = 16 of a Span.
_ALWAYS = Struct("<2s16s2s8sBQBQ2sI")
#: trace_id = 1, span_id = 2 and flags = 6 of a Link, which is links = 13 of a Span; 33 bytes.
_LINK = Struct("<2s2s16s2s8sBI")
_TRACE_ID, _SPAN_ID, _PARENT_ID = b"\x0a\x10", b"\x12\x08", b"\x22\x08"
_BEGAN, _ENDED, _SPAN_FLAGS, _LINK_FLAGS = 0x39, 0x41, b"\x85\x01", 0x35
_LINKS = b"\x6a\x21"
#: spans = 2 of a ScopeSpans, scope_spans = 2 of a ResourceSpans, and resource_spans = 1 of a request.
_SPANS, _SCOPE_SPANS, _RESOURCE_SPANS = b"\x12", b"\x12", b"\x0a"
# Most attributes come again with each request: routes, names, status codes.
_REMEMBERED = 2048
_BYTES = [bytes([each]) for each in range(256)]
_LEAST, _MOST = -(2**63), 2**63 - 1


def request_of(spans: Iterable[Span], *, offset_ns: int, resource: Mapping[str, str], scope: tuple[str, str]) -> bytes:
    """Return an ExportTraceServiceRequest (opentelemetry.proto.collector.trace.v1) as it is sent to a collector.

    Args:
        offset_ns: Unix time less `time.monotonic_ns`.
        resource: What the process is.
        scope: Name and version of what made the spans.
    """
    told = [ScopeSpans(scope=InstrumentationScope(name=scope[0], version=scope[1])).SerializeToString()]
    told += [_span(span, offset_ns) for span in spans]
    of_resource = ResourceSpans(resource=Resource(attributes=_pairs(resource))).SerializeToString() + _field(
        _SCOPE_SPANS, b"".join(told)
    )
    return _field(_RESOURCE_SPANS, of_resource)


def _span(span: Span, offset_ns: int) -> bytes:
    """Return a Span as a field; its own fields may come in any order, so that what is seldom there comes last."""
    told = _named(span.name, span.kind) + _ALWAYS.pack(
        _TRACE_ID,
        span.trace_id,
        _SPAN_ID,
        span.span_id,
        _BEGAN,
        int(span.began * 1e9) + offset_ns,
        _ENDED,
        int(span.ended * 1e9) + offset_ns,
        _SPAN_FLAGS,
        _FLAGS,
    )
    if span.parent_id:
        told += _PARENT_ID + span.parent_id
    if span.attributes:
        told += b"".join([_attribute(name, value) for name, value in span.attributes.items()])
    for trace_id, span_id in span.links:
        told += _LINK.pack(_LINKS, _TRACE_ID, trace_id, _SPAN_ID, span_id, _LINK_FLAGS, _FLAGS)
    if span.events or span.state or span.error is not None:
        told += _seldom(span, offset_ns)
    return _field(_SPANS, told)


def _seldom(span: Span, offset_ns: int) -> bytes:
    message = Message(trace_state=span.state.decode("latin-1"))
    for name, at, attributes in span.events:
        message.events.add(name=name, time_unix_nano=int(at * 1e9) + offset_ns, attributes=_pairs(attributes))
    if span.error is not None:
        message.status.CopyFrom(Status(code=Status.STATUS_CODE_ERROR, message=span.error))
    return _bytes(message)


def _bytes(message: Message) -> bytes:
    written: bytes = message.SerializeToString()
    return written


def _field(tag: bytes, content: bytes) -> bytes:
    """Return a field that has a length: seven bits a byte, the lowest first, each but the last marked."""
    length = len(content)
    while length > 127:
        tag += _BYTES[length & 127 | 128]
        length >>= 7
    return tag + _BYTES[length] + content


@lru_cache(_REMEMBERED)
def _named(name: str, kind: str) -> bytes:
    return _bytes(Message(name=name, kind=_KINDS[kind]))


def _attribute(name: str, value: Any) -> bytes:
    return _serialized(name, value) if isinstance(value, list) else _scalar(name, value)


@lru_cache(_REMEMBERED, typed=True)  # 1 is not True
def _scalar(name: str, value: str | float | bytes) -> bytes:
    return _serialized(name, value)


def _serialized(name: str, value: Any) -> bytes:
    return _bytes(Message(attributes=_pairs({name: value})))


def _pairs(told: Mapping[str, Any]) -> list[KeyValue]:
    return [KeyValue(key=name, value=_value(value)) for name, value in told.items()]


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
