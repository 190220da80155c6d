"""molae.fit against float64 references, mathematics, and bad arguments."""

import gc
import itertools
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ref import fit as ref

import molae
from molae import _core, fit
from molae.errors import (
    ArgumentError,
    MolaeError,
    NonFiniteError,
    PrecisionWarning,
    ShapeError,
)

F32, F64, F16, BF16 = np.float32, np.float64, np.float16, ml_dtypes.bfloat16
#: Unit roundoff of the arithmetic and of the storage.
WORK_EPS = {F32: 2.0**-23, F64: 2.0**-52, F16: 2.0**-23, BF16: 2.0**-23}
STORE_EPS = {F32: 2.0**-24, F64: 2.0**-53, F16: 2.0**-11, BF16: 2.0**-8}


def experts(seed, E, rows, cols, dtype=F64, common=None):
    """Gaussian experts; with `common`, of rank `common` with one row space for all."""
    rng = np.random.default_rng(seed)
    if common is None:
        return rng.standard_normal((E, rows, cols)).astype(dtype)
    B = rng.standard_normal((common, cols))
    return (rng.standard_normal((E, rows, common)) @ B).astype(dtype)


def decaying(seed, E, F, D, decay, dtype):
    """Experts whose stack has singular values ``exp(-decay j)``."""
    rng = np.random.default_rng(seed)
    U = np.linalg.qr(rng.standard_normal((E * F, D)))[0]
    V = np.linalg.qr(rng.standard_normal((D, D)))[0]
    X = (U * np.exp(-decay * np.arange(D))) @ V
    return X.reshape(E, F, D).astype(dtype)


def energy_gap(found, W, group, side, rank):
    """Squared relative error of molae's factors less that of the best ones, in float64."""
    g = found.groups.index(tuple(group))
    X = ref.stack(W, group, side)
    B = found.basis(g).astype(F64)
    A = np.concatenate(
        [a.astype(F64) if side == "input" else a.astype(F64).T for a in found.private[g]]
    )
    s = np.linalg.svd(X, compute_uv=False)
    return (np.square(X - A @ B).sum() - np.square(s[rank:]).sum()) / np.square(s).sum()


def tolerance(dtype, n):
    """Of an energy gap. Rounding A and B to storage adds n independent relative errors of the
    storage's roundoff to an optimum, so the energy rises with their square; the arithmetic adds
    its roundoff times the length of the sums."""
    return 4 * STORE_EPS[dtype] ** 2 + 8 * WORK_EPS[dtype] * np.sqrt(n)


def check_gap(gap, dtype, n):
    assert -tolerance(dtype, n) <= gap <= tolerance(dtype, n)


def test_the_gap_checker_rejects_a_wrong_factor():
    W = experts(0, 4, 12, 20)
    f = fit.factor_shared(W, 6)
    check_gap(energy_gap(f, W, range(4), "input", 6), F64, 48)
    wrong = f.private[0].copy()
    wrong[1, 3, 2] += 10 * np.sqrt(tolerance(F64, 48) * np.square(W).sum())
    object.__setattr__(f, "private", (wrong,))
    with pytest.raises(AssertionError):
        check_gap(energy_gap(f, W, range(4), "input", 6), F64, 48)


def test_reference_on_a_case_done_by_hand():
    # two 1×2 experts (3, 0) and (4, 0): one common row space, singular value 5
    W = np.array([[[3.0, 0.0]], [[4.0, 0.0]]])
    B, A = ref.joint_factorization(W, (0, 1), "input", 1)
    np.testing.assert_allclose(np.abs(B), [[1, 0]])
    np.testing.assert_allclose([ref.product(a, B, "input") for a in A], W)
    assert ref.kernel_intersection_dim(W, (0, 1), "input") == 1
    np.testing.assert_allclose(ref.truncate(np.diag([2.0, 1.0]), 1), np.diag([2.0, 0.0]))


# ------------------------------------------------------------- against references

# (E, F, D, groups, rank): primes, tiles of 128, 256, 512 and 1024 rows and their neighbours,
# short stacks (kF < D), one expert, unequal groups, rank 1, rank full
CASES = [
    (1, 1, 1, None, 1),
    (1, 7, 5, None, 2),
    (3, 5, 31, None, 11),
    (4, 37, 64, [[0, 1], [2, 3]], 20),
    (5, 13, 29, [[4, 0, 2], [1], [3]], 7),
    (2, 127, 17, None, 16),
    (2, 128, 129, None, 40),
    (2, 257, 64, [[1], [0]], 64),
    (3, 255, 65, None, 1),
    (2, 1023, 33, None, 30),
    (1, 1025, 40, None, 40),
    (2, 300, 513, None, 100),
    (1, 200, 600, None, 150),
]


@pytest.mark.parametrize("form", ["gauge", "plain"])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16])
@pytest.mark.parametrize(("E", "F", "D", "groups", "rank"), CASES)
def test_factors_reach_the_optimum(E, F, D, groups, rank, dtype, side, form):
    W = experts(1, E, *((F, D) if side == "input" else (D, F)), dtype)
    groups = groups or [list(range(E))]
    ranks = [min(rank, len(g) * F, D) for g in groups]
    with warnings.catch_warnings():
        # full rank of a short stack discards nothing: the direct path is right there
        warnings.simplefilter("ignore", PrecisionWarning)
        f = fit.factor_shared(W, ranks, groups=groups, side=side, form=form)
    for g, (group, R) in enumerate(zip(groups, ranks, strict=True)):
        n = len(group) * F
        check_gap(energy_gap(f, W, group, side, R), dtype, n + D)
        s = ref.singular_values(W, group, side)
        np.testing.assert_allclose(
            np.square(f.spectrum[g]),
            np.square(s),
            atol=8 * WORK_EPS[dtype] * np.sqrt(n) * s[0] ** 2,
        )
        assert f.private[g].dtype == f.shared[g].dtype == dtype
        stored = [f.shared[g], f.private[g]]
        assert sum(a.size for a in stored) == fit.stored_numbers(R, len(group), F, D, form)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16])
def test_reported_errors_are_those_of_the_stored_factors(dtype, side):
    W = experts(2, 5, 40, 30, dtype)
    groups = [[0, 3], [1, 2, 4]]
    f = fit.factor_shared(W, [9, 0], groups=groups, side=side)
    assert f.stored_numbers == sum(a.size for a in f.shared + f.private)
    for i in range(5):
        X = W[i].astype(F64)
        error = np.linalg.norm(X - f.reconstruct(i).astype(F64)) / np.linalg.norm(X)
        np.testing.assert_allclose(f.error[i], error, rtol=1e-5)
        np.testing.assert_allclose(f.energy[i], np.square(X).sum(), rtol=1e-6)
    assert f.error[1] == f.error[2] == f.error[4] == 1.0  # rank 0 keeps nothing
    for g, group in enumerate(groups):
        total = f.energy[group].sum()
        np.testing.assert_allclose(
            f.group_error[g] ** 2, (f.error[group] ** 2 * f.energy[group]).sum() / total, rtol=1e-12
        )


def test_private_factors_answer_the_rounded_basis():
    # least squares against B as stored, not against the B that was rounded
    W = experts(3, 4, 24, 32, BF16)
    f = fit.factor_shared(W, 10)
    B = f.basis(0).astype(F64)
    for i in range(4):
        best = ref.least_squares(W[i], B)
        # one rounding to bfloat16 away from the exact answer
        np.testing.assert_allclose(
            f.private[0][i].astype(F64), best, rtol=2 * STORE_EPS[BF16], atol=1e-5
        )


# ------------------------------------------------------------------ mathematics


@pytest.mark.parametrize("dtype", [F32, F64])
def test_one_expert_meets_eckart_young(dtype):
    W = experts(4, 1, 30, 50, dtype)
    for R in (1, 7, 29):
        f = fit.factor_shared(W, R)
        expected = np.linalg.norm(W[0] - ref.truncate(W[0], R)) / np.linalg.norm(W[0])
        np.testing.assert_allclose(f.error[0], expected, rtol=1e-5 if dtype == F32 else 1e-12)
        np.testing.assert_allclose(f.error[0] ** 2, f.discarded_energy[0], rtol=1e-5)
        np.testing.assert_allclose(
            fit.reduce_rank(W, R)[0],
            ref.truncate(W[0], R),
            atol=100 * WORK_EPS[dtype] * np.abs(W).max() * 50,
        )


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_planted_common_subspace_is_recovered(dtype, side):
    """The paper's exact case: row spaces that sum to dimension r need rank r and no more."""
    F, D, r = 20, 48, 11
    W = experts(5, 6, F, D, dtype, common=r)
    if side == "output":
        W = np.ascontiguousarray(W.transpose(0, 2, 1))
    with pytest.warns(PrecisionWarning, match="group 0"):
        f = fit.factor_shared(W, r, side=side)
    assert f.used_svd.tolist() == [True]
    assert f.group_error[0] < 50 * WORK_EPS[dtype]
    assert f.kernel_dim[0] == D - r == ref.kernel_intersection_dim(W, range(6), side)
    assert f.discarded_energy[0] < (100 * WORK_EPS[dtype]) ** 2
    below = fit.factor_shared(W, r - 1, side=side)
    assert below.group_error[0] > 1e-3  # one rank less loses a planted direction
    assert below.used_svd.tolist() == [False]


def test_gram_alone_would_miss_what_the_svd_finds():
    """Why there is a direct path: in float32 the Gram matrix cannot see past sqrt(eps)."""
    W = decaying(6, 8, 64, 96, 0.3, F32)
    X = ref.stack(W, range(8), "input").astype(F32)
    V = np.linalg.eigh(X.T @ X)[1][:, -48:].astype(F64)
    by_gram = np.linalg.norm(X - X @ V @ V.T) / np.linalg.norm(X)
    with pytest.warns(PrecisionWarning):
        by_molae = fit.factor_shared(W, 48).group_error[0]
    assert by_molae < 2e-6
    assert by_gram > 10 * by_molae


@pytest.mark.parametrize("dtype", [F32, F64])
def test_precision_rule_keeps_its_promise(dtype):
    """Without a warning, the discarded energy is within a hundredth of the best."""
    paths = set()
    for decay in np.linspace(0.02, 0.35 if dtype == F32 else 0.8, 12):
        W = decaying(7, 4, 40, 64, decay, dtype)
        for R in (8, 24, 40, 56):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                f = fit.factor_shared(W, R)
            best = np.square(ref.singular_values(W, range(4), "input"))
            # in the dtype's own reach: A and B are stored with a roundoff of their own
            floor = (64 * WORK_EPS[dtype]) ** 2 * best.sum()
            found = f.group_error[0] ** 2 * best.sum()
            assert found <= 1.01 * best[R:].sum() + floor, (decay, R, f.used_svd)
            assert bool(caught) == bool(f.used_svd[0])
            paths.add(bool(f.used_svd[0]))
    assert paths == {True, False}  # the sweep crosses the border


@given(
    seed=st.integers(0, 2**32 - 1),
    E=st.integers(1, 5),
    F=st.integers(1, 12),
    D=st.integers(2, 16),
    side=st.sampled_from(["input", "output"]),
)
@settings(max_examples=60, deadline=None)
def test_error_never_rises_with_the_rank(seed, E, F, D, side):
    W = experts(seed, E, *((F, D) if side == "input" else (D, F)))
    full = min(E * F, D)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrecisionWarning)
        errors = [fit.factor_shared(W, R, side=side).group_error[0] for R in range(full + 1)]
    assert errors[0] == 1
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(errors))
    assert errors[-1] < 1e-12


@given(seed=st.integers(0, 2**32 - 1), data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_permuting_experts_permutes_results(seed, data):
    W = experts(seed, 6, 9, 14)
    order = data.draw(st.permutations(range(6)))
    groups = [[0, 1, 2], [3, 4, 5]]
    moved = [[order.index(e) for e in g] for g in groups]
    a = fit.factor_shared(W, 5, groups=groups)
    b = fit.factor_shared(W[list(order)], 5, groups=moved)
    for i in range(6):
        np.testing.assert_array_equal(a.reconstruct(order[i]), b.reconstruct(i))


def test_two_steps_of_the_paper():
    W = experts(8, 4, 20, 30)
    R = 12
    reduced = fit.reduce_rank(W, R)
    f = fit.factor_shared(reduced, R, form="plain")
    B, A = ref.two_steps(W, range(4), R)
    for i in range(4):
        np.testing.assert_allclose(f.reconstruct(i), A[i] @ B, atol=1e-12)
    # and the first step matters below full rank
    direct = fit.factor_shared(W, R, form="plain")
    assert np.abs(direct.reconstruct(0) - f.reconstruct(0)).max() > 1e-3


@pytest.mark.parametrize(
    ("rows", "cols"), [(1, 1), (9, 4), (4, 9), (130, 40), (40, 1030), (1030, 20)]
)
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16])
def test_reduce_rank(rows, cols, dtype):
    W = experts(9, 3, rows, cols, dtype)
    full = min(rows, cols)
    for R in sorted({0, 1, full // 2, full - 1, full} & set(range(full + 1))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PrecisionWarning)
            found = fit.reduce_rank(W, R)
        assert found.dtype == (F64 if dtype == F64 else F32)
        for i in range(3):
            best = ref.truncate(W[i], R)
            # a subspace is found to about eps / gap; its error shows in energy, not entries
            X = W[i].astype(F64)
            gap = np.square(X - found[i]).sum() - np.square(X - best).sum()
            assert abs(gap) <= 8 * WORK_EPS[dtype] * (rows + cols) * np.square(X).sum()


def test_reduce_rank_of_a_matrix_that_has_it():
    W = experts(10, 2, 30, 50, F32, common=7)
    with pytest.warns(PrecisionWarning):
        found = fit.reduce_rank(W, 7)
    assert np.abs(found - W).max() < 1e-5 * np.abs(W).max()


@given(seed=st.integers(0, 2**32 - 1), R=st.integers(1, 9), extra=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_gauge_spans_the_same_rows(seed, R, extra):
    B = np.random.default_rng(seed).standard_normal((R, R + extra))
    M, perm = fit.gauge(B)
    G = fit.ungauge(M, perm)
    assert sorted(perm) == list(range(R + extra))
    T = ref.least_squares(B, G)
    np.testing.assert_allclose(T @ G, B, atol=1e-9 * max(1, np.abs(T).max()))
    np.testing.assert_array_equal(G[:, perm[:R]], np.eye(R))


def test_pivoting_keeps_the_gauge_small():
    B = np.linalg.qr(np.random.default_rng(0).standard_normal((256, 64)))[0].T
    M, _ = fit.gauge(np.ascontiguousarray(B.astype(F32)))
    assert np.abs(M).max() < 3  # without pivoting entries reach hundreds


def test_gauge_form_loses_nothing():
    W = experts(11, 4, 32, 48, F32)
    plain = fit.factor_shared(W, 20, form="plain")
    gauged = fit.factor_shared(W, 20, form="gauge")
    np.testing.assert_allclose(plain.group_error, gauged.group_error, rtol=1e-6)
    assert plain.stored_numbers - gauged.stored_numbers == 20 * 20


@pytest.mark.parametrize("form", ["gauge", "plain"])
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16])
def test_full_rank_is_the_original_bit_for_bit(dtype, form):
    W = experts(12, 3, 20, 16, dtype)
    f = fit.factor_shared(W, 16, form=form)
    for i in range(3):
        np.testing.assert_array_equal(f.private[0][i], W[i])
        np.testing.assert_array_equal(f.reconstruct(i), W[i].astype(f.reconstruct(i).dtype))
    assert f.group_error[0] == 0


def test_zero_weights():
    W = np.zeros((2, 5, 8), F32)
    f = fit.factor_shared(W, [0], groups=[[0, 1]])
    assert f.error.tolist() == [0, 0]
    assert f.kernel_dim[0] == 8
    assert f.effective_rank[0] == 0


# -------------------------------------------------------- diagnostics and counts


def test_diagnostics():
    assert fit.effective_rank(np.ones(7)) == pytest.approx(7)
    assert fit.effective_rank([5.0]) == 1
    assert fit.discarded_energy([2.0, 1.0, 1.0], 1) == pytest.approx(2 / 6)
    assert fit.common_kernel_dim([1.0, 1e-9], 5) == 4
    W = experts(13, 4, 6, 32)
    np.testing.assert_allclose(
        fit.spectrum(W, groups=[[0, 1], [2, 3]])[1],
        ref.singular_values(W, (2, 3), "input"),
        rtol=1e-9,
    )


def test_published_counts():
    # OLMoE-1B-7B, R = F = 1024, groups of 8: R(kF + D) of kFD
    assert fit.stored_numbers(1024, 8, 1024, 2048, "plain") / (8 * 1024 * 2048) == 0.625


# ------------------------------------------------------ threads, inputs, memory


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("side", ["input", "output"])
def test_thread_count_does_not_change_a_bit(dtype, side):
    W = experts(14, 6, *((150, 140) if side == "input" else (140, 150)), dtype)
    groups = [[0, 1, 2], [3], [4, 5]]
    results = []
    for n in (1, 2, 3, 7):
        with molae.num_threads(n):
            f = fit.factor_shared(W, [50, 20, 30], groups=groups, side=side)
            results.append(
                [a.tobytes() for a in (*f.shared, *f.perm, *f.private, *f.spectrum, f.error)]
                + [fit.reduce_rank(W, 9).tobytes()]
            )
    assert all(r == results[0] for r in results)


def _variants(W):
    swapped = W.astype(W.dtype.newbyteorder())
    strided = np.repeat(W, 2, axis=2)[:, :, ::2]
    buffer = np.zeros(W.nbytes + 1, np.uint8)
    misaligned = buffer[1:].view(W.dtype).reshape(W.shape)
    misaligned[:] = W
    readonly = W.copy()
    readonly.flags.writeable = False
    yield from (list(W), tuple(W), np.asfortranarray(W), strided, swapped, misaligned, readonly)
    yield W.tolist()
    yield list(np.asfortranarray(W))


def test_every_kind_of_array_is_taken_and_none_is_changed():
    W = experts(15, 3, 8, 10)
    expected = fit.factor_shared(W, 4)
    before = W.copy()
    for variant in _variants(W):
        found = fit.factor_shared(variant, 4)
        np.testing.assert_array_equal(found.private[0], expected.private[0])
        np.testing.assert_array_equal(fit.reduce_rank(variant, 2), fit.reduce_rank(W, 2))
    np.testing.assert_array_equal(W, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16])
@pytest.mark.parametrize("side", ["input", "output"])
def test_nan_and_inf_are_refused_with_the_expert(bad, dtype, side):
    W = experts(16, 6, 9, 11, dtype)
    W[4, 8, 10] = bad
    with pytest.raises(NonFiniteError, match="expert 4") as caught:
        fit.factor_shared(W, 2, groups=[[0, 1], [2], [5, 3, 4]], side=side)
    assert caught.value.expert == 4
    with pytest.raises(NonFiniteError, match="expert 4"):
        fit.reduce_rank(W, 2)
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        fit.gauge(np.array([[1.0, bad]]))


def test_factor_that_overflows_float16_is_refused():
    W = np.full((2, 4, 8), 60000.0, F16)  # A = X Bᵀ(BBᵀ)⁻¹ stays; plain B is unit, A is large
    with pytest.raises(NonFiniteError, match="overflows"):
        fit.factor_shared(W, 1, form="plain")


BAD_CALLS = [
    (lambda W: fit.factor_shared(W[0], 1), ShapeError, "W: expected shape (E, rows, cols)"),
    (lambda W: fit.factor_shared([], 1), ShapeError, "at least one expert"),
    (lambda W: fit.factor_shared([W[0], W[1, :2]], 1), ShapeError, r"W[1]: expected a matrix"),
    (lambda W: fit.factor_shared([W[0], W[1].astype(F32)], 1), ArgumentError, "W[1]: expected"),
    (lambda W: fit.factor_shared(W.astype(int), 1), ArgumentError, "got int64"),
    (lambda W: fit.factor_shared(W, 9), ArgumentError, "min(k F, D) = 8, got 9"),
    (lambda W: fit.factor_shared(W, -1), ArgumentError, "rank of group 0: expected 0"),
    (lambda W: fit.factor_shared(W, True), ArgumentError, "got True"),
    (lambda W: fit.factor_shared(W, 1.5), TypeError, "float"),
    (lambda W: fit.factor_shared(W, [1, 1]), ArgumentError, "one a group, 1, got 2"),
    (lambda W: fit.factor_shared(W, 1, groups=[[0, 1]]), ArgumentError, "exactly one group"),
    (lambda W: fit.factor_shared(W, 1, groups=[[0, 1, 2], []]), ArgumentError, "at least one"),
    (lambda W: fit.factor_shared(W, 1, side="left"), ArgumentError, "side: expected one of input"),
    (lambda W: fit.factor_shared(W, 1, form="x"), ArgumentError, "form: expected one of gauge"),
    (lambda W: fit.reduce_rank(W, 6), ArgumentError, "min(rows, cols) = 5, got 6"),
    (lambda W: fit.gauge(W[0].T), ShapeError, "R <= D"),
    (lambda W: fit.gauge(np.ones((2, 3))), ArgumentError, "linearly dependent"),
    (lambda W: fit.gauge(np.ones((1, 3), F16)), ArgumentError, "float32 or float64"),
    (lambda W: fit.ungauge(np.ones((1, 2)), [0, 0, 1]), ShapeError, "permutation"),
    (lambda W: fit.ungauge(np.ones(2), [0, 1]), ShapeError, "M: expected shape"),
    (lambda W: fit.factor_shared(W, 2).reconstruct(3), ArgumentError, "expected 0 to 2"),
    (lambda W: fit.stored_numbers(1, 1, 1, 1, "x"), ArgumentError, "form"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_CALLS)
def test_bad_arguments_name_the_argument(call, error, text):
    with pytest.raises(error) as caught:
        call(experts(17, 3, 5, 8))
    assert text in str(caught.value)


def test_the_extension_checks_what_the_face_checked():
    """A crash is a bug report without a traceback: the C side refuses on its own."""
    W = list(experts(18, 2, 3, 4))
    refused = [
        (W, [0, 1], [0, 1], [1]),  # group_ptr does not reach E
        (W, [0, 1], [0, 2, 2], [1, 1]),  # an empty group
        (W, [0, 1], [0], []),  # no group
        (W, [0, 1], [0, 2], [5]),  # rank too large
        (W, [0], [0, 2], [1]),  # ids of the wrong length
        ([W[0].T, W[1].T], [0, 1], [0, 2], [1]),  # not contiguous
        ([W[0], W[1].astype(F32)], [0, 1], [0, 2], [1]),
        (["x", W[0]], [0, 1], [0, 2], [1]),
    ]
    for args in refused:
        with pytest.raises(MolaeError):
            _core.factor_shared(*args, 0, False, True, True, 1)
    with pytest.raises(MolaeError):
        _core.factor_shared(W, [0, 1], [0, 2], [1], 0, False, True, True, 0)


def test_memory_of_a_large_result_is_used_again_once_it_is_gone():
    W = experts(3, 2, 1024, 1032).astype(F32)
    live = _core.mem_live()
    first = fit.factor_shared(W, 1000).private[0]  # 8 MB
    assert first.nbytes > 4 << 20
    assert _core.mem_live() == live + 1
    kept, part = first.copy(), first[1:]
    del first
    second = fit.factor_shared(W[::-1], 1000).private[0]
    assert not np.shares_memory(part, second)
    assert np.array_equal(part, kept[1:])  # a view holds the memory
    assert second.flags.writeable
    assert second.flags.c_contiguous
    address = second.ctypes.data
    del second
    third = fit.factor_shared(W, 1000).private[0]
    assert third.ctypes.data == address
    assert np.array_equal(third, kept)
    del third, part
    assert _core.mem_live() == live


def test_every_failed_allocation_is_an_error_without_a_leak():
    W = list(experts(19, 3, 9, 7))
    live = _core.mem_live()
    calls = [
        lambda: _core.factor_shared(W, [0, 1, 2], [0, 2, 3], [2, 3], 0, False, True, True, 2),
        lambda: _core.reduce_rank(W, 3, 2),
        lambda: _core.gauge(W[0][:3]),
    ]
    for call in calls:
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
    W = list(experts(20, 2, 6, 8, BF16))

    def counts():
        gc.collect()  # of what other tests left in cycles
        return [sys.getrefcount(a) for a in W] + [sys.getrefcount(W[0].dtype)]

    before = counts()
    for _ in range(50):
        _core.factor_shared(W, [0, 1], [0, 2], [2], 0, False, True, True, 1)
        _core.reduce_rank(W, 2, 1)
        with pytest.raises(ArgumentError):
            _core.factor_shared(W, [0, 1], [0, 2], [99], 0, False, True, True, 1)
    assert counts() == before
