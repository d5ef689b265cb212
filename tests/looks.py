"""Looks at a load, with a value for everything that a test does not care about."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from serve.autoscaling.decisions import Look


def look(**changed: Any) -> Look:
    """Return a look at 12:01:07 UTC at a model of one replica, for which the load asks for 4."""
    values: dict[str, Any] = {
        "at": 1_767_268_867.0,
        "ongoing_requests": 6.2,
        "window_s": 30.0,
        "target_ongoing_requests": 2.0,
        "asked_replicas": 4,
        "wanted_replicas": 1,
        "running_replicas": 1,
        "min_replicas": 1,
        "max_replicas": 3,
        "upscale_delay_s": 30.0,
        "downscale_delay_s": 600.0,
        "lasted_s": 30.0,
    }
    return Look(**values | changed)


@st.composite
def looks(draw: st.DrawFn) -> Look:
    """Draw a look as Ray may give one: wanted is within the bounds."""
    least = draw(st.integers(1, 5))
    most = draw(st.integers(least + 1, 9))
    return look(
        at=draw(st.integers(10**12, 2 * 10**12)) / 1000,
        ongoing_requests=draw(st.floats(0, 1e6)),
        asked_replicas=draw(st.integers(0, 12)),
        wanted_replicas=draw(st.integers(least, most)),
        running_replicas=draw(st.integers(0, 9)),
        min_replicas=least,
        max_replicas=most,
        lasted_s=draw(st.floats(0, 1000)),
    )
