"""What was decided of each model's replicas, kept in Ray's control store: it outlives the controller that decides.

The last look, written as often as once a second, stands apart from the decisions, which are many and seldom change.
"""

from __future__ import annotations

import json
from typing import Any

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from serve.autoscaling.kept import Kept, read_kept
from serve.runtime.phases import NAMESPACE

_LAST, _DECISIONS = "scaling", "decisions"


def write(model: str, kept: Kept, written: Kept) -> None:
    """Keep what is known of a model's scaling.

    Args:
        written: What was kept before.
    """
    if kept.decisions != written.decisions:
        _put(_DECISIONS, model, [decision.told() for decision in kept.decisions])
    _put(_LAST, model, kept.told())


def read(model: str) -> Kept:
    """Return what is kept of a model; nothing where there is none, or where another version wrote it."""
    return _read(model, _get(_DECISIONS, model) or ())


def read_last(model: str) -> Kept:
    """Return what is kept of a model but for its decisions."""
    return _read(model, ())


def forget(model: str) -> None:
    """Remove what is kept of a model."""
    for kind in (_LAST, _DECISIONS):
        _internal_kv_del(_key(kind, model), namespace=NAMESPACE)


def _read(model: str, decisions: Any) -> Kept:
    told = _get(_LAST, model)
    try:
        return read_kept(told, decisions) if told else Kept()
    except (LookupError, TypeError, ValueError):
        return Kept()


def _get(kind: str, model: str) -> Any:
    value = _internal_kv_get(_key(kind, model), namespace=NAMESPACE)
    return json.loads(value) if value else None


def _put(kind: str, model: str, told: Any) -> None:
    _internal_kv_put(_key(kind, model), json.dumps(told).encode(), overwrite=True, namespace=NAMESPACE)


def _key(kind: str, model: str) -> bytes:
    return f"{kind}/{model}".encode()
