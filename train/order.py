"""The order of the samples: the same global batches whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch.utils.data import Sampler

from data.dataset import ConversationDataset


class EpochSampler(Protocol):
    """A sampler whose order depends on the epoch alone."""

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next iteration gives."""
        ...

    def __iter__(self) -> Iterator[int]: ...

    def __len__(self) -> int: ...


class ShuffledSampler(Sampler[int]):
    """A new random order of the samples of each epoch, from the seed alone."""

    def __init__(self, size: int, *, seed: int, data: ConversationDataset | None = None) -> None:
        self._size, self._seed, self._epoch, self._data = size, seed, 0, data

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next iteration gives."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        chosen = range(self._size) if self._data is None else self._data.epoch(generator)
        return iter([chosen[place] for place in torch.randperm(len(chosen), generator=generator)])


class WholeBatches(Sampler[int]):
    """An order whose last global batch is filled up with samples from the beginning of the same epoch.

    Ranks take their forward passes from it in turns, so every optimizer step has the same samples, and each forward
    pass the same ones, whatever the number of ranks; a short last batch would be shared out differently.
    """

    def __init__(self, order: EpochSampler, *, global_batch: int) -> None:
        if len(order) == 0:
            raise ValueError("order: got no sample, expected at least one")
        self._order, self._global_batch = order, global_batch
        self.steps = -(-len(order) // global_batch)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next iteration gives."""
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        return self.steps * self._global_batch

    def __iter__(self) -> Iterator[int]:
        samples: Sequence[int] = list(self._order)
        for index in range(len(self)):
            yield samples[index % len(samples)]
