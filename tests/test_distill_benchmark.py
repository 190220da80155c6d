"""The benchmark of distillation: both contestants take the same steps, and others are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from benchmark_modules import load

from molae.fit import LayerInput, answer_error

check = load("check")
contestant = load("distill_torch")
distill = load("distill")
settings = load("settings")
tables = load("tables")

TINY = settings.Distilled("tiny", E=6, K=2, D=36, F=20, steps=2, epochs=2, k=3, size=0.6)
FORMS = contestant.FORMS


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def task():
    return distill.Task.drawn(TINY, np.float32)


@pytest.fixture(scope="module")
def ours(task):
    return task.by_molae()


# ------------------------------------------------------------------------- equality


@pytest.mark.parametrize("form", FORMS)
def test_both_take_the_same_steps(task, ours, form):
    theirs = task.by_torch(form)
    assert len(theirs.steps) == len(ours.steps) == TINY.steps * TINY.epochs
    assert distill.check(form.name, task, ours, theirs) > 0
    before, after = (
        answer_error(
            LayerInput(task.x, task.index, task.weights),
            distill._projections(layer, task.perm),
            distill._projections(task.layer, task.perm),
        )
        for layer in (task.layer, theirs.factors)
    )
    assert after > before == 0  # they went somewhere


@pytest.mark.parametrize("form", [f for f in FORMS if f is not contestant.Grouped])
def test_they_do_in_float64_up_to_rounding(form):
    own = distill.Task.drawn(TINY, np.float64)
    assert distill.check(form.name, own, own.by_molae(), own.by_torch(form)) < 1e-7


@pytest.mark.parametrize("form", FORMS)
def test_experts_that_nothing_reaches_stay(task, form):
    idle = replace(task, index=np.where(task.index == 4, 3, task.index))
    ours, theirs = idle.by_molae(), idle.by_torch(form)
    distill.check(form.name, idle, ours, theirs)
    assert np.array_equal(theirs.factors[0][4], task.layer[0][4])


@pytest.mark.parametrize("form", FORMS)
def test_another_rate_and_another_answer_are_refused(monkeypatch, task, ours, form):
    with monkeypatch.context() as patch:
        patch.setitem(distill.OPTIONS, "rate", 1.01 * distill.OPTIONS["rate"])
        theirs = task.by_torch(form)
    with pytest.raises(check.WrongAnswer, match=f"{form.name}: gate_proj, private"):
        distill.check(form.name, task, ours, theirs)
    wrong = replace(task, answers=np.float32(1.01) * task.answers)
    with pytest.raises(check.WrongAnswer, match="of its way"):
        distill.check(form.name, task, ours, wrong.by_torch(form))


@pytest.mark.parametrize("which", range(6))
def test_one_matrix_that_is_off_is_refused(task, ours, which):
    assert distill.check("x", task, ours, ours) == 0
    factors = [a.copy() for a in ours.factors]
    factors[which][-1] += 0.02 * (factors[which] - task.layer[which])[-1]
    name = f"x: {('gate', 'up', 'down')[which // 2]}_proj, {('private', 'shared')[which % 2]}"
    with pytest.raises(check.WrongAnswer, match=name):
        distill.check("x", task, ours, distill.Run(factors, ours.steps))
    factors[which][-1] = np.nan
    with pytest.raises(check.WrongAnswer, match=name):
        distill.check("x", task, ours, distill.Run(factors, ours.steps))


def test_other_numbers_of_steps_are_refused(task, ours):
    with pytest.raises(check.WrongAnswer, match="3 steps, molae's are 4"):
        distill.check("x", task, ours, distill.Run(ours.factors, ours.steps[1:]))


# -------------------------------------------------------------------------- the case


def test_operations_of_a_step(task):
    few = replace(task, index=np.array([[0, 1], [0, 5], [2, 3]]))  # groups of 3: 1, 2 and 2
    F, D, K = TINY.F, TINY.D, TINY.K
    ranks = [M.shape[1] for M in task.layer[1::2]]
    want = sum(
        3 * K * F * R + passes * met * R * (D - R)
        for R, met, passes in zip(ranks, (5 / 3, 5 / 3, 2), (2, 2, 3), strict=True)
    )
    assert distill.flops(few) == pytest.approx(2 * 1024 * want)


def test_rows_and_their_table():
    few = settings.Settings(repeats=2, threads=1, pause=0.0, D=64, distilled=(TINY,))
    found = json.loads(json.dumps(distill.distill(few, 10.0)))
    (row,) = found["rows"]
    assert set(row["times"]) == {"molae", *(form.name for form in FORMS)}
    assert row["best"] != "molae"
    assert row["against"]["ratio"] == pytest.approx(
        row["times"][row["best"]]["median_s"] / row["times"]["molae"]["median_s"]
    )
    assert row["reached"] == (row["against"]["ratio"] >= 2)
    share = row["flops"] / row["times"]["molae"]["median_s"] / 1e9 / row["product_gflops"]
    assert row["peak_share"]["molae"] == pytest.approx(share)
    for reached in (True, False):
        row["reached"] = reached
        text = tables.benchmarks(
            {"header": load("header").header(1), "peaks": {"gflops": {}, "copy_gbs": 1.0},
             "quick": True, "distill": found}
        )  # fmt: skip
        assert f"reached in {int(reached)} of 1 rows" in text
    assert f"({row['best']})" in text


def test_a_case_refuses_a_wrong_contestant(monkeypatch):
    monkeypatch.setattr(contestant, "WARMUP", 0.9)
    with pytest.raises(check.WrongAnswer, match="a loop, float64"):
        distill.distill(settings.Settings(distilled=(TINY,)), 10.0)
