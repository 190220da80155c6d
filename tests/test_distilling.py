"""A layer trained to answer as other experts do."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from test_fit_compressed import LATENT, D, answer, problem

import molae
from molae import ops
from molae.errors import ArgumentError, NonFiniteError, ShapeError
from molae.fit import distill_layer
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
    found = distill_layer(given, student, teacher=teacher, epochs=2, rate=1e3)
    for a, b in zip(arrays(student), arrays(found.layer), strict=True):
        assert np.array_equal(a, b)
    assert found.error[0] == found.error[1]


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
