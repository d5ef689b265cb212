"""Writes down what the scaling policy saw and said, on a thread of its own: Ray's control store may be away for long.

The policy is asked three times a second for each model, inside the loop that keeps every replica alive. All that it
does for this is to leave a look in a mailbox.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ray.serve._private.constants import (
    SERVE_AUTOSCALING_DECISION_COUNTERS_KEY,
    SERVE_AUTOSCALING_DECISION_TIMESTAMP_KEY,
)

from serve.applications import model_of
from serve.autoscaling.decisions import Look
from serve.autoscaling.kept import Kept
from serve.runtime import decisions

logger = logging.getLogger("ray.serve")

_WRITE_S = 1.0
# A model that was not looked at for so long was removed, or is another's to write of; what is stored is read again.
_FORGOTTEN_S = 10.0


class Scribe:
    """The mailbox, and what empties it.

    Args:
        read: Returns what is kept of a model.
        write: Keeps what is known of a model, in place of what was kept before.
        clock: Unix time, seconds.
    """

    def __init__(
        self,
        *,
        read: Callable[[str], Kept],
        write: Callable[[str, Kept, Kept], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._read = read
        self._write = write
        self._clock = clock
        self._lock = threading.Lock()
        self._looks: dict[str, list[Look]] = {}
        # Model -> what is known of it, and what of that was written down.
        self._known: dict[str, tuple[Kept, Kept]] = {}
        self._is_told = False

    def note(self, ctx: Any, asked: float) -> None:
        """Leave a look, for `write_down`.

        Args:
            ctx: An `AutoscalingContext` of Ray Serve.
            asked: What the policy answered to it.
        """
        model = model_of(ctx.app_name)
        if model is None:
            return
        look = look_of(ctx, asked)
        with self._lock:
            waiting = self._looks.setdefault(model, [])
            # Of looks between which nothing was decided the last is enough: the mailbox stays small.
            if waiting and _course(waiting[-1]) == _course(look):
                waiting[-1] = look
            else:
                waiting.append(look)

    def run(self) -> None:
        """Empty the mailbox once a second, for ever."""
        while True:
            time.sleep(_WRITE_S)
            self.write_down()

    def write_down(self) -> None:
        """Empty the mailbox; what could not be written is tried again with the model's next look."""
        with self._lock:
            looks, self._looks = self._looks, {}
        for model, seen in looks.items():
            try:
                self._keep(model, seen)
            except Exception:
                if not self._is_told:
                    self._is_told = True
                    logger.exception("What was decided of %s is not written down yet.", model)
        oldest = self._clock() - _FORGOTTEN_S
        self._known = {model: known for model, known in self._known.items() if not _is_older(known[0], oldest)}

    def _keep(self, model: str, seen: list[Look]) -> None:
        if model not in self._known:
            stored = self._read(model)
            self._known[model] = (stored, stored)
        kept, written = self._known[model]
        for look in seen:
            kept = kept.after(look)
        self._known[model] = (kept, written)
        if kept.is_news(written):
            self._write(model, kept, written)
            self._known[model] = (kept, kept)


@functools.cache
def of_this_process() -> Scribe:
    """Return the scribe of this process, at work: Ray makes the policies itself, and cannot be handed one."""
    scribe = Scribe(read=decisions.read, write=decisions.write)
    threading.Thread(target=scribe.run, name="scribe", daemon=True).start()
    return scribe


def look_of(ctx: Any, asked: float) -> Look:
    """Return what a policy saw in an `AutoscalingContext` and answered."""
    now = time.time() if ctx.current_time is None else ctx.current_time
    look = Look(
        at=now,
        ongoing_requests=float(ctx.total_num_requests),
        window_s=ctx.config.look_back_period_s,
        target_ongoing_requests=ctx.config.get_target_ongoing_requests(),
        asked_replicas=math.ceil(asked),
        wanted_replicas=ctx.target_num_replicas,
        running_replicas=ctx.current_num_replicas,
        min_replicas=ctx.capacity_adjusted_min_replicas,
        max_replicas=ctx.capacity_adjusted_max_replicas,
        upscale_delay_s=ctx.config.upscale_delay_s,
        downscale_delay_s=ctx.config.downscale_delay_s,
        lasted_s=0.0,
    )
    # Ray counts up while more is asked for, down while less is, and remembers since when.
    since = ctx.policy_state.get(SERVE_AUTOSCALING_DECISION_TIMESTAMP_KEY)
    course = ctx.policy_state.get(SERVE_AUTOSCALING_DECISION_COUNTERS_KEY, 0)
    if since is None or course * (look.asked_replicas - look.wanted_replicas) <= 0:
        return look
    return replace(look, lasted_s=max(0.0, now - since))


def _course(look: Look) -> tuple[int, int, int]:
    return look.wanted_replicas, look.min_replicas, look.max_replicas


def _is_older(kept: Kept, at: float) -> bool:
    return kept.look is not None and kept.look.at < at
