"""How sure a measured number is: intervals of means and proportions, tests of paired differences."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.stats
from jaxtyping import Float

RESAMPLES = 9999


@dataclasses.dataclass(frozen=True)
class Interval:
    """A point estimate and the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Difference(Interval):
    """A mean paired difference, its interval, and the two-sided p-value of "no difference"."""

    p_value: float


def wilson(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927).

    (p̂ + z²/2n ± z √(p̂(1−p̂)/n + z²/4n²)) / (1 + z²/n); never empty at 0 or n successes.
    """
    ends = scipy.stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return Interval(successes / n, float(ends.low), float(ends.high))


def mean(values: Sequence[float] | Float[np.ndarray, " n"], *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """The mean and its percentile-bootstrap interval (Efron 1979) over resampled records."""
    return ratio(values, np.ones(len(values)), confidence=confidence, seed=seed)


def of_scores(scores: Sequence[float], *, seed: int = 0) -> tuple[bool, Interval]:
    """Whether all scores are 0 or 1, and the mean: then with Wilson's interval, else with `mean`'s."""
    share = set(scores) <= {0.0, 1.0}
    return share, wilson(int(sum(scores)), len(scores)) if share else mean(scores, seed=seed)


def ratio(
    numerators: Sequence[float] | Float[np.ndarray, " n"],
    denominators: Sequence[float] | Float[np.ndarray, " n"],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Σ numerators / Σ denominators, with a percentile bootstrap over records.

    Loss a token, for one: a record counts by its tokens, and is drawn whole.
    """
    pairs = np.asarray(numerators, float), np.asarray(denominators, float)
    value = float(pairs[0].sum() / pairs[1].sum())
    if len(pairs[0]) < 2:
        return Interval(value, float("-inf"), float("inf"))
    ends = scipy.stats.bootstrap(
        pairs,
        lambda a, b, axis=-1: a.sum(axis=axis) / b.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=999,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(ends.low), float(ends.high))


def paired_difference(
    after: Sequence[float], before: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Difference:
    """Mean of after − before on the same records.

    The interval is a percentile bootstrap over records; the p-value comes from flipping the signs
    of the differences (Fisher's randomisation test), exactly where there are few records.
    """
    differences = np.asarray(after, float) - np.asarray(before, float)
    estimate = mean(differences, confidence=confidence, seed=seed)
    test = scipy.stats.permutation_test(
        (differences,),
        lambda d, axis=-1: d.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=999,
        rng=np.random.default_rng(seed),
    )
    return Difference(estimate.value, estimate.low, estimate.high, float(test.pvalue))
