"""molae.fit.refit and layer_moments against float64 references, and their refusals."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

import molae
from molae import _core
from molae.errors import ArgumentError, NonFiniteError, ShapeError
from molae.fit import (
    LayerInput,
    answer_error,
    factor_shared,
    layer_energies,
    layer_moments,
    refit,
    row_metric,
)
from molae.ops import Projection, latent_experts_forward

F64 = np.float64


def layer(seed=0, E=5, D=9, F=6, N=300, K=2, dtype=F64, idle=True):
    """An input and dense experts; expert E − 1 is met by nobody, and some slots by none."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((N, D)).astype(dtype)
    index = rng.integers(0, E - 1 if idle else E, (N, K))
    index[rng.random((N, K)) < 0.1] = E
    given = LayerInput(x, index, rng.random((N, K)).astype(dtype))
    shapes = ((E, F, D), (E, F, D), (E, D, F))
    return given, tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def latent(W, side, rank=4, form="gauge", groups=((0, 3), (1,), (2, 4))):
    factors = factor_shared(W, rank, groups=groups, side=side, form=form)
    return Projection.from_factors(factors)


def student_of(W, form="gauge", groups=((0, 3), (1,), (2, 4)), rank=4):
    return (
        latent(W[0], "input", rank, form, groups),
        latent(W[1], "input", rank, form, groups),
        latent(W[2], "output", rank, form, groups),
    )


def dense(W):
    return tuple(Projection.dense(w) for w in W)


def metric_of(given, student, W):
    return row_metric(layer_moments(given, *dense(W)), student[1])


def answer(given, experts):
    return latent_experts_forward(given.x, given.index, given.weights, *experts)


def distance(given, student, teacher):
    aim = answer(given, teacher) + (0 if given.lost is None else given.lost)
    return np.linalg.norm(aim - answer(given, student)) / np.linalg.norm(aim)


def with_private(student, at, e, private):
    """The layer with another private factor of one expert."""
    own = student[at]
    stacks = [a.copy() for a in own.private]
    for group, stack in zip(own.groups, stacks, strict=True):
        if e in group:
            stack[group.index(e)] = private
    return (*student[:at], replace(own, private=tuple(stacks)), *student[at + 1 :])


def least_squares(given, student, teacher, at, hold):
    """All private factors of one type by a dense solve: the answer's columns one by one."""
    own = student[at]
    base = answer(given, student)
    aim = answer(given, teacher) + (0 if given.lost is None else given.lost)
    columns, places = [], []
    for group, stack in zip(own.groups, own.private, strict=True):
        for n, e in enumerate(group):
            for place in np.ndindex(stack[n].shape):
                unit = stack[n].copy()
                unit[place] += 1
                columns.append((answer(given, with_private(student, at, e, unit)) - base).ravel())
                places.append((e, place))
    J, r = np.array(columns).T, (aim - base).ravel()
    change = np.linalg.solve(J.T @ J + hold(places), J.T @ r)
    return np.linalg.norm(r - J @ change) / np.linalg.norm(aim), change


@pytest.mark.parametrize("form", ["gauge", "plain"])
@pytest.mark.parametrize("lost", [False, True])
def test_down_is_the_least_squares_solution(form, lost):
    given, W = layer(N=120, E=4, D=7, F=5)
    if lost:
        extra = 0.3 * np.random.default_rng(8).standard_normal(given.x.shape)
        given = replace(given, lost=extra)
    student, teacher = student_of(W, form, ((0, 3), (1,), (2,)), 3), dense(W)
    hold = 0.05
    own = student[2]
    bases = [
        b if p is None else molae.fit.ungauge(b, p)
        for b, p in zip(own.shared, own.perm, strict=True)
    ]
    moments = layer_moments(given, *student[:2], teacher[2]).hidden.moment

    def held(places):
        """hold tr(H) / F in the metric of the shared factor."""
        M = np.zeros((len(places), len(places)))
        for g, group in enumerate(own.groups):
            gram = bases[g] @ bases[g].T
            for e in group:
                level = hold * moments[e].trace() / len(moments[e])
                mine = [i for i, (other, _) in enumerate(places) if other == e]
                for i in mine:
                    for j in mine:
                        (a, b), (c, d) = places[i][1], places[j][1]
                        M[i, j] = level * gram[a, c] * (b == d) + 1e-12 * (i == j)
        return M

    best, _ = least_squares(given, student, teacher, 2, held)
    found = refit(given, student, teacher, "down", steps=60, hold=hold)
    assert found.error[0] == pytest.approx(distance(given, student, teacher), rel=1e-10)
    after = distance(given, (*student[:2], found.projection), teacher)
    assert after == pytest.approx(best, rel=1e-6)
    assert found.error[-1] == pytest.approx(after, rel=1e-8)
    assert after < found.error[0]


def test_up_reaches_the_least_squares_error():
    given, W = layer(1, N=150, E=4, D=6, F=4, idle=False)
    student, teacher = student_of(W, groups=((0, 3), (1,), (2,)), rank=3), dense(W)
    metric = metric_of(given, student, W)
    best, _ = least_squares(given, student, teacher, 1, lambda places: 1e-9 * np.eye(len(places)))
    found = refit(given, student, teacher, "up", metric=metric, steps=200, hold=1e-8)
    after = distance(given, (student[0], found.projection, student[2]), teacher)
    assert after == pytest.approx(best, rel=1e-4)
    assert after < 0.95 * found.error[0]


def test_the_check_rejects_a_wrong_answer():
    given, W = layer(2, N=120, E=4, D=7, F=5)
    student, teacher = student_of(W, groups=((0, 3), (1,), (2,)), rank=3), dense(W)
    found = refit(given, student, teacher, "down", steps=60)
    own = found.projection
    off = replace(own, private=tuple(a * (1 + 1e-3) for a in own.private))
    better = distance(given, (*student[:2], own), teacher)
    assert abs(distance(given, (*student[:2], off), teacher) / better - 1) > 1e-6


@drawn(st.integers(0, 2**32), st.sampled_from(["up", "down"]), st.sampled_from([1, 3, 5]))
@settings(max_examples=20, deadline=None)
def test_the_objective_never_rises(seed, which, rank):
    given, W = layer(seed)
    student, teacher = student_of(W, rank=rank), dense(W)
    metric = metric_of(given, student, W)
    found = refit(given, student, teacher, which, metric=metric, steps=5, hold=0.01)
    assert (np.diff(found.objective) <= 1e-12 * found.objective[0]).all()
    changed = list(student)
    changed[1 if which == "up" else 2] = found.projection
    assert distance(given, changed, teacher) == pytest.approx(found.error[-1], rel=1e-6, abs=1e-9)
    assert found.error[-1] <= found.error[0] * (1 + 1e-9)


@pytest.mark.parametrize("which", ["up", "down"])
def test_what_nobody_met_and_what_has_no_rank_stays(which):
    given, W = layer(3)
    student = student_of(W, groups=((0, 3), (1,), (2,), (4,)), rank=[4, 0, 4, 4])
    found = refit(
        given, student, dense(W), which, metric=metric_of(given, student, W), steps=3
    ).projection
    before = student[1 if which == "up" else 2]
    assert np.array_equal(found.private[3], before.private[3])  # expert 4
    assert found.ranks == before.ranks
    assert found.shared is before.shared or all(
        np.array_equal(a, b) for a, b in zip(found.shared, before.shared, strict=True)
    )
    assert np.abs(found.private[0] - before.private[0]).max() > 1e-3


@pytest.mark.parametrize("which", ["up", "down"])
def test_stored_types_are_kept_and_a_dense_type_is_fitted_too(which):
    given, W = layer(4, dtype=np.float32)
    narrow = tuple(w.astype(ml_dtypes.bfloat16) for w in W)
    teacher = dense(narrow)
    student = student_of(narrow)
    metric = metric_of(given, student, narrow)
    found = refit(given, student, teacher, which, metric=metric, steps=3)
    assert found.projection.dtype == ml_dtypes.bfloat16
    changed = list(student)
    changed[1 if which == "up" else 2] = found.projection
    # Rounded to 8 bits in the end.
    assert distance(given, changed, teacher) < found.error[-1] + 0.01 < found.error[0]
    if which == "down":
        whole = (*student[:2], teacher[2])
        again = refit(given, whole, teacher, "down", steps=3)
        assert again.error[-1] < 0.95 * again.error[0]


def test_threads_do_not_show():
    given, W = layer(5, N=2500, dtype=np.float32)
    student, teacher = student_of(W), dense(W)
    found = []
    for threads in (1, 3):
        with molae.num_threads(threads):
            metric = metric_of(given, student, W)
            one = refit(given, student, teacher, "up", metric=metric)
            two = refit(given, student, teacher, "down")
            found.append([*one.projection.private, *two.projection.private, one.error])
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def test_moments_by_the_definition():
    given, W = layer(6, N=2100, E=3, D=5, F=4, K=1)
    found = layer_moments(given, *dense(W))
    gate, up, down = W
    for e in range(3):
        t, k = np.nonzero(given.index == e)
        g, x = given.weights[t, k][:, None], given.x[t]
        a, u = x @ gate[e].T, x @ up[e].T
        s = 1 / (1 + np.exp(-a))
        assert found.x.count[e] == len(t)
        assert np.allclose(found.x.moment[e], (g * x).T @ (g * x), rtol=1e-10)
        h = g * a * s * u
        assert np.allclose(found.hidden.moment[e], h.T @ h, rtol=1e-10, atol=1e-12)
        if not len(t):
            continue
        for kind, felt in (("gate_proj", u * s * (1 + a * (1 - s))), ("up_proj", a * s)):
            S = (g * felt).T @ (g * felt) / np.square(g).sum() * (down[e].T @ down[e])
            assert np.allclose(found.row_metric[kind][e], S, rtol=1e-9, atol=1e-12)
    assert found.x.count[2] == 0
    diagonal = found.row_metric["up_proj"][2].diagonal()
    assert (diagonal > 0).all()  # of an expert that nobody met: as the others on average


def test_nothing_is_left_behind():
    given, W = layer(7)
    student, teacher = student_of(W), dense(W)
    refit(given, student, teacher, "down")
    before = _core.mem_live()
    for _ in range(3):
        refit(given, student, teacher, "down")
    assert _core.mem_live() == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"which": "gate"}, ArgumentError, "which: expected up or down"),
        ({"which": "up"}, ArgumentError, "metric: needed"),
        ({"steps": -1}, ArgumentError, "steps >= 0"),
        ({"hold": 0.0}, ArgumentError, "hold > 0"),
        ({"hold": float("nan")}, ArgumentError, "hold > 0"),
    ],
)
def test_what_makes_no_sense_is_refused(change, error, message):
    given, W = layer()
    options = {"which": "down"} | change
    with pytest.raises(error, match=message):
        refit(given, student_of(W), dense(W), **options)


@pytest.mark.parametrize("which", ["up", "down"])
def test_answers_that_are_known_are_the_teachers(which):
    given, W = layer(11)
    given = replace(given, lost=0.1 * np.random.default_rng(1).standard_normal(given.x.shape))
    student, teacher = student_of(W), dense(W)
    metric = metric_of(given, student, W)
    want = refit(given, student, teacher, which, metric=metric)
    known = replace(given, answers=answer(given, teacher))
    found = refit(known, student, student, which, metric=metric)  # the teacher is not asked
    assert found.error == pytest.approx(want.error, rel=1e-12)
    for a, b in zip(found.projection.private, want.projection.private, strict=True):
        assert np.allclose(a, b, rtol=1e-9, atol=1e-12)
    assert known.first(7).answers.shape == (7, given.x.shape[1])


@pytest.mark.parametrize("dense_up", [False, True])
@pytest.mark.parametrize("which", ["up", "down"])
def test_what_is_kept_is_what_would_be_made_again(which, dense_up):
    """To the bit, over several chunks, whatever the arrays held before."""
    given, W = layer(12, N=2500, dtype=np.float32)
    student, teacher = student_of(W), dense(W)
    if dense_up:
        student = (student[0], teacher[1], student[2])
    metric = metric_of(given, student, W)
    asked = {}

    def room(name, shape):
        asked[name] = np.full(shape, np.nan, np.float32)
        return asked[name]

    want = refit(given, student, teacher, which, metric=metric, steps=3)
    found = refit(replace(given, room=room), student, teacher, which, metric=metric, steps=3)
    for a, b in zip(found.projection.private, want.projection.private, strict=True):
        assert np.array_equal(a, b)
    assert np.array_equal(found.error, want.error)
    second = {"up": set() if dense_up else {"z_up"}, "down": {"up"}}[which]
    assert set(asked) == {"gate"} | second
    assert asked["gate"].shape == (2500 * 2, 6)
    assert np.isfinite(asked["gate"][:2048]).any()


def test_a_wrong_shape_and_nan_are_refused():
    given, W = layer()
    with pytest.raises(ShapeError, match="answers: expected"):
        refit(replace(given, answers=given.x[:-1]), student_of(W), dense(W), "down")
    with pytest.raises(ShapeError, match="lost: expected"):
        refit(replace(given, lost=given.x[:-1]), student_of(W), dense(W), "down")
    bad = given.x.copy()
    bad[3, 1] = np.nan
    with pytest.raises(NonFiniteError):
        refit(replace(given, x=bad), student_of(W), dense(W), "down")
    with pytest.raises(NonFiniteError):
        layer_moments(replace(given, x=bad), *dense(W))


def test_some_experts_have_the_bits_that_they_have_among_all():
    given, W = layer(8, N=4500, dtype=np.float32)
    whole = layer_moments(given, *dense(W))
    energies = layer_energies(given, *dense(W)[:2])
    for name in ("count", "mass", "x", "hidden", "gate", "up"):
        assert np.array_equal(getattr(energies, name), getattr(whole.energies, name)), name
    traces = whole.x.moment.trace(axis1=1, axis2=2)
    assert np.allclose(energies.x, traces, rtol=1e-5)
    assert np.allclose(energies.hidden, whole.hidden.moment.trace(axis1=1, axis2=2), rtol=1e-5)
    for given_energies in (None, energies):
        some = layer_moments(given, *dense(W), experts=[4, 1], energies=given_energies)
        assert some.experts == (4, 1)
        for at, e in enumerate(some.experts):
            assert np.array_equal(some.x.moment[at], whole.x.moment[e])
            assert np.array_equal(some.hidden.moment[at], whole.hidden.moment[e])
            for kind, rows in some.row_metric.items():
                assert np.array_equal(rows[at], whole.row_metric[kind][e])
    before = whole.x.moment[2].copy()
    raised = whole.raise_floor(0.5).x.moment[2] - before
    assert np.allclose(raised, np.eye(len(before)) * 0.5 * energies.x.sum() / 5 / 9, atol=1e-3)
    for wrong in ([], [5], [1, 1]):
        with pytest.raises(ArgumentError, match="experts: expected"):
            layer_moments(given, *dense(W), experts=wrong)
    bad = given.x.copy()
    bad[3, 1] = np.nan
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        layer_energies(replace(given, x=bad), *dense(W)[:2])


# -------------------------------------------------------------- moments_product

ROOT, SOLVE, TIMES, PROJECT = range(4)


def products(op, W, M, ridge=0.0, *, left=False, dtype=None, threads=2):
    shape = [m.shape for m in M] if op == ROOT else [w.shape for w in W]
    if op == PROJECT:
        shape = [(len(w), len(w)) for w in W]
    found = [np.empty(s, dtype or getattr((W or M)[0], "dtype", F64)) for s in shape]
    _core.moments_product(op, left, found, W, M, ridge, threads)
    return found


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    ("dtype", "wide"), [(np.float32, np.float32), (np.float32, F64), (F64, F64)]
)
def test_moments_product(dtype, wide, left):
    rng = np.random.default_rng(9)
    n, ridge = 40, 0.1
    X = rng.standard_normal((3, 60, n))
    M = [np.ascontiguousarray((x.T @ x).astype(dtype)) for x in X] + [np.zeros((n, n), dtype)]
    W = [rng.standard_normal((rows, n)).astype(dtype) for rows in (5, 1, 70, 4)]
    roots = products(ROOT, [], M, ridge, dtype=wide)
    assert all(not np.tril(U, -1).any() for U in roots)
    given = [np.ascontiguousarray(w.T) for w in W] if left else W

    def turned(found):
        return [f.T for f in found] if left else found

    solved = products(SOLVE, given, roots, left=left, dtype=dtype)
    times = products(TIMES, given, M, left=left)
    for w, m, U, out, product, both in zip(
        W[:3], M, roots, turned(solved), turned(times), products(PROJECT, W, M), strict=False
    ):
        w, m = w.astype(F64), m.astype(F64)
        ridged = m + ridge * m.trace() / n * np.eye(n)
        want = np.linalg.solve(ridged, w.T).T
        # Condition below n / ridge; the rest is rounding to the type.
        loose = 4 * np.finfo(dtype).eps + 1e3 * n * np.finfo(F64).eps
        close = loose * np.abs(want).max() * (10 if dtype is wide else 1)
        assert np.abs(out - want).max() <= close
        assert np.abs(1.001 * out - want).max() > close
        found = U.astype(F64).T @ U.astype(F64)
        assert np.abs(found - ridged).max() <= 10 * np.finfo(wide).eps * ridged.max()
        for got, right in ((product, w @ m), (both, w @ m @ w.T)):
            near = 4 * loose * np.abs(right).max()
            assert np.allclose(got, right, rtol=0, atol=near)
            assert not np.allclose(1.001 * got, right, rtol=0, atol=np.abs(right).max() / 2e3)
    assert not solved[3].any()
    again = [w.copy() for w in given]
    _core.moments_product(SOLVE, left, again, again, roots, 0.0, 1)  # in place
    assert all(np.array_equal(a, b) for a, b in zip(again, solved, strict=True))


@pytest.mark.parametrize(
    ("op", "W", "M", "error", "message"),
    [
        (SOLVE, [np.ones((2, 3))], [], ShapeError, "one for each"),
        (ROOT, [np.ones((2, 3))], [np.eye(3)], ShapeError, "W, out: expected"),
        (SOLVE, [np.ones((2, 3))], [np.ones((2, 2))], ShapeError, "W"),
        (SOLVE, [np.ones((2, 3))], [np.eye(3, dtype=np.float32)], ArgumentError, "dtype of W"),
        (TIMES, [np.ones((2, 3), np.float32)], [np.eye(3)], ArgumentError, "dtype of W"),
        (TIMES, [np.ones((2, 3))] * 2, [np.eye(3), np.eye(3, dtype="f4")], ArgumentError, "one d"),
        (TIMES, [np.ones((2, 3))], [np.eye(3)[:2]], ShapeError, "moments"),
        (TIMES, [np.ones((2, 3))], ["no"], ArgumentError, "expected a matrix"),
        (TIMES, [np.full((2, 3), np.nan)], [np.eye(3)], NonFiniteError, "NaN or Inf"),
        (SOLVE, [np.full((2, 3), np.inf)], [np.eye(3)], NonFiniteError, "NaN or Inf"),
        (ROOT, [], [np.array([[1.0, 3], [3, 1]])], Exception, "ridge is too small"),
        (ROOT, [], [np.full((2, 2), np.nan)], NonFiniteError, "NaN or Inf"),
        (4, [np.ones((2, 3))], [np.eye(3)], ArgumentError, "op: expected 0 to 3"),
    ],
)
def test_moments_product_refuses(op, W, M, error, message):
    with pytest.raises(error, match=message):
        products(op, W, M, 1e-3)


def test_moments_product_refuses_another_place():
    W, M = [np.ones((2, 3))], [np.eye(3)]
    for op, shape in ((TIMES, (2, 2)), (PROJECT, (2, 3)), (SOLVE, (3, 3))):
        with pytest.raises(ShapeError, match="out"):
            _core.moments_product(op, False, [np.empty(shape)], W, M, 1e-3, 1)
    with pytest.raises(ShapeError, match="W"):
        _core.moments_product(TIMES, True, [np.empty((2, 3))], W, M, 0.0, 1)
    with pytest.raises(ArgumentError, match="left"):
        _core.moments_product(PROJECT, True, [np.empty((3, 3))], [np.ones((3, 3))], M, 0.0, 1)
    with pytest.raises(ArgumentError, match="out: expected the dtype"):
        _core.moments_product(TIMES, False, [np.empty((2, 3), np.float32)], W, M, 0.0, 1)
    with pytest.raises(ArgumentError, match="ridge"):
        _core.moments_product(ROOT, False, [np.empty((3, 3))], [], M, 0.0, 1)


# --------------------------------------------------------------- the error of the answers


def test_the_error_of_answers_is_that_of_the_sums(rng):
    """Errors of a token's experts may cancel, and then there are none."""
    E, F, D, K, N = 4, 6, 5, 2, 40
    gate, up, down = (rng.standard_normal((E, *shape)) for shape in ((F, D), (F, D), (D, F)))
    down[1] = down[0]
    gate[1], up[1] = gate[0], up[0]
    x = rng.standard_normal((N, D))
    index = np.sort(np.argsort(rng.random((N, E)), axis=1)[:, :K], axis=1)
    weights = rng.random((N, K))

    def answers(down):
        y = np.zeros((N, D))
        for t in range(N):
            for e, g in zip(index[t], weights[t], strict=True):
                a = gate[e] @ x[t]
                y[t] += g * down[e] @ (a / (1 + np.exp(-a)) * (up[e] @ x[t]))
        return y

    other = down + rng.standard_normal(down.shape) / 5
    given = LayerInput(x, index, weights)
    own = tuple(Projection.dense(W) for W in (gate, up, down))
    found = answer_error(given, (*own[:2], Projection.dense(other)), own)
    lost = np.linalg.norm(answers(other) - answers(down)) / np.linalg.norm(answers(down))
    assert found == pytest.approx(lost, rel=1e-10)
    assert answer_error(given, own, own) == 0

    pairs = LayerInput(x, np.tile([0, 1], (N, 1)), np.full((N, K), 0.5))
    gap = rng.standard_normal((D, F))
    other = down + np.stack([gap, -gap, 0 * gap, 0 * gap])
    found = answer_error(pairs, (*own[:2], Projection.dense(other)), own)
    assert found < 1e-12
    part = given.first(7)
    assert len(part.x) == len(part.index) == len(part.weights) == 7


def test_the_error_of_no_answer_is_none(rng):
    nothing = Projection.dense(np.zeros((2, 3, 3)))
    given = LayerInput(rng.standard_normal((4, 3)), np.zeros((4, 1), np.int64), np.ones((4, 1)))
    assert answer_error(given, (nothing,) * 3, (nothing,) * 3) == 0
