"""Activation kernels of every table: accuracy against float64, and equal bits."""

from __future__ import annotations

import numpy as np
import pytest
from ref import ops as ref

import molae
from molae import _core
from molae.errors import ArgumentError, ShapeError
from molae.ops import ACTIVATIONS, activate

ISAS = _core.build_info()["isas"]
F32, F64 = np.float32, np.float64
SIZES = (0, 1, 7, 8, 15, 16, 17, 31, 33, 61, 257)
ALPHA, LIMIT = 1.702, 7.0


def act(isa, kind, gate, up, dh=None, w=1.0):
    return _core.act(isa, ACTIVATIONS.index(kind), gate, up, dh, w, ALPHA, LIMIT)


def values(dtype, n=20000):
    """Small, ordinary and large values of both signs, and the seams of the exponential."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(n) * np.exp(rng.uniform(-12, 4, n))
    seams = [0.0, -0.0, 7, -7, 87.2, -87.4, 88.4, -88.4, 104, -104, 1e4, -1e4, 0.34657, -0.34658]
    return np.concatenate([x, seams]).astype(dtype)


def close(found, want, size, dtype):
    """Within 8 roundings of the terms' size; below the smallest normal numbers nothing is said:
    the f32 exponential stops at e^-87.3, 1.2e-38."""
    floor = 1e-32 if dtype == F32 else 1e-300
    bound = 8 * np.finfo(dtype).eps * size + floor
    return bool(np.all(np.abs(found.astype(F64) - want) <= bound))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_values(isa, kind, dtype):
    gate = values(dtype)
    up = np.random.default_rng(1).permutation(values(dtype))
    g, u = gate.astype(F64), up.astype(F64)
    want = ref.activate(kind, g, u, ALPHA, LIMIT)
    # a rounded argument of the exponential moves the result by its size
    argument = {
        "gelu": g * g,
        "gelu_tanh": 2 * np.abs(g + 0.1 * g**3),
        "swiglu_clamped": 2 * np.abs(g),
    }
    size = np.abs(want) * (1 + argument.get(kind, 0))
    found = act(isa, kind, gate, up)
    assert found.dtype == dtype
    assert close(found, want, size, dtype)
    worse = found.copy()
    i = int(np.argmax((np.abs(want) > 1e-3) & (np.abs(g) < 1)))
    worse[i] *= 1 + 100 * np.finfo(dtype).eps
    assert not close(worse, want, size, dtype)


def test_reference_has_the_usual_forms():
    x = np.linspace(-5, 5, 101)
    tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(ref.activate("gelu_tanh", x, 1.0), tanh, atol=1e-14)
    np.testing.assert_allclose(ref.activate("gelu", x, 1.0), tanh, atol=1e-3)
    np.testing.assert_allclose(ref.activate("gelu", 1.0, 1.0), 0.8413447460685429)
    np.testing.assert_allclose(ref.activate("silu", x, 2.0), 2 * x / (1 + np.exp(-x)))


@pytest.mark.parametrize("isa", ISAS)
def test_silu_to_the_far_tail(isa):
    """Relative accuracy where x e^x is still a normal number."""
    x = np.linspace(-85, 85, 40001).astype(F32)
    wide = x.astype(F64)
    want = wide / (1 + np.exp(-wide))
    found = act(isa, "silu", x, np.ones_like(x)).astype(F64)
    nonzero = want != 0
    error = np.abs(found[nonzero] / want[nonzero] - 1).max()
    assert 0 < error < 4 * 2.0**-24 + 1e-8


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_gradients(isa, kind, dtype):
    rng = np.random.default_rng(2)
    gate, up, dh = (rng.standard_normal(4099) * s for s in (4, 5, 1))
    gate, up, dh = (a.astype(dtype) for a in (gate, up, dh))
    g, u, d, w = gate.astype(F64), up.astype(F64), dh.astype(F64), 0.625
    dg, du = ref.activate_gradient(kind, g, u, d * w, ALPHA, LIMIT)
    h = ref.activate(kind, g, u, ALPHA, LIMIT)
    dgate, dup, hw, total = act(isa, kind, gate, up, dh, w)
    size = np.abs(d) * (1 + np.abs(g)) * (1 + np.abs(u))  # of the terms of each derivative
    for found, want in ((dgate, dg), (dup, du), (hw, w * h)):
        scale = (1 + np.abs(g)) ** 2 * (1 + np.abs(u)) if found is hw else size * (1 + g * g)
        assert close(found, want, scale, dtype)
    steps = 4099 / 16 + 4
    assert abs(total - d @ h) <= np.finfo(dtype).eps * steps * (np.abs(d * h).sum())


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("n", SIZES)
def test_every_table_gives_the_same_bits(kind, n):
    rng = np.random.default_rng(n)
    gate, up, dh = (rng.standard_normal(n).astype(F32) * 5 for _ in range(3))
    tables = []
    for isa in ISAS:
        parts = act(isa, kind, gate, up, dh, 0.3)
        tables.append(
            [act(isa, kind, gate, up).tobytes(), *(a.tobytes() for a in parts[:3]), parts[3]]
        )
    assert all(t == tables[0] for t in tables)
    # the order of additions is part of the contract
    h = act("ref", kind, gate, up)
    padded = np.zeros(-(-n // 16) * 16 or 16, F32)
    padded[:n] = dh * h
    lanes = np.zeros(16, F32)
    for row in padded.reshape(-1, 16):
        lanes = lanes + row
    for half in (8, 4, 2, 1):
        lanes = lanes[:half] + lanes[half : 2 * half]
    assert tables[0][4] == lanes[0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_nan_stays_nan(isa, kind, dtype):
    x, one = np.array([np.nan, 1.0], dtype), np.ones(2, dtype)
    for h in (act(isa, kind, x, one), act(isa, kind, one, x)):
        assert np.isnan(h).tolist() == [True, False]


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_many_rows_on_any_threads_are_the_kernels_own(kind, dtype):
    gate = values(dtype)[:40000].reshape(-1, 2)
    up = np.random.default_rng(1).permutation(gate)
    ones = np.ones(gate.size, dtype)
    isa = _core.build_info()["isa"]
    dgate, dup, h, _ = act(isa, kind, gate.ravel(), up.ravel(), ones)
    for threads in (1, 3):
        with molae.num_threads(threads):
            found = activate(gate, up, activation=kind, slopes=True)
            alone = activate(gate, up, activation=kind)
        assert alone.tobytes() == h.tobytes()
        assert [a.tobytes() for a in found] == [h.tobytes(), dgate.tobytes(), dup.tobytes()]
        assert found[0].shape == gate.shape


@pytest.mark.parametrize(
    ("gate", "up", "options", "error", "message"),
    [
        (np.ones(3), np.ones(4), {}, ShapeError, "up: expected the shape of gate"),
        (np.ones(3), np.ones(3, F32), {}, ArgumentError, "all the same"),
        (np.ones(3, np.int64), np.ones(3), {}, ArgumentError, "gate"),
        (np.ones(3), np.ones(3), {"activation": "tanh"}, ArgumentError, "activation: expected"),
    ],
)
def test_activate_refuses(gate, up, options, error, message):
    with pytest.raises(error, match=message):
        activate(gate, up, **options)
