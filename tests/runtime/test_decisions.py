"""What is kept in the control store is what is read from it, whoever wrote there before."""

from __future__ import annotations

import json

import pytest

from serve.autoscaling.kept import Kept
from serve.runtime import decisions
from tests.looks import look

KEPT = Kept().after(look()).after(look(wanted_replicas=3)).after(look(wanted_replicas=2))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, bytes]:
    """Ray's control store as a mapping."""
    kept: dict[bytes, bytes] = {}

    def put(key: bytes, value: bytes, overwrite: bool, namespace: bytes) -> None:
        kept[key] = value

    monkeypatch.setattr(decisions, "_internal_kv_put", put)
    monkeypatch.setattr(decisions, "_internal_kv_get", lambda key, namespace: kept.get(key))
    monkeypatch.setattr(decisions, "_internal_kv_del", lambda key, namespace: kept.pop(key, None))
    return kept


def test_what_is_written_is_read_by_model(store: dict[bytes, bytes]):
    decisions.write("a", KEPT, Kept())
    assert decisions.read("a") == KEPT
    assert decisions.read_last("a").decisions == ()
    assert decisions.read_last("a").counts == KEPT.counts
    assert decisions.read("b") == Kept()


def test_a_look_alone_leaves_the_decisions_as_they_are(store: dict[bytes, bytes]):
    decisions.write("a", KEPT, Kept())
    store[b"decisions/a"] = b"[]"
    later = KEPT.after(look(wanted_replicas=2, ongoing_requests=9.0))
    decisions.write("a", later, KEPT)
    assert store[b"decisions/a"] == b"[]"
    assert decisions.read_last("a").look == later.look


def test_what_is_forgotten_leaves_nothing(store: dict[bytes, bytes]):
    decisions.write("a", KEPT, Kept())
    decisions.write("b", KEPT, Kept())
    decisions.forget("a")
    assert decisions.read("a") == Kept()
    assert decisions.read("b") == KEPT
    assert all(key.endswith(b"/b") for key in store)


@pytest.mark.parametrize("told", [{}, {"look": {"at": 3}, "counts": {}}, {"look": None, "counts": {"up.load": 1}}, [1]])
def test_what_another_version_wrote_counts_for_nothing(store: dict[bytes, bytes], told: object):
    store[b"scaling/a"] = json.dumps(told).encode()
    assert decisions.read("a") == Kept()
