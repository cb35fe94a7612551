"""How sure a score is, and whether two models differ on the same questions.

Questions about one image are not independent, so whole images are resampled (a cluster bootstrap). scipy's bootstrap
does not resample clusters, so the few lines are here.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
_AT_ONCE = 4_000_000  # drawn numbers held in memory at a time
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """What the second of two models scores more than the first on the same questions.

    Attributes:
        mean: mean difference of a question's value.
        low: lower end of its 95 % interval.
        high: upper end.
        p: two-sided p-value of "no difference", not below 1 / RESAMPLES.
        gained: questions on which the second is better.
        lost: questions on which the first is better.
    """

    mean: float
    low: float
    high: float
    p: float
    gained: int
    lost: int


def standard_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float | None:
    """Returns the standard error of the mean of `values`, of which those of one cluster go together.

    None with fewer than two clusters.
    """
    numbers = np.asarray(values, dtype=np.float64)
    sums, _ = _by_cluster(numbers - numbers.mean(), clusters)
    groups = len(sums)
    if groups < 2:  # one cluster has no spread
        return None
    return float(np.sqrt(groups / (groups - 1) * np.square(sums).sum()) / len(numbers))


def difference(first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable]) -> Difference:
    """Returns how `second` differs from `first`, question by question, by a paired bootstrap over clusters.

    Args:
        first: a value for each question, of the model to compare with.
        second: the same questions' values, of the other.
        clusters: what each question is about; questions with the same go together.
    """
    changes = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    gained, lost = int((changes > 0).sum()), int((changes < 0).sum())
    if gained == lost == 0:
        return Difference(0.0, 0.0, 0.0, 1.0, 0, 0)
    means = _resampled(*_by_cluster(changes, clusters))
    low, high = np.quantile(means, [0.025, 0.975])
    tail = min(float((means <= 0).mean()), float((means >= 0).mean()))
    p = min(1.0, max(2 * tail, 1 / RESAMPLES))
    return Difference(float(changes.mean()), float(low), float(high), p, gained, lost)


def _by_cluster(values: Numbers, clusters: Sequence[Hashable]) -> tuple[Numbers, Numbers]:
    """Returns each cluster's sum and its number of values."""
    names: dict[Hashable, int] = {}
    numbers = [names.setdefault(name, len(names)) for name in clusters]
    sums, sizes = np.zeros(len(names)), np.zeros(len(names))
    np.add.at(sums, numbers, values)
    np.add.at(sizes, numbers, 1.0)
    return sums, sizes


def _resampled(sums: Numbers, sizes: Numbers) -> Numbers:
    """Returns the mean in each of RESAMPLES draws of as many clusters as there are, with replacement."""
    random, groups = np.random.default_rng(0), len(sums)
    rows = max(1, _AT_ONCE // groups)
    means = []
    for start in range(0, RESAMPLES, rows):
        drawn = random.integers(groups, size=(min(rows, RESAMPLES - start), groups))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(means)
