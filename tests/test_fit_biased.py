"""Fits to experts with biases and a clamped activation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from molae.convert.staging import StagedText, write_reading
from molae.errors import ArgumentError
from molae.fit import (
    LayerInput,
    answer_error,
    distill_layer,
    factor_shared,
    fit_layer,
    layer_moments,
    refit,
)
from molae.ops import Projection

N, K, E, D, F = 200, 2, 4, 10, 8
ALPHA, LIMIT = 1.3, 0.9


@pytest.fixture
def layer():
    rng = np.random.default_rng(5)
    W = {
        "gate_proj": rng.standard_normal((E, F, D)) / 2,
        "up_proj": rng.standard_normal((E, F, D)) / 2,
        "down_proj": rng.standard_normal((E, D, F)) / 2,
    }
    biases = tuple(rng.standard_normal((E, width)) / 2 for width in (F, F, D))
    index = np.argsort(rng.random((N, E)), axis=1)[:, :K]
    index[::7, 1] = E  # not here
    given = LayerInput(
        rng.standard_normal((N, D)), index, rng.random((N, K)), "swiglu_clamped",
        alpha=ALPHA, limit=LIMIT, biases=biases,
    )  # fmt: skip
    return given, W


def own(W) -> tuple[Projection, Projection, Projection]:
    return tuple(Projection.dense(W[kind]) for kind in ("gate_proj", "up_proj", "down_proj"))


def intermediate(given, W, e, x):
    """By the definition."""
    gate = np.minimum(x @ W["gate_proj"][e].T + given.biases[0][e], LIMIT)
    up = np.clip(x @ W["up_proj"][e].T + given.biases[1][e], -LIMIT, LIMIT)
    return (up + 1) * gate / (1 + np.exp(-ALPHA * gate))


def answers(given, W):
    y = np.zeros((N, D))
    for t in range(N):
        for k in range(K):
            e = given.index[t, k]
            if e < E:
                h = intermediate(given, W, e, given.x[t])
                y[t] += given.weights[t, k] * (W["down_proj"][e] @ h + given.biases[2][e])
    return y


def test_answers_and_moments(layer):
    given, W = layer
    aims = np.concatenate([aim for _, _, aim in given.aims(own(W))])
    np.testing.assert_allclose(aims, answers(given, W), rtol=1e-12, atol=1e-12)
    moments = layer_moments(given, *own(W))
    for e in range(E):
        rows = np.zeros((F, F))
        for t, k in zip(*np.nonzero(given.index == e), strict=True):
            h = given.weights[t, k] * intermediate(given, W, e, given.x[t])
            rows += np.outer(h, h)
        np.testing.assert_allclose(moments.hidden.moment[e], rows, rtol=1e-10, atol=1e-12)


def squeezed(W, kind):
    groups, side = [[0, 1], [2, 3]], "output" if kind == "down_proj" else "input"
    return Projection.from_factors(factor_shared(W[kind], 5, groups=groups, side=side))


def test_refit_of_down(layer):
    given, W = layer
    gate, up, _ = own(W)
    down = squeezed(W, "down_proj")
    found = refit(given, (gate, up, down), own(W), "down", steps=200, hold=1e-9)
    before = answer_error(given, (gate, up, down), own(W))
    after = answer_error(given, (gate, up, found.projection), own(W))
    assert found.error[0] == pytest.approx(before, rel=1e-9)
    assert found.error[-1] == pytest.approx(after, rel=1e-5)
    # The least squares that it solves, once more by a direct method.
    aim = answers(given, W)
    columns, target = [], aim.copy()
    B = down.shared
    placed = []
    for g, shared in enumerate(B):
        one = np.zeros((5, D))
        one[:, down.perm[g]] = np.hstack([np.eye(5), shared])
        placed.append(one)
    for e in range(E):
        h = np.zeros((N, F))
        for t, k in zip(*np.nonzero(given.index == e), strict=True):
            h[t] += given.weights[t, k] * intermediate(given, W, e, given.x[t])
            target[t] -= given.weights[t, k] * given.biases[2][e]
        one = placed[e // 2]
        columns += [np.outer(h[:, f], one[r]).ravel() for r in range(5) for f in range(F)]
    system = np.stack(columns, 1)
    best, *_ = np.linalg.lstsq(system, target.ravel(), rcond=None)
    least = np.linalg.norm(system @ best - target.ravel()) / np.linalg.norm(aim)
    assert least < before
    assert after - least < 0.02 * (before - least)


def test_up_is_not_linear(layer):
    given, W = layer
    gate, _, down = own(W)
    up = squeezed(W, "up_proj")
    with pytest.raises(ArgumentError, match="not linear in up"):
        refit(given, (gate, up, down), own(W), "up", metric=object())
    assert not given.linear_in_up
    assert LayerInput(given.x, given.index, given.weights).linear_in_up


def test_training_a_layer(layer):
    given, W = layer
    student = tuple(squeezed(W, kind) for kind in W)
    found = distill_layer(given, student, teacher=own(W), steps=60, rate=3e-3)
    before = answer_error(given, student, own(W))
    after = answer_error(given, found.layer, own(W))
    assert found.error[0] == pytest.approx(before, rel=1e-9)
    assert found.error[-1] == pytest.approx(after, rel=1e-9)
    assert after < 0.95 * before


def test_a_whole_layer(layer):
    given, W = layer
    parts = {kind: ([[0, 1], [2, 3]], [5, 5]) for kind in W}
    found = fit_layer(given, W, parts)
    plain = tuple(squeezed(W, kind) for kind in W)
    fitted = answer_error(given, tuple(found.projections.values()), own(W))
    assert fitted < 0.9 * answer_error(given, plain, own(W))
    assert set(found.layer_error) == {"down_proj"}


def test_what_another_process_is_given(layer, tmp_path):
    given, W = layer
    aim = answers(given, W)
    write_reading(tmp_path / "reading.safetensors", replace(given, answers=aim))
    with StagedText({}, tmp_path / "reading.safetensors") as staged:
        found = staged.reading(0)
        assert found.act == given.act
        for one, other in zip(found.biases, given.biases, strict=True):
            np.testing.assert_array_equal(one, other)
        error = answer_error(replace(found, answers=None), own(W), own(W))
        assert error == 0
        np.testing.assert_array_equal(found.answers, aim)
    write_reading(tmp_path / "plain.safetensors", replace(given, biases=None, answers=aim))
    with StagedText({}, tmp_path / "plain.safetensors") as staged:
        assert staged.reading(0).biases is None
