"""Where a budget goes: against every possible spending of small ones."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molae.arch import latent_flops
from molae.convert.budget import Curve, Flops, spend
from molae.errors import ArgumentError


def curve(seed, k, F, D, weight=1.0):
    s = np.sort(np.random.default_rng(seed).random(min(k * F, D)) ** 4)[::-1]
    return Curve.of(s, weight, k=k, F=F, D=D)


def test_a_curve_falls_to_nothing():
    c = Curve.of(np.array([3.0, 2.0, 1.0]), 2.0, k=1, F=3, D=5)
    assert c.lost.tolist() == [28.0, 10.0, 2.0, 0.0]
    assert [c.cost(rank) for rank in range(4)] == [0, 7, 12, 15]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(2, 4), st.floats(0.05, 1.0))
def test_spending_on_the_hulls_is_near_the_best(seed, count, D, share):
    rng = np.random.default_rng(seed)
    curves = [curve(seed + i, int(rng.integers(1, 3)), 3, D, rng.random()) for i in range(count)]
    least = sum(c.cost(1) for c in curves)
    most = sum(c.cost(len(c.lost) - 1) for c in curves)
    budget = least + share * (most - least)
    ranks = spend(curves, budget)
    assert all(1 <= rank < len(c.lost) for rank, c in zip(ranks, curves, strict=True))
    assert sum(c.cost(rank) for rank, c in zip(ranks, curves, strict=True)) <= budget

    def lost(some):
        return sum(c.lost[rank] for rank, c in zip(some, curves, strict=True))

    affordable = [
        some
        for some in itertools.product(*(range(1, len(c.lost)) for c in curves))
        if sum(c.cost(rank) for rank, c in zip(some, curves, strict=True)) <= budget
    ]
    best = min(lost(some) for some in affordable)
    # A greedy choice on hulls misses the best by less than one step of one curve.
    step = max(
        c.lost[a] - c.lost[b]
        for c in curves
        for a, b in itertools.pairwise([*c.corners(), c.corners()[-1]])
    )
    assert lost(ranks) <= best + step + 1e-12


def test_all_is_bought_where_all_can_be():
    curves = [curve(i, 2, 3, 5) for i in range(3)]
    assert spend(curves, 3 * 2 * 3 * 5) == (5, 5, 5)


def test_what_counts_more_gets_more():
    same = curve(1, 2, 8, 12)
    light, heavy = Curve(same.lost * 0.1, 2, 8, 12), Curve(same.lost * 10, 2, 8, 12)
    low, high = spend([light, heavy], 1.2 * same.cost(6))
    assert high > low


def test_corners_are_convex():
    c = Curve(np.array([10.0, 9.5, 9.0, 1.0, 0.5, 0.0]), 1, 5, 9)
    assert c.corners()[:2] == [1, 3]
    slopes = [
        (c.lost[a] - c.lost[b]) / (c.cost(b) - c.cost(a))
        for a, b in itertools.pairwise(c.corners())
    ]
    assert slopes == sorted(slopes, reverse=True)


def test_too_little_is_refused():
    with pytest.raises(ArgumentError, match="rank 1"):
        spend([curve(0, 2, 3, 5)], 9)


# ------------------------------------------------------------------------ a second budget


def test_operations_of_a_curve_are_the_plans():
    E, K, F, D = 8, 2, 6, 10
    curves = [curve(i, 2, F, D) for i in range(4)]
    for ranks in ((3, 3, 3, 3), (1, 2, 5, 9)):
        own = sum(c.flops(E, K)[rank] for c, rank in zip(curves, ranks, strict=True))
        whole = latent_flops([2] * 4, ranks, form="gauge", K=K, F=F, D=D)
        assert own == pytest.approx(whole)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 1.0), st.floats(0.2, 1.0))
def test_both_budgets_hold_and_little_is_lost(seed, size, work):
    E, K, F, D = 6, 2, 3, 4
    rng = np.random.default_rng(seed)
    curves = [curve(seed + i, 2, F, D, rng.random()) for i in range(3)]

    def taken(some):
        pairs = list(zip(curves, some, strict=True))
        return sum(c.cost(r) for c, r in pairs), sum(c.flops(E, K)[r] for c, r in pairs)

    def lost(some):
        return sum(c.lost[rank] for rank, c in zip(some, curves, strict=True))

    (low, least), (high, most) = taken((1, 1, 1)), taken([len(c.lost) - 1 for c in curves])
    numbers, operations = low + size * (high - low), least + work * (most - least)
    ranks = spend(curves, numbers, flops=Flops(operations, E, K))
    assert taken(ranks)[0] <= numbers
    assert taken(ranks)[1] <= operations
    affordable = [
        some
        for some in itertools.product(*(range(1, len(c.lost)) for c in curves))
        if taken(some)[0] <= numbers and taken(some)[1] <= operations
    ]
    best = min(lost(some) for some in affordable)
    step = max(c.lost[1] - c.lost[2] for c in curves) + max(c.lost[1] for c in curves) / 2
    assert lost(ranks) <= best + step
    alone = spend(curves, numbers)
    assert lost(alone) <= lost(ranks) + step


def test_a_second_budget_that_does_not_bind_changes_nothing():
    curves = [curve(i, 2, 6, 10) for i in range(4)]
    assert spend(curves, 150) == spend(curves, 150, flops=Flops(1e9, 8, 2))
    with pytest.raises(ArgumentError, match="flops: 1 operations a token"):
        spend(curves, 150, flops=Flops(1, 8, 2))
