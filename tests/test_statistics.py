"""Intervals and tests against closed forms and exhaustive enumeration."""

import itertools
import math

import numpy as np
import pytest

from luthier.evals import statistics

Z = 1.959963984540054


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (1, 3), (134, 200), (5, 1000)])
def test_wilson_is_the_closed_form(k, n):
    p, scale = k / n, 1 + Z**2 / n
    centre = (p + Z**2 / (2 * n)) / scale
    half = Z / scale * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    found = statistics.wilson(k, n)
    assert found.value == p
    assert found.low == pytest.approx(centre - half, abs=1e-9)
    assert found.high == pytest.approx(centre + half, abs=1e-9)


def test_bootstrap_of_a_mean_nears_the_normal_interval():
    values = np.random.default_rng(0).normal(3, 2, 400)
    error = Z * values.std() / 20
    found = statistics.mean(values)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + error, abs=0.1 * error)
    assert found == statistics.mean(values)


def test_bootstrap_of_a_ratio_nears_the_delta_method():
    rng = np.random.default_rng(1)
    size = rng.integers(5, 50, 500).astype(float)
    total = size * 2.0 + rng.normal(0, 4, 500)
    value = total.sum() / size.sum()
    error = Z * math.sqrt(np.sum((total - value * size) ** 2)) / size.sum()
    found = statistics.ratio(total, size)
    assert found.value == pytest.approx(value)
    assert (found.high - found.low) / 2 == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize("values", [[0.25], [1.0, 1.0, 1.0]])
def test_a_mean_without_spread(values):
    found = statistics.mean(values)
    assert found.value == values[0]
    assert found.low <= found.value <= found.high


def test_permutation_test_is_all_sign_flips():
    differences = np.asarray([0.9, 0.1, -0.4, 0.7, 0.3, 0.0, 0.55, -0.05])
    flips = np.asarray(list(itertools.product([1, -1], repeat=8)))
    means = (flips * differences).mean(axis=1)
    expected = np.mean(np.abs(means) >= abs(differences.mean()) - 1e-12)
    before = np.linspace(0, 1, 8)
    found = statistics.paired_difference(before + differences, before)
    assert found.value == pytest.approx(differences.mean())
    assert found.p_value == pytest.approx(expected, abs=1e-9)
    assert found.low < found.value < found.high
