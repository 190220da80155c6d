"""Groups and ranks: what a size allows, and what is refused."""

import numpy as np
import pytest
from checkpoints import make_checkpoint

import molae
from molae import ConvertConfig
from molae.convert import METHODS, plan
from molae.convert.allocation import largest_rank
from molae.errors import ArgumentError
from molae.fit import stored_numbers

TYPES = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """E=10 leaves a smaller last group in eights and fours."""
    return make_checkpoint(tmp_path_factory.mktemp("source") / "src", E=10, D=24, F=16)


@pytest.mark.parametrize("form", ["gauge", "plain"])
@pytest.mark.parametrize(("k", "F", "D"), [(1, 5, 9), (3, 4, 7), (8, 2, 16)])
def test_the_largest_rank_is_the_largest(k, F, D, form):
    limit = min(D, k * F)
    for budget in np.linspace(0, 1.1 * k * F * D, 60):
        rank = largest_rank(budget, k=k, F=F, D=D, form=form, limit=limit)
        assert rank == 0 or stored_numbers(rank, k, F, D, form) <= budget
        assert rank == limit or stored_numbers(rank + 1, k, F, D, form) > budget


@pytest.mark.parametrize("size", [0.9, 0.75, 0.5, 0.25])
@pytest.mark.parametrize("group_size", [1, 2, 4, 8, 10, "auto", {"gate": 4, "down": 3}])
def test_latent_reaches_the_size_from_below_in_each_group(checkpoint, size, group_size):
    found = plan(checkpoint, ConvertConfig(size=size, group_size=group_size))
    assert found.size_reached <= size
    E, F, D = 10, 16, 24
    for kind in TYPES:
        k = found.types[kind].group_sizes[0]
        rank = max(rank for rank in found.types[kind].ranks)
        assert stored_numbers(rank, k, F, D) <= size * k * F * D
        assert stored_numbers(rank + 1, k, F, D) > size * k * F * D
        if isinstance(group_size, dict):
            assert k == group_size.get(kind.removesuffix("_proj"), k)
    numbers = found.after.numbers["gate_proj"]
    assert numbers["dense"] == 0
    assert found.before.expert_numbers == 2 * 3 * E * F * D


def test_the_last_group_may_be_smaller_and_has_its_own_rank(checkpoint):
    found = plan(checkpoint, ConvertConfig(size=0.5, group_size=8))
    assert found.types["gate_proj"].group_sizes == (8, 2)
    F, D = 16, 24
    assert found.types["gate_proj"].ranks == tuple(
        largest_rank(0.5 * k * F * D, k=k, F=F, D=D, form="gauge", limit=D) for k in (8, 2)
    )


def test_a_size_that_leaves_no_rank_is_refused_with_the_smallest_there_is(checkpoint):
    with pytest.raises(ArgumentError, match="smallest size that can be reached is") as caught:
        plan(checkpoint, ConvertConfig(size=0.001, group_size=4))
    smallest = float(str(caught.value).rsplit(" ", 1)[1])
    plan(checkpoint, ConvertConfig(size=smallest * 1.001, group_size=4))
    with pytest.raises(ArgumentError):
        plan(checkpoint, ConvertConfig(size=smallest * 0.99, group_size=4))
    with pytest.raises(ArgumentError, match="smallest size"):
        plan(checkpoint, ConvertConfig(size=0.001))


def test_auto_finds_the_planted_group_size(tmp_path, rng):
    """Experts that share their row space in fours are best grouped in fours."""
    E, F, D, R = 16, 12, 32, 6
    replace = {}
    for layer in range(2):
        for kind in TYPES:
            for first in range(0, E, 4):
                basis = rng.standard_normal((R, D)).astype(np.float32)
                for e in range(first, first + 4):
                    A = rng.standard_normal((F, R)).astype(np.float32)
                    W = (A @ basis).T if kind == "down_proj" else A @ basis
                    name = f"model.layers.{layer}.mlp.experts.{e}.{kind}.weight"
                    replace[name] = np.ascontiguousarray(W)
    src = make_checkpoint(tmp_path / "src", E=E, F=F, D=D, replace=replace)
    found = plan(src, ConvertConfig(size=0.33))
    assert [c.group_size for c in found.candidates if c.kind == "up_proj"] == [2, 4, 8, 16]
    for kind in TYPES:
        assert found.types[kind].group_sizes == (4,)
        chosen = [c for c in found.candidates if c.kind == kind and c.chosen]
        assert len(chosen) == 1
        assert chosen[0].error < 2e-3  # a Gram matrix in float32 sees no further
        assert chosen[0].error == min(c.error for c in found.candidates if c.kind == kind)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_size_one_leaves_everything(checkpoint, name):
    found = plan(checkpoint, ConvertConfig(method=name, size=1.0))
    assert found.types == {}
    assert found.size_reached == 1.0
    assert found.flops_ratio == 1.0


def test_the_papers_method_takes_the_smallest_group_that_reaches_the_size(checkpoint):
    found = plan(checkpoint, ConvertConfig(method="molae", size=0.9))
    assert set(found.types) == {"gate_proj", "up_proj"}
    assert max(r for r in found.types["gate_proj"].ranks if r is not None) == 16
    k = found.types["gate_proj"].group_sizes[0]
    assert found.size_reached <= 0.9
    smaller = plan(checkpoint, ConvertConfig(method="molae", rank=16, group_size=k - 1))
    assert smaller.size_reached > 0.9


def test_the_papers_method_takes_the_largest_rank_for_a_group_size(checkpoint):
    found = plan(checkpoint, ConvertConfig(method="molae", size=0.6, group_size=5))
    (rank,) = found.types["gate_proj"].ranks
    assert found.size_reached <= 0.6
    more = plan(checkpoint, ConvertConfig(method="molae", rank=rank + 1, group_size=5))
    assert more.size_reached > 0.6


def test_rank_and_group_size_decide_alone(checkpoint):
    found = plan(checkpoint, ConvertConfig(method="molae", rank=4, group_size=5))
    E, F, D = 10, 16, 24
    stored = 2 * 2 * stored_numbers(4, 5, F, D, "plain") + E * F * D
    assert found.size_reached == stored / (3 * E * F * D)
    assert found.size_asked is None
    with pytest.raises(ArgumentError, match=r"cannot reach 0\.35"):
        plan(checkpoint, ConvertConfig(method="molae", rank=4, group_size=5, size=0.35))
    plan(checkpoint, ConvertConfig(method="molae", rank=4, group_size=5, size=0.6))


def test_sizes_the_papers_method_cannot_reach_are_refused_with_those_it_can(checkpoint):
    with pytest.raises(ArgumentError) as caught:
        plan(checkpoint, ConvertConfig(method="molae", size=0.4))
    text = str(caught.value)
    assert "cannot reach 0.4" in text
    shown = [float(part.split(" (")[0]) for part in text.split("it reaches ")[1].split(", ")[::2]]
    assert shown == sorted(shown, reverse=True)
    assert all(0.4 < share < 1 for share in shown)
    best = plan(checkpoint, ConvertConfig(method="molae", size=shown[-1] + 1e-4))
    assert best.size_reached == pytest.approx(shown[-1], abs=1e-4)


def test_the_papers_method_can_use_other_groups_for_gate_and_up(checkpoint):
    found = plan(checkpoint, ConvertConfig(method="molae", rank=8, group_size={"gate": 2, "up": 5}))
    assert found.types["gate_proj"].group_sizes == (2,)
    assert found.types["up_proj"].group_sizes == (5,)


def test_a_group_that_saves_nothing_stays_dense(checkpoint):
    found = plan(checkpoint, ConvertConfig(method="molae", rank=16, group_size=9))
    assert found.types["gate_proj"].group_sizes == (9, 1)
    assert found.types["gate_proj"].ranks == (None, 16)
    assert found.after.numbers["gate_proj"]["dense"] == 2 * 16 * 24


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"method": "magic"}, "known are latent, molae"),
        ({"rank": 3}, "method 'latent' finds its ranks"),
        ({"group_size": 11}, "the model has E=10"),
        ({"method": "molae", "group_size": 11}, "the model has E=10"),
        ({"method": "molae", "rank": 17}, r"at most min\(F, D\) = 16, got 17"),
        ({"method": "molae", "group_size": {"down": 2}}, "leaves down_proj as it is"),
    ],
)
def test_settings_that_do_not_fit_the_model(checkpoint, settings, text):
    with pytest.raises(ArgumentError, match=text):
        plan(checkpoint, ConvertConfig(**settings))


def test_the_plan_says_when_work_rises(checkpoint):
    rises = plan(checkpoint, ConvertConfig(method="molae", size=0.9))
    assert rises.flops_ratio > 1
    falls = plan(checkpoint, ConvertConfig(size=0.3))
    assert falls.flops_ratio < 1


def test_a_plan_is_deterministic_and_writes_nothing(checkpoint):
    before = sorted(path.name for path in checkpoint.iterdir())
    first, second = (plan(checkpoint, ConvertConfig(size=0.5)) for _ in range(2))
    assert first.to_dict() | {"seconds": 0} == second.to_dict() | {"seconds": 0}
    assert sorted(path.name for path in checkpoint.iterdir()) == before
    assert molae.plan is plan
