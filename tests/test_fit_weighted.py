"""molae.fit.factor_weighted against float64 references, its optima, and bad arguments."""

import gc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ref import fit as plain
from ref import weighted as ref

import molae
from molae import _core
from molae.errors import ArgumentError, NonFiniteError, ShapeError
from molae.fit import factor_shared, factor_weighted, weighted_spectrum
from molae.fit.weighted import factor_at_ranks

F32, F64, F16, BF16 = np.float32, np.float64, np.float16, ml_dtypes.bfloat16
SIDES = ("input", "output")


def problem(seed, E, F, D, side="input", dtype=F64, idle=(), rows=40):
    """Experts, and moments of rows whose directions differ a thousandfold."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((E, F, D) if side == "input" else (E, D, F)).astype(dtype)
    n = D if side == "input" else F
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0] * np.logspace(0, -1.5, n)
    moments = np.zeros((E, n, n))
    for e in set(range(E)) - set(idle):
        x = rng.standard_normal((rows, n)) * (1 + rng.random(n)) @ basis.T
        moments[e] = x.T @ x * rng.random()
    return W, moments


def row_metric(seed, E, F):
    """Errors of rows that count and add up in different ways."""
    S = np.random.default_rng(seed).standard_normal((E, F, F))
    return S @ S.transpose(0, 2, 1)


def sides(W, side):
    return [np.asarray(w, F64) if side == "input" else np.asarray(w, F64).T for w in W]


def losses(found, W, shrunk, rows=None):
    """Each expert's error in its metric, from the factors as stored."""
    X, own = sides(W, found.side), []
    for i, C in enumerate(shrunk):
        approximation = sides([found.reconstruct(i).astype(F64)], found.side)[0]
        own.append(ref.lost(X[i], approximation, C, found.side, None if rows is None else rows[i]))
    return np.array(own)


@pytest.mark.parametrize("form", ["gauge", "plain"])
@pytest.mark.parametrize("rank", [0, 1, 5, 9, 15, 16])
@pytest.mark.parametrize("weigh_rows", [False, True])
def test_one_expert_reaches_the_weighted_optimum(form, rank, weigh_rows):
    W, C = problem(1, 1, 20, 16)
    rows = row_metric(1, 1, 20) if weigh_rows else None
    S = None if rows is None else rows[0]
    _, shrunk = ref.pooled(C, 0.1, 1e-3)
    found = factor_weighted(W, C, rank, form=form, row_metric=rows, shrinkage=0.1, ridge=1e-3)
    best = ref.single_optimum(W[0], shrunk[0], rank, S)
    total = ref.lost(W[0], 0, shrunk[0], "input", S)
    assert losses(found, W, shrunk, rows)[0] == pytest.approx(best, rel=1e-9, abs=1e-10 * total)
    assert found.energy[0] == pytest.approx(total, rel=1e-10)
    assert found.error[0] ** 2 * total == pytest.approx(best, rel=1e-9, abs=1e-10 * total)


def test_the_check_of_the_optimum_rejects_a_fit_without_weights():
    W, C = problem(1, 1, 20, 16)
    _, shrunk = ref.pooled(C, 0.1, 1e-3)
    assert losses(factor_shared(W, 5), W, shrunk)[0] > 1.5 * ref.single_optimum(W[0], shrunk[0], 5)


@pytest.mark.parametrize("form", ["gauge", "plain"])
@pytest.mark.parametrize("rank", [0, 1, 6, 12, 18])
def test_the_output_side_reaches_the_optimum_of_the_group(form, rank):
    W, H = problem(2, 4, 10, 18, "output")
    _, shrunk = ref.pooled(H, 0.05, 1e-3)
    found = factor_weighted(W, H, rank, side="output", form=form, shrinkage=0.05, ridge=1e-3)
    X = sides(W, "output")
    total = sum(ref.lost(x, 0, h, "output") for x, h in zip(X, shrunk, strict=True))
    best = ref.output_optimum(X, shrunk, rank)
    assert losses(found, W, shrunk).sum() == pytest.approx(best, rel=1e-9, abs=1e-10 * total)
    assert np.square(found.spectrum[0][rank:]).sum() == pytest.approx(
        best, rel=1e-9, abs=1e-10 * total
    )


@pytest.mark.parametrize("weigh_rows", [False, True])
def test_the_spectrum_is_that_of_the_pooled_problem(weigh_rows):
    W, C = problem(3, 3, 12, 17)
    rows = row_metric(0, 3, 12) if weigh_rows else None
    pool, shrunk = ref.pooled(C, 0.2, 1e-3)
    s = ref.pooled_spectrum(W, pool, shrunk, rows)
    for found in (
        weighted_spectrum(W, C, row_metric=rows, shrinkage=0.2, ridge=1e-3)[0],
        factor_weighted(W, C, 5, row_metric=rows, shrinkage=0.2, ridge=1e-3).spectrum[0],
    ):
        assert found.shape == (17,)
        assert np.allclose(found, s[:17], rtol=1e-9, atol=1e-9 * s[0])


@pytest.mark.parametrize("form", ["gauge", "plain"])
@pytest.mark.parametrize("rank", [4, 13])
def test_private_factors_are_least_squares_in_the_metric(form, rank):
    """No change of an A_i helps: (W - A B) C Bᵀ = 0."""
    W, C = problem(4, 3, 12, 17)
    _, shrunk = ref.pooled(C, 0.1, 1e-3)
    found = factor_weighted(W, C, rank, form=form, shrinkage=0.1, ridge=1e-3)
    B = found.basis(0)
    for i in range(3):
        slope = (W[i] - found.private[0][i] @ B) @ shrunk[i] @ B.T
        assert np.abs(slope).max() < 1e-9 * np.abs(W[i] @ shrunk[i] @ B.T).max()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 4),
    st.integers(2, 9),
    st.integers(2, 12),
    st.sampled_from(SIDES),
    st.sampled_from(["gauge", "plain"]),
    st.data(),
)
def test_no_rank_more_and_no_weight_known_makes_it_worse(seed, E, F, D, side, form, data):
    """More rank never costs, and knowing the metric beats not knowing it."""
    W, C = problem(seed, E, F, D, side)
    R = data.draw(st.integers(0, min(E * F, D)))
    options = {"side": side, "form": form, "shrinkage": 0.1, "ridge": 1e-3}
    _, shrunk = ref.pooled(C, 0.1, 1e-3)
    found = factor_weighted(W, C, R, **options)
    own = losses(found, W, shrunk)
    slack = 1e-9 * found.energy.sum()
    assert np.allclose(own, found.error**2 * found.energy, rtol=1e-6, atol=slack)
    if side == "output":  # an optimum; on the input side the pooled basis is a choice
        more = factor_weighted(W, C, min(R + 1, E * F, D), **options)
        assert losses(more, W, shrunk).sum() <= own.sum() + slack
        blind = factor_shared(W, R, side=side, form=form)
        assert own.sum() <= losses(blind, W, shrunk).sum() + slack


def test_on_the_input_side_the_weights_pay():
    gains = []
    for seed in range(10):
        W, C = problem(seed, 4, 10, 16)
        _, shrunk = ref.pooled(C, 0.05, 1e-4)
        own = losses(factor_weighted(W, C, 8), W, shrunk).sum()
        gains.append(losses(factor_shared(W, 8), W, shrunk).sum() / own)
    assert min(gains) > 1.3


@pytest.mark.parametrize("side", SIDES)
def test_an_expert_of_no_rows_is_fitted_to_its_group(side):
    W, C = problem(5, 3, 9, 14, side, idle=(1,))
    pool, _ = ref.pooled(C, 0.05, 1e-3)
    found = factor_weighted(W, C, 7, side=side, ridge=1e-3)
    assert all(np.isfinite(a).all() for a in (*found.private, *found.shared))
    assert 0 < found.error[1] < 1
    X, B = sides(W, side), found.basis(0)
    if side == "input":
        wanted = X[1] @ pool @ B.T @ np.linalg.inv(B @ pool @ B.T)
        assert np.allclose(found.private[0][1], wanted, rtol=1e-7, atol=1e-9)
    # It has next to no say in what the others share.
    others = factor_weighted(W[[0, 2]], C[[0, 2]], 7, side=side, ridge=1e-3)
    assert found.error[0] == pytest.approx(others.error[0], rel=0.02)


@pytest.mark.parametrize("side", SIDES)
def test_a_group_of_no_rows_is_fitted_without_data(side):
    W, C = problem(6, 4, 9, 14, side, idle=(0, 1))
    found = factor_weighted(W, C, 6, groups=[[0, 1], [2, 3]], side=side)
    blind = factor_shared(W, 6, groups=[[0, 1], [2, 3]], side=side)
    assert np.allclose(found.spectrum[0], blind.spectrum[0], rtol=1e-9)
    for i in (0, 1):
        assert np.allclose(found.reconstruct(i), blind.reconstruct(i), rtol=1e-7, atol=1e-9)


def test_rows_that_count_more_are_kept_better():
    W, C = problem(7, 3, 12, 16)
    _, shrunk = ref.pooled(C, 0.05, 1e-4)
    rows = np.stack([np.diag(np.where(np.arange(12) < 3, 100.0, 1.0))] * 3)
    heavy, even = (factor_weighted(W, C, 4, row_metric=given) for given in (rows, None))
    assert losses(heavy, W, shrunk, rows).sum() < losses(even, W, shrunk, rows).sum()
    assert losses(even, W, shrunk).sum() < losses(heavy, W, shrunk).sum()
    assert heavy.energy.sum() > 10 * even.energy.sum()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("form", ["gauge", "plain"])
def test_narrow_types_lose_their_rounding_alone(dtype, side, form):
    W, C = problem(8, 3, 10, 16, side, dtype)
    found = factor_weighted(W, C.astype(F32), 11, side=side, form=form)
    exact = factor_weighted(W.astype(F64), C.astype(F32), 11, side=side, form=form)
    assert {a.dtype for a in (*found.shared, *found.private)} == {np.dtype(dtype)}
    eps = float(ml_dtypes.finfo(dtype).eps)
    # The factors' roundings, and A adapts to that of B; both are a few units wide here. The fit of
    # float32 is itself in float32: what the moments weigh a thousandth of the rest it knows less
    # well, by an amount that depends on the BLAS kernels.
    units = 1000 if dtype == F32 else 40
    for i in range(3):
        scale = np.abs(exact.reconstruct(i)).max()
        gap = np.abs(found.reconstruct(i).astype(F64) - exact.reconstruct(i)).max()
        assert gap < units * eps * scale
    total = (found.error**2 * found.energy).sum()
    assert total < (exact.error**2 * exact.energy).sum() + 40 * eps * found.energy.sum()


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("share", [1e-1, 1e-2, 1e-3, 1e-4, 1e-6])
def test_small_errors_are_measured_to_three_digits(dtype, side, share):
    """A stack of rank 8 and noise, whose share of the energy is what is lost at rank 8."""
    rng = np.random.default_rng(20)
    E, F, D, R = 2, 96, 64, 8
    W = rng.standard_normal((E, F, R)) @ rng.standard_normal((R, D)) / np.sqrt(R)
    W += np.sqrt(share) * rng.standard_normal((E, F, D))
    n = D if side == "input" else F
    x = rng.standard_normal((E, 400, n))
    C = (x.transpose(0, 2, 1) @ x).astype(F32 if dtype != F64 else F64)
    W = (W if side == "input" else W.transpose(0, 2, 1)).astype(dtype)
    S = row_metric(21, E, F).astype(C.dtype) if side == "input" else None
    found = factor_weighted(W, C, R, side=side, row_metric=S, shrinkage=0.1, ridge=1e-3)
    _, shrunk = ref.pooled(C.astype(F64), 0.1, 1e-3)
    X, B = sides(W, side), found.basis(0).astype(F64)
    for i in range(E):
        A = found.private[0][i].astype(F64)
        product = A @ B if side == "input" else A.T @ B
        rows = None if S is None else S[i].astype(F64)
        wanted = ref.lost(X[i], product, shrunk[i], side, rows)
        total = ref.lost(X[i], 0, shrunk[i], side, rows)
        assert found.energy[i] == pytest.approx(total, rel=1e-6)
        assert found.error[i] ** 2 * found.energy[i] == pytest.approx(wanted, rel=5e-4)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("side", SIDES)
def test_no_size_of_weights_is_too_large_or_small(dtype, side):
    W, C = problem(22, 3, 10, 16, side, dtype)
    C = C.astype(F32)
    plain_size = factor_weighted(W, C, 6, side=side)
    for power in (-80, 80):
        W_scaled = np.ldexp(W.astype(F64), power).astype(dtype)
        found = factor_weighted(W_scaled, C, 6, side=side)
        assert np.allclose(found.error, plain_size.error, rtol=1e-6)
        assert np.allclose(np.ldexp(found.spectrum[0], -power), plain_size.spectrum[0], rtol=1e-5)


def test_one_expert_of_the_output_side_goes_by_its_rows():
    """Fewer rows than columns, also where they are dependent and that way is closed."""
    W, H = problem(23, 1, 8, 20, "output")
    _, shrunk = ref.pooled(H, 0.05, 1e-3)
    for rank_of_stack in (8, 3):
        W[0][:, rank_of_stack:] = W[0][:, :1] * np.arange(8 - rank_of_stack)
        X = sides(W, "output")
        total = ref.lost(X[0], 0, shrunk[0], "output")
        for rank in (0, 2, 3, 5, 8):
            for form in ("gauge", "plain"):
                found = factor_weighted(W, H, rank, side="output", form=form, ridge=1e-3)
                best = ref.output_optimum(X, shrunk, rank)
                assert losses(found, W, shrunk)[0] == pytest.approx(best, 1e-9, 1e-10 * total)


@pytest.mark.parametrize("side", SIDES)
def test_moments_that_rounding_left_indefinite_are_enough(side):
    W, C = problem(24, 2, 9, 30, side)
    w, V = np.linalg.eigh(C)
    w[:, 0] = -1e-7 * w[:, -1]
    bent = (V * w[:, None, :]) @ V.transpose(0, 2, 1)
    found = factor_weighted(W, bent, 6, side=side, ridge=1e-9)
    near = factor_weighted(W, C, 6, side=side, ridge=1e-9)
    assert np.isfinite(found.error).all()
    assert found.group_error[0] < 1.1 * near.group_error[0]


def test_the_kernel_of_a_narrow_stack_is_seen():
    W, C = problem(25, 2, 12, 16)
    W[:, :, 10:] = W[:, :, :6]
    for dtype in (F32, F64):
        found = factor_weighted(W.astype(dtype), C.astype(dtype), 5)
        assert found.kernel_dim[0] == 6


@pytest.mark.parametrize("side", SIDES)
def test_groups_are_independent_and_threads_change_nothing(side):
    W, C = problem(9, 7, 11, 15, side)
    groups, ranks = [[6, 0], [3], [1, 2, 5, 4]], [5, 3, 12]
    whole = factor_weighted(W, C, ranks, groups=groups, side=side)
    before = molae.get_num_threads()
    try:
        for threads in (1, 3):
            molae.set_num_threads(threads)
            again = factor_weighted(W, C, ranks, groups=groups, side=side)
            for a, b in zip(
                (*whole.shared, *whole.private), (*again.shared, *again.private), strict=True
            ):
                assert a.tobytes() == b.tobytes()
            assert whole.error.tobytes() == again.error.tobytes()
    finally:
        molae.set_num_threads(before)
    for g, (group, rank) in enumerate(zip(groups, ranks, strict=True)):
        alone = factor_weighted(W[group], C[group], rank, side=side)
        assert alone.shared[0].tobytes() == whole.shared[g].tobytes()
        assert alone.private[0].tobytes() == whole.private[g].tobytes()


def test_moments_of_low_rank_are_enough():
    """Fewer rows than directions: the ridge closes what they leave open."""
    W, C = problem(10, 2, 12, 24, rows=5)
    found = factor_weighted(W, C, 10)
    assert found.group_error[0] < 0.05
    assert all(np.isfinite(a).all() for a in found.private)


@pytest.mark.parametrize("side", SIDES)
def test_nan_is_named(side):
    W, C = problem(11, 4, 6, 8, side)
    C[2, 1, 1] = np.nan
    with pytest.raises(NonFiniteError, match="moments") as caught:
        factor_weighted(W, C, 3, groups=[[0, 1], [3, 2]], side=side)
    assert caught.value.expert == 2
    C[2] = -np.eye(len(C[2]))
    with pytest.raises(NonFiniteError, match="negative trace"):
        factor_weighted(W, C, 3, side=side)
    W, C = problem(11, 4, 6, 8, side)
    W[3, 0, 0] = np.inf
    with pytest.raises(NonFiniteError, match="weights") as caught:
        factor_weighted(W, C, 3, groups=[[0], [1], [2], [3]], side=side)
    assert caught.value.expert == 3


def test_a_factor_that_overflows_is_named():
    _, C = problem(12, 2, 6, 8)
    with pytest.raises(NonFiniteError, match="overflows"):
        factor_weighted(np.full((2, 6, 8), F16(60000)), C, 1, form="plain")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"moments": np.zeros((3, 8, 8))}, ShapeError, "one an expert"),
        ({"moments": np.zeros((2, 7, 7))}, ShapeError, r"\(W, W\)|W=8|expected"),
        ({"moments": np.zeros((2, 8, 8), int)}, ArgumentError, "moments"),
        ({"moments": np.zeros((2, 8, 8), F16)}, ArgumentError, "float32 or float64"),
        ({"rank": 9}, ArgumentError, "rank"),
        ({"shrinkage": -1.0}, ArgumentError, "shrinkage"),
        ({"shrinkage": np.nan}, ArgumentError, "shrinkage"),
        ({"ridge": 0.0}, ArgumentError, "ridge"),
        ({"ridge": np.inf}, ArgumentError, "ridge"),
        ({"row_metric": np.ones((3, 6, 6))}, ShapeError, "row_metric"),
        ({"row_metric": np.ones((2, 5, 5))}, ShapeError, "row_metric"),
        ({"row_metric": np.ones((2, 6, 6), F32)}, ArgumentError, "one dtype"),
        ({"row_metric": -np.ones((2, 6, 6))}, NonFiniteError, "row_metric"),
        ({"form": "other"}, ArgumentError, "form"),
        ({"side": "other"}, ArgumentError, "side"),
        ({"groups": [[0], [0]]}, ArgumentError, "groups"),
    ],
)
def test_bad_arguments(change, error, text):
    W, C = problem(13, 2, 6, 8)
    options = {"W": W, "moments": C, "rank": 3} | change
    with pytest.raises(error, match=text):
        factor_weighted(**options)


def test_row_weights_are_of_the_input_side():
    W, H = problem(14, 2, 6, 8, "output")
    with pytest.raises(ArgumentError, match="row_metric"):
        factor_weighted(W, H, 3, side="output", row_metric=np.ones((2, 6, 6)))


def test_nothing_is_left_behind():
    W, C = problem(16, 4, 6, 8)
    gc.collect()
    before = _core.mem_live()
    for side in SIDES:
        moments = C if side == "input" else C[:, :6, :6].copy()
        weights = W if side == "input" else W.transpose(0, 2, 1).copy()
        found = factor_weighted(weights, moments, 3, side=side)
        with pytest.raises(ShapeError):
            factor_weighted(weights, moments[:, :-1], 3, side=side)
        del found
    gc.collect()
    assert _core.mem_live() == before


def test_the_reference_agrees_with_the_plain_one_where_nothing_is_weighed():
    W, _ = problem(17, 3, 6, 8)
    pool, shrunk = ref.pooled(np.zeros((3, 8, 8)), 0.1, 0.1)
    s = plain.singular_values(W, range(3), "input")
    assert np.allclose(ref.pooled_spectrum(W, pool, shrunk), s)


# ------------------------------------------------------------------ several ranks at once


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("form", ["gauge", "plain"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_several_ranks_are_those_of_single_calls(side, form, k, dtype):
    E, F, D = 6, 7, 18  # one expert has fewer rows than columns, three have more
    W, C = problem(3, E, F, D, side, dtype, idle=(4,))
    C = C.astype(dtype)
    rows = row_metric(3, E, F).astype(dtype) if side == "input" else None
    groups = [[5, 0, 2], [1, 4, 3]] if k == 3 else [[e] for e in (5, 0, 2, 1, 4, 3)]
    top = min(k * F, D)
    several = [top // 2, [r % top for r in range(len(groups))], top, 0, top - 1]
    options = {"groups": groups, "side": side, "form": form, "row_metric": rows}
    together = factor_at_ranks(W, C, several, **options)
    assert together[0].ranks == (top // 2,) * len(groups)
    close = {"rtol": 1e-9 if dtype == F64 else 2e-4, "atol": 1e-9 if dtype == F64 else 1e-5}
    for rank, found in zip(several, together, strict=True):
        alone = factor_weighted(W, C, rank, **options)
        assert found.groups == alone.groups
        assert found.ranks == alone.ranks
        for name in ("energy", "error", "group_error", "discarded_energy"):
            assert np.allclose(getattr(found, name), getattr(alone, name), **close), name
        for mine, theirs in zip(found.spectrum, alone.spectrum, strict=True):
            assert np.allclose(mine, theirs, **close)
        for e in range(E):
            mine, theirs = found.reconstruct(e), alone.reconstruct(e)
            assert np.allclose(mine, theirs, rtol=0, atol=(10 * close["rtol"]) * np.abs(W[e]).max())
    for threads in (1, 3):
        with molae.num_threads(threads):
            again = factor_at_ranks(W, C, several, **options)
        for mine, theirs in zip(again, together, strict=True):
            assert all(
                np.array_equal(a, b) for a, b in zip(mine.private, theirs.private, strict=True)
            )


def test_an_error_among_several_ranks_names_the_expert():
    W, C = problem(4, 4, 5, 8)
    W[2, 1, 1] = np.nan
    with pytest.raises(NonFiniteError, match="expert 2") as caught:
        factor_at_ranks(W, C, [2, 3], groups=[[0, 1], [3, 2]])
    assert caught.value.expert == 2
    W, C = problem(4, 4, 5, 8)
    C[3, 0, 0] = np.inf
    with pytest.raises(NonFiniteError, match="moments") as caught:
        factor_at_ranks(W, C, [2, 3], groups=[[0, 1], [3, 2]])
    assert caught.value.expert == 3
