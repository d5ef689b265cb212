"""Which of several controllers acts: the one that holds a Lease (coordination.k8s.io/v1)."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

from serve.cluster.kube import WRITE_S, Cluster, Conflict, Missing

DURATION_S = 45
RENEW_S = 5.0
#: How long before it runs out a Lease is no longer acted on: longer than any one write takes, so that none lands when
#: another controller acts already.
MARGIN_S = WRITE_S + 5.0


class Leadership:
    """One controller's side of a Lease.

    The Lease is made, and removed, with the rest of the installation: here it is only taken and left, so that none is
    left behind. A holder trusts its own clock alone: it counts itself out `DURATION_S` after it began the last renewal
    that went through. Another takes a Lease over once it has itself seen it unchanged for that long, so clocks need
    not agree.

    Args:
        identity: Of this process, unlike any other's.
        clock: Seconds, monotonic.
        now: The time of day that is written for people to read.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        name: str,
        identity: str,
        clock: Callable[[], float],
        now: Callable[[], datetime.datetime],
    ) -> None:
        self._cluster = cluster
        self._name = name
        self._identity = identity
        self._clock = clock
        self._now = now
        self._seen: tuple[str, float] = ("", 0.0)
        self._held_until = float("-inf")

    @property
    def holds(self) -> bool:
        """Return whether this process may begin a write now, and nobody else may before it has ended."""
        return self._clock() + MARGIN_S < self._held_until

    def renew(self) -> bool:
        """Take or keep the Lease if that is possible, and return whether it is held.

        Raises:
            ApiUnavailable: What was held is held until it runs out.
            Missing: There is no such Lease; nothing is held.
        """
        began = self._clock()
        try:
            lease = self._cluster.get_lease(self._name)
            # Not before it was answered: what is seen may have been written just then.
            if not self._may_take(lease, self._clock()):
                self._held_until = float("-inf")
                return False
            self._cluster.put_lease(self._name, self._spec(lease.get("spec", {})), metadata=lease["metadata"])
        except Conflict:
            self._held_until = float("-inf")
            return False
        except Missing:
            self._held_until = float("-inf")
            raise
        self._held_until = began + DURATION_S
        return True

    def give_up(self) -> None:
        """Let the next controller act at once; raises ApiUnavailable, Conflict and Missing."""
        if not self.holds:
            return
        self._held_until = float("-inf")
        lease = self._cluster.get_lease(self._name)
        if lease.get("spec", {}).get("holderIdentity") == self._identity:
            self._cluster.put_lease(self._name, lease["spec"] | {"holderIdentity": ""}, metadata=lease["metadata"])

    def _may_take(self, lease: dict[str, Any], now: float) -> bool:
        holder = lease.get("spec", {}).get("holderIdentity", "")
        if holder in ("", self._identity):
            return True
        version = lease["metadata"]["resourceVersion"]
        if self._seen[0] != version:
            self._seen = (version, now)
        return now - self._seen[1] > DURATION_S

    def _spec(self, before: dict[str, Any]) -> dict[str, Any]:
        now = self._now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        kept = before.get("holderIdentity") == self._identity
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": DURATION_S,
            "renewTime": now,
            "acquireTime": before["acquireTime"] if kept and "acquireTime" in before else now,
            "leaseTransitions": before.get("leaseTransitions", 0) + (not kept),
        }
