"""How sure a score is, and whether two models differ on the same questions.

Questions about one image are not independent, so whole images are resampled (a cluster bootstrap). scipy's bootstrap
does not resample clusters, so the few lines are here; scipy is no dependency, so Student's t is integrated here too.
"""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 5000
_AT_ONCE = 4_000_000  # drawn numbers held in memory at a time
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """What the second of two models scores more than the first on the same questions."""

    mean: float  # of a question's value
    low: float  # ends of the 95 % interval of the mean
    high: float
    p: float  # two-sided, of "no difference"; not below least_p, of a bootstrap not below 1 / RESAMPLES
    gained: int | None  # questions on which the second is better; None where nothing pairs them
    lost: int | None  # questions on which the first is better


def standard_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float | None:
    """Returns the standard error of the mean of `values`, of which those of one cluster go together.

    None with fewer than two clusters: one has no spread.
    """
    numbers = np.asarray(values, dtype=np.float64)
    sums, _ = _by_cluster(numbers - numbers.mean(), clusters)
    groups = len(sums)
    return None if groups < 2 else float(np.sqrt(groups / (groups - 1) * np.square(sums).sum()) / len(numbers))


def difference(first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable]) -> Difference | None:
    """Returns how `second` differs from `first`, question by question, by a paired bootstrap over clusters.

    `first` and `second` hold a value for each question, `clusters` what it is about: questions about one thing go
    together. None with fewer than two clusters, of which nothing can be said.
    """
    if len(set(clusters)) < 2:
        return None
    changes = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    gained, lost = int((changes > 0).sum()), int((changes < 0).sum())
    if gained == lost == 0:
        return Difference(0.0, 0.0, 0.0, 1.0, 0, 0)
    means = _resampled(*_by_cluster(changes, clusters))
    low, high = np.quantile(means, [0.025, 0.975])
    tail = min(float((means <= 0).mean()), float((means >= 0).mean()))
    p = min(1.0, max(2 * tail, 1 / RESAMPLES, least_p(changes, clusters)))
    return Difference(float(changes.mean()), float(low), float(high), p, gained, lost)


def least_p(changes: Sequence[float] | Numbers, clusters: Sequence[Hashable]) -> float:
    """Returns the least two-sided p-value that changes in so few clusters can have: that of the sign test."""
    sums, _ = _by_cluster(np.asarray(changes, dtype=np.float64), clusters)
    return min(1.0, 2.0 ** (1 - int(np.count_nonzero(sums))))


def over_seeds(
    first: Sequence[float], second: Sequence[float], *, paired: bool, images: tuple[float, int] = (0.0, 2)
) -> tuple[float, float, float, float]:
    """Returns mean difference, the ends of its 95 % interval, and p, of scores over seeds, at least two of each.

    Student's t. Its squared error is that over seeds (of the differences where they are `paired`, the same seeds in the
    same order) plus that over images, which all seeds share; Satterthwaite's rule gives the degrees of freedom.
    `images` are the standard error of the mean difference over images, and their number.
    """
    parts = [(images[0] ** 2, images[1] - 1)]  # squared errors and their degrees of freedom
    samples = [[new - old for old, new in zip(first, second, strict=True)]] if paired else [first, second]
    parts += [(statistics.variance(scores) / len(scores), len(scores) - 1) for scores in samples]
    mean, error = statistics.fmean(second) - statistics.fmean(first), sum(part for part, _ in parts) ** 0.5
    freedom = error**4 / max(sum(part**2 / free for part, free in parts), 1e-300)
    if error == 0:
        return mean, mean, mean, 1.0 if mean == 0 else 0.0
    # with t = sqrt(f) tan(angle) the density of t is cos(angle) ** (f - 1), up to a factor
    angles = np.linspace(0.0, np.pi / 2, 100_001)
    density = np.cos(angles) ** (freedom - 1)
    within = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    within /= within[-1]
    half = error * freedom**0.5 * float(np.tan(np.interp(0.95, within, angles)))
    p = 1 - float(np.interp(np.arctan(abs(mean) / error / freedom**0.5), angles, within))
    return mean, mean - half, mean + half, p


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values corrected for their number by Holm's step-down rule, in the same order."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, p_values[place] * (len(p_values) - rank)))
        corrected[place] = largest
    return corrected


def _by_cluster(values: Numbers, clusters: Sequence[Hashable]) -> tuple[Numbers, Numbers]:
    """Returns each cluster's sum and its number of values."""
    names: dict[Hashable, int] = {}
    numbers = [names.setdefault(name, len(names)) for name in clusters]
    return np.bincount(numbers, weights=values).astype(np.float64), np.bincount(numbers).astype(np.float64)


def _resampled(sums: Numbers, sizes: Numbers) -> Numbers:
    """Returns the mean in each of RESAMPLES draws of as many clusters as there are, with replacement."""
    random, groups = np.random.default_rng(0), len(sums)
    rows = max(1, _AT_ONCE // groups)
    means = []
    for start in range(0, RESAMPLES, rows):
        drawn = random.integers(groups, size=(min(rows, RESAMPLES - start), groups))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(means)
