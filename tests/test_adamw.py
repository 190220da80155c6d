"""AdamW against its own formulas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import molae
from molae import _core
from molae.errors import ArgumentError, NonFiniteError, ShapeError
from molae.fit import AdamW
from molae.fit.adamw import cosine


def reference(w, gradients, lr, beta1, beta2, eps, decay, max_norm=None):
    """Algorithm 2 of arXiv 1711.05101, with gradients clipped to a norm."""
    w, m, v = w.astype(np.float64), np.zeros(w.shape), np.zeros(w.shape)
    for t, g in enumerate(gradients, 1):
        g = g.astype(np.float64)
        if max_norm is not None:
            g = g * min(1, max_norm / np.linalg.norm(g))
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        w = w - lr * (m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps) + decay * w)
    return w


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 3e-6), (np.float64, 1e-13)])
@pytest.mark.parametrize("max_norm", [None, 3.0])
def test_steps_are_those_of_the_formulas(dtype, rtol, max_norm):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((7, 5000)).astype(dtype)
    gradients = [rng.standard_normal(w.shape).astype(dtype) for _ in range(5)]
    want = reference(w, gradients, 0.01, 0.8, 0.95, 1e-6, 0.1, max_norm)
    descent = AdamW({"w": w}, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, max_norm=max_norm)
    for g in gradients:
        norm = descent.step({"w": g}, 0.01)
        assert norm == pytest.approx(np.linalg.norm(g.astype(np.float64)), rel=1e-6)
    np.testing.assert_allclose(w, want, rtol=rtol, atol=rtol)
    assert descent.steps == 5


def test_it_is_torchs():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    w = rng.standard_normal(300)
    theirs = torch.nn.Parameter(torch.from_numpy(w.copy()))
    other = torch.optim.AdamW([theirs], lr=0.02, betas=(0.9, 0.99), weight_decay=0.05)
    descent = AdamW({"w": w}, betas=(0.9, 0.99), weight_decay=0.05)
    for _ in range(10):
        g = rng.standard_normal(300)
        theirs.grad = torch.from_numpy(g.copy())
        other.step()
        descent.step({"w": g}, 0.02)
    np.testing.assert_allclose(w, theirs.detach().numpy(), rtol=1e-12)


def test_threads_change_no_bit():
    rng = np.random.default_rng(2)
    begun = rng.standard_normal(100_003).astype(np.float32)
    g = rng.standard_normal(begun.shape).astype(np.float32)
    found = []
    before = molae.get_num_threads()
    try:
        for threads in (1, 3):
            molae.set_num_threads(threads)
            w = begun.copy()
            AdamW({"w": w}, max_norm=1.0).step({"w": g}, 0.1)
            found.append(w)
    finally:
        molae.set_num_threads(before)
    assert np.array_equal(*found)


def test_each_array_has_its_own_rate():
    a, b = np.ones(3), np.ones(3)
    AdamW({"a": a, "b": b}).step({"a": np.ones(3), "b": np.ones(3)}, {"a": 0.5, "b": 0.0})
    assert a == pytest.approx(0.5)
    assert (b == 1).all()


def test_a_bad_gradient_moves_nothing():
    a, b = np.ones(3), np.ones(3)
    descent = AdamW({"a": a, "b": b})
    with pytest.raises(NonFiniteError, match="gradient"):
        descent.step({"a": np.ones(3), "b": np.array([1, np.nan, 1])}, 0.1)
    assert (a == 1).all()
    assert descent.steps == 0
    for wrong in ({"a": np.ones(3)}, {"a": np.ones(3), "b": np.ones(4)}):
        with pytest.raises(ShapeError, match="gradients"):
            descent.step(wrong, 0.1)
    with pytest.raises(ArgumentError, match="max_norm"):
        AdamW({"a": a}, max_norm=0)
    for options in ({"betas": (1.0, 0.9)}, {"eps": 0.0}, {"weight_decay": -1.0}):
        with pytest.raises(ArgumentError, match="adamw: expected"):
            AdamW({"a": a}, **options).step({"a": np.ones(3)}, 0.1)


def test_many_arrays_are_stepped_as_each_by_itself():
    rng = np.random.default_rng(3)
    sizes = (1, 16384, 0, 16385, 40000)
    begun = {str(n): rng.standard_normal(n).astype(np.float32) for n in sizes}
    slopes = {name: rng.standard_normal(w.size).astype(np.float32) for name, w in begun.items()}
    rates = {name: 0.1 / (1 + i) for i, name in enumerate(begun)}
    together = {name: w.copy() for name, w in begun.items()}
    norm = AdamW(together).step(slopes, rates)
    assert norm == pytest.approx(
        np.sqrt(sum(np.sum(np.square(g.astype(float))) for g in slopes.values())), rel=1e-12
    )
    for name, w in begun.items():
        AdamW({name: w}).step(slopes, rates)
        assert np.array_equal(w, together[name])


def stepped(weights, gradients):
    """One step of the native function, from nothing."""
    means = [[np.zeros(w.shape) for w in weights] for _ in range(2)]
    rates = [0.1] * len(weights)
    return _core.adamw(weights, *means, gradients, rates, 0.9, 0.99, 1e-8, 0.0, 0.0, 1, 1)


def test_arrays_that_overlap_are_refused():
    a = np.ones(4)
    with pytest.raises(ArgumentError, match="weights: an array that is written overlaps gradient"):
        stepped([a], [a])
    both = np.ones(6)
    with pytest.raises(ArgumentError, match="weights: an array that is written overlaps weights"):
        stepped([both[:4], both[2:]], [np.ones(4), np.ones(4)])
    stepped([both[:3], both[3:]], [a[:3], a[1:]])  # side by side, and of one gradient
    assert both == pytest.approx(0.9)
    a.flags.writeable = False
    with pytest.raises(ArgumentError, match="weights: the array is read-only"):
        stepped([a], [np.ones(4)])
    with pytest.raises(ShapeError, match="lists of one length"):
        stepped([both], [])
    with pytest.raises(ArgumentError, match="all alike"):
        stepped([both], [np.ones(6, np.float32)])


def test_the_rate_rises_and_falls():
    rates = [cosine(step, 100, 10) for step in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert rates[10] == 1
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0 < rates[-1] < 1e-3
