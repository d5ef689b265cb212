"""The one table from an error to its HTTP status, and each protocol's own shape of an error."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import orjson

from serve.api.wire import JSON_HEADER, Send, send_bytes
from serve.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidInput,
    ModelNotFound,
    NotReady,
    Overloaded,
    PayloadTooLarge,
    PredictionFailed,
    RoundhouseError,
    UnsupportedMedia,
    UnsupportedParameter,
)

logger = logging.getLogger("roundhouse.api")


class PathNotFound(RoundhouseError):
    """No route has this path."""


class MethodNotAllowed(RoundhouseError):
    """The route exists and does not answer this method.

    Args:
        allow: The methods that it answers, as in the Allow header.
    """

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class ReplicaLost(RoundhouseError):
    """The replica that held this request went away before its answer; whether the work was done is not known."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Problem(NamedTuple):
    """How an error is told over HTTP.

    Args:
        kind: OpenAI's `type`.
        code: OpenAI's `code`.
    """

    status: int
    kind: str
    code: str


# The first class that an error is an instance of decides: the narrower ones stand first.
TABLE: tuple[tuple[type[RoundhouseError], Problem], ...] = (
    (UnsupportedParameter, Problem(400, "invalid_request_error", "unsupported_parameter")),
    (PayloadTooLarge, Problem(413, "invalid_request_error", "payload_too_large")),
    (UnsupportedMedia, Problem(415, "invalid_request_error", "unsupported_media_type")),
    (InvalidInput, Problem(400, "invalid_request_error", "invalid_value")),
    (ModelNotFound, Problem(404, "invalid_request_error", "model_not_found")),
    (PathNotFound, Problem(404, "invalid_request_error", "not_found")),
    (MethodNotAllowed, Problem(405, "invalid_request_error", "method_not_allowed")),
    (Overloaded, Problem(429, "rate_limit_error", "overloaded")),
    (Cancelled, Problem(499, "invalid_request_error", "client_closed_request")),
    (NotReady, Problem(503, "server_error", "model_not_ready")),
    (ReplicaLost, Problem(503, "server_error", "replica_lost")),
    (DeadlineExceeded, Problem(504, "timeout_error", "deadline_exceeded")),
    (PredictionFailed, Problem(500, "server_error", "prediction_failed")),
)
INTERNAL = Problem(500, "server_error", "internal_error")
#: What a status is counted as where it was passed on, or its error was not seen.
OUTCOMES_OF_STATUS = {told.status: told.code for _, told in reversed(TABLE)} | {400: "invalid_value"}

#: An error and how it is told -> the body of its answer.
Shape = Callable[[Problem, str, "str | None"], Mapping[str, Any]]


def problem(error: Exception) -> Problem:
    """Return how an error is told over HTTP."""
    for kind, told in TABLE:
        if isinstance(error, kind):
            return told
    return INTERNAL


def open_inference_shape(told: Problem, message: str, place: str | None) -> dict[str, Any]:  # noqa: ARG001 - a Shape
    """`{"error": "..."}` (Open Inference Protocol v2, "Inference Response JSON Error Object")."""
    return {"error": message}


def openai_shape(told: Problem, message: str, place: str | None) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`, as OpenAI's clients read it."""
    return {"error": {"message": message, "type": told.kind, "param": place, "code": told.code}}


def describe(error: Exception) -> tuple[Problem, str, str | None]:
    """Return how an error is told, its sentence and the request's place that it is about; never a traceback."""
    told = problem(error)
    if told is INTERNAL:
        logger.error("A request failed for a reason that is not the caller's.", exc_info=error)
        return told, "internal error; the server's log has the reason", None
    message = str(error)
    if isinstance(error, NotReady) and error.phase not in message:
        message = f"{message} (phase: {error.phase})"
    place = error.place if isinstance(error, InvalidInput) else "model" if isinstance(error, ModelNotFound) else None
    return told, message, place


def error_headers(error: Exception, told: Problem) -> list[tuple[bytes, bytes]]:
    """Return what an error adds to the headers: when to ask again, or that asking again is of no use."""
    headers = [JSON_HEADER]
    if isinstance(error, (Overloaded, NotReady, ReplicaLost)):
        headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode()))
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", error.allow.encode()))
    if told.status in (500, 504):
        # OpenAI's clients repeat every 5xx by themselves; the same request would fail or be late again.
        headers.append((b"x-should-retry", b"false"))
    return headers


async def send_error(send: Send, error: Exception, shape: Shape, *, extra: list[tuple[bytes, bytes]]) -> None:
    """Answer with an error in a protocol's shape."""
    told, message, place = describe(error)
    body = orjson.dumps(shape(told, message, place))
    await send_bytes(send, told.status, [*error_headers(error, told), *extra], body)
