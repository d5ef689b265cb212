"""`roundhouse explain`: why a model has the replicas that it has, asked of a running platform."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from urllib.parse import quote

from serve.autoscaling.decisions import Decision, read_decision
from serve.errors import InvalidInput
from serve.runtime.predict import get

_FORMS = "14:05 or 14:05:30 of today, or RFC 3339 such as 2026-01-31T14:05:30Z"


def explain(base_url: str, model: str, *, at: datetime | None, as_json: bool) -> None:
    """Ask, and print the answer, or the decision at a time.

    Args:
        at: With a time zone; None for everything.

    Raises:
        RequestFailed: The platform refuses or is not there.
    """
    told = get(f"{base_url}/v2/models/{quote(model, safe='')}/explain")
    if at is None:
        text = json.dumps(told, indent=2) if as_json else readable(told)
    else:
        found = decision_at(told, at)
        text = json.dumps(found, indent=2) if as_json else readable_at(told, found, at)
    sys.stdout.write(text + "\n")


def read_time(text: str, *, now: datetime | None = None) -> datetime:
    """Return the moment that a person means.

    Args:
        now: Today and the time zone; None takes this machine's.

    Raises:
        InvalidInput: It is no time.
    """
    now = datetime.now().astimezone() if now is None else now
    for form in ("%H:%M", "%H:%M:%S"):
        try:
            time = datetime.strptime(text, form).time()
        except ValueError:
            continue
        return datetime.combine(now.date(), time, now.tzinfo)
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidInput(f"{text!r} is no time; give {_FORMS}", place="--at") from error
    if found.tzinfo is None:
        raise InvalidInput(f"{text!r} has no time zone; end it with Z, or with an offset such as +02:00", place="--at")
    return found


def decision_at(told: Mapping[str, Any], at: datetime) -> dict[str, Any] | None:
    """Return what was decided at a time, or last before it; None where nothing was, or it is no longer kept."""
    for decision in told["decisions"]:
        if datetime.fromisoformat(decision["at"]) <= at:
            return dict(decision)
    return None


def readable(told: Mapping[str, Any]) -> str:
    """Return an explanation as lines for people, times as of this machine."""
    replicas, bounds = told["replicas"], told["bounds"]
    least, most = bounds["min_replicas"], bounds["max_replicas"]
    counts = ", ".join(f"{count} {state}" for state, count in replicas.items() if count or state in ("wanted", "ready"))
    allowed = f"fixed at {least}" if least == most else f"{least} to {most} allowed"
    lines = [f"{told['model']}: {counts}; {allowed}", "", f"Now: {told['holds']}"]
    if told["decisions"]:
        lines += ["", "Decisions, newest first:"]
        lines += [f"  {_dated(read_decision(decision))}" for decision in told["decisions"]]
    elif least != most:
        lines += ["", "Nothing was decided yet."]
    return "\n".join(lines)


def readable_at(told: Mapping[str, Any], found: Mapping[str, Any] | None, at: datetime) -> str:
    """Return a decision at or before a time as a line for people."""
    if found is not None:
        return _dated(read_decision(found))
    moment = at.astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    if not told["decisions"]:
        return f"nothing was decided of {told['model']} at {moment} or before; {told['holds']}"
    oldest = _dated(read_decision(told["decisions"][-1]))
    return f"nothing that is kept was decided of {told['model']} at {moment} or before; the oldest is: {oldest}"


def _dated(decision: Decision) -> str:
    day = datetime.fromtimestamp(decision.at).astimezone().strftime("%Y-%m-%d")
    return f"{day}  {decision.sentence(None)}"
