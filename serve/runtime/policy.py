"""What Ray Serve's controller asks how many replicas a model should have: Ray's own policy, whose answers are noted.

Ray gives its controller a copy of what is defined here and not the module: nothing may be kept in it, and what is used
is imported where it is used.
"""

from __future__ import annotations

from typing import Any


class NotedPolicy:
    """Ray's default policy. Its answer stands, whatever becomes of noting it."""

    def __init__(self) -> None:
        self._is_told = False

    def __call__(self, ctx: Any) -> Any:
        """Return Ray's answer to an `AutoscalingContext`: a number of replicas, and what to remember."""
        from ray.serve.autoscaling_policy import default_autoscaling_policy

        answer = default_autoscaling_policy(ctx)
        try:
            from serve.runtime import scribe

            scribe.of_this_process().note(ctx, answer[0])
        except Exception:
            if not self._is_told:
                self._is_told = True
                import logging

                logging.getLogger("ray.serve").exception("Scaling goes on, but why is not written down.")
        return answer
