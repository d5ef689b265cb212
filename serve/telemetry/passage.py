"""How one request went through this process, noted once by whoever knows and read by metrics, traces and logs."""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.telemetry.tracing import RequestTrace

_KEY = "roundhouse.passage"
_LONGEST_MESSAGE = 1000


class Passage:
    """The moments of a request and how it ended; moments are of `time.monotonic`, and 0 where it did not come so far.

    `began`, `arrived`, `launched`, `answered` and `ended` follow each other, so that what is between them adds up to
    the whole. Where a request opens several streams, they are those of its first to arrive and to be launched, and of
    its last to be answered.

    Attributes:
        began: It reached the application.
        arrived: Its items were in the model's queue.
        prepare_began, prepared: The call that made its first item ready, which is within the time in the queue.
        launched: Its first batch began, or its stream got a slot.
        first_part: A stream's first part was there.
        answered: Its last result was there, or it was given up.
        replied: Its answer began.
        ended: Its answer was written.
        status: Of its answer; 0 before it begins.
        outcome: `ok`, or the code of the error that ended it.
        model: Of the declaration, where a gateway found it.
        is_counted: False where it is not for the metrics.
        is_raised: Whether an error here ended it, rather than one that was passed on.
        trace: Where it is recorded; None where it is not.
        details: What its span tells of it beside all this.
        message: What its error said, which may repeat what the client sent.
    """

    __slots__ = (
        "answered", "arrived", "began", "details", "ended", "first_part", "is_counted", "is_raised", "launched",
        "message", "model", "outcome", "prepare_began", "prepared", "replied", "status", "trace",
    )  # fmt: skip

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.arrived = self.prepare_began = self.prepared = self.launched = self.first_part = 0.0
        self.answered = self.replied = self.ended = 0.0
        self.status = 0
        self.outcome = "ok"
        self.model = ""
        self.message = ""
        self.is_counted = True
        self.is_raised = False
        self.trace: RequestTrace | None = None
        self.details: dict[str, Any] | None = None

    @classmethod
    def of(cls, scope: MutableMapping[str, Any]) -> Passage:
        """Return the one of a request that an Endpoint answers."""
        passage: Passage = scope[_KEY]
        return passage

    @property
    def is_fault(self) -> bool:
        """Whether it failed by our fault, be it after its answer began; a client that leaves has not met one."""
        if self.outcome == "client_closed_request":
            return False
        return self.status >= 500 or (self.outcome != "ok" and not 400 <= self.status < 500)

    def enter(self, scope: MutableMapping[str, Any]) -> None:
        """Become what `of` returns."""
        scope[_KEY] = self

    def failed(self, outcome: str, error: Exception) -> None:
        """Note what ended it."""
        self.outcome = outcome
        self.is_raised = True
        self.message = str(error)[:_LONGEST_MESSAGE]

    def tell(self, details: dict[str, Any]) -> None:
        """Add to the details."""
        self.details = details if self.details is None else self.details | details

    def was_prepared(self, began: float, ended: float) -> None:
        """Note the call that made the first item ready."""
        if not self.prepare_began:
            self.prepare_began, self.prepared = began, ended

    def went(self, *, arrived: float, launched: float, answered: float) -> None:
        """Note how the request, or one stream of it, went through the queue and the model; `launched` may be 0."""
        if not self.arrived or arrived < self.arrived:
            self.arrived = arrived
        if launched and (not self.launched or launched < self.launched):
            self.launched = launched
        self.answered = max(self.answered, answered)
