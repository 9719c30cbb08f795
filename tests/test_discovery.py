"""False discovery rates against the step-up procedures written as they are defined, and against simulations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from spray.analysis.discovery import CORRECTIONS, q_values, simes

p_values = st.lists(st.floats(0, 1), min_size=1, max_size=30)


def rejected(p: list[float], level: float, correction: str) -> set[int]:
    """The step-up procedure: the largest k with p_(k) <= level k / (m c), and the k smallest p-values are rejected."""
    m = len(p)
    c = sum(1 / i for i in range(1, m + 1)) if correction == "benjamini_yekutieli" else 1
    order = sorted(range(m), key=lambda i: p[i])
    k = max((j for j in range(1, m + 1) if p[order[j - 1]] <= level * j / (m * c)), default=0)
    return {i for i in range(m) if k and p[i] <= p[order[k - 1]]}


@pytest.mark.parametrize("correction", CORRECTIONS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(p=p_values, level=st.sampled_from([0.011, 0.053, 0.21]))
def test_q_values_call_what_the_step_up_procedure_rejects(correction: str, p: list[float], level: float) -> None:
    q = q_values(p, correction)
    assert {int(i) for i in np.flatnonzero(q <= level)} == rejected(p, level, correction)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(p=p_values)
def test_q_values_are_scipys(p: list[float]) -> None:
    for correction, method in zip(CORRECTIONS, ("bh", "by"), strict=True):
        np.testing.assert_allclose(q_values(p, correction), false_discovery_control(p, method=method), rtol=1e-9)


def test_known_numbers_and_any_order() -> None:
    np.testing.assert_allclose(q_values([0.01, 0.04, 0.03]), [0.03, 0.04, 0.04])
    np.testing.assert_allclose(q_values([0.2, 0.2]), [0.2, 0.2])
    assert q_values([]).shape == (0,)


def test_simes_holds_for_the_smallest_of_many() -> None:
    rng = np.random.default_rng(0)
    smallest = [simes(rng.uniform(size=12)).min() for _ in range(2000)]
    # Simes' test is exact for independent tests.
    assert 0.035 < np.mean(np.array(smallest) <= 0.05) < 0.065


@pytest.mark.parametrize("p", [[-0.1], [1.1], [float("nan")]])
def test_refuses_what_is_no_p_value(p: list[float]) -> None:
    with pytest.raises(ValueError, match="p-values"):
        q_values(p)
    with pytest.raises(ValueError, match="none of"):
        q_values([0.5], "bonferroni")
