"""Counting functions against brute force and hand-computed cases."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molae.arch import active_numbers, dense_flops, hit_probabilities, latent_flops
from molae.errors import ArgumentError

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def brute_force(sizes, K):
    """Share of all K-subsets of the experts that meet each group."""
    group = [g for g, k in enumerate(sizes) for _ in range(k)]
    draws = list(combinations(range(len(group)), K))
    met = [{group[e] for e in draw} for draw in draws]
    return [sum(g in m for m in met) / len(draws) for g in range(len(sizes))]


@given(SIZES, st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_hits_are_those_of_all_draws(sizes, data):
    K = data.draw(st.integers(1, min(sum(sizes), 6)))
    got = hit_probabilities(sizes, K)
    assert got == pytest.approx(brute_force(sizes, K), rel=1e-12)
    assert 1 - 1e-12 <= sum(got) <= min(K, len(sizes)) + 1e-12


def test_hits_by_hand():
    assert hit_probabilities([1] * 10, 3) == pytest.approx([0.3] * 10)
    assert hit_probabilities([7], 3) == (1.0,)
    assert hit_probabilities([3, 5], 8) == (1.0, 1.0)
    assert hit_probabilities([2, 2], 2) == pytest.approx([5 / 6, 5 / 6])
    # 512 experts: the binomials exceed any float.
    assert sum(hit_probabilities([256, 256], 200)) == pytest.approx(2)


def test_dense_layer():
    assert dense_flops(2, 3, 5) == 60


@given(SIZES, st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_active_numbers_are_those_of_all_draws(sizes, data):
    F, D = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    K = data.draw(st.integers(1, min(sum(sizes), 5)))
    ranks = [data.draw(st.none() | st.integers(0, D)) for _ in sizes]
    form = data.draw(st.sampled_from(["gauge", "plain"]))
    group = [g for g, k in enumerate(sizes) for _ in range(k)]
    total, draws = 0, list(combinations(range(len(group)), K))
    for draw in draws:
        for g in {group[e] for e in draw}:
            R = ranks[g]
            if R is not None:
                total += R * (D - R) if form == "gauge" else R * D
        for e in draw:
            R = ranks[group[e]]
            total += F * D if R is None else F * R
    wanted = total / len(draws)
    got = active_numbers(sizes, ranks, form=form, K=K, F=F, D=D)
    assert got == pytest.approx(wanted, rel=1e-12)
    flops = latent_flops(sizes, ranks, form=form, K=K, F=F, D=D)
    assert flops == pytest.approx(2 * wanted, rel=1e-12)


def test_all_left_dense_is_the_dense_layer():
    got = latent_flops([4, 4], [None, None], form="gauge", K=2, F=3, D=5)
    assert got == dense_flops(2, 3, 5)


def test_one_group_by_hand():
    # One group of all: always hit. 2 (R D + K F R) and 2 (R (D - R) + K F R).
    assert latent_flops([8], [4], form="plain", K=2, F=6, D=10) == 2 * (40 + 48)
    assert latent_flops([8], [4], form="gauge", K=2, F=6, D=10) == 2 * (24 + 48)
    assert latent_flops([8], [0], form="gauge", K=2, F=6, D=10) == 0


def test_a_plain_layer_of_full_rank_costs_more_than_the_dense_one():
    sizes, ranks = [8] * 8, [1024] * 8
    dense = dense_flops(8, 1024, 2048)
    assert latent_flops(sizes, ranks, form="plain", K=8, F=1024, D=2048) > 1.15 * dense
    assert latent_flops(sizes, ranks, form="gauge", K=8, F=1024, D=2048) < dense


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: hit_probabilities([2, 0], 1), "sizes: expected at least 1 expert"),
        (lambda: hit_probabilities([2], 3), "K: expected 1 to E=2, got 3"),
        (lambda: hit_probabilities([2], 0), "K: expected 1 to E=2, got 0"),
        (lambda: hit_probabilities([], 1), "K: expected 1 to E=0"),
        (lambda: active_numbers([2], [1], form="x", K=1, F=1, D=1), "form: expected 'gauge'"),
        (lambda: active_numbers([2], [], form="plain", K=1, F=1, D=1), "one for each of 1 groups"),
        (lambda: active_numbers([2], [2], form="plain", K=1, F=1, D=1), "0 to D=1, got 2"),
        (lambda: active_numbers([2], [-1], form="plain", K=1, F=1, D=1), "got -1"),
    ],
)
def test_arguments_that_make_no_sense(call, text):
    with pytest.raises(ArgumentError) as caught:
        call()
    assert text in str(caught.value)
