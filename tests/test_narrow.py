"""Narrow experts: what they compute, and how they are fitted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st
from ref import compressed as ref
from ref import ops as ref_ops
from test_fit_compressed import BIASED, LATENT, D, E, F, K, answer, problem

import molae
from molae import ops
from molae.errors import ArgumentError, NonFiniteError, ShapeError
from molae.fit import descent, narrow, narrow_experts
from molae.ops import NarrowExperts, Projection, narrow_experts_forward, split_slots

M = 3
BIASES = ("gate_bias", "up_bias")


def some_narrow(rng, m=M, dtype=np.float64, *, biased=False):
    shapes = [(E, m, D), (E, m, D), (E, D, m), (E, D), *[(E, m)] * (2 * biased)]
    return NarrowExperts(*(rng.standard_normal(s).astype(dtype) for s in shapes))


def hidden(given, n, e, x):
    """Of one narrow expert and one token, in plain NumPy."""
    gate, up = n.gate[e] @ x, n.up[e] @ x
    if n.gate_bias is not None:
        gate, up = gate + n.gate_bias[e], up + n.up_bias[e]
    return ref_ops.activate(given.activation, gate, up, given.alpha, given.limit)


def by_hand(given, aux, n):
    """Row by row."""
    y = np.zeros_like(given.x)
    for t, k in np.argwhere(aux < E):
        e, g = aux[t, k], given.weights[t, k]
        y[t] += g * (n.down[e] @ hidden(given, n, e, given.x[t]) + n.bias[e])
    return y


# ------------------------------------------------------------------------------- slots


@drawn(st.integers(0, 9), st.integers(0, K - 1), st.sampled_from([np.float32, np.float64]))
def test_slots_are_told_apart_as_the_definition_says(seed, n, dtype):
    rng = np.random.default_rng(seed)
    index = rng.integers(0, E + 1, (20, K))
    weights = rng.integers(0, 3, (20, K)).astype(dtype)  # many equal ones
    main, aux = split_slots(index, weights, E, n)
    for t in range(20):
        last = ref.split(weights[t], index[t], n)[1]
        for k in range(K):
            assert (main[t, k], aux[t, k]) == ((E, index[t, k]) if k in last else (index[t, k], E))


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"n": K}, ArgumentError, "num_compressed: expected 0 to K - 1"),
        ({"n": -1}, ArgumentError, "num_compressed: expected 0 to K - 1"),
        ({"index": np.full((4, K), E + 1)}, ArgumentError, "0 to E"),
        ({"index": np.zeros((5, K), int)}, ShapeError, "top_k_weights"),
        ({"weights": np.zeros((4, K), int)}, ArgumentError, "top_k_weights"),
    ],
)
def test_slots_that_make_no_sense_are_refused(wrong, error, text):
    call = {"index": np.zeros((4, K), int), "weights": np.ones((4, K)), "n": 1, **wrong}
    with pytest.raises(error, match=text):
        split_slots(call["index"], call["weights"], E, call["n"])


# ------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("m", [0, 1, M])
@pytest.mark.parametrize("options", [{}, LATENT, LATENT | BIASED])
def test_the_answer_is_that_of_both_halves(options, m):
    given, experts = problem(3, 60, **options)
    rest = some_narrow(np.random.default_rng(1), m, biased="bias" in options and m > 0)
    call, how = (given.x, given.index, given.weights, *experts), given.how(experts)
    main, aux = split_slots(given.index, given.weights, E, 2)
    want = ops.latent_experts_forward(given.x, main, given.weights, *experts, **how)
    want += by_hand(given, aux, rest)
    np.testing.assert_allclose(narrow_experts_forward(*call, rest, 2, **how), want, atol=1e-12)
    assert np.array_equal(narrow_experts_forward(*call, rest, 0, **how), answer(given, experts))


def test_arrays_that_do_not_belong_together_are_refused():
    good = some_narrow(np.random.default_rng(0))
    for name in ("gate", "up", "down", "bias"):
        with pytest.raises(ShapeError, match=f"{'up' if name == 'gate' else name}: expected"):
            replace(good, **{name: getattr(good, name)[:, :2]})
    again = NarrowExperts.of(good.arrays)
    assert all(np.array_equal(again.arrays[k], v) for k, v in good.arrays.items())
    assert (good.num_experts, good.units, good.numbers) == (E, M, E * D * (3 * M + 1))
    bare = NarrowExperts.of({"bias": good.bias})
    assert (bare.units, list(bare.arrays)) == (0, ["bias"])
    biased = some_narrow(np.random.default_rng(0), biased=True)
    again = NarrowExperts.of(biased.arrays)
    assert all(np.array_equal(again.arrays[k], v) for k, v in biased.arrays.items())
    assert (len(again.arrays), biased.numbers) == (6, good.numbers + 2 * E * M)
    with pytest.raises(ShapeError, match="up_bias: expected"):
        replace(biased, up_bias=biased.up_bias[:, 1:])
    with pytest.raises(ShapeError, match="gate_bias, up_bias: expected both or neither"):
        replace(biased, up_bias=None)


# ------------------------------------------------------------------------------- fit


def errors_of(given, experts, found, n):
    aim = answer(given, experts)
    call = given.x, given.index, given.weights, *experts
    y = narrow_experts_forward(*call, found, n, **given.how(experts))
    return np.linalg.norm(aim - y) / np.linalg.norm(aim)


@pytest.mark.parametrize("m", [0, M])
@pytest.mark.parametrize("options", [{}, LATENT, LATENT | BIASED])
def test_the_linear_part_is_the_least_squares_solution(options, m, monkeypatch):
    monkeypatch.setattr(narrow, "RESIDUAL", 1e-12)
    monkeypatch.setattr(descent, "HELD_OUT", 10**9)
    given, experts = problem(1, 300, **options)
    ridge, n = 0.05, 2
    found = narrow_experts(given, experts, n, m, ridge=ridge, linear_steps=300, epochs=0)
    assert found.residual < 1e-8
    begun = narrow_experts(given, experts, n, m, linear_steps=0, epochs=0).experts
    assert np.array_equal(begun.bias, given.biases[2] if given.biases else np.zeros((E, D)))
    main, aux = split_slots(given.index, given.weights, E, n)
    rest = answer(given, experts) - ops.latent_experts_forward(
        given.x, main, given.weights, *experts, **given.how(experts)
    )
    features = np.zeros((300, E, m + 1))  # what each expert's V = [down | bias] is multiplied with
    for t, k in np.argwhere(aux < E):
        e = aux[t, k]
        h = [*hidden(given, begun, e, given.x[t]), 1.0]
        features[t, e] += given.weights[t, k] * np.array(h)
    hold = []
    for e in range(E):
        trace = 0.0
        for t, k in np.argwhere(aux == e):
            h = np.array([*hidden(given, begun, e, given.x[t]), 1.0])
            trace += given.weights[t, k] ** 2 * (h @ h)
        hold += [ridge * trace / (m + 1)] * (m + 1)
    A = features.reshape(300, -1)
    start = np.concatenate([begun.down, begun.bias[:, :, None]], 2).transpose(0, 2, 1)
    start = start.reshape(-1, D)
    V = np.linalg.solve(A.T @ A + np.diag(hold), A.T @ rest + np.array(hold)[:, None] * start)
    V = V.reshape(E, m + 1, D).transpose(0, 2, 1)
    np.testing.assert_allclose(found.experts.down, V[:, :, :-1], atol=1e-6)
    np.testing.assert_allclose(found.experts.bias, V[:, :, -1], atol=1e-6)


@pytest.mark.parametrize("options", [{}, BIASED])
def test_it_begins_with_the_units_that_matter_most(options):
    given, (gate, up, down) = problem(5, **options)
    wide = [np.empty((E, *p.private[0].shape[1:])) for p in (gate, up, down)]
    for own, p in zip(wide, (gate, up, down), strict=True):
        own[list(p.groups[0])] = p.private[0]
    wide[2][:, :, [1, 4]] *= 30
    experts = tuple(Projection.dense(own) for own in wide)
    found = narrow_experts(given, experts, 1, 2, linear_steps=0, epochs=0).experts
    assert np.array_equal(found.gate, wide[0][:, [1, 4]])
    assert np.array_equal(found.up, wide[1][:, [1, 4]])
    assert np.array_equal(found.down, wide[2][:, :, [1, 4]])
    if options:
        assert np.array_equal(found.gate_bias, given.biases[0][:, [1, 4]])
        assert np.array_equal(found.up_bias, given.biases[1][:, [1, 4]])
        assert np.array_equal(found.bias, given.biases[2])


@pytest.mark.parametrize("options", [{}, BIASED])
def test_with_all_units_it_begins_as_the_experts(options):
    given, experts = problem(5, **options)
    found = narrow_experts(given, experts, 2, F, linear_steps=0, epochs=0)
    assert found.error[0] > 0.1
    assert found.error[1] < 1e-12


def test_narrow_experts_that_were_planted_are_found():
    given, experts = problem(7, 2000)
    rng = np.random.default_rng(2)
    planted = some_narrow(rng)
    call = given.x, given.index, given.weights, *experts
    aim = narrow_experts_forward(*call, planted, 2)
    found = narrow_experts(replace(given, answers=aim), experts, 2, M, epochs=150, rate=0.05)
    start, linear, end = found.error
    assert end < 0.4 * linear < 0.4 * start


def test_biases_that_were_planted_are_found():
    given, experts = problem(7, 2000, **BIASED)
    begun = narrow_experts(given, experts, 2, M, linear_steps=0, epochs=0).experts
    rng = np.random.default_rng(2)
    moved = {name: begun.arrays[name] + rng.standard_normal((E, M)) for name in BIASES}
    call = given.x, given.index, given.weights, *experts
    aim = narrow_experts_forward(*call, replace(begun, **moved), 2, **given.how(experts))
    found = narrow_experts(replace(given, answers=aim), experts, 2, M, epochs=150, rate=0.05)
    start, linear, end = found.error
    assert end < 0.2 * linear < 0.2 * start
    assert all((found.experts.arrays[name] != begun.arrays[name]).all() for name in BIASES)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("options", [{}, LATENT, LATENT | BIASED])
def test_each_part_comes_closer(options, n):
    given, experts = problem(2, 1500, **options)
    found = narrow_experts(given, experts, n, M, epochs=30)
    start, linear, end = found.error
    assert end < linear < start
    assert end == pytest.approx(errors_of(given, experts, found.experts, n), rel=1e-9)
    bias = narrow_experts(given, experts, n, 0)
    assert end < bias.error[2] <= bias.error[0]


def test_what_earlier_layers_lost_is_made_up_for():
    given, experts = problem(4)
    lost = np.broadcast_to(np.linspace(1, 2, D), given.x.shape).copy()
    found = narrow_experts(replace(given, lost=lost), experts, 1, 0).experts
    assert narrow_experts(given, experts, 1, 0).experts.bias.mean() < 0.5 < found.bias.mean()


def test_a_descent_that_leads_astray_is_not_taken():
    given, experts = problem(6)
    calm = narrow_experts(given, experts, 2, M, epochs=0)
    wild = narrow_experts(given, experts, 2, M, epochs=3, rate=1e3)
    assert np.array_equal(wild.experts.down, calm.experts.down)
    assert wild.error[2] == calm.error[1]


def test_threads_and_runs_change_no_bit():
    given, experts = problem(8, 3000, dtype=np.float32)
    before = molae.get_num_threads()
    try:
        for threads in (1, 2):
            molae.set_num_threads(threads)
            found = narrow_experts(given, experts, 2, M, epochs=2)
            if threads == 1:
                first = found
            for name, array in found.experts.arrays.items():
                assert np.array_equal(array, first.experts.arrays[name]), name
    finally:
        molae.set_num_threads(before)
    other = narrow_experts(given, experts, 2, M, epochs=2, seed=1)
    assert not np.array_equal(other.experts.gate, first.experts.gate)


def test_experts_that_are_never_compressed_stay_as_they_began():
    given, experts = problem(9)
    index = given.index.copy()
    index[index == 3] = E
    given = replace(given, index=index)
    found = narrow_experts(given, experts, 1, M).experts
    begun = narrow_experts(given, experts, 1, M, linear_steps=0, epochs=0).experts
    for name, array in found.arrays.items():
        assert np.array_equal(array[3], begun.arrays[name][3]), name


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"n": 0}, ArgumentError, "num_compressed: expected 1 to K - 1"),
        ({"n": K}, ArgumentError, "num_compressed: expected 1 to K - 1"),
        ({"units": F + 1}, ArgumentError, "units: expected 0 to F"),
        ({"units": -1}, ArgumentError, "units: expected 0 to F"),
        ({"ridge": 0.0}, ArgumentError, "ridge"),
        ({"rate": 0.0}, ArgumentError, "rate"),
        ({"epochs": -1}, ArgumentError, "epochs"),
        ({"x": np.nan}, NonFiniteError, "NaN or Inf"),
        ({"lost": np.zeros((2, D))}, ShapeError, "lost"),
    ],
)
def test_what_makes_no_sense_is_refused(options, error, text):
    given, experts = problem(0)
    options = dict(options)
    if "x" in options:
        x = given.x.copy()
        x[5, 2] = options.pop("x")
        given = replace(given, x=x)
    if "lost" in options:
        given = replace(given, lost=options.pop("lost"))
    n, units = options.pop("n", 1), options.pop("units", M)
    with pytest.raises(error, match=text):
        narrow_experts(given, experts, n, units, **options)
