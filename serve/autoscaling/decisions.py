"""What was seen of a model's load and what came of it, with the sentences that say so to whoever asks later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, tzinfo
from typing import Any

#: Why the number changed: more load, less of it, or a bound that the declaration moved.
REASONS = ("load", "idle", "bound")
DIRECTIONS = ("up", "down")

# A look is written down every ten seconds at least; one that is older than a few of them has no follower.
_STALE_S = 45.0


@dataclass(frozen=True, slots=True)
class Look:
    """What the policy saw of a model at one moment.

    Args:
        at: Unix time, seconds.
        ongoing_requests: In flight and waiting, of all replicas: the mean over `window_s`.
        window_s: Seconds.
        target_ongoing_requests: How many of them one replica should have.
        asked_replicas: How many replicas that makes, before bounds and delays.
        wanted_replicas: How many there were to be at that moment.
        running_replicas: How many answered.
        min_replicas, max_replicas: The bounds.
        upscale_delay_s, downscale_delay_s: How long more, or fewer, must be asked for before the number changes.
        lasted_s: How long more, or fewer, have been asked for; 0 where neither is.
    """

    at: float
    ongoing_requests: float
    window_s: float
    target_ongoing_requests: float
    asked_replicas: int
    wanted_replicas: int
    running_replicas: int
    min_replicas: int
    max_replicas: int
    upscale_delay_s: float
    downscale_delay_s: float
    lasted_s: float

    def bounded(self, replicas: int) -> int:
        """Return a number of replicas within the bounds."""
        return max(self.min_replicas, min(self.max_replicas, replicas))

    def load(self) -> str:
        """Return the load in words."""
        count = f"{round(self.ongoing_requests, 1):g}"
        many = "" if count == "1" else "s"
        return (
            f"{count} ongoing request{many} over {self.window_s:g} s, target {self.target_ongoing_requests:g} a replica"
        )

    def told(self) -> dict[str, Any]:
        """Return it in JSON values, as `read_look` reads it."""
        return {"at": rfc3339(self.at)} | {name: value for name, value in asdict(self).items() if name != "at"}


@dataclass(frozen=True, slots=True)
class Decision:
    """One change of the number of replicas that there are to be.

    Args:
        at: Unix time, seconds.
        before, after: The numbers.
        reason: Of `REASONS`.
        look: What it was decided on.
    """

    at: float
    before: int
    after: int
    reason: str
    look: Look

    @property
    def direction(self) -> str:
        """Return `up` or `down`."""
        return "up" if self.after > self.before else "down"

    def sentence(self, zone: tzinfo | None = UTC) -> str:
        """Return it for people, with the time of day in a zone; None is this machine's."""
        time = datetime.fromtimestamp(self.at, UTC).astimezone(zone).strftime("%H:%M:%S %Z")
        look = self.look
        if self.reason == "bound":
            why = f"its bounds are now {look.min_replicas} to {look.max_replicas}"
        else:
            bound = f"at most {look.max_replicas}" if self.after > self.before else f"at least {look.min_replicas}"
            why = f"{look.load()}, {bound}"
        return f"{self.before} -> {self.after} at {time}: {why}"

    def told(self) -> dict[str, Any]:
        """Return it in JSON values, as `read_decision` reads it."""
        return {
            "at": rfc3339(self.at),
            "from": self.before,
            "to": self.after,
            "reason": self.reason,
            "sentence": self.sentence(),
            "inputs": self.look.told(),
        }


def rfc3339(at: float) -> str:
    """Return a Unix time in RFC 3339, to the millisecond."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def read_look(told: Mapping[str, Any]) -> Look:
    """Return what `Look.told` returned; raises LookupError, TypeError or ValueError where it is of another form."""
    return Look(**{**told, "at": datetime.fromisoformat(told["at"]).timestamp()})


def read_decision(told: Mapping[str, Any]) -> Decision:
    """Return what `Decision.told` returned; raises as `read_look`."""
    return Decision(
        at=datetime.fromisoformat(told["at"]).timestamp(),
        before=told["from"],
        after=told["to"],
        reason=told["reason"],
        look=read_look(told["inputs"]),
    )


def decided(before: Look, now: Look) -> Decision | None:
    """Return what was decided between a look and the next one, or None.

    The policy does not learn what becomes of its answer until it is asked again: the earlier look is what it was
    decided on, unless the bounds moved in between.
    """
    if now.wanted_replicas == before.wanted_replicas:
        return None
    if now.wanted_replicas == now.bounded(before.wanted_replicas):
        return Decision(now.at, before.wanted_replicas, now.wanted_replicas, "bound", now)
    reason = "load" if now.wanted_replicas > before.wanted_replicas else "idle"
    return Decision(before.at, before.wanted_replicas, now.wanted_replicas, reason, before)


def holds(look: Look | None, *, min_replicas: int, max_replicas: int, now: float) -> str:
    """Return why a model is not scaling now, or for what it still waits.

    Args:
        look: The last one.
        min_replicas, max_replicas: As declared.
        now: Unix time, seconds.
    """
    if min_replicas == max_replicas:
        return f"the number is fixed: scaling.min_replicas and scaling.max_replicas are both {min_replicas}"
    if look is None:
        return "its load has not been looked at yet; Ray does so once the model is deployed"
    if now - look.at > _STALE_S:
        ago_s = round(now - look.at)
        return f"its load was last looked at {ago_s} s ago; nothing scales until Ray's Serve controller looks again"
    if not look.running_replicas:
        return f"no replica answers yet, so no load is known; {look.wanted_replicas} stay wanted"
    return _what_holds(look, now)


def _what_holds(look: Look, now: float) -> str:
    wanted, asked = look.wanted_replicas, look.asked_replicas
    allowed = look.bounded(asked)
    why = f"{_are(asked)} asked for, by {look.load()}"
    if allowed != wanted:
        which, delay_s = ("more", look.upscale_delay_s) if allowed > wanted else ("fewer", look.downscale_delay_s)
        lasted_s = min(delay_s, look.lasted_s + max(0.0, now - look.at))
        wait = f"once {which} are asked for during {delay_s:g} s, {lasted_s:.0f} s so far"
        return f"it goes from {wanted} to {allowed} {wait}: {why}"
    if asked > look.max_replicas:
        return f"scaling.max_replicas holds it at {wanted}: {why}"
    if asked < look.min_replicas:
        return f"scaling.min_replicas holds it at {wanted}: {why}"
    return f"nothing is to change: {why}"


def _are(count: int) -> str:
    return f"{count} is" if count == 1 else f"{count} are"
