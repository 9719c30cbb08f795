"""Groups that inner activations show, and whether two sets of samples can be told apart: against planted truth."""

from __future__ import annotations

import numpy as np
import pytest

from spray.isolation.subgroups import subgroups
from spray.isolation.two_samples import FEWEST, told_apart

D = 40


def samples(n: int, seed: int) -> np.ndarray:
    """Correlated features with heavy tails, as activations have."""
    rng = np.random.default_rng(seed)
    return rng.gamma(2.0, size=(n, 12)) @ np.random.default_rng(0).normal(size=(12, D)) + rng.normal(size=(n, D))


@pytest.mark.parametrize(
    ("first", "second"), [((150, 1), (400, 2)), ((60, 3), (60, 4)), ((40, 5), (300, 6)), ((8, 7), (90, 8))]
)
def test_samples_of_one_kind_are_not_told_apart(first: tuple[int, int], second: tuple[int, int]) -> None:
    """Independent draws: the mean over seeds of the folds is that of chance."""
    (n, a), (m, b) = first, second
    areas = [told_apart(samples(n, 10 * a + s), samples(m, 10 * b + s), s) for s in range(8)]
    assert np.mean(areas) == pytest.approx(0.5, abs=0.06 if n > 10 else 0.12)


def test_rounding_of_what_is_always_the_same_tells_nothing() -> None:
    """A yellow of 0.1 blue is 0.09998 in half precision; one that is off by a hundredth is another yellow."""
    x, y = samples(60, 1), samples(80, 2)
    for blue, expected in ((float(np.float16(0.1)), False), (0.11, True)):
        one, other = (np.column_stack([rows, np.full(len(rows), b)]) for rows, b in ((x, 0.1), (y, blue)))
        assert (told_apart(one, other, 0) > 0.8) is expected


def test_a_shift_and_a_spread_are_told_apart() -> None:
    x, y = samples(120, 1), samples(300, 2)
    shifted, wider = y.copy(), y.copy()
    shifted[:, :5] += 2 * y[:, :5].std(axis=0)
    wider = (y - y.mean(axis=0)) * 2 + y.mean(axis=0)
    assert told_apart(x, shifted, 0) > 0.95
    assert told_apart(x, wider, 0) > 0.9
    assert told_apart(shifted[:120], x, 0) == pytest.approx(told_apart(x, shifted[:120], 0), abs=0.05)


def test_what_undoes_the_difference_leaves_nothing_to_tell() -> None:
    """A cluster that is the rest plus something; and one of another kind, whose mean alone is made the same."""
    step = np.zeros(D)
    step[:6] = 6
    cluster, rest = samples(100, 1) + step, samples(300, 2)
    assert told_apart(cluster, rest, 0) > 0.99
    assert told_apart(cluster, rest + step, 0) < 0.62
    kind = samples(100, 3) * np.linspace(0.2, 3, D) + step
    assert told_apart(kind, rest + kind.mean(axis=0) - rest.mean(axis=0), 0) > 0.9


def test_too_few_samples_say_nothing() -> None:
    assert told_apart(samples(FEWEST - 1, 0), samples(100, 1) + 9, 0) == 0.5
    assert told_apart(samples(FEWEST, 0), samples(100, 1) + 9, 0) > 0.95


def test_the_group_with_something_of_its_own_comes_first() -> None:
    """A natural kind, twice as large a difference, is in other classes as well; what was planted is not."""
    own, others = samples(400, 1), samples(600, 2)
    planted, natural = np.zeros(400, dtype=bool), np.zeros(400, dtype=bool)
    planted[:60], natural[40:160] = True, True
    directions = np.random.default_rng(3).normal(size=(2, D))
    own[planted] += 3 * directions[0]
    own[natural] += 6 * directions[1]
    others[:200] += 6 * directions[1]
    found = subgroups(own, others, 0, 2)
    assert found
    first = found[0]
    assert (first & planted).sum() / first.sum() > 0.9
    assert (first & planted).sum() / planted.sum() > 0.8
    again = subgroups(own, others, 0, 2)
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))


def test_a_small_group_is_found_among_many_kinds_and_no_group_twice() -> None:
    """With more kinds than the fewest components have room for."""
    rng = np.random.default_rng(5)
    kinds = 5 * rng.normal(size=(30, 200))
    own, others = (rng.normal(size=(n, 200)) + kinds[rng.integers(0, 30, n)] for n in (400, 600))
    planted = np.arange(400) < 30
    own[planted] += 5 * rng.normal(size=200)
    found = subgroups(own, others, 0, 4)
    shares = [(member & planted).sum() / (member | planted).sum() for member in found]
    assert max(shares, default=0.0) > 0.8
    for i, one in enumerate(found):
        assert all((one & other).sum() < 0.5 * (one | other).sum() for other in found[:i])


def test_where_nothing_stands_out_there_are_no_groups() -> None:
    assert subgroups(samples(400, 1), samples(600, 2), 0, 2) == []
    assert subgroups(samples(400, 1), samples(600, 2), 0, 0) == []
    assert subgroups(samples(10, 1), samples(600, 2), 0, 2) == []
    assert subgroups(np.ones((100, D)), np.ones((200, D)), 0, 2) == []
