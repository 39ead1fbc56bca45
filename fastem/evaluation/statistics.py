"""What a mean over images is worth: bootstrap intervals, and a test of paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: Sequence[float], *, level: float = 0.95, draws: int = 10_000, seed: int = 0) -> Interval:
    """The mean with its percentile bootstrap interval (Efron 1979): the images are drawn again with replacement.

    One value has no interval: its ends are nan. The same values give the same interval.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"a mean needs a list of one value or more, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("the values of a mean are finite")
    if len(x) == 1:
        return Interval(float(x[0]), float("nan"), float("nan"))
    rng, means = np.random.Generator(np.random.PCG64(seed)), []
    rows = max(1, 4_000_000 // len(x))  # of the draws at a time
    for start in range(0, draws, rows):
        means.append(x[rng.integers(0, len(x), (min(rows, draws - start), len(x)))].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(x.mean()), float(low), float(high))


class Paired(NamedTuple):
    """Differences a - b of the same cases."""

    count: int
    difference: Interval
    median: float
    better: int  # cases where a > b
    p: float  # two-sided, Wilcoxon signed-rank; nan where all differences are 0


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Whether two methods differ on the same cases (Wilcoxon 1945).

    Raises:
        ImportError: without scipy (`pip install fastem[eval]`).
    """
    from scipy.stats import wilcoxon

    x = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    p = float(wilcoxon(x).pvalue) if x.any() else float("nan")
    return Paired(len(x), bootstrap_mean(x), float(np.median(x)), int((x > 0).sum()), p)
