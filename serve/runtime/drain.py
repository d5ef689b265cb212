"""A worker's leave: its replicas are replaced elsewhere before its pod ends, so that no request is lost with it."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Callable

import psutil

from serve.errors import RoundhouseError
from serve.runtime.front import haproxy_binary
from serve.runtime.local import begun, has_haproxy

_NOBODY = "{head} is no name any more: the platform is going, and nobody takes the replicas over"
_REPLICA_TITLE = "ray::ServeReplica"
_POLL_S = 0.5
_CONNECT_S = 3.0
_ANSWER_S = 10.0
# Ray's client goes on by itself for minutes with a head that went, or stands still, after it had been reached.
_TALK_S = 20.0
# For what is still on its way here when the last replica has ended.
_LAST_REQUESTS_S = 5.0
# However late it is, the proxy here has this long for what it was asked.
_LAST_ANSWERS_S = 10.0
# So long before the deadline, and no earlier than in its last quarter, replicas that nobody has taken over stop: they
# go on until every proxy knows, which takes ten seconds, and most requests have a minute.
_LAST_CALL_S = 75.0
# Ray stops a replica whether or not another answers in its place, once its node's deadline is no further away than the
# time that the replica has to stop in, a minute for most: no deadline that Ray knows may come near before ours does.
_NO_HURRY_S = 10 * 86_400.0
# A head that is being replaced may be without a name for a moment.
_NAMELESS_S = 10.0


class DrainError(RoundhouseError):
    """The node could not be drained; the message says the likely fix."""


def drain_node(head: str, *, address: str, deadline_s: float, say: Callable[[str], None]) -> None:
    """Have Ray place this node's replicas elsewhere, and return when none is left here, or at the deadline.

    Each goes on answering until another does so in its place. One that has no successor 75 s before the deadline, or in
    its last quarter, stops: once the proxies know, it takes no request any more, and finishes those it has while there
    is time. Then, and also where nobody takes them over, this node's proxy answers what it was asked, and ends.

    A head that is being replaced as well is waited for: without it nobody would take the replicas over. One whose name
    is gone will not come back, and nothing is waited for.

    Args:
        head: `host:port` of Ray's control store.
        address: This node's, as Ray knows it.
        deadline_s: Seconds after which whatever is left is left. The proxy may take ten seconds more.

    Raises:
        DrainError: Ray has not answered by the deadline, does not know the node, or refuses.
    """
    ends = time.monotonic() + deadline_s
    try:
        if _asked(head, address, _NO_HURRY_S, ends, say):
            say(f"{address} is draining; at most {deadline_s:g} s")
            if not _handed_over(head, ends - min(_LAST_CALL_S, deadline_s / 4), say):
                _stop_the_rest(head, address, ends, say)
    finally:
        _let_go(max(ends, time.monotonic() + _LAST_ANSWERS_S), say)


def _handed_over(head: str, until: float, say: Callable[[str], None]) -> bool:
    """Wait until no replica is here or nobody will take them over; return False where `until` comes first."""
    left: int | None = None
    known = _address_of(head)
    seen = time.monotonic()
    while time.monotonic() < until:
        count = len(replicas_here())
        if count != left:
            left = count
            say(f"{_counted(left)} left")
        if not left:
            time.sleep(min(_LAST_REQUESTS_S, max(0.0, until - time.monotonic())))
            return True
        if _address_of(head) or (known and _answers(known)):
            seen = time.monotonic()
        elif time.monotonic() - seen > _NAMELESS_S:
            say(_NOBODY.format(head=head))
            return True
        time.sleep(_POLL_S)
    return False


def _stop_the_rest(head: str, address: str, ends: float, say: Callable[[str], None]) -> None:
    """Have Ray stop what it could not place elsewhere, so that requests in flight are answered before the pod's end."""
    if not (left := len(replicas_here())):
        return
    say(f"the deadline is near, and {_are_left(left)}: Ray stops what nobody has taken over")
    if not _asked(head, address, 0.0, ends, say):
        return
    while (left := len(replicas_here())) and time.monotonic() < ends:
        time.sleep(_POLL_S)
    say(f"the deadline has passed, and {_are_left(left)}" if left else "0 replicas left")


def _counted(replicas: int) -> str:
    return f"{replicas} replica{'' if replicas == 1 else 's'}"


def _are_left(replicas: int) -> str:
    return f"{_counted(replicas)} {'is' if replicas == 1 else 'are'} left"


def _let_go(ends: float, say: Callable[[str], None]) -> None:
    """Have the proxies here end in order: they take no connection any more, and close each after its answer.

    A client that keeps its connection would otherwise see it break off when the pod ends, be it in the middle of an
    answer (soft stop, section 4 of HAProxy's management guide).
    """
    going = proxies_here()
    for proxy in going:
        with contextlib.suppress(psutil.Error):
            proxy.send_signal(signal.SIGUSR1)
    # Ray may start another meanwhile; to that one nobody is led any more.
    while set(going) & set(proxies_here()):
        if time.monotonic() > ends:
            say("the deadline has passed, and requests are left")
            return
        time.sleep(_POLL_S)


def _address_of(head: str) -> tuple[str, int] | None:
    """Return where a name leads, or None while it leads nowhere, be it unknown or not to be asked for."""
    host, _, port = head.rpartition(":")
    try:
        return str(socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0][4][0]), int(port)
    except socket.gaierror:
        return None


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True


def replicas_here() -> list[int]:
    """Return the process ids of the replicas on this machine, or in this container."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"]
        if words and words[0].startswith(_REPLICA_TITLE):
            found.append(process.pid)
    return found


def proxies_here() -> list[psutil.Process]:
    """Return Ray's HAProxy processes on this machine, or in this container, that have not ended."""
    if not has_haproxy():
        return []
    binary = haproxy_binary()
    # One that has ended, and that nobody has asked after yet, has no words.
    return [one for one in psutil.process_iter(["cmdline"]) if (one.info["cmdline"] or [""])[0] == binary]


class _HeadIsAway(DrainError):
    """Ray's control store does not answer."""


def _asked(head: str, address: str, deadline_s: float, ends: float, say: Callable[[str], None]) -> bool:
    """Ask until the head answers; return False, and say so, where it has no name, and does not get one soon."""
    told = False
    named = time.monotonic()
    while True:
        try:
            _ask_to_drain(head, address, deadline_s)
            return True
        except _HeadIsAway as error:
            now = time.monotonic()
            named = now if _address_of(head) else named
            if now - named > _NAMELESS_S:
                say(_NOBODY.format(head=head))
                return False
            if now > ends:
                raise
            if not told:
                say(f"{error}; waiting for it")
                told = True
            time.sleep(_POLL_S)


def _ask_to_drain(head: str, address: str, deadline_s: float) -> None:
    """Ask once; a later deadline takes the place of the one before.

    Raises:
        _HeadIsAway: It does not answer.
        DrainError: It does not know the node, or refuses.
    """
    host, _, port = head.rpartition(":")
    try:
        # Ray's own client takes forty seconds to find that nobody is there.
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
        answers = begun(lambda: _drained(head, address, deadline_s)).result(_TALK_S)
    except Exception as error:
        why = str(error) or f"no answer in {_TALK_S:g} s"
        raise _HeadIsAway(f"Ray's control store at {head} does not answer: {why}") from error
    if not answers:
        raise DrainError(
            f"Ray has no node that is alive at {address}; --node-ip takes the address given to `ray start`"
        )
    if refusals := [why for accepted, why in answers if not accepted]:
        raise DrainError(f"Ray does not drain {address}: {'; '.join(refusals)}")


def _drained(head: str, address: str, deadline_s: float) -> list[tuple[bool, str]]:
    """Return what Ray says to the drain of each node that is alive at an address: whether it does it, or why not."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2, gcs_pb2

    alive = gcs_pb2.GcsNodeInfo.GcsNodeState.ALIVE
    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    client = GcsClient(address=head)
    nodes = [
        node.node_id.hex()
        for node in client.get_all_node_info(timeout=_ANSWER_S).values()
        if node.node_manager_address == address and node.state == alive
    ]
    deadline_ms = int((time.time() + deadline_s) * 1000)
    return [client.drain_node(node, reason, "its pod is being ended", deadline_ms) for node in nodes]
