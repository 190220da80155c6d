"""molae.ops forward: routing, and layers against a float64 reference."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_layers import ROLES, layer
from ref import ops as ref

import molae
from molae import fit, ops
from molae.ops import ACTIVATIONS, Projection

pytestmark = pytest.mark.usefixtures("unset_is_nan")

F32, F64, BF16 = np.float32, np.float64, ml_dtypes.bfloat16
EPS = {F32: 2.0**-24, F64: 2.0**-53}


def check_forward(layer, y):
    """Sums of D, R, F and K products of known size, each with a relative error of eps a step;
    an output in bfloat16 is rounded once more."""
    want = ref.forward(*layer.reference_args())
    eps = EPS[F64 if layer.x.dtype == F64 else F32]
    steps = 2 * layer.x.shape[1] + layer.F + layer.index.shape[1] + 32
    bound = (eps * steps + layer.roundings()) * layer.bound() + 1e-300
    if layer.x.dtype == BF16:
        bound += 2.0**-8 * np.abs(want)
    assert y.dtype == layer.x.dtype
    assert y.shape == want.shape
    assert np.all(np.abs(y.astype(F64) - want) <= bound)


def test_the_checker_rejects_a_wrong_result():
    made = layer(0, 9, 2, 3, 8, 6, ranks=(3,))
    y = ops.latent_experts_forward(*made.args)
    check_forward(made, y)
    for wrong in (y * (1 + 1e-9), y + 1e-9, y[::-1]):
        with pytest.raises(AssertionError):
            check_forward(made, wrong)


def test_reference_on_a_case_done_by_hand():
    # x = (1, 2); gate (3), up (1): h = relu(3) * 1 = 3; down (1, 2): (3, 6), times 1/2
    x, index, w = np.array([[1.0, 2.0]]), np.array([[0, 1]]), np.array([[0.5, 9.0]])
    gate, up, down = np.array([[[1.0, 1.0]]]), np.array([[[-1.0, 1.0]]]), np.array([[[1.0], [2.0]]])
    args = (x, index, w, gate, up, down, [None] * 3, ("relu", 0, 0))
    np.testing.assert_allclose(ref.forward(*args), [[1.5, 3.0]])
    d = ref.backward(np.ones((1, 2)), *args)
    np.testing.assert_allclose(d["top_k_weights"], [[9.0, 0.0]])
    np.testing.assert_allclose(d["down"][0], [[1.5], [1.5]])
    np.testing.assert_allclose(d["gate"][0], [[1.5, 3.0]])  # dh = 1/2 (1 + 2), times up = 1
    np.testing.assert_allclose(d["up"][0], [[4.5, 9.0]])
    np.testing.assert_allclose(d["x"], [[1.5 - 4.5, 1.5 + 4.5]])
    np.testing.assert_allclose(
        ref.activate("swiglu_clamped", 9.0, -9.0), -6 * 7 * ref.sigmoid(11.914)
    )


# --------------------------------------------------------------------- route


@given(
    seed=st.integers(0, 2**32 - 1),
    N=st.integers(0, 9),
    K=st.integers(1, 5),
    E=st.integers(1, 7),
    data=st.data(),
)
@settings(max_examples=60)
def test_route(seed, N, K, E, data):
    rng = np.random.default_rng(seed)
    index = rng.integers(0, E + 1, (N, K))
    of = np.array(data.draw(st.lists(st.integers(0, 2), min_size=E, max_size=E)))
    groups = [np.flatnonzero(of == g).tolist() for g in range(3) if (of == g).any()]
    r = ops.route(index, E, groups)
    rows = ref.rows_by_expert(index, E)
    assert r.expert_ptr.tolist() == np.cumsum([0, *map(len, rows)]).tolist()
    found = list(zip(r.token.tolist(), r.slot.tolist(), strict=True))
    assert found == [pair for expert in rows for pair in expert]
    assert len(r.group_ptr) == len(groups) + 1
    for g, group in enumerate(groups):
        mine = r.group_token[r.group_ptr[g] : r.group_ptr[g + 1]].tolist()
        assert mine == sorted({t for t, k in np.ndindex(N, K) if index[t, k] in group})
    assert ops.route(index, E).group_ptr is None


# ----------------------------------------------------------- against the reference

# (N, K, E, D, F): ones, primes, few rows, blocks of 32, 64, 256, 512, 1024 and 2048 and their
# neighbours
SIZES = [
    (0, 2, 3, 5, 4),
    (1, 1, 1, 1, 1),
    (1, 4, 6, 17, 13),
    (1, 2, 3, 530, 270),
    (7, 3, 5, 13, 11),
    (33, 2, 4, 40, 31),
    (65, 1, 1, 300, 520),
    (257, 3, 3, 24, 70),
    (300, 2, 9, 70, 33),
    (1025, 1, 2, 9, 12),
    (2051, 2, 5, 12, 10),
]
KINDS = {
    "dense": {"ranks": (None,), "groups": (1, 1, 1)},
    "plain": {"ranks": (4, 1), "groups": (2, 2, 2), "form": "plain"},
    "gauge": {"ranks": (4, 1), "groups": (2, 3, 2), "form": "gauge"},
    "mixed": {"ranks": (3, None, 7, 0), "groups": (4, 3, 3), "form": "gauge"},
    "mixed_plain": {"ranks": (None, 5, 0), "groups": (2, 3, 2), "form": "plain"},
    "holes": {"ranks": (4, 0), "groups": (2, 1, 2), "form": "gauge"},
}


def fitting(kind, E, D):
    """The kind with ranks that D allows."""
    made = dict(KINDS[kind])
    made["ranks"] = tuple(None if r is None else min(r, D) for r in made["ranks"])
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_float64(size, kind, bias):
    N, K, E, D, F = size
    made = layer(1, N, K, E, D, F, bias=bias, **fitting(kind, E, D))
    check_forward(made, ops.latent_experts_forward(*made.args, **made.options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "io"), [(F32, F32), (BF16, F32), (BF16, BF16), (F32, BF16)])
def test_float32_and_bfloat16(size, kind, dtype, io):
    N, K, E, D, F = size
    made = layer(2, N, K, E, D, F, dtype=dtype, io=io, bias=True, **fitting(kind, E, D))
    check_forward(made, ops.latent_experts_forward(*made.args, **made.options))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_activations(activation, dtype):
    made = layer(3, 40, 2, 4, 9, 37, dtype=dtype, bias=True, activation=activation, limit=0.8)
    check_forward(made, ops.latent_experts_forward(*made.args, **made.options))


@pytest.mark.parametrize("form", ["gauge", "plain"])
@pytest.mark.parametrize("rank", [0, 1, 11, 12])
def test_ranks_from_nothing_to_full(rank, form):
    made = layer(4, 30, 2, 4, 12, 7, ranks=(rank,), groups=(2, 2, 2), form=form, bias=True)
    check_forward(made, ops.latent_experts_forward(*made.args, **made.options))


@pytest.mark.parametrize("kind", ["dense", "gauge"])
@pytest.mark.parametrize(
    "index",
    [
        np.zeros((600, 1), int),  # all rows on one expert
        np.full((5, 2), 4),  # none anywhere
        np.tile(np.arange(4), (9, 1)),  # K = E
        np.array([[2, 2, 2], [0, 2, 0]]),  # the same expert again
        np.array([[3, 4], [4, 1]]),
    ],
    ids=["one", "none", "all", "twice", "sentinels"],
)
def test_routings(index, kind):
    made = layer(5, *index.shape, 4, 10, 6, index=index, bias=True, **fitting(kind, 4, 10))
    check_forward(made, ops.latent_experts_forward(*made.args, **made.options))


def test_group_of_one_expert():
    made = layer(6, 20, 2, 5, 10, 6, ranks=(3,), groups=(5, 5, 5))
    check_forward(made, ops.latent_experts_forward(*made.args))


def test_dense_arrays_are_one_dense_group():
    made = layer(7, 50, 2, 4, 20, 9)
    arrays = [made.dense(role) for role in ROLES]
    y = ops.experts_forward(*made.args[:3], *arrays)
    check_forward(made, y)
    mixed = ops.latent_experts_forward(*made.args[:3], arrays[0], made.up, arrays[2])
    check_forward(made, mixed)
    wrapped = ops.latent_experts_forward(*made.args[:3], *map(Projection.dense, arrays))
    assert wrapped.tobytes() == y.tobytes()


def test_fused_gate_up_is_read_where_it_lies():
    rng = np.random.default_rng(8)
    gate_up, down = rng.standard_normal((3, 10, 7)), rng.standard_normal((3, 7, 5))
    x, index, w = rng.standard_normal((6, 7)), rng.integers(0, 3, (6, 2)), rng.random((6, 2))
    gate, up = gate_up[:, :5], gate_up[:, 5:]
    y = ops.experts_forward(x, index, w, gate, up, down)
    copied = ops.experts_forward(x, index, w, gate.copy(), up.copy(), down)
    assert y.tobytes() == copied.tobytes()


@pytest.mark.parametrize("form", ["gauge", "plain"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_fitted_factors_are_the_layer_of_their_products(dtype, form):
    rng = np.random.default_rng(9)
    W = {
        "gate": rng.standard_normal((6, 20, 32)).astype(dtype),
        "up": rng.standard_normal((6, 20, 32)).astype(dtype),
        "down": rng.standard_normal((6, 32, 20)).astype(dtype),
    }
    parts = {
        "gate": [[0, 1, 5], [2, 3, 4]],
        "up": [[0], [1, 2, 3, 4, 5]],
        "down": [[3, 4], [0, 1, 2, 5]],
    }
    factors = {
        role: fit.factor_shared(
            W[role],
            9,
            groups=parts[role],
            side="output" if role == "down" else "input",
            form=form,
        )
        for role in ROLES
    }
    projections = {role: Projection.from_factors(f) for role, f in factors.items()}
    made = layer(9, 40, 3, 6, 32, 20, dtype=dtype)
    for role in ROLES:
        setattr(made, role, projections[role])
        np.testing.assert_allclose(
            made.dense(role)[4], factors[role].reconstruct(4), rtol=1e-5, atol=1e-4
        )
    check_forward(made, ops.latent_experts_forward(*made.args))


# ------------------------------------------------------------------- properties


def test_float32_agrees_with_float64():
    made = layer(10, 100, 2, 5, 60, 30, dtype=F32, **KINDS["mixed"])
    y = ops.latent_experts_forward(*made.args)
    wide = [
        Projection(
            p.groups,
            p.ranks,
            [a.astype(F64) for a in p.private],
            [None if a is None else a.astype(F64) for a in p.shared],
            p.perm,
            form=p.form,
        )
        for p in (made.gate, made.up, made.down)
    ]
    z = ops.latent_experts_forward(made.x.astype(F64), made.index, made.weights.astype(F64), *wide)
    assert 0 < np.abs(y - z).max() < 1e-5 * np.abs(z).max()


def test_tokens_permute():
    made = layer(11, 30, 2, 5, 12, 8, **KINDS["mixed"])
    order = np.random.default_rng(0).permutation(30)
    y = ops.latent_experts_forward(*made.args)
    z = ops.latent_experts_forward(
        made.x[order], made.index[order], made.weights[order], *made.args[3:]
    )
    np.testing.assert_allclose(z, y[order], rtol=1e-12, atol=1e-13)


def test_experts_permute():
    made = layer(12, 30, 2, 6, 12, 8, **KINDS["mixed"])
    order = np.random.default_rng(1).permutation(6)  # expert e is now order[e]
    moved = [
        Projection(
            [[int(order[e]) for e in group] for group in p.groups],
            p.ranks,
            p.private,
            p.shared,
            p.perm,
            form=p.form,
        )
        for p in made.args[3:]
    ]
    index = np.append(order, 6)[made.index]
    y = ops.latent_experts_forward(*made.args)
    z = ops.latent_experts_forward(made.x, index, made.weights, *moved)
    np.testing.assert_allclose(z, y, rtol=1e-12, atol=1e-13)


def test_linear_in_the_routing_weights():
    made = layer(13, 30, 2, 5, 12, 8, bias=True, **KINDS["mixed"])
    v = np.random.default_rng(2).standard_normal(made.weights.shape)

    def run(w):
        return ops.latent_experts_forward(made.x, made.index, w, *made.args[3:], **made.options)

    np.testing.assert_allclose(
        run(2 * made.weights - 3 * v), 2 * run(made.weights) - 3 * run(v), atol=1e-12
    )
    assert not run(np.zeros_like(v)).any()


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("kind", KINDS)
def test_thread_count_does_not_change_a_bit(kind, dtype):
    made = layer(14, 600, 2, 4, 300, 280, dtype=dtype, bias=True, **fitting(kind, 4, 300))
    results = []
    for n in (1, 2, 5):
        with molae.num_threads(n):
            y, saved = ops.latent_experts_forward(*made.args, **made.options, save=True)
            plain = ops.latent_experts_forward(*made.args, **made.options)
            rows = len(ops.route(made.index, 4).token)
            results.append([y.tobytes(), plain.tobytes(), saved.gate[:rows].tobytes()])
    assert results[0] == results[1] == results[2]
    assert results[0][0] == results[0][1]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_known_is_not_computed(kind):
    """Given back as it was it changes no bit; given otherwise it is believed."""
    made = layer(16, 60, 2, 4, 12, 8, bias=True, **KINDS[kind])
    y, saved = ops.latent_experts_forward(*made.args, **made.options, save=True)
    for known in (["gate"], ["up"], ["z_up"], ["gate", "z_up"], ["gate", "up", "z_up"]):
        kept = {name: getattr(saved, name).copy() for name in known}
        blank = ops.Saved(*(np.full_like(a, np.nan) for a in saved._core()))
        given = replace(blank, **kept)
        again, same = ops.latent_experts_forward(
            *made.args, **made.options, save=given, known=known
        )
        assert same is given
        assert again.tobytes() == y.tobytes(), known
    nothing = replace(saved, up=np.zeros_like(saved.up))
    zero = ops.latent_experts_forward(*made.args, **made.options, save=nothing, known=["up"])[0]
    without = {**made.options, "down_bias": None}
    bias = y - ops.latent_experts_forward(*made.args, **without)
    np.testing.assert_allclose(zero, bias, atol=1e-12)


def test_out_is_written_and_inputs_are_not():
    made = layer(15, 20, 2, 4, 12, 8, bias=True, **KINDS["mixed"])
    before = [a.copy() for a in (made.x, made.index, made.weights)]
    out = np.full(made.x.shape, np.nan)
    y = ops.latent_experts_forward(*made.args, **made.options, out=out)
    assert y is out
    check_forward(made, out)
    for a, b in zip((made.x, made.index, made.weights), before, strict=True):
        np.testing.assert_array_equal(a, b)
