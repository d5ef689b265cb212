"""What can go wrong, as one small tree, so that every layer raises the same words and only the API knows status codes.

RoundhouseError
├── SpecError            the declaration is wrong                    (never reaches HTTP)
├── SourceError          a model's files could not be had            (the model fails to load)
├── LoadError            the files were had, the model did not load
├── InvalidInput         the caller's request is wrong
│   ├── UnsupportedParameter
│   ├── PayloadTooLarge
│   └── UnsupportedMedia
├── ModelNotFound
├── NotReady             the model is loading, draining or failed
├── Overloaded           the queue is full
├── DeadlineExceeded
├── Cancelled            the caller left
└── PredictionFailed     the model raised
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class RoundhouseError(Exception):
    """Base of every error that Roundhouse raises on purpose; `str(error)` is a sentence for people."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own way back calls the class with its message alone, which loses what else it carries.
        return _restore, (type(self), self.args, self.__dict__)


def _restore(kind: type[RoundhouseError], arguments: tuple[Any, ...], state: dict[str, Any]) -> RoundhouseError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(state)
    return error


class SpecError(RoundhouseError):
    """A declaration that cannot be accepted; the message lists every problem, a line each."""


class SourceError(RoundhouseError):
    """A model's files could not be had; the message names the source and the likely fix."""


class LoadError(RoundhouseError):
    """A model's files were had and the model did not load from them."""


class InvalidInput(RoundhouseError):
    """A request that no retry will mend.

    Args:
        message: What is wrong, with the value where that helps.
        place: The field, as a path into the request: `inputs[0].shape`, `header x-request-timeout-ms`.
    """

    def __init__(self, message: str, *, place: str | None = None) -> None:
        super().__init__(f"{place}: {message}" if place else message)
        self.message = message
        self.place = place


class UnsupportedParameter(InvalidInput):
    """A parameter that the protocol knows and this model or server does not support."""


class PayloadTooLarge(InvalidInput):
    """A body, an item or a decoded input over its limit."""


class UnsupportedMedia(InvalidInput):
    """A body whose content type or encoding is not understood."""


class ModelNotFound(RoundhouseError):
    """No model of this name is declared.

    Args:
        name: What was asked for.
        near: Declared names that look like it, best first.
    """

    def __init__(self, name: str, *, near: Sequence[str] = ()) -> None:
        hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
        super().__init__(f"model {name!r:.100} is not declared{hint}")
        self.name = name
        self.near = tuple(near)


class NotReady(RoundhouseError):
    """A declared model that cannot answer now.

    Args:
        phase: `queued`, `downloading`, `loading`, `warming`, `draining` or `failed`.
        retry_after_s: Seconds after which asking again makes sense.
    """

    def __init__(self, message: str, *, phase: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.phase = phase
        self.retry_after_s = retry_after_s


class Overloaded(RoundhouseError):
    """The queue is full.

    Args:
        retry_after_s: Seconds until the queue should have room, from its length and the measured rate.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(RoundhouseError):
    """The request's deadline passed before its answer."""


class Cancelled(RoundhouseError):
    """The caller went away before its answer."""


class PredictionFailed(RoundhouseError):
    """The model raised on this item; the message holds the exception's type and text, never its traceback."""
