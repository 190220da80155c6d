"""A layer trained to answer as other experts do."""

from __future__ import annotations

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from test_fit_compressed import BIASED, LATENT, D, answer, problem

import molae
from molae import ops
from molae.errors import ArgumentError, NonFiniteError, NumericalError, ShapeError
from molae.fit import descent, distill_layer
from molae.ops import Projection


def disturbed(p, seed=0, by=0.3):
    """The same groups and ranks, other numbers."""
    rng = np.random.default_rng(seed)

    def moved(arrays):
        return tuple(
            None if a is None else a + by * a.std() * rng.standard_normal(a.shape) for a in arrays
        )

    return replace(p, private=moved(p.private), shared=moved(p.shared))


def student_of(experts, **options):
    return tuple(disturbed(p, seed, **options) for seed, p in enumerate(experts))


def error(given, layer, teacher):
    aim = answer(given, teacher)
    return np.linalg.norm(aim - answer(given, layer)) / np.linalg.norm(aim)


def arrays(layer):
    return [a for p in layer for a in (*p.private, *p.shared) if a is not None]


@pytest.mark.parametrize("options", [{}, LATENT])
def test_a_student_finds_its_teacher(options):
    given, teacher = problem(1, 2000, **options)
    student = student_of(teacher)
    found = distill_layer(given, student, teacher=teacher, epochs=40, rate=0.03)
    assert found.error[1] < 0.15 * found.error[0]
    assert found.error == pytest.approx(
        [error(given, layer, teacher) for layer in (student, found.layer)], rel=1e-9
    )
    for old, new in zip(student, found.layer, strict=True):
        assert (old.groups, old.ranks, old.form) == (new.groups, new.ranks, new.form)
        for a, b in zip(old.perm, new.perm, strict=True):
            assert a is None or np.array_equal(a, b)


@pytest.mark.parametrize("trained", [["down"], ["gate", "up"]])
def test_only_what_is_asked_for_is_trained(trained):
    given, teacher = problem(2, 800, **LATENT)
    student = student_of(teacher)
    before = [a.copy() for a in arrays(student)]
    found = distill_layer(given, student, teacher=teacher, trained=trained, epochs=4)
    assert all(np.array_equal(a, b) for a, b in zip(arrays(student), before, strict=True))
    for kind, old, new in zip(("gate", "up", "down"), student, found.layer, strict=True):
        same = all(np.array_equal(a, b) for a, b in zip(arrays([old]), arrays([new]), strict=True))
        assert same == (kind not in trained), kind
    assert found.error[1] < found.error[0]


def test_known_answers_need_no_teacher_and_what_was_lost_is_made_up_for():
    given, teacher = problem(3, 800)
    student = student_of(teacher)
    aim = answer(given, teacher)
    one = distill_layer(given, student, teacher=teacher, epochs=3)
    other = distill_layer(replace(given, answers=aim), student, epochs=3)
    assert one.error == pytest.approx(other.error)
    lost = np.full(given.x.shape, 0.5)
    found = distill_layer(replace(given, lost=lost), student, teacher=teacher, epochs=20)
    gap = answer(given, found.layer) - aim
    assert np.linalg.norm(gap - lost) < np.linalg.norm(answer(given, student) - aim - lost)


def test_a_descent_that_leads_astray_is_not_taken():
    given, teacher = problem(4)
    student = student_of(teacher)
    found = distill_layer(given, student, teacher=teacher, epochs=2, rate=0.5)
    assert min(loss for _, loss in found.losses[1:]) > found.losses[0][1]
    for a, b in zip(arrays(student), arrays(found.layer), strict=True):
        assert np.array_equal(a, b)
    assert found.error[0] == found.error[1]


@pytest.mark.parametrize(("rate", "kind"), [(1e3, NumericalError), (1e200, NonFiniteError)])
def test_a_loss_that_runs_away_is_an_error_that_names_the_step(rate, kind):
    given, teacher = problem(4)
    with pytest.raises(kind, match=r"^step \d: .*take a smaller rate"):
        distill_layer(given, student_of(teacher), teacher=teacher, epochs=2, rate=rate)


def test_it_ends_early_where_nothing_is_gained():
    given, teacher = problem(4)
    found = distill_layer(given, student_of(teacher), teacher=teacher, steps=50, rate=0.5)
    losses = [loss for _, loss in found.losses]  # a pass is one step
    assert found.steps == losses.index(min(losses)) + descent.PATIENCE < 50


def test_losses_are_of_the_tokens_held_out():
    given, teacher = problem(7, 1500)
    student = student_of(teacher)
    found = distill_layer(given, student, teacher=teacher, steps=7)  # passes are of two steps
    assert [step for step, _ in found.losses] == [0, 2, 4, 6, 7]
    held = given.first(len(given.x))
    some = np.arange(len(given.x)) % descent.HELD_OUT == descent.HELD_OUT - 1
    held = replace(given, x=given.x[some], index=given.index[some], weights=given.weights[some])
    assert found.losses[0][1] == pytest.approx(error(held, student, teacher), rel=1e-9)
    assert min(loss for _, loss in found.losses) == pytest.approx(
        error(held, found.layer, teacher), rel=1e-9
    )


@pytest.mark.parametrize("form", ["vectors", "narrow", "additive"])
@pytest.mark.parametrize("options", [{}, LATENT, LATENT | BIASED])
def test_beside_what_acts_for_compressed_experts(form, options):
    """The whole layer comes nearer, and what acts for them stays as it is."""
    given, teacher = problem(8, 1200, **options)
    student, n = student_of(teacher), 1
    rng = np.random.default_rng(0)
    E, F = teacher[0].num_experts, 6
    if form == "vectors":
        light = 1 + 0.2 * rng.standard_normal((E, 2 * D + F))
    else:
        m = 2 * (form == "narrow")
        parts = [
            (E, m, D),
            (E, m, D),
            (E, D, m),
            (E, D),
            *[(E, m)] * (m if "bias" in options else 0),
        ]
        light = ops.NarrowExperts(*(0.1 * rng.standard_normal(shape) for shape in parts))

    def run(layer):
        call = given.x, given.index, given.weights, *layer, light, n
        which = ops.compressed_experts_forward if form == "vectors" else ops.narrow_experts_forward
        return which(*call, **given.how(layer))

    aim = answer(given, teacher)
    found = distill_layer(given, student, teacher=teacher, light=(light, n), epochs=10)
    before, after = (
        np.linalg.norm(aim - run(layer)) / np.linalg.norm(aim) for layer in (student, found.layer)
    )
    assert found.error == pytest.approx([before, after], rel=1e-9)
    assert after < 0.9 * before
    alone = distill_layer(given, student, teacher=teacher, epochs=10)
    assert after < np.linalg.norm(aim - run(alone.layer)) / np.linalg.norm(aim)


class Kept:
    """A keeper in memory; `stop` ends the run after so many steps."""

    def __init__(self, stop=None):
        self.state, self.stop, self.begun = None, stop, []

    def load(self):
        return self.state

    def due(self):
        return True

    def save(self, arrays, facts):
        self.state = {name: a.copy() for name, a in arrays.items()}, json.loads(json.dumps(facts))

    def told(self, done, steps, loss):
        self.begun.append(done)
        if done == self.stop:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_an_interrupted_run_goes_on_to_the_same_bytes(stop):
    given, teacher = problem(9, 2500, dtype=np.float32, **LATENT)
    student = student_of(teacher)
    options = {"teacher": teacher, "epochs": 3, "weight_decay": 0.1, "max_norm": 1e-3}
    whole = distill_layer(given, student, **options)
    kept = Kept(stop)
    with pytest.raises(KeyboardInterrupt):
        distill_layer(given, student, keeper=kept, told=kept.told, **options)
    kept.stop, kept.begun = None, []
    again = distill_layer(given, student, keeper=kept, told=kept.told, **options)
    assert kept.begun[0] == stop  # nothing is done twice
    assert (again.losses, again.steps) == (whole.losses, whole.steps)
    for a, b in zip(arrays(whole.layer), arrays(again.layer), strict=True):
        assert np.array_equal(a, b)


def test_types_stay_and_threads_change_no_bit():
    given, teacher = problem(5, 3000, dtype=np.float32, **LATENT)
    narrow = tuple(
        replace(
            p,
            private=tuple(None if a is None else a.astype(ml_dtypes.bfloat16) for a in p.private),
            shared=tuple(None if a is None else a.astype(ml_dtypes.bfloat16) for a in p.shared),
        )
        for p in student_of(teacher)
    )
    found = []
    for threads in (1, 2):
        with molae.threads.num_threads(threads):
            found.append(distill_layer(given, narrow, teacher=teacher, epochs=2))
    one, two = (arrays(f.layer) for f in found)
    assert all(a.dtype == ml_dtypes.bfloat16 for a in one)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert found[0].error[1] < found[0].error[0]
    ops.latent_experts_forward(given.x, given.index, given.weights, *found[0].layer)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"teacher": None}, ArgumentError, "teacher: needed"),
        ({"trained": ()}, ArgumentError, "trained: expected some of gate, up, down"),
        ({"trained": ("router",)}, ArgumentError, "trained"),
        ({"epochs": -1}, ArgumentError, "epochs"),
        ({"steps": -1}, ArgumentError, "steps"),
        ({"weight_decay": -1.0}, ArgumentError, "weight_decay"),
        ({"max_norm": 0.0}, ArgumentError, "max_norm"),
        ({"rate": 0.0}, ArgumentError, "rate"),
        ({"x": np.nan}, NonFiniteError, "NaN or Inf"),
        ({"lost": np.zeros((2, D))}, ShapeError, "lost"),
    ],
)
def test_what_makes_no_sense_is_refused(options, kind, text):
    given, teacher = problem(0)
    options = {"teacher": teacher, **options}
    if "x" in options:
        x = given.x.copy()
        x[5, 2] = options.pop("x")
        given = replace(given, x=x)
    if "lost" in options:
        given = replace(given, lost=options.pop("lost"))
    with pytest.raises(kind, match=text):
        distill_layer(given, teacher, **options)


def test_dense_and_empty_parts_are_taken_as_they_are():
    given, (gate, up, down) = problem(6, 400)
    E, F = gate.num_experts, gate.private[0].shape[1]
    nothing = Projection((tuple(range(E)),), (0,), (None,), (None,))
    student = (gate, nothing, Projection.dense(np.zeros((E, D, F))))
    found = distill_layer(given, student, teacher=(gate, up, down), epochs=1)
    assert found.layer[1].private == (None,)
