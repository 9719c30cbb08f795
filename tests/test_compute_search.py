"""Finding the samples that end processes, against what is planted; the number of processes that it costs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spray.pipelines.compute.dask_search import Search


def search(start: int, stop: int, is_deadly) -> tuple[list[int], int, int]:
    """Return what is found, and how many probes and deaths it took."""
    looking, probes, deaths = Search.of(start, stop), 0, 0
    while (part := looking.next()) is not None:
        assert start <= part[0] < part[1] <= stop
        probes += 1
        assert probes < 10 * (stop - start) + 10
        if is_deadly(set(range(*part))):
            deaths += 1
            looking.died()
        else:
            looking.survived()
    return looking.culprits, probes, deaths


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_exactly_those_that_are_planted_are_found(data):
    start = data.draw(st.integers(0, 1000))
    size = data.draw(st.integers(1, 200))
    planted = data.draw(st.sets(st.integers(start, start + size - 1), min_size=1, max_size=4))
    found, _, _ = search(start, start + size, lambda part: bool(part & planted))
    assert found == sorted(planted)


@pytest.mark.parametrize("size", [1, 2, 3, 64, 512])
def test_one_among_many_costs_a_process_for_each_halving(size):
    for bad in {0, size // 2, size - 1}:
        found, probes, deaths = search(0, size, lambda part, bad=bad: bad in part)
        assert found == [bad]
        assert deaths <= math.ceil(math.log2(size)) + 1
        # Where the first half dies the second is looked at too: there may be more than one.
        assert probes <= 2 * math.ceil(math.log2(size)) + 1


def test_nobody_is_blamed_for_what_only_many_do_together():
    """As where memory runs out: halves are fine."""
    found, _, deaths = search(0, 64, lambda part: len(part) >= 40)
    assert (found, deaths) == ([], 0)
    assert search(0, 64, lambda part: len(part) >= 20)[0] == []


def test_nobody_is_blamed_for_what_does_not_come_again():
    assert search(0, 64, lambda part: False)[:1] == ([],)
