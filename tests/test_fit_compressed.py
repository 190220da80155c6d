"""Embeddings of compressed experts fitted to a text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from moe_layers import layer
from ref import compressed as ref

import molae
from molae import fit, ops
from molae.errors import ArgumentError, NonFiniteError, ShapeError
from molae.fit import LayerInput, compressed_experts
from molae.ops import Projection

E, D, F, K = 5, 8, 6, 3
LATENT = {"ranks": (4, 6), "groups": (2, 3, 2)}
BIASED = {"bias": True, "activation": "swiglu_clamped", "alpha": 1.3, "limit": 0.9}


def problem(seed=0, N=400, dtype=np.float64, **options):
    """A text and the layer that reads it."""
    made = layer(seed, N, K, E, D, F, dtype=dtype, sentinels=0.05, **options)
    rng = np.random.default_rng(seed)
    index = np.argsort(rng.random((N, E)), axis=1)[:, :K]
    index[rng.random((N, K)) < 0.05] = E
    biases = tuple(made.biases.values()) if options.get("bias") else None
    given = LayerInput(
        made.x, index, np.sort(made.weights, axis=1)[:, ::-1].copy(), biases=biases, **made.act
    )
    return given, (made.gate, made.up, made.down)


def answer(given, experts, e=None, n=0):
    call, how = (given.x, given.index, given.weights, *experts), given.how(experts)
    if e is None:
        return ops.latent_experts_forward(*call, **how)
    return ops.compressed_experts_forward(*call, e, n, **how)


def error(given, experts, e, n, aim=None):
    aim = answer(given, experts) if aim is None else aim
    return np.linalg.norm(aim - answer(given, experts, e, n)) / np.linalg.norm(aim)


def holding(given, experts, n, ridge):
    """r_i by the definition."""
    energy = np.zeros(E)
    y = answer(given, experts, np.ones((E, 2 * D + F)), n)
    for t in range(len(y)):
        slots = [k for k in ref.split(given.weights[t], given.index[t], n)[1]
                 if given.index[t, k] < E]  # fmt: skip
        g = np.array([given.weights[t, k] for k in slots])
        for k, share in zip(slots, g / g.sum(), strict=True):
            energy[given.index[t, k]] += share**2 * (y[t] @ y[t])
    return ridge * energy / (2 * D + F)


@pytest.mark.parametrize("kind", [{}, BIASED])
@pytest.mark.parametrize("n", [1, 2])
def test_the_linear_part_is_the_least_squares_solution(n, kind, monkeypatch):
    monkeypatch.setattr(fit.compressed, "RESIDUAL", 1e-10)
    given, experts = problem(1, **kind)
    ridge, one = 0.05, np.ones((E, 2 * D + F))
    base = one.copy()
    base[:, D : D + F] = 0
    start = answer(given, experts, base, n)
    columns = []
    for i, f in np.ndindex(E, F):
        e = base.copy()
        e[i, D + f] = 1
        columns.append((answer(given, experts, e, n) - start).ravel())
    J = np.array(columns).T
    held = np.repeat(holding(given, experts, n, ridge), F)
    aim = (answer(given, experts) - start).ravel()
    want = np.linalg.solve(J.T @ J + np.diag(held), J.T @ aim + held)
    found = compressed_experts(given, experts, n, ridge=ridge, linear_steps=200, steps=0)
    assert found.residual < 1e-8
    np.testing.assert_allclose(found.embeddings[:, D : D + F].ravel(), want, rtol=0, atol=1e-7)
    assert (found.embeddings[:, :D] == 1).all()
    assert (found.embeddings[:, D + F :] == 1).all()
    assert np.abs(want - 1).max() > 0.05
    again = compressed_experts(given, experts, n, ridge=2 * ridge, linear_steps=200, steps=0)
    assert np.abs(again.embeddings[:, D : D + F].ravel() - want).max() > 1e-4


@pytest.mark.parametrize("kind", [{}, LATENT, {**LATENT, "form": "plain"}, LATENT | BIASED])
def test_errors_are_those_of_the_layer_and_fall(kind):
    given, experts = problem(2, **kind)
    found = compressed_experts(given, experts, 2)
    assert found.error[0] == pytest.approx(error(given, experts, np.ones((E, 2 * D + F)), 2))
    assert found.error[2] == pytest.approx(error(given, experts, found.embeddings, 2))
    assert found.error[2] < found.error[1] < found.error[0]


@drawn(
    seed=st.integers(0, 99),
    n=st.integers(1, 2),
    ridge=st.sampled_from([1e-4, 0.01, 1.0]),
    dtype=st.sampled_from([np.float32, np.float64]),
    kind=st.sampled_from([{}, BIASED]),
)
@settings(max_examples=15, deadline=None)
def test_the_objective_never_rises(seed, n, ridge, dtype, kind):
    given, experts = problem(seed, N=60, dtype=dtype, **LATENT, **kind)
    found = compressed_experts(given, experts, n, ridge=ridge, steps=5)
    assert (np.diff(found.objective) <= 0).all()
    assert np.isfinite(found.embeddings).all()


@pytest.mark.parametrize("kind", [{}, BIASED])
def test_vectors_that_were_planted_are_found(kind):
    given, experts = problem(3, N=2500, **kind)
    rng = np.random.default_rng(4)
    planted = 1 + 0.3 * rng.standard_normal((E, 2 * D + F))
    given = replace(given, answers=answer(given, experts, planted, 2))
    found = compressed_experts(given, experts, 2, ridge=1e-6, steps=60)
    assert found.error[0] > 0.15
    assert found.error[2] < 0.02 * found.error[0]


def test_what_nobody_compresses_stays():
    given, experts = problem(5)
    weights = given.weights.copy()
    weights[given.index == 2] = 9.0  # always runs
    found = compressed_experts(replace(given, weights=weights), experts, 1)
    assert (found.embeddings[2] == 1).all()
    assert np.abs(found.embeddings[[0, 1, 3, 4]] - 1).max() > 0.01


def test_lost_answers_and_a_teacher():
    given, experts = problem(6)
    lost = 0.1 * np.random.default_rng(1).standard_normal(given.x.shape)
    aim = answer(given, experts) + lost
    want = compressed_experts(replace(given, lost=lost), experts, 1)
    assert want.error[0] == pytest.approx(error(given, experts, np.ones((E, 2 * D + F)), 1, aim))
    known = replace(given, lost=lost, answers=answer(given, experts))
    other = problem(7)[1]
    found = compressed_experts(known, experts, 1, teacher=other)  # is not asked
    np.testing.assert_allclose(found.embeddings, want.embeddings, rtol=1e-9)
    asked = compressed_experts(given, other, 1, teacher=experts)
    assert asked.error[0] == pytest.approx(
        error(given, other, np.ones((E, 2 * D + F)), 1, answer(given, experts))
    )


def test_threads_do_not_show():
    given, experts = problem(8, N=2500, dtype=np.float32, **LATENT)
    found = []
    for threads in (1, 3):
        with molae.num_threads(threads):
            found.append(compressed_experts(given, experts, 2, steps=4).embeddings.tobytes())
    assert found[0] == found[1]


def test_what_makes_no_sense_is_refused():
    given, experts = problem()
    for n in (0, 3):
        with pytest.raises(ArgumentError, match=r"num_compressed: expected 1 to K - 1 = 2"):
            compressed_experts(given, experts, n)
    for options in ({"ridge": 0.0}, {"steps": -1}, {"linear_steps": -1}):
        with pytest.raises(ArgumentError, match="expected ridge > 0"):
            compressed_experts(given, experts, 1, **options)
    with pytest.raises(ShapeError, match="lost: expected the shape of x"):
        compressed_experts(replace(given, lost=given.x[1:]), experts, 1)
    x = given.x.copy()
    x[3, 1] = np.nan
    with pytest.raises(NonFiniteError, match="NaN or Inf in what the experts read"):
        compressed_experts(replace(given, x=x), experts, 1)
    assert isinstance(experts[0], Projection)
