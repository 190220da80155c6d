"""The quantization_config of a converted checkpoint, and the tensors it promises."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molae.errors import ArgumentError, CheckpointError
from molae.factored import (
    Factored,
    LightModule,
    Part,
    Split,
    group_tensors,
    index_groups,
    numbers_by_role,
)
from molae.fit import stored_numbers

LETTERS = {"E": 5, "K": 3, "D": 8, "F": 6}
SPLIT = Split(((0, 2), (1,), (3, 4)), (3, 0, None))
WHOLE = Factored(
    method="latent",
    form="gauge",
    layout="fused",
    layers={0: {"gate_proj": SPLIT}, 7: {"down_proj": SPLIT}},
    molae_version="0.1.0",
)


def test_it_survives_a_dict():
    assert Factored.from_dict(WHOLE.to_dict(), LETTERS) == WHOLE


def test_compressed_experts_are_of_a_newer_format():
    both = replace(WHOLE, compressed={0: 1, 7: 2})
    assert Factored.from_dict(both.to_dict(), LETTERS) == both
    assert (WHOLE.to_dict()["format_version"], both.to_dict()["format_version"]) == (1, 2)
    (part,) = both.light.tensors("P", E=4, F=6, D=8)
    assert part == Part("compressed", "P.compressed", (4, 22))
    assert both.light.numbers(F=6, D=8) == 22


@pytest.mark.parametrize("units", [0, 2])
def test_narrow_experts_are_of_a_newer_format(units):
    narrow = replace(WHOLE, compressed={0: 1}, light=LightModule(units))
    data = narrow.to_dict()
    assert (data["format_version"], data["light_units"]) == (3, units)
    assert Factored.from_dict(data, LETTERS) == narrow
    parts = {part.name: part.shape for part in narrow.light.tensors("P", E=4, F=6, D=8)}
    wide = {"gate": (4, 2, 8), "up": (4, 2, 8), "down": (4, 8, 2)} if units else {}
    assert parts == {**{f"P.light.{k}_proj": s for k, s in wide.items()}, "P.light.bias": (4, 8)}
    assert narrow.light.numbers(F=6, D=8) * 4 == sum(np.prod(shape) for shape in parts.values())


def test_narrow_experts_with_biases_are_of_the_newest_format():
    narrow = replace(WHOLE, compressed={0: 1}, light=LightModule(2, biased=True))
    data = narrow.to_dict()
    assert (data["format_version"], data["light_units"], data["light_biases"]) == (4, 2, True)
    assert Factored.from_dict(data, LETTERS) == narrow
    parts = {part.name: part.shape for part in narrow.light.tensors("P", E=4, F=6, D=8)}
    plain = {part.name: part.shape for part in LightModule(2).tensors("P", E=4, F=6, D=8)}
    assert parts == plain | {"P.light.gate_bias": (4, 2), "P.light.up_bias": (4, 2)}
    assert narrow.light.numbers(F=6, D=8) * 4 == sum(np.prod(shape) for shape in parts.values())


@pytest.mark.parametrize(
    ("text", "units"),
    [("vectors", None), ("additive", 0), ("narrow:5", 5), ("narrow:1/3", 2), ("narrow:1/1", 6)],
)
def test_light_modules_have_names(text, units):
    assert LightModule.parse(text, 6) == LightModule(units)
    # What has no gate and up has no biases of them.
    assert LightModule.parse(text, 6, biased=True) == LightModule(units, biased=bool(units))


@pytest.mark.parametrize("text", ["", "narrow", "narrow:0", "narrow:7", "narrow:1/7", "narrow:-1"])
def test_light_modules_that_make_no_sense_are_refused(text):
    with pytest.raises(ArgumentError, match="light_module"):
        LightModule.parse(text, 6)


def changed(path, value):
    data = WHOLE.to_dict()
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return data


GATE = ("layers", "0", "gate_proj")


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("quant_method",), "gptq", "quant_method"),
        (("format_version",), 5, "newer molae"),
        (("light_biases",), 1, "light_biases: expected true only beside light_units"),
        (("light_biases",), True, "light_biases: expected true only beside light_units"),
        (("light_units",), 7, "light_units: expected 0 to F = 6"),
        (("light_units",), -1, "light_units"),
        (("light_units",), True, "light_units"),
        (("compressed_experts",), [1], "compressed_experts"),
        (("compressed_experts",), {"x": 1}, "'x'"),
        (("compressed_experts",), {"0": 3}, "compressed_experts.0: expected 1 to K - 1 = 2"),
        (("compressed_experts",), {"0": 0}, "compressed_experts.0"),
        (("format_version",), "1", "format_version"),
        (("format_version",), 0, "format_version"),
        (("form",), "round", "form"),
        (("layers",), None, "layers"),
        (("layers", "x"), {}, "'x'"),
        (("layers", "0"), {"router": {}}, "layers.0"),
        (GATE, 3, "layers.0.gate_proj"),
        ((*GATE, "groups"), [[0, 1], [1], [3, 4]], "layers.0.gate_proj.groups"),
        ((*GATE, "groups"), [[0, 1], [], [2, 3, 4]], "layers.0.gate_proj.groups"),
        ((*GATE, "groups"), [[0, 1], [2], [3]], "layers.0.gate_proj.groups"),
        ((*GATE, "groups"), [[0, 1], [2], [3, 5]], "layers.0.gate_proj.groups"),
        ((*GATE, "groups"), [0, 1, 2, 3, 4], "layers.0.gate_proj.groups"),
        ((*GATE, "ranks"), [3, 0], "layers.0.gate_proj.ranks"),
        ((*GATE, "ranks"), [3, 0, -1], "layers.0.gate_proj.ranks"),
        ((*GATE, "ranks"), [3, 0, 1.5], "layers.0.gate_proj.ranks"),
        ((*GATE, "ranks"), [3, 0, True], "layers.0.gate_proj.ranks"),
        ((*GATE, "ranks"), [9, 0, None], "at most D=8"),
        ((*GATE, "ranks"), None, "layers.0.gate_proj.ranks"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(path, value, named):
    with pytest.raises(CheckpointError) as caught:
        Factored.from_dict(changed(path, value), LETTERS)
    assert named in str(caught.value)


def test_names_and_shapes_of_each_kind_of_group():
    def shapes(kind, rank, form="gauge"):
        found = group_tensors("P", kind, 3, 2, rank, F=6, D=8, form=form)
        return {part.name: part.shape for part in found}

    assert shapes("up_proj", 5) == {
        "P.up_proj.3.perm": (8,),
        "P.up_proj.3.shared": (5, 3),
        "P.up_proj.3.private": (2, 6, 5),
    }
    assert shapes("up_proj", 5, "plain") == {
        "P.up_proj.3.shared": (5, 8),
        "P.up_proj.3.private": (2, 6, 5),
    }
    assert shapes("down_proj", 5)["P.down_proj.3.private"] == (2, 5, 6)
    assert shapes("up_proj", None) == {"P.up_proj.3.dense": (2, 6, 8)}
    assert shapes("down_proj", None) == {"P.down_proj.3.dense": (2, 8, 6)}
    assert shapes("down_proj", 0) == {}


@given(
    k=st.integers(1, 6), F=st.integers(1, 9), D=st.integers(1, 9), data=st.data(),
    form=st.sampled_from(["gauge", "plain"]),
)  # fmt: skip
def test_shapes_hold_the_numbers_that_are_counted(k, F, D, data, form):
    rank = data.draw(st.integers(0, min(D, k * F)))
    numbers = numbers_by_role(Split((tuple(range(k)),), (rank,)), F=F, D=D, form=form)
    assert numbers["shared"] + numbers["private"] == stored_numbers(rank, k, F, D, form)
    assert numbers["perm"] == (D if form == "gauge" and rank else 0)


@given(experts=st.integers(1, 70), size=st.integers(1, 80))
def test_index_groups_hold_each_expert_once(experts, size):
    groups = index_groups(experts, size)
    assert [e for group in groups for e in group] == list(range(experts))
    assert all(len(group) == size for group in groups[:-1])
    assert 1 <= len(groups[-1]) <= size
