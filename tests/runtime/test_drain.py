"""A worker that leaves waits for whoever takes its replicas over, and only for that."""

from __future__ import annotations

import socket

import pytest

from serve.runtime import drain
from serve.runtime.drain import DrainError, drain_node


def test_a_head_whose_name_is_gone_is_not_waited_for() -> None:
    said: list[str] = []
    drain_node("head.invalid:6379", address="127.0.0.1", deadline_s=600, say=said.append)
    assert said == ["head.invalid:6379 is no name any more: the platform is going, and nobody takes the replicas over"]


def test_a_head_that_is_away_is_waited_for_until_the_deadline() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        head = f"127.0.0.1:{taken.getsockname()[1]}"
        said: list[str] = []
        with pytest.raises(DrainError, match=f"control store at {head} does not answer"):
            drain_node(head, address="127.0.0.1", deadline_s=1, say=said.append)
    assert len(said) == 1 and said[0].endswith("; waiting for it")


def test_a_head_that_goes_for_good_while_replicas_are_left_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "_NAMELESS_S", 0.0)
    # Ray's control store took the request, and went.
    monkeypatch.setattr(drain, "_ask_to_drain", lambda *_: None)
    monkeypatch.setattr(drain, "replicas_here", lambda: [1])
    said: list[str] = []
    drain_node("head.invalid:6379", address="127.0.0.1", deadline_s=600, say=said.append)
    assert (
        said[-1] == "head.invalid:6379 is no name any more: the platform is going, and nobody takes the replicas over"
    )
