"""The statistics of plots/study/study.py against known values, a plain reading of Holm, and simulation."""

import importlib.util

import numpy as np
import pytest
from random_models import ROOT

spec = importlib.util.spec_from_file_location("study", ROOT / "plots" / "study" / "study.py")
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)


@pytest.mark.parametrize("df, quantile", [(1, 12.7062), (2, 4.30265), (4, 2.77645), (30, 2.04227)])  # printed tables
def test_quantiles_of_t(df, quantile):
    assert study.t_quantile(df) == pytest.approx(quantile, rel=1e-4)
    assert study.t_p_value(quantile, df) == pytest.approx(0.05, rel=1e-3)


def test_holm_is_what_his_rule_says():
    """In the order of p: reject while p_(i) < 0.05 / (m - i), and nothing after the first that is not."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        p_values = {str(i): float(p) for i, p in enumerate(rng.beta(0.3, 3, size=6))}
        adjusted, rejected = study.holm(p_values), set()
        for place, name in enumerate(sorted(p_values, key=p_values.get)):
            if p_values[name] * (6 - place) >= 0.05:
                break
            rejected.add(name)
        assert {name for name, p in adjusted.items() if p < 0.05} == rejected


@pytest.mark.parametrize("n, comparisons", [(5, 1), (5, 32), (3, 1)])
def test_the_smallest_visible_difference_is_found_four_times_in_five(n, comparisons):
    rng = np.random.default_rng(n)
    seen = rng.standard_normal(n)
    true = study.smallest_difference(seen, comparisons) / np.std(seen, ddof=1)  # in standard deviations
    draws = true + rng.standard_normal((40_000, n))
    t = draws.mean(axis=1) / draws.std(axis=1, ddof=1) * np.sqrt(n)
    assert (np.abs(t) > study.t_quantile(n - 1, 0.05 / comparisons)).mean() == pytest.approx(0.8, abs=0.01)


def test_the_paired_test_looks_at_differences():
    assert study.paired_p_value([1.0, 1.0, 1.0]) == 0 and study.paired_p_value([0.0, 0.0]) == 1
    assert study.paired_p_value([1.0, 2.0, 3.0]) == pytest.approx(study.t_p_value(2 * 3**0.5, 2))


def test_welch_against_a_worked_example():
    """Two samples with the same mean do not differ; with equal sizes and spreads it is Student's t with 2 n - 2."""
    assert study.welch_p_value([1.0, 2.0, 3.0], [3.0, 1.0, 2.0]) == 1
    t = 2 / (2 / 3) ** 0.5
    assert study.welch_p_value([1.0, 2.0, 3.0], [3.0, 4.0, 5.0]) == pytest.approx(study.t_p_value(t, 4))
    # t = 5.00, df = 1.22: the second sample has a tenth of the first one's spread
    a, b = np.array([10.0, 12.0]), np.array([4.9, 5.1])
    df = (1 + 0.01) ** 2 / (1 + 0.0001)
    assert study.welch_p_value(a, b) == pytest.approx(study.t_p_value(6 / 1.01**0.5, df))
