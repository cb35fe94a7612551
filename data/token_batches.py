"""Batches by token count: steps and forward passes of nearly equal size, for packed rows without padding."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import Sampler


class TokenBatches(Sampler[list[int]]):
    """Batch sampler with steps of nearly equal token count; yields the samples of each forward pass.

    The order is divided into steps of an equal share of the epoch's tokens, so every sample comes once an epoch. In a
    step each sample, longest first, goes to the pass with the fewest tokens so far. Every epoch has the same number of
    steps, and every step the same number of passes, which ranks take in turn. A step with fewer samples than passes is
    filled up with samples from the beginning of the epoch.

    Args:
        order: sampler of sample indices, with `set_epoch`.
        lengths: tokens of each sample.
        tokens_per_step: maximum tokens of a step, as the mean over an epoch.
        passes: forward passes of a step, over all ranks.
    """

    def __init__(self, order: Any, lengths: Sequence[int], *, tokens_per_step: int, passes: int) -> None:
        self._order, self._lengths, self._passes = order, lengths, passes
        order.set_epoch(0)
        self.steps = math.ceil(sum(lengths[index] for index in order) / tokens_per_step)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        return self.steps * self._passes

    def __iter__(self) -> Iterator[list[int]]:
        samples = list(self._order)
        steps: list[list[int]] = [[] for _ in range(self.steps)]
        whole, seen = sum(self._lengths[index] for index in samples), 0
        for index in samples:
            middle = seen + self._lengths[index] / 2
            steps[int(middle / whole * self.steps)].append(index)
            seen += self._lengths[index]
        for step in steps:
            missing = max(0, self._passes - len(step))
            yield from self._shared([*step, *(samples[number % len(samples)] for number in range(missing))])

    def of_rank(self, rank: int, ranks: int) -> RankPasses:
        """Returns the passes that one rank takes."""
        return RankPasses(self, rank, ranks)

    def _shared(self, step: list[int]) -> list[list[int]]:
        passes: list[list[int]] = [[] for _ in range(self._passes)]
        lightest = [(0, number) for number in range(self._passes)]
        for index in sorted(step, key=lambda index: -self._lengths[index]):
            tokens, number = heapq.heappop(lightest)
            passes[number].append(index)
            heapq.heappush(lightest, (tokens + self._lengths[index], number))
        return passes


class RankPasses(Sampler[list[int]]):
    """Every `ranks`-th pass of TokenBatches."""

    def __init__(self, batches: TokenBatches, rank: int, ranks: int) -> None:
        self._batches, self._rank, self._ranks = batches, rank, ranks

    def __len__(self) -> int:
        return len(self._batches) // self._ranks

    def __iter__(self) -> Iterator[list[int]]:
        return islice(iter(self._batches), self._rank, None, self._ranks)
