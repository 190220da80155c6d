"""The benchmark of calibrated fits: both contestants do the same, and wrong answers are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from benchmark_modules import load

from molae.fit import fit_layer
from molae.fit.layer import REFITS
from molae.ops import latent_experts_forward

calibration = load("calibration")
bounds = load("calibration_bound")
contestant = load("calibration_torch")
check = load("check")
settings = load("settings")
tables = load("tables")

TINY = settings.Calibrated("tiny", E=8, K=2, F=24, D=48, N=2500)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return calibration.Task.drawn(tmp_path_factory.mktemp("task"), TINY, np.float32)


@pytest.fixture(scope="module")
def fit(task):
    return fit_layer(task.given, task.W, task.parts)


# ------------------------------------------------------------------------- equality


@pytest.mark.parametrize("size", [0.6, 0.9])
def test_both_do_the_same(tmp_path, size):
    own = calibration.Task.drawn(tmp_path, replace(TINY, size=size), np.float32)
    ours = fit_layer(own.given, own.W, own.parts)
    between = calibration.check(own, ours, own.by_torch())
    assert between < 1e-5 * ours.layer_error["down_proj"][-1]


def test_both_do_the_same_for_an_expert_that_nothing_reaches(task):
    index = np.where(task.index == 3, TINY.E, task.index)
    answers = latent_experts_forward(task.x, index, task.weights, *task.own)
    idle = replace(task, index=index, answers=answers)
    calibration.check(idle, fit_layer(idle.given, idle.W, idle.parts), idle.by_torch())
    assert idle.layer().pairs[3] == 0


def test_both_do_the_same_for_groups_of_down(task):
    pairs = [[e, e + 1] for e in range(0, TINY.E, 2)]
    parts = {**task.parts, "down_proj": (pairs, (17,) * len(pairs))}
    own = replace(task, parts=parts)
    calibration.check(own, fit_layer(own.given, own.W, own.parts), own.by_torch())


def test_stored_in_bfloat16_they_differ_by_rounding(tmp_path):
    own = calibration.Task.drawn(tmp_path, TINY)
    calibration.check(own, fit_layer(own.given, own.W, own.parts), own.by_torch())


@pytest.mark.parametrize(
    ("name", "value"), [("FLOOR", 0.0), ("HOLD", 0.06), ("SHRINKAGE", 0.0), ("RIDGE", 1e-2)]
)
def test_another_algorithm_is_refused(task, fit, monkeypatch, name, value):
    monkeypatch.setattr(contestant, name, value)
    with pytest.raises(check.WrongAnswer, match="apart"):
        calibration.check(task, fit, task.by_torch())


def test_a_wrong_factor_of_either_is_refused(task, fit):
    theirs = task.by_torch()
    calibration.check(task, fit, theirs)
    theirs.layer.gate.private[2] *= 1.01
    with pytest.raises(check.WrongAnswer, match="apart"):
        calibration.check(task, fit, theirs)
    theirs.layer.gate.private[2] /= 1.01
    up = fit.projections["up_proj"]
    wrong = replace(up, private=(up.private[0] * np.float32(1.01), *up.private[1:]))
    with pytest.raises(check.WrongAnswer, match="apart"):
        calibration.check(
            task, replace(fit, projections={**fit.projections, "up_proj": wrong}), theirs
        )


def test_wrong_errors_of_the_layer_are_refused(task, fit):
    theirs = task.by_torch()
    theirs.layer_error["up_proj"][-1] *= 1.02
    with pytest.raises(check.WrongAnswer, match="up_proj"):
        calibration.check(task, fit, theirs)
    del theirs.layer_error["up_proj"]
    with pytest.raises(check.WrongAnswer, match="refits"):
        calibration.check(task, fit, theirs)


# ---------------------------------------------------------------------- measurement


def test_the_case_says_where_the_time_goes(monkeypatch):
    given = settings.Settings(calibrated=TINY, fits=2, pause=0.0)
    found = json.loads(json.dumps(calibration.calibration(given, 10.0)))
    (row,) = found["rows"]
    assert row["over_bound"] == pytest.approx(row["times"]["molae"]["median_s"] / row["bound_s"])
    assert sum(p["bound_s"] for p in row["phases"]) == pytest.approx(row["bound_s"])
    seconds = [p["seconds"] for p in row["phases"]]
    assert min(seconds) > 0
    assert sum(seconds) == pytest.approx(row["times"]["molae"]["median_s"], rel=0.5)
    assert [p["phase"] for p in row["phases"] if p["peak_share"]] == [
        "moments",
        *(f"refit {n}, {kind}: passes" for n, (kind, _) in enumerate(REFITS, 1)),
    ]
    assert len(row["times"]["PyTorch"]["times_s"]) == row["rounds"] == 2
    assert row["memory_bytes"] > 0 < row["estimated_bytes"]
    assert {name for name, (_, goal, _) in row["goals"].items() if goal} == set(calibration.GOALS)
    text = "\n".join(tables.calibration_tables.calibration(found, tables.table))
    assert "medians of 2 rounds" in text
    assert "refit 2, up_proj: solves" in text


def test_phases_add_up_to_the_call(task):
    ours = calibration._Ours.of(task)
    assert sum(ours.seconds()) == pytest.approx(ours.end - ours.start)
    assert len(ours.passes) == 1 + sum(1 + steps for _, steps in REFITS)


# ------------------------------------------------------------------------- the bound


def by_rate(found, phase, rate):
    return sum(e.count * e.flops for e in found if e.phase == phase and e.rate == rate)


@pytest.mark.parametrize(("R", "b"), [(10, 10), (30, 18)])
def test_the_list_is_that_of_the_algorithm(R, b):
    """Two groups of two on the input side; down alone. b: rows of the basis that is found."""
    F, D, N, k, G, down = 16, 48, 100, 2, 2, 9
    layer = bounds.Layer(
        F, D,
        {"gate_proj": [[0, 1], [2, 3]], "up_proj": [[0, 1], [2, 3]],
         "down_proj": [[0], [1], [2], [3]]},
        {"gate_proj": [R, R], "up_proj": [R, R], "down_proj": [down] * 4},
        [N] * 4,
        {"gate_proj": [150, 160], "up_proj": [150, 160], "down_proj": [N] * 4},
    )  # fmt: skip
    found = bounds.entries(layer, [("up_proj", 3), ("down_proj", 2)])
    E = k * G
    assert by_rate(found, "moments", "float32") == E * N * (4 * F * D + D**2 + 3 * F**2)
    assert by_rate(found, "factors", "float32") == (
        E * D * F**2
        + 2 * E * (2 * F**2 * D + F * D**2 + 2 * F * R * D + 2 * F**2 * R)
        + E * 2 * F**2 * down
    )
    latent = 2 * R * (D - R) * D + R**2 * (D - R)
    solve = down**2 * (D - down)
    assert by_rate(found, "factors", "float64") == (
        2 * G * (D**3 + b * D**2 + 2 * b**2 * D + b**2 * (D - b))
        + 2 * E * (latent + 3 * F * R**2)
        + E * latent
        + E * (2 * F**2 * D + 2 * down * F * D + 2 * down**2 * D + 2 * solve)
        + E * (2 * F * down * (D - down) + 3 * F * down**2)
    )
    lapack = {(e.rate, e.order): 0 for e in found if e.order and e.phase == "factors"}
    for e in found:
        if e.order and e.phase == "factors":
            lapack[e.rate, e.order] += e.count
    assert lapack == {
        ("Cholesky", (D,)): 2 * G, ("eigenvectors", (D,)): 2 * G, ("Cholesky", (b,)): 2 * G
        + (2 * E if b == R else 0), ("QR", (b, D)): 2 * G,
        ("Cholesky", (F,)): E, ("eigenvectors", (F,)): E, ("Cholesky", (down,)): 2 * E,
        ("QR", (down, D)): E, **({} if b == R else {("Cholesky", (R,)): 2 * E}),
    }  # fmt: skip

    inner = 2 * 310 * 2 * R * (D - R) + 2 * E * N * 2 * F * R
    outer = E * N * 2 * down * (D - down) + E * N * 2 * F * down
    assert by_rate(found, "refit 1, up_proj: passes", "float32") == (
        inner + outer + 6 * (outer + E * N * 2 * F * R)
    )
    assert by_rate(found, "refit 2, down_proj: passes", "float32") == (
        E * N * F**2 + inner + 5 * outer
    )
    assert by_rate(found, "refit 1, up_proj: solves", "float64") == E * 3 * 2 * F * R**2
    assert by_rate(found, "refit 1, up_proj: solves", "float32") == (
        E * 3 * (2 * R * F**2 + 2 * F * R**2)
    )


def test_the_bound_is_flops_over_pace_and_lapack():
    found = [
        bounds.Entry("a", "x", 3, 2e9, "float32"),
        bounds.Entry("a", "y", 2, 1e9, "float64"),
        bounds.Entry("b", "z", 5, 0, "QR", (8, 16)),
    ]
    paces, lapack = {"float32": 10.0, "float64": 4.0}, {("QR", (8, 16)): 0.5}
    assert bounds.bound(found, paces, lapack) == pytest.approx({"a": 0.6 + 0.5, "b": 2.5})


def test_lapack_is_measured_once_an_order():
    found = [
        bounds.Entry("a", "x", 3, 0, routine, order)
        for routine, order in (("QR", (4, 9)), ("eigenvectors", (9,)), ("Cholesky", (9,)))
        for _ in range(2)
    ]
    times = bounds.lapack_seconds(found, 1)
    assert set(times) == {("QR", (4, 9)), ("eigenvectors", (9,)), ("Cholesky", (9,))}
    assert min(times.values()) > 0
