"""molae.ops: what is refused, and that nothing leaks."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from moe_layers import ROLES, layer
from test_ops_forward import KINDS

from molae import _core, ops
from molae.errors import ArgumentError, MolaeError, ShapeError
from molae.ops import Gradients, Projection, Saved
from molae.ops.call import Call

F32, F64, BF16 = np.float32, np.float64, ml_dtypes.bfloat16
N, K, E, D, F = 6, 2, 4, 10, 5


def dense(dtype=F64):
    made = layer(1, N, K, E, D, F, dtype=dtype)
    for role in ROLES:
        setattr(made, role, getattr(made, role).private[0].copy())
    return made


def forward(x=None, index=None, weights=None, gate=None, up=None, down=None, **options):
    made = dense()
    given = (x, index, weights, gate, up, down)
    args = [b if a is None else a for a, b in zip(given, made.args, strict=True)]
    return ops.experts_forward(*args, **options)


def zeros(*shape, dtype=F64):
    return np.zeros(shape, dtype)


def readonly(a):
    a.flags.writeable = False
    return a


BAD = [
    ({"x": zeros(N, D + 1)}, ShapeError, "gate[0]: expected shape (F=5, D=11), got (5, 10)"),
    ({"x": zeros(D)}, ShapeError, "x: expected shape (N, D), got (10,)"),
    ({"x": zeros(N, D, dtype=np.int64)}, ArgumentError, "x: expected float32, float64"),
    ({"x": zeros(N, D, dtype=np.float16)}, ArgumentError, "x: expected float32, float64 or bf"),
    ({"x": zeros(N, D, dtype=F32)}, ArgumentError, "top_k_weights: expected float32, got float64"),
    ({"index": zeros(N, K)}, ArgumentError, "top_k_index: expected whole numbers, got float64"),
    ({"index": np.zeros(N, int)}, ShapeError, "top_k_index: expected shape (N, K), got (6,)"),
    ({"index": np.full((N, K), 5)}, ArgumentError, "top_k_index: expected 0 to E"),
    ({"index": np.full((N, K), -1)}, ArgumentError, "top_k_index: expected 0 to E"),
    ({"index": np.zeros((N + 1, K), int)}, ShapeError, "top_k_index: expected shape (N=6, K)"),
    ({"weights": zeros(N, K + 1)}, ShapeError, "top_k_weights: expected shape (N=6, K=2)"),
    ({"weights": zeros(N, K, dtype=F32)}, ArgumentError, "top_k_weights: expected float64"),
    ({"gate": zeros(E, D, F)}, ShapeError, "gate[0]: expected shape (F=10, D=10), got (10, 5)"),
    ({"up": zeros(E, D, F)}, ShapeError, "up[0]: expected shape (F=5, D=10), got (10, 5); trans"),
    ({"down": zeros(E, F, D)}, ShapeError, "down[0]: expected shape (D=10, F=5), got (5, 10); t"),
    ({"down": zeros(E + 1, D, F)}, ShapeError, "the same number of experts, got [4, 4, 5]"),
    ({"up": zeros(F, D)}, ShapeError, "up: expected a Projection or an array (E, F, D), got (5"),
    ({"up": [1]}, ArgumentError, "up: expected an array"),
    ({"up": zeros(E, F, D, dtype=F32)}, ArgumentError, "up: expected float64 for this x, got"),
    ({"up": zeros(E, D, F).swapaxes(1, 2)}, ArgumentError, "up[0]: the array is not C-contiguous"),
    ({"up": zeros(E, F, 2 * D)[:, :, ::2]}, ArgumentError, "up[0]: the array is not C-contiguous"),
    ({"gate_bias": zeros(E, D)}, ShapeError, "gate_bias: expected shape (E=4, F=5), got (4, 10)"),
    ({"down_bias": zeros(E, F)}, ShapeError, "down_bias: expected shape (E=4, D=10), got (4, 5)"),
    ({"up_bias": zeros(E, F, dtype=F32)}, ArgumentError, "up_bias: expected float64, got float32"),
    ({"activation": "tanh"}, ArgumentError, "activation: expected one of silu, gelu"),
    ({"out": zeros(N, D + 1)}, ShapeError, "out: expected shape (N=6, D=10), got (6, 11)"),
    ({"out": zeros(N, D, dtype=F32)}, ArgumentError, "out: expected float64, got float32"),
    ({"out": zeros(D, N).T}, ArgumentError, "out: the array is not C-contiguous"),
    ({"out": zeros(N, 2 * D)[:, ::2]}, ArgumentError, "out: the array is not C-contiguous"),
    ({"out": readonly(zeros(N, D))}, ArgumentError, "out: the array is read-only"),
    ({"out": [0]}, ArgumentError, "out: expected an array"),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD)
def test_bad_arguments_name_the_argument(options, error, text):
    with pytest.raises(error) as caught:
        forward(**options)
    assert text in str(caught.value)


def test_outputs_that_overlap_are_refused():
    x = zeros(N, D)
    with pytest.raises(ArgumentError, match="out: an array that is written overlaps x"):
        forward(x=x, out=x)
    both = zeros(2 * N - 1, D)
    with pytest.raises(ArgumentError, match="overlaps x"):
        forward(x=both[:N], out=both[N - 1 :])
    gate = zeros(E, F, D)
    with pytest.raises(ArgumentError, match="out: an array that is written overlaps gate"):
        forward(gate=gate, out=gate.reshape(-1, D)[1 : N + 1])
    made = dense()
    y, saved = ops.experts_forward(*made.args, save=True)
    for out, name in (
        (Gradients(x=y), "dy"),
        (Gradients(x=made.x), "x"),
        (Gradients(gate=made.up), "up"),
        (Gradients(gate=gate, up=gate), "d(gate|up)"),
    ):
        with pytest.raises(ArgumentError, match=f"an array that is written overlaps {name}"):
            ops.experts_backward(y, saved, *made.args, out=out)


def test_inputs_may_be_read_only_strided_or_lists():
    made = dense()
    y = ops.experts_forward(*made.args)
    same = ops.experts_forward(
        np.asfortranarray(made.x),
        made.index.tolist(),
        np.repeat(made.weights, 2, axis=1)[:, ::2],
        *(readonly(getattr(made, role)) for role in ROLES),
    )
    assert same.tobytes() == y.tobytes()
    small = ops.experts_forward(made.x, made.index.astype(np.int32), *made.args[2:])
    assert small.tobytes() == y.tobytes()


def test_what_is_known_comes_with_its_arrays():
    made = dense()
    _, saved = ops.latent_experts_forward(*made.args, save=True)
    for options in ({"save": True, "known": ["gate"]}, {"save": saved, "known": ["u"]}):
        with pytest.raises(ArgumentError, match="known: expected some of gate, up, z_up, and save"):
            ops.latent_experts_forward(*made.args, **options)
    short = replace(saved, gate=saved.gate[1:])
    with pytest.raises(ShapeError, match=r"saved.gate: expected shape"):
        ops.latent_experts_forward(*made.args, save=short, known=["gate"])
    with pytest.raises(ArgumentError, match="overlaps"):
        ops.latent_experts_forward(*made.args, save=replace(saved, up=saved.gate))


def test_bad_gradients_name_the_argument():
    made = dense()
    y, saved = ops.experts_forward(*made.args, save=True)

    def run(**options):
        return ops.experts_backward(
            options.pop("dy", y), options.pop("saved", saved), *made.args, **options
        )

    for options, error, text in [
        ({"dy": zeros(N, D + 1)}, ShapeError, "dy: expected shape (N=6, D=10)"),
        ({"dy": zeros(N, D, dtype=F32)}, ArgumentError, "dy: expected float64"),
        ({"out": Gradients(x=zeros(N, D, dtype=F32))}, ArgumentError, "dx: expected float64"),
        ({"out": Gradients(x=readonly(zeros(N, D)))}, ArgumentError, "dx: the array is read-only"),
        ({"out": Gradients(top_k_weights=zeros(N, 3))}, ShapeError, "dtop_k_weights: expected"),
        ({"out": Gradients(gate=zeros(E, D, F))}, ShapeError, "dgate: expected an array of the"),
        ({"out": Gradients(gate=zeros(E, F, D, dtype=F32))}, ArgumentError, "dgate[0]: expected"),
        (
            {"saved": Saved(saved.gate[1:], saved.up, saved.z_gate, saved.z_up, saved.u)},
            ShapeError,
            "saved.gate: expected shape (S=12, F=5), got (11, 5)",
        ),
    ]:
        with pytest.raises(error) as caught:
            run(**options)
        assert text in str(caught.value)


def test_bad_projections_name_the_argument():
    A, M, perm = zeros(2, F, 3), zeros(3, D - 3), np.arange(D, dtype=np.int32)
    good = {
        "groups": [[0, 1], [3, 2]],
        "ranks": [3, 3],
        "private": [A, A],
        "shared": [M, M],
        "perm": [perm, perm],
    }
    Projection(**good)
    for change, error, text in [
        ({"groups": [[0, 1], [1, 2]]}, ArgumentError, "each expert of 0 to 3 in exactly one"),
        ({"ranks": [3]}, ShapeError, "ranks: expected one a group, 2, got 1"),
        ({"private": [A, A[:1]]}, ShapeError, "private[1]: expected three axes, the first k=2"),
        ({"private": [A, None]}, ArgumentError, "private[1]: missing"),
        ({"ranks": [3, -1]}, ArgumentError, "ranks[1]: expected None or 0 and more, got -1"),
        ({"perm": [perm, perm * 0]}, ShapeError, "perm[1]: expected a permutation"),
        ({"form": "x"}, ArgumentError, "form: expected gauge or plain"),
    ]:
        with pytest.raises(error) as caught:
            Projection(**{**good, **change})
        assert text in str(caught.value)

    made = dense()

    def run(**change):
        p = Projection(**{**good, **change})
        return ops.latent_experts_forward(*made.args[:3], p, made.up, made.down)

    run()
    for change, error, text in [
        ({"private": [A, zeros(2, F, 4)]}, ShapeError, "gate[2]: expected shape (F=5, R=3)"),
        ({"shared": [M, zeros(3, D)]}, ShapeError, "gate.shared[1]: expected shape (R=3, M=7)"),
        ({"shared": [M, None]}, ArgumentError, "group 1: shared, perm: missing"),
        ({"perm": [perm, None]}, ArgumentError, "group 1: shared, perm: missing"),
        ({"perm": [perm, perm[:-1]]}, ShapeError, "gate.perm: expected shape (D=10,)"),
        ({"perm": [perm, perm.astype(int)]}, ArgumentError, "gate.perm[1]: expected an array of"),
        (
            {"ranks": [3, None], "private": [A, zeros(2, F, D)]},
            ArgumentError,
            "gate.shared[1]: group 1 is dense",
        ),
        (
            {"private": [A, A.astype(F32)]},
            ArgumentError,
            "gate[2]: expected float64, got float32",
        ),
    ]:
        with pytest.raises(error) as caught:
            run(**change)
        assert text in str(caught.value)
    with pytest.raises(ArgumentError, match="rank: expected -1"):
        run(ranks=[3, 11], private=[A, zeros(2, F, 11)], shared=[M, None])
    with pytest.raises(ArgumentError, match="groups: expected each"):
        ops.route([[0]], 2, groups=[[0]])


def test_the_extension_checks_what_the_face_checked():
    made = layer(2, N, K, E, D, F, **KINDS["gauge"])
    call = Call.of(*made.args[:3], made.args[3:], (None, None, None), ("silu", 0.0, 0.0)).core
    y = zeros(N, D)
    _core.experts_forward(y, None, 0, call, 1, False)

    def changed(i, value):
        return (*call[:i], value, *call[i + 1 :])

    gate = call[3]
    bad_perm = np.full(D, D, np.int32)
    for bad in (
        changed(6, E + 1),
        changed(6, 0),
        changed(7, 0),
        changed(8, 6),
        changed(8, -1),
        changed(3, (gate[0][:-1], *gate[1:])),
        changed(3, (gate[0], gate[1] + 9, *gate[2:])),
        changed(3, (gate[0], gate[1] * 0 - 1, *gate[2:])),
        changed(3, (gate[0], gate[1], gate[2] + 1, *gate[3:])),
        changed(3, (gate[0], gate[1], gate[2], [None] * len(gate[3]), *gate[4:])),
        changed(3, (*gate[:4], [bad_perm] * len(gate[4]), *gate[5:])),
        changed(3, ([None] * E, *gate[1:])),
        changed(0, "x"),
    ):
        with pytest.raises(MolaeError):
            _core.experts_forward(y, None, 0, bad, 1, False)
    with pytest.raises(MolaeError):
        _core.experts_forward(y, None, 0, call, 0, False)
    with pytest.raises(MolaeError):
        _core.route([[0, 3]], 2, None, 0)
    with pytest.raises(MolaeError):
        _core.route([[0, 1]], 2, [0, 2], 2)


def test_every_failed_allocation_is_an_error_without_a_leak():
    made = layer(3, N, K, E, D, F, bias=True, **KINDS["mixed"])
    y, saved = ops.latent_experts_forward(*made.args, **made.options, save=True)
    live = _core.mem_live()
    for call in (
        lambda: ops.latent_experts_forward(*made.args, **made.options),
        lambda: ops.latent_experts_backward(y, saved, *made.args, **made.options),
        lambda: ops.route(made.index, E),
    ):
        failures = 0
        for n in range(1, 100):
            _core.mem_fail_after(n)
            try:
                call()
                break
            except MemoryError:
                failures += 1
            finally:
                _core.mem_fail_after(0)
            assert _core.mem_live() == live
        assert failures >= 1
    assert _core.mem_live() == live


def test_reference_counts_stay_flat():
    made = layer(4, N, K, E, D, F, dtype=BF16, io=F32, bias=True, **KINDS["mixed"])
    out = np.zeros((N, D), F32)
    _, saved = ops.latent_experts_forward(*made.args, **made.options, save=True)
    watched = [
        *(a for p in made.args[3:] for a in (*p.private, *p.shared, *p.perm) if a is not None),
        *(m for p in made.args[3:] for m in p._by_expert if m is not None),
        *made.biases.values(),
        *saved._core(),
        made.x,
        made.weights,
        made.index,
        out,
        made.gate.private[0].dtype,
    ]

    def counts():
        gc.collect()
        return [sys.getrefcount(a) for a in watched]

    def everything():
        ops.latent_experts_forward(*made.args, **made.options, out=out)
        ops.latent_experts_backward(out, saved, *made.args, **made.options)
        ops.route(made.index, E, made.gate.groups)
        with pytest.raises(ArgumentError):
            ops.latent_experts_forward(*made.args, **made.options, out=made.x)
        with pytest.raises(ShapeError):
            ops.latent_experts_backward(out[1:], saved, *made.args, **made.options)

    everything()
    before = counts()
    for _ in range(30):
        everything()
    assert counts() == before
