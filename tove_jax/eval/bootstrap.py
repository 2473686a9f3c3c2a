"""How sure a number is: bootstrap over held-out pictures, spread over runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean with its bootstrap error.

    Attributes:
      mean: of the sample itself.
      std: standard deviation of the resampled means.
      low, high: 2.5 and 97.5 percentiles of the resampled means (Efron's percentile interval).
    """

    mean: float
    std: float
    low: float
    high: float


def bootstrap_mean(values: np.ndarray, resamples: int, *, seed: int = 0) -> Interval:
    """Bootstraps the mean of independent values.

    Args:
      values: (n,) one value a picture; for an accuracy, 1 where the answer is right.
      resamples: samples of n pictures drawn with replacement.
      seed: of the draws.

    Returns:
      The interval; with no resamples it is the mean alone.
    """
    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    if not resamples:
        return Interval(mean, 0.0, mean, mean)
    generator = np.random.default_rng(seed)
    means = np.array([values[generator.integers(0, len(values), len(values))].mean() for _ in range(resamples)])
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(mean, float(means.std()), float(low), float(high))


def bootstrap_clusters(values: np.ndarray, clusters: np.ndarray, resamples: int, *, seed: int = 0) -> Interval:
    """Bootstraps the mean of values that belong together in clusters, such as questions about one picture.

    Args:
      values: (n,); NaN does not count.
      clusters: (n,) the cluster of each, any comparable kind.
      resamples: samples of whole clusters drawn with replacement, as many as there are.
      seed: of the draws.

    Returns:
      The interval; with no resamples, or nothing that counts, it is the mean alone (0 for nothing).
    """
    counted = ~np.isnan(np.asarray(values, np.float64))
    values = np.asarray(values, np.float64)[counted]
    if not len(values):
        return Interval(0.0, 0.0, 0.0, 0.0)
    _, number = np.unique(np.asarray(clusters)[counted], return_inverse=True)
    sums, counts = np.bincount(number, values), np.bincount(number)
    mean = float(values.mean())
    if not resamples:
        return Interval(mean, 0.0, mean, mean)
    generator = np.random.default_rng(seed)
    draws = (generator.integers(0, len(sums), len(sums)) for _ in range(resamples))
    means = np.array([sums[drawn].sum() / counts[drawn].sum() for drawn in draws])
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(mean, float(means.std()), float(low), float(high))


def paired_difference(first: np.ndarray, second: np.ndarray, resamples: int, *, seed: int = 0) -> Interval:
    """Bootstraps ``mean(first - second)`` of values on the same pictures.

    Pictures are resampled as pairs, so what makes a picture hard for both cancels.

    Args:
      first: (n,) one value a picture.
      second: (n,) of the same pictures in the same order.
      resamples: as in `bootstrap_mean`.
      seed: of the draws.

    Returns:
      The interval of the difference.
    """
    return bootstrap_mean(np.asarray(first, np.float64) - np.asarray(second, np.float64), resamples, seed=seed)


def over_runs(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Summarises the same metrics of several runs (seeds).

    Args:
      runs: flat metrics of each run.

    Returns:
      For every name that all runs have: ``{name}/mean`` and ``{name}/std`` (sample standard
      deviation, n - 1; 0 for a single run), and ``count``.
    """
    shared = set.intersection(*(set(run) for run in runs)) if runs else set()
    result: dict[str, float] = {"count": len(runs)}
    for name in sorted(shared):
        values = np.array([run[name] for run in runs], np.float64)
        result[f"{name}/mean"] = float(values.mean())
        result[f"{name}/std"] = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return result
