"""molae.fit.fit_layer: what it is made of, in blocks and at once, and its refusals."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import molae
from molae import _core
from molae.errors import ArgumentError, NonFiniteError
from molae.fit import (
    LayerInput,
    answer_error,
    factor_weighted,
    fit_layer,
    layer_moments,
    refit,
    row_metric,
)
from molae.fit.layer import FLOOR, _blocks
from molae.ops import Projection

TYPES = ("gate_proj", "up_proj", "down_proj")
QUADS = [[5, 0, 3, 6], [1, 2, 4, 7]]
PAIRS = [[5, 0], [3, 6], [4, 1], [7, 2]]
ALONE = [[e] for e in (6, 1, 0, 7, 2, 3, 5, 4)]
PARTS = {
    "gate_proj": (QUADS, [6, 5]),
    "up_proj": (PAIRS, [5, 4, 6, 3]),
    "down_proj": (ALONE, [4] * 8),
}


def layer(seed=0, E=8, D=12, F=7, N=2500, K=2, dtype=np.float32, idle=None):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((N, D)) * np.logspace(0, -1, D)).astype(dtype)
    index = rng.integers(0, E, (N, K))
    if idle is not None:
        index[index == idle] = E
    given = LayerInput(x, index, rng.random((N, K)).astype(dtype))
    shapes = ((E, F, D), (E, F, D), (E, D, F))
    W = {
        kind: rng.standard_normal(shape).astype(dtype)
        for kind, shape in zip(TYPES, shapes, strict=True)
    }
    return given, W


def dense(W):
    return tuple(Projection.dense(np.asarray(W[kind])) for kind in TYPES)


def arrays(found):
    for kind in TYPES:
        p = found.projections[kind]
        yield from (a for a in (*p.private, *p.shared, *p.perm) if a is not None)
    for f in found.factors.values():
        yield from (f.energy, f.error, f.group_error, f.discarded_energy, *f.spectrum)
    yield from (np.array(errors) for errors in found.layer_error.values())


def test_it_is_its_parts_one_after_the_other():
    given, W = layer(dtype=np.float64)
    found = fit_layer(given, W, PARTS, refits=(("down_proj", 2), ("up_proj", 1)))
    moments = layer_moments(given, *dense(W)).raise_floor(FLOOR)
    student = {}
    for kind, (groups, ranks) in PARTS.items():
        down = kind == "down_proj"
        factors = factor_weighted(
            W[kind],
            (moments.hidden if down else moments.x).moment,
            ranks,
            groups=groups,
            side="output" if down else "input",
            row_metric=moments.row_metric.get(kind),
        )
        student[kind] = Projection.from_factors(factors)
        for name in ("energy", "error", "group_error", "discarded_energy"):
            assert np.allclose(getattr(found.factors[kind], name), getattr(factors, name))
        assert found.factors[kind].groups == tuple(map(tuple, groups))
    metric = row_metric(moments, student["up_proj"])
    for kind, steps in (("down_proj", 2), ("up_proj", 1)):
        one = refit(
            given,
            tuple(student[k] for k in TYPES),
            dense(W),
            kind.removesuffix("_proj"),
            metric=metric,
            steps=steps,
        )
        assert found.layer_error[kind] == pytest.approx([one.error[0], one.error[-1]], rel=1e-9)
        student[kind] = one.projection
    for kind in TYPES:
        for mine, theirs in zip(
            found.projections[kind].private, student[kind].private, strict=True
        ):
            assert np.allclose(mine, theirs, atol=1e-9)
        for e in range(8):
            assert np.allclose(
                found.factors[kind].reconstruct(e),
                replace(factors_of(student[kind], found.factors[kind])).reconstruct(e),
                atol=1e-9,
            )
    error = answer_error(given, tuple(found.projections[k] for k in TYPES), dense(W))
    assert error == pytest.approx(found.layer_error["up_proj"][-1], rel=1e-9)
    assert error < found.layer_error["down_proj"][0]


def factors_of(projection, like):
    return replace(like, shared=projection.shared, private=projection.private)


@pytest.mark.parametrize("at_once", [4, 5, 7])
@pytest.mark.parametrize("idle", [None, 2])
def test_blocks_give_the_same_bits(at_once, idle):
    given, W = layer(1, idle=idle)
    given = replace(given, lost=0.1 * np.random.default_rng(3).standard_normal(given.x.shape))
    W = {kind: w.astype(ml_dtypes.bfloat16) for kind, w in W.items()}
    whole = fit_layer(given, W, PARTS)
    some = fit_layer(given, W, PARTS, experts_at_once=at_once)
    pairs = list(zip(arrays(whole), arrays(some), strict=True))
    assert len(pairs) > 40
    for a, b in pairs:
        assert np.array_equal(a, b)
    assert whole.factors["up_proj"].ranks == some.factors["up_proj"].ranks == (5, 4, 6, 3)


def test_threads_do_not_show_and_nothing_is_left():
    given, W = layer(2)
    found = []
    for threads in (1, 3):
        with molae.num_threads(threads):
            found.append(list(arrays(fit_layer(given, W, PARTS))))
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
    del found
    before = _core.mem_live()
    fit_layer(given, W, PARTS)
    assert _core.mem_live() == before


def test_it_beats_the_fit_without_data_and_without_a_refit():
    given, W = layer(4, N=3000)
    own = dense(W)

    def error(found):
        return answer_error(given, tuple(found.projections[k] for k in TYPES), own)

    blind = {
        kind: Projection.from_factors(
            molae.fit.factor_shared(
                W[kind], ranks, groups=groups, side="output" if kind == "down_proj" else "input"
            )
        )
        for kind, (groups, ranks) in PARTS.items()
    }
    without = answer_error(given, tuple(blind[k] for k in TYPES), own)
    plain, whole = fit_layer(given, W, PARTS, refits=()), fit_layer(given, W, PARTS)
    assert error(whole) < 0.95 * error(plain) < 0.95 * without
    assert not plain.layer_error


def test_types_that_are_not_named_stay():
    given, W = layer(5)
    found = fit_layer(given, W, {"down_proj": PARTS["down_proj"]})
    assert list(found.factors) == list(found.layer_error) == ["down_proj"]
    assert found.projections["gate_proj"].ranks == (None,) * 8
    assert np.shares_memory(found.projections["gate_proj"].private[3], W["gate_proj"])


def test_float16_stays_float16():
    given, W = layer(6)
    found = fit_layer(given, {k: w.astype(np.float16) for k, w in W.items()}, PARTS)
    for kind in PARTS:  # computed with as float32, with the values that are stored
        stored, own = found.factors[kind], found.projections[kind]
        assert own.dtype == np.float32
        assert {a.dtype for a in (*stored.private, *stored.shared)} == {np.dtype(np.float16)}
        assert all(np.array_equal(a, b) for a, b in zip(stored.private, own.private, strict=True))


def test_groups_are_never_cut():
    assert _blocks([QUADS, PAIRS, ALONE], 4) == [(5, 0, 3, 6), (1, 2, 4, 7)]
    assert _blocks([PAIRS, ALONE], 4) == [(5, 0, 3, 6), (4, 1, 7, 2)]
    assert _blocks([ALONE], 3) == [(6, 1, 0), (7, 2, 3), (5, 4)]
    crossed = [[0, 1], [2, 3], [4, 5], [6, 7]], [[1, 2], [0, 3], [4], [5], [6], [7]]
    assert _blocks(crossed, 4) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    with pytest.raises(ArgumentError, match="groups tie 4 experts together.*room for 3"):
        _blocks(crossed, 3)


def test_what_makes_no_sense_is_refused():
    given, W = layer(7)
    with pytest.raises(ArgumentError, match="groups tie 4"):
        fit_layer(given, W, PARTS, experts_at_once=3)
    for stacks, parts in (({"up_proj": W["up_proj"]}, PARTS), (W, {}), (W, {"router": PARTS})):
        with pytest.raises(ArgumentError, match="W, parts: expected all and some of"):
            fit_layer(given, stacks, parts)
    bad = {kind: w.copy() for kind, w in W.items()}
    bad["up_proj"][6, 1, 1] = np.inf
    for at_once in (None, 4):
        with pytest.raises(NonFiniteError):
            fit_layer(given, bad, PARTS, experts_at_once=at_once)
    bad = {kind: w.copy() for kind, w in W.items()}
    bad["down_proj"][6, 1, 1] = np.nan  # nothing reads it before it is factored
    with pytest.raises(NonFiniteError) as caught:
        fit_layer(given, bad, {"down_proj": PARTS["down_proj"]}, refits=(), experts_at_once=4)
    assert caught.value.expert == 6 or caught.value.expert is None
