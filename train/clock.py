"""Training time, and learning rates that follow it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds of training, saved in checkpoints, so that a resumed run goes on where it stopped.

    Loading the model and the data is not counted, nor is validation; the count starts with `start`.
    """

    def __init__(self, before: float = 0.0) -> None:
        self.agreed = before  # seconds as all ranks know them: rank 0's, sent once a step
        self._before = before
        self._started: float | None = None

    def start(self) -> None:
        """Starts counting."""
        self._started = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count what happens inside."""
        began = time.monotonic()
        yield
        if self._started is not None:
            self._started += time.monotonic() - began

    def seconds(self) -> float:
        """Returns the seconds of training so far, of this process and those that it resumes."""
        now = 0.0 if self._started is None else time.monotonic() - self._started
        return self._before + now


def rate_factor(kind: str, share: float, *, warmup: float) -> float:
    """Returns the learning rate as a share of its peak.

    Args:
        kind: cosine, linear or constant.
        share: how much of the run is over, 0..1.
        warmup: share of the run in which the rate rises from 0.

    Source: transformers.get_scheduler's three schedules, over time in place of steps.
    """
    share = min(share, 1.0)
    if share < warmup:
        return share / warmup
    left = (1.0 - share) / (1.0 - warmup)
    return {"cosine": 0.5 * (1 - math.cos(math.pi * left)), "linear": left, "constant": 1.0}[kind]
