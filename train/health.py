"""Whether a model still learns: a dead one trains to the end without a sign, unless it is looked for."""

from __future__ import annotations

import math
from typing import Final

_STILL_STEPS: Final = 10  # with a gradient of exactly 0, although the batch had something to learn from
_WORSE_STEPS: Final = 200  # with a loss above that of guessing every token alike


class Health:
    """Counts the steps in a row that a live model does not make.

    Args:
        vocabulary: size of the vocabulary.
        warmup_steps: steps at the start in which the loss may be high.
        needs_images: only the vision tower or the projector learn, so a step without images has no gradient.
    """

    def __init__(self, *, vocabulary: int, warmup_steps: int, needs_images: bool) -> None:
        self._guess = math.log(vocabulary)
        self._warmup, self._needs_images = warmup_steps, needs_images
        self._still = self._worse = 0

    def fault(self, *, step: int, norm: float | None, loss: float, had_images: bool) -> str | None:
        """Returns what is wrong after a step, or None.

        Args:
            step: optimizer steps done.
            norm: of the gradient; None where it is not known.
            loss: mean over the labelled tokens of the step.
            had_images: some sample of the step had an image.
        """
        if norm is not None and not math.isfinite(norm):
            return "the gradient is nan or infinite"
        if had_images or not self._needs_images:
            self._still = self._still + 1 if norm == 0.0 else 0
        self._worse = self._worse + 1 if step > self._warmup and loss > self._guess else 0
        if self._still >= _STILL_STEPS:
            return f"the gradient was exactly 0 in {_STILL_STEPS} steps in a row: the model is dead; lower the rates"
        if self._worse >= _WORSE_STEPS:
            return (
                f"the loss was above {self._guess:.2f}, that of guessing, in {_WORSE_STEPS} steps in a row: the model "
                "does not learn; lower the rates"
            )
        return None
