"""The laws of the order: every index once, one modality and like lengths a batch, from seed and epoch alone."""

import random

import pytest
import torch

from data.dataset import LengthModalitySampler


def sampler(images=100, texts=37, batch=8, seed=0):
    has_image = [True] * images + [False] * texts
    random.Random(1).shuffle(has_image)
    lengths = [100 + (index * 37) % 91 for index in range(images + texts)]
    return LengthModalitySampler(lengths, has_image, batch_size=batch, seed=seed)


def batches(chosen):
    order = list(chosen)
    return [order[start : start + chosen.batch_size] for start in range(0, len(order), chosen.batch_size)]


SIZES = [(100, 37), (0, 5), (64, 0), (3, 4), (5000, 1601), (1, 0), (0, 0)]


@pytest.mark.parametrize(("images", "texts"), SIZES)
@pytest.mark.parametrize("batch", [1, 8, 1000])
def test_every_index_comes_once_an_epoch(images, texts, batch):
    chosen = sampler(images, texts, batch)
    for epoch in (0, 1):
        chosen.set_epoch(epoch)
        assert sorted(chosen) == list(range(len(chosen))) == list(range(images + texts))


@pytest.mark.parametrize(("images", "texts"), SIZES)
def test_as_many_batches_as_can_be_are_of_one_modality(images, texts):
    chosen = sampler(images, texts)
    mixed = [batch for batch in batches(chosen) if len({chosen.has_image[index] for index in batch}) > 1]
    assert len(mixed) <= 1
    whole = images // 8 + texts // 8
    assert all(len({chosen.has_image[index] for index in batch}) == 1 for batch in batches(chosen)[:whole])


def test_batches_hold_like_lengths():
    chosen = sampler(4000, 1600)
    spread = [
        max(map(chosen.lengths.__getitem__, batch)) - min(map(chosen.lengths.__getitem__, batch))
        for batch in batches(chosen)
    ]
    assert sum(spread) / len(spread) < 5  # of 91


def test_the_order_of_batches_does_not_follow_length_or_modality():
    chosen = sampler(4000, 4000)
    firsts = [batch[0] for batch in batches(chosen)]
    for values in ([chosen.lengths[index] for index in firsts], [chosen.has_image[index] for index in firsts]):
        pairs = torch.tensor([values[:-1], values[1:]], dtype=torch.float64)
        assert abs(torch.corrcoef(pairs)[0, 1]) < 0.15


def test_the_order_follows_seed_and_epoch_alone():
    first, again, other = sampler(), sampler(), sampler(seed=1)
    torch.manual_seed(3)
    order = list(first)
    torch.manual_seed(4)
    assert order == list(first) == list(again)
    assert order != list(other)
    again.set_epoch(1)
    epoch = list(again)
    assert order != epoch
    again.set_epoch(0)
    assert order == list(again)
    first.set_epoch(1)
    assert epoch == list(first)


def test_has_image_may_be_any_truth():
    chosen = LengthModalitySampler([5, 6, 7], torch.tensor([1, 0, 1]).numpy(), batch_size=2, seed=0)
    assert sorted(chosen) == [0, 1, 2]
