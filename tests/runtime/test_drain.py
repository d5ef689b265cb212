"""A worker that leaves waits for whoever takes its replicas over, and only for that."""

from __future__ import annotations

import socket

import pytest

from serve.runtime import drain
from serve.runtime.drain import DrainError, drain_node

NOBODY = "head.invalid:6379 is no name any more: the platform is going, and nobody takes the replicas over"


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "_NAMELESS_S", 0.0)
    monkeypatch.setattr(drain, "_POLL_S", 0.01)


def test_a_head_whose_name_is_gone_is_not_waited_for() -> None:
    said: list[str] = []
    drain_node("head.invalid:6379", address="127.0.0.1", deadline_s=600, say=said.append)
    assert said[-1] == NOBODY


def test_a_head_that_is_away_is_waited_for_until_the_deadline() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        head = f"127.0.0.1:{taken.getsockname()[1]}"
        said: list[str] = []
        with pytest.raises(DrainError, match=f"control store at {head} does not answer"):
            drain_node(head, address="127.0.0.1", deadline_s=1, say=said.append)
    assert len(said) == 1 and said[0].endswith("; waiting for it")


def test_a_head_that_goes_for_good_while_replicas_are_left_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray's control store took the request, and went.
    monkeypatch.setattr(drain, "_ask_to_drain", lambda *_: None)
    monkeypatch.setattr(drain, "replicas_here", lambda: [1])
    said: list[str] = []
    drain_node("head.invalid:6379", address="127.0.0.1", deadline_s=600, say=said.append)
    assert said[-1] == NOBODY


def test_a_name_that_cannot_be_asked_for_is_no_loss_while_the_head_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        answers = iter([("127.0.0.1", port)])
        left = iter([[1], [1], [1], []])
        monkeypatch.setattr(drain, "_LAST_REQUESTS_S", 0.0)
        monkeypatch.setattr(drain, "_ask_to_drain", lambda *_: None)
        monkeypatch.setattr(drain, "_address_of", lambda _: next(answers, None))
        monkeypatch.setattr(drain, "replicas_here", lambda: next(left))
        said: list[str] = []
        drain_node(f"head:{port}", address="127.0.0.1", deadline_s=600, say=said.append)
    assert said[-1] == "0 replicas left"
