"""What is kept of a model's scaling: its last decisions, how many there were, and the last look at its load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from serve.autoscaling.decisions import DIRECTIONS, REASONS, Decision, Look, decided, read_decision, read_look

MOST_DECISIONS = 50
# A load that stays as it is needs no new word of it, but now and then one that somebody still looks.
_STILL_LOOKING_S = 10.0

Counts = Mapping[tuple[str, str], int]
NO_COUNTS: Counts = MappingProxyType({(direction, reason): 0 for direction in DIRECTIONS for reason in REASONS})


@dataclass(frozen=True, slots=True)
class Kept:
    """What is known of one model.

    Args:
        look: The last one; None before the first.
        decisions: Newest first, at most `MOST_DECISIONS`.
        counts: Direction and reason -> decisions since the model was first declared.
    """

    look: Look | None = None
    decisions: tuple[Decision, ...] = ()
    counts: Counts = field(default_factory=lambda: NO_COUNTS)

    def after(self, look: Look) -> Kept:
        """Return what is known once another look was had."""
        decision = decided(self.look, look) if self.look is not None else None
        if decision is None:
            return replace(self, look=look)
        key = decision.direction, decision.reason
        return Kept(
            look=look,
            decisions=(decision, *self.decisions)[:MOST_DECISIONS],
            counts=MappingProxyType({**self.counts, key: self.counts[key] + 1}),
        )

    def is_news(self, written: Kept) -> bool:
        """Return whether it tells more than what was written down before."""
        if self.look is None or written.look is None:
            return self.look is not written.look
        if self.decisions != written.decisions or _of_note(self.look) != _of_note(written.look):
            return True
        return self.look.at - written.look.at >= _STILL_LOOKING_S

    def told(self) -> dict[str, Any]:
        """Return all but the decisions in JSON values, as `read_kept` reads it."""
        return {
            "look": self.look.told() if self.look else None,
            "counts": {".".join(key): count for key, count in self.counts.items()},
        }


def read_kept(told: Mapping[str, Any], decisions: Iterable[Mapping[str, Any]] = ()) -> Kept:
    """Return what `Kept.told` returned; raises LookupError, TypeError or ValueError where it is of another form.

    Args:
        decisions: What `Decision.told` returned of each, newest first.
    """
    return Kept(
        look=read_look(told["look"]) if told["look"] else None,
        decisions=tuple(map(read_decision, decisions)),
        counts=MappingProxyType({key: int(told["counts"][".".join(key)]) for key in NO_COUNTS}),
    )


def _of_note(look: Look) -> tuple[Any, ...]:
    return replace(look, at=0.0, lasted_s=0.0, ongoing_requests=round(look.ongoing_requests, 2)), look.lasted_s > 0
