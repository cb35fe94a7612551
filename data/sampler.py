"""The order of an epoch: batches of like length, with images or without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Generator
from torch.utils.data import Sampler

_POOL = 50  # batches whose samples are sorted by length together: like lengths, and still a random mix


class LengthModalitySampler(Sampler[int]):
    """Yields every index once an epoch, so that each run of `batch_size` is of one modality and of like length.

    The order follows from the seed and the epoch alone: it is the same on every rank, and a resumed run skips to
    its place in it. What is left over of either modality stands at the end of the epoch.

    Args:
        lengths: tokens of each sample.
        has_image: whether each sample has an image.
        batch_size: samples of one optimizer step over all ranks.
        seed: seed of the order.

    Source: LLaVA's group_by_modality_length; there the left-overs of both modalities share a batch too.
    """

    def __init__(self, lengths: Sequence[int], has_image: Sequence[bool], *, batch_size: int, seed: int) -> None:
        self.lengths, self.has_image = lengths, has_image
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of another epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """Yields the indices of this epoch."""
        random = Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        whole: list[list[int]] = []
        rest: list[int] = []
        for modality in (True, False):
            members = [index for index, image in enumerate(self.has_image) if bool(image) is modality]
            batches = self._batches([members[place] for place in torch.randperm(len(members), generator=random)])
            whole += [batch for batch in batches if len(batch) == self.batch_size]
            rest += [index for batch in batches if len(batch) < self.batch_size for index in batch]
        for place in torch.randperm(len(whole), generator=random).tolist():
            yield from whole[place]
        yield from rest

    def _batches(self, members: list[int]) -> list[list[int]]:
        pool = self.batch_size * _POOL
        ordered: list[int] = []
        for start in range(0, len(members), pool):
            ordered += sorted(members[start : start + pool], key=lambda index: -self.lengths[index])
        return [ordered[start : start + self.batch_size] for start in range(0, len(ordered), self.batch_size)]
