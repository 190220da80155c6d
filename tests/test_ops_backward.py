"""molae.ops backward: against a float64 reference and central differences."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_layers import ROLES, layer
from ref import ops as ref
from test_ops_forward import KINDS, check_forward, fitting

import molae
from molae import _core, ops
from molae.errors import ArgumentError
from molae.ops import ACTIVATIONS, Gradients, Projection, ProjectionGradients

pytestmark = pytest.mark.usefixtures("unset_is_nan")

F32, F64, BF16 = np.float32, np.float64, ml_dtypes.bfloat16
EPS = {F32: 2.0**-24, F64: 2.0**-53}


def run(made, dy, **options):
    _, saved = ops.latent_experts_forward(*made.args, **made.options, save=True)
    return ops.latent_experts_backward(dy, saved, *made.args, **made.options, **options)


def flat(d):
    """{name: array} of all gradients that there are."""
    found = {}
    for name in ("x", "top_k_weights", *ROLES, *(f"{role}_bias" for role in ROLES)):
        value = getattr(d, name)
        if isinstance(value, ProjectionGradients):
            for part in ("private", "shared"):
                for g, a in enumerate(getattr(value, part)):
                    if a is not None:
                        found[f"{name}.{part}[{g}]"] = a
        elif value is not None:
            found[name] = value
    return found


def by_name(made, d, form=np.asarray):
    """Gradients of the dense layer as those of what was passed; `form` is applied to factors."""
    found = {"x": d["x"], "top_k_weights": d["top_k_weights"]}
    for role in ROLES:
        p, down = getattr(made, role), role == "down"
        if isinstance(p, np.ndarray):
            found[role] = d[role]
        else:
            for g, (group, rank) in enumerate(zip(p.groups, p.ranks, strict=True)):
                if rank == 0:
                    found[f"{role}.private[{g}]"] = np.zeros(p.private[g].shape)
                    found[f"{role}.shared[{g}]"] = np.zeros(p.shared[g].shape)
                    continue
                dW = d[role][list(group)]
                if rank is None:
                    found[f"{role}.private[{g}]"] = dW
                    continue
                A, perm = form(p.private[g].astype(F64)), p.perm[g]
                B = form(ref.basis(p.shared[g].astype(F64), perm))
                dA, dB = ref.factor_gradients(dW, A, B, down)
                found[f"{role}.private[{g}]"] = dA
                found[f"{role}.shared[{g}]"] = dB if perm is None else dB[:, perm[rank:]]
        if made.biases.get(f"{role}_bias") is not None:
            found[f"{role}_bias"] = d[f"{role}_bias"]
    return found


def check_backward(made, dy, found):
    """Each number within eps times the steps of its chain of sums, of the size of its terms. The
    many rows of a sum are taken to err independently."""
    want = by_name(made, ref.backward(dy.astype(F64), *made.reference_args()))
    bound = by_name(made, made.bound_backward(dy), np.abs)
    assert found.keys() == want.keys()
    work = F64 if made.x.dtype == F64 else F32
    N, D = made.x.shape
    steps = 4 * np.sqrt(N * made.index.shape[1]) + 2 * D + made.F + 32
    for name, a in found.items():
        assert a.dtype == work, name
        assert a.shape == want[name].shape, name
        share = EPS[work] * steps + made.roundings()
        assert np.all(np.abs(a - want[name]) <= share * bound[name] + 1e-300), name


def test_the_checker_rejects_a_wrong_result():
    made = layer(0, 9, 2, 3, 8, 6, ranks=(3,))
    dy = np.random.default_rng(0).standard_normal(made.x.shape)
    found = flat(run(made, dy))
    check_backward(made, dy, found)
    for name in found:
        for wrong in (found[name] * (1 + 1e-9), -found[name]):
            with pytest.raises(AssertionError):
                check_backward(made, dy, {**found, name: wrong})


SIZES = [
    (0, 2, 3, 5, 4),
    (1, 1, 1, 1, 1),
    (1, 4, 6, 17, 13),
    (7, 3, 5, 13, 11),
    (65, 1, 1, 300, 520),
    (257, 3, 3, 24, 70),
    (300, 2, 9, 70, 33),
    (1025, 1, 2, 9, 12),
    (2051, 2, 5, 12, 10),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_float64(size, kind, bias):
    N, K, E, D, F = size
    made = layer(21, N, K, E, D, F, bias=bias, **fitting(kind, E, D))
    dy = np.random.default_rng(0).standard_normal(made.x.shape)
    check_backward(made, dy, flat(run(made, dy)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "io"), [(F32, F32), (BF16, F32), (BF16, BF16)])
def test_float32_and_bfloat16(size, kind, dtype, io):
    N, K, E, D, F = size
    made = layer(22, N, K, E, D, F, dtype=dtype, io=io, bias=True, **fitting(kind, E, D))
    dy = np.random.default_rng(0).standard_normal(made.x.shape).astype(io)
    check_backward(made, dy, flat(run(made, dy)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_activations(activation, dtype):
    made = layer(23, 40, 2, 4, 9, 37, dtype=dtype, bias=True, activation=activation, limit=0.8)
    dy = np.random.default_rng(0).standard_normal(made.x.shape).astype(dtype)
    check_backward(made, dy, flat(run(made, dy)))


@pytest.mark.parametrize(
    "index",
    [
        np.zeros((600, 1), int),
        np.full((5, 2), 4),
        np.tile(np.arange(4), (9, 1)),
        np.array([[2, 2, 2], [0, 2, 0]]),
        np.array([[3, 4], [4, 1]]),
    ],
    ids=["one", "none", "all", "twice", "sentinels"],
)
@pytest.mark.parametrize("kind", ["dense", "gauge"])
def test_routings(index, kind):
    made = layer(24, *index.shape, 4, 10, 6, index=index, bias=True, **fitting(kind, 4, 10))
    dy = np.random.default_rng(0).standard_normal(made.x.shape)
    d = run(made, dy)
    check_backward(made, dy, flat(d))
    assert not d.top_k_weights[index == 4].any()


@pytest.mark.parametrize("form", ["gauge", "plain"])
@pytest.mark.parametrize("rank", [0, 1, 11, 12])
def test_ranks_from_nothing_to_full(rank, form):
    made = layer(25, 30, 2, 4, 12, 7, ranks=(rank,), groups=(2, 2, 2), form=form, bias=True)
    dy = np.random.default_rng(0).standard_normal(made.x.shape)
    check_backward(made, dy, flat(run(made, dy)))


# -------------------------------------------------------------- central differences


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["dense", "plain", "mixed"])
def test_every_gradient_by_central_differences(activation, kind):
    """Every number of every input, of the implementation's own forward, in float64."""
    made = layer(
        26, 4, 2, 3, 5, 4, bias=True, activation=activation, limit=0.9, **fitting(kind, 3, 5)
    )
    dy = np.random.default_rng(0).standard_normal(made.x.shape)
    inputs = {"x": made.x, "top_k_weights": made.weights}
    for role in ROLES:
        inputs[f"{role}_bias"] = made.biases[f"{role}_bias"]
        p = getattr(made, role)
        for g in range(len(p.groups)):
            inputs[f"{role}.private[{g}]"] = p.private[g]
            if p.shared[g] is not None:
                inputs[f"{role}.shared[{g}]"] = p.shared[g]
    found = flat(run(made, dy))
    assert found.keys() == inputs.keys()

    def loss():
        return (dy * ops.latent_experts_forward(*made.args, **made.options)).sum()

    step = 1e-5
    for name, a in inputs.items():
        for i in np.ndindex(*a.shape):
            kept = a[i]
            a[i] = kept + step
            above = loss()
            a[i] = kept - step
            below = loss()
            a[i] = kept
            # h² f''' / 6 for a few tens, and rounding of the loss over the step
            assert abs((above - below) / (2 * step) - found[name][i]) < 1e-7, (name, i)


# ------------------------------------------------------------------------ properties


def test_backward_adds_to_what_is_given():
    made = layer(27, 30, 2, 5, 12, 8, bias=True, **KINDS["mixed"])
    dy = np.random.default_rng(0).standard_normal(made.x.shape)
    fresh = flat(run(made, dy))
    d = run(made, dy)
    again = run(made, dy, out=d)
    assert again is d
    for name, a in flat(again).items():
        np.testing.assert_allclose(a, 2 * fresh[name], rtol=1e-12, atol=1e-12)


def test_backward_overwrites_what_is_given():
    made = layer(27, 30, 2, 5, 12, 8, bias=True, **KINDS["mixed"])
    made.index[made.index == 1] = 0  # what an expert without rows has left is gone, too
    dy = np.random.default_rng(0).standard_normal(made.x.shape)
    fresh = flat(run(made, dy))
    d = run(made, dy)
    for a in flat(d).values():
        a.fill(np.nan)
    assert run(made, dy, out=d, add=False) is d
    for name, a in flat(d).items():
        assert a.tobytes() == fresh[name].tobytes(), name


def test_only_what_is_wanted():
    made = layer(28, 30, 2, 5, 12, 8, bias=True, **KINDS["mixed"])
    dy = np.random.default_rng(0).standard_normal(made.x.shape)
    everything = flat(run(made, dy))
    names = ["x", "top_k_weights", *ROLES, *(f"{role}_bias" for role in ROLES)]
    for name in names:
        found = flat(run(made, dy, wanted=[name]))
        assert {n.split(".")[0] for n in found} == {name}
        for n, a in found.items():
            assert a.tobytes() == everything[n].tobytes(), n
    # single arrays of a projection
    for role in ROLES:
        p = getattr(made, role)
        for g in range(len(p.groups)):
            for part in ("private", "shared"):
                if getattr(p, part)[g] is None:
                    continue
                lists = {k: [None] * len(p.groups) for k in ("private", "shared")}
                lists[part][g] = np.zeros(getattr(p, part)[g].shape)
                out = Gradients(**{role: ProjectionGradients(**lists)})
                found = flat(run(made, dy, out=out))
                assert list(found) == [f"{role}.{part}[{g}]"]
                for n, a in found.items():
                    assert a.tobytes() == everything[n].tobytes(), n


def test_dense_arrays():
    made = layer(29, 30, 2, 4, 12, 8)
    for role in ROLES:
        setattr(made, role, made.dense(role))
    dy = np.random.default_rng(0).standard_normal(made.x.shape)
    _, saved = ops.experts_forward(*made.args, save=True)
    d = ops.experts_backward(dy, saved, *made.args)
    check_backward(made, dy, flat(d))
    # a fused gradient takes views as the fused weight does
    fused = np.zeros((4, 16, 12))
    ops.experts_backward(dy, saved, *made.args, out=Gradients(gate=fused[:, :8], up=fused[:, 8:]))
    np.testing.assert_array_equal(fused[:, :8], d.gate)
    np.testing.assert_array_equal(fused[:, 8:], d.up)


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("kind", KINDS)
def test_thread_count_does_not_change_a_bit(kind, dtype):
    made = layer(30, 600, 2, 4, 300, 280, dtype=dtype, bias=True, **fitting(kind, 4, 300))
    dy = np.random.default_rng(0).standard_normal(made.x.shape).astype(made.x.dtype)
    results = []
    for n in (1, 2, 5):
        with molae.num_threads(n):
            found = flat(run(made, dy))
            results.append({name: a.tobytes() for name, a in found.items()})
    assert results[0] == results[1] == results[2]


def test_saved_serves_twice_and_inputs_are_left_alone():
    made = layer(31, 30, 2, 5, 12, 8, **KINDS["mixed"])
    dy = np.random.default_rng(0).standard_normal(made.x.shape)
    _, saved = ops.latent_experts_forward(*made.args, save=True)
    inputs = [made.x, made.index, made.weights, dy, saved.u, saved.z_gate, *made.gate.private]
    before = [a.tobytes() for a in inputs]
    one = flat(ops.latent_experts_backward(dy, saved, *made.args))
    two = flat(ops.latent_experts_backward(dy, saved, *made.args))
    assert all(one[n].tobytes() == two[n].tobytes() for n in one)
    assert [a.tobytes() for a in inputs] == before


def test_what_cannot_be_wanted_is_refused():
    made = layer(32, 6, 2, 3, 5, 4)
    dy = np.zeros(made.x.shape)
    with pytest.raises(ArgumentError, match="dgate_bias: there is no gate_bias"):
        run(made, dy, out=Gradients(gate_bias=np.zeros((3, 4))))
    with pytest.raises(ArgumentError, match="wanted: expected among x, top_k_weights"):
        run(made, dy, wanted=["w"])
    with pytest.raises(ArgumentError, match="give one of the two"):
        run(made, dy, wanted=["x"], out=Gradients(x=dy))
    with pytest.raises(ArgumentError, match="expected ProjectionGradients"):
        run(made, dy, out=Gradients(gate=np.zeros((3, 4, 5))))
    assert isinstance(made.gate, Projection)


WHOLE_LAYER = """
import hashlib, numpy as np, molae
from molae import ops
rng = np.random.default_rng(0)
shapes = ((40, 24), (3, 70, 24), (3, 70, 24))
x, gate, up = (rng.standard_normal(s, dtype=np.DTYPE) for s in shapes)
down, index = rng.standard_normal((3, 24, 70), dtype=np.DTYPE), rng.integers(0, 3, (40, 2))
w = rng.random((40, 2), dtype=np.DTYPE)
args = x, index, w, gate, up, down
digest = hashlib.sha256()
for activation in ops.ACTIVATIONS:
    y, saved = ops.experts_forward(*args, activation=activation, save=True)
    d = ops.experts_backward(y, saved, *args, activation=activation)
    for a in (y, d.x, d.top_k_weights, d.gate, d.up, d.down):
        digest.update(a.tobytes())
print(molae.show_config("dict")["kernels"]["isa"], digest.hexdigest())
"""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_instruction_set_gives_the_same_layer(python, dtype):
    """All but float32 products give the same bits; OpenBLAS's core does not follow the variable."""
    runs = {}
    for disabled in ("", "avx512", "avx512,avx2"):
        code = WHOLE_LAYER.replace("DTYPE", dtype)
        isa, digest = python(code, MOLAE_DISABLE_ISA=disabled).split()
        # Where the table has a product of its own for these 17 and more rows, BLAS is not asked.
        if dtype == "float64" or not _core.rows_f32_native(isa):
            runs[isa] = digest
    assert "ref" in runs
    assert len(set(runs.values())) == 1


@given(
    seed=st.integers(0, 2**32 - 1),
    N=st.integers(0, 12),
    K=st.integers(1, 5),
    E=st.integers(1, 6),
    D=st.integers(1, 12),
    F=st.integers(1, 9),
    form=st.sampled_from(["gauge", "plain"]),
    groups=st.tuples(*[st.integers(1, 4)] * 3),
    ranks=st.lists(st.none() | st.integers(0, 12), min_size=1, max_size=4),
    bias=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
)
@settings(max_examples=150)
def test_any_layer(seed, N, K, E, D, F, form, groups, ranks, bias, activation):
    made = layer(
        seed,
        N,
        K,
        E,
        D,
        F,
        form=form,
        groups=groups,
        ranks=tuple(None if r is None else min(r, D) for r in ranks),
        bias=bias,
        activation=activation,
    )
    dy = np.random.default_rng(0).standard_normal(made.x.shape)
    check_forward(made, ops.latent_experts_forward(*made.args, **made.options))
    check_backward(made, dy, flat(run(made, dy)))
