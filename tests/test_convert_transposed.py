"""Experts that lie transposed, interleaved, or in MXFP4: what is read, and the way back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from converting import bits, factored_matrices, fixed_method, read_json, tensors
from encoded import oss_config, oss_pair, oss_tensors

from molae import ConvertConfig
from molae.arch import describe, load_family
from molae.convert import convert, inspect, materialize
from molae.convert.methods import METHODS
from molae.errors import CheckpointError, NonFiniteError
from molae.factored import Split
from molae.io import open_checkpoint

KINDS = ("gate_proj", "up_proj", "down_proj")

#: Every matrix is kept, so that materializing is exact.
DENSE = Split(((2, 0), (1, 3)), (None, None))


def by_name(own: dict[str, np.ndarray], layer: int, kind: str) -> np.ndarray:
    """(E, rows, cols) of the tiny gpt_oss, by the definition of its layout."""
    prefix = f"model.layers.{layer}.mlp.experts"
    if kind == "down_proj":
        return own[f"{prefix}.down_proj"].transpose(0, 2, 1)
    both = own[f"{prefix}.gate_up_proj"].transpose(0, 2, 1)
    return both[:, (kind == "up_proj") :: 2]


def same_weights(one: Path, other: Path) -> None:
    first, second = tensors(one), tensors(other)
    assert list(first) == list(second)
    for name, array in first.items():
        assert bits(array) == bits(second[name]), name


# ------------------------------------------------------------------- reading


def test_matrices(tmp_path):
    mxfp4, bf16 = oss_pair(tmp_path)
    own = tensors(bf16)
    for src, encoding in ((mxfp4, "mxfp4"), (bf16, None)):
        with open_checkpoint(src) as checkpoint:
            assert checkpoint.encoding == encoding
            model = describe(checkpoint)
            assert (model.layout, model.dtype) == ("transposed", "BF16")
            assert not model.is_mapped(checkpoint.encoding)
            for layer in model.moe_layers:
                for kind in KINDS:
                    found = model.matrices(checkpoint, layer, kind)
                    wanted = by_name(own, layer, kind)
                    assert len(found) == len(wanted)
                    for a, b in zip(found, wanted, strict=True):
                        assert a.flags.c_contiguous
                        assert bits(a) == bits(np.ascontiguousarray(b))


def test_an_mxfp4_checkpoint_is_seen_as_what_it_stands_for(tmp_path):
    mxfp4, bf16 = oss_pair(tmp_path)
    same_weights(mxfp4, bf16)
    found, plain = inspect(mxfp4), inspect(bf16)
    assert (found.encoding, plain.encoding) == ("mxfp4", None)
    assert found.total_parameters == plain.total_parameters
    assert found.active_parameters == plain.active_parameters
    assert found.bytes < plain.bytes


# ---------------------------------------------------------------- conversion


def test_converted_alike(tmp_path):
    mxfp4, bf16 = oss_pair(tmp_path)
    for src, dst in ((mxfp4, "a"), (bf16, "b")):
        report = convert(src, tmp_path / dst, ConvertConfig(size=0.6))
    same_weights(tmp_path / "a", tmp_path / "b")
    own, made = tensors(bf16), tensors(tmp_path / "a")
    kept = [name for name in own if name.endswith(("_bias", ".bias", "router.weight", "sinks"))]
    assert len(kept) == 2 * 9
    for name in kept:
        assert bits(made[name]) == bits(own[name])
    # The errors that the report tells are those of the factors against the definition.
    for row in report.rows:
        exact = by_name(own, row.layer, row.kind).astype(np.float64)
        gap = np.stack(factored_matrices(tmp_path / "a", row.layer, row.kind)) - exact
        error = np.linalg.norm(gap) / np.linalg.norm(exact)
        assert 0 < error < 1
        assert row.error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("kinds", [KINDS, ("gate_proj", "up_proj"), ("down_proj",)])
def test_the_way_back_is_exact(tmp_path, monkeypatch, kinds):
    mxfp4, bf16 = oss_pair(tmp_path)
    monkeypatch.setitem(METHODS, "fixed", fixed_method(dict.fromkeys(kinds, DENSE)))
    convert(mxfp4, tmp_path / "small", ConvertConfig(method="fixed"))
    materialize(tmp_path / "small", tmp_path / "whole")
    same_weights(tmp_path / "whole", bf16)
    config = read_json(tmp_path / "whole" / "config.json")
    assert config == read_json(bf16 / "config.json")


def test_full_rank_multiplies_out_to_the_source(tmp_path, monkeypatch):
    _, bf16 = oss_pair(tmp_path)
    full = Split(((0,), (1,), (2,), (3,)), (32,) * 4)
    monkeypatch.setitem(METHODS, "fixed", fixed_method(dict.fromkeys(KINDS, full)))
    convert(bf16, tmp_path / "small", ConvertConfig(method="fixed"))
    materialize(tmp_path / "small", tmp_path / "whole")
    own, made = tensors(bf16), tensors(tmp_path / "whole")
    assert list(made) == list(own)
    for name, array in own.items():  # at R = D the shared factor is a permutation
        assert np.array_equal(made[name], array), name


# ------------------------------------------------------- transposed, in order


def transposed_family(path: Path, per_expert: bool) -> Path:
    """As llama4 has its experts: transposed, gate in the first half; or one tensor an expert."""
    name = "${experts}.${expert}." if per_expert else "${experts}."
    front = [] if per_expert else ["E"]
    data = {
        "model_type": "transposed",
        "letters": {
            "L": "num_hidden_layers", "E": "num_experts", "K": "num_experts_per_tok",
            "D": "hidden_size", "F": "intermediate_size",
        },
        "moe_layers": {},
        "blocks": ["model.layers.${layer}.mlp"],
        "experts": "${block}.experts",
        "layouts": [{"name": "turned", "tensors": [
            {"role": "gate_up_proj", "name": f"{name}gate_up_proj", "shape": [*front, "D", "2F"],
             "transposed": True},
            {"role": "down_proj", "name": f"{name}down_proj", "shape": [*front, "F", "D"],
             "transposed": True},
        ]}],
        "tensors": [{"role": "router", "name": "${block}.gate.weight", "shape": ["E", "D"]}],
    }  # fmt: skip
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("per_expert", [False, True])
def test_transposed_in_order(tmp_path, monkeypatch, per_expert):
    rng = np.random.default_rng(0)
    E, D, F = 3, 6, 4
    config = {
        "model_type": "transposed", "num_hidden_layers": 1, "num_experts": E,
        "num_experts_per_tok": 1, "hidden_size": D, "intermediate_size": F,
    }  # fmt: skip
    at = "model.layers.0.mlp"
    both = rng.standard_normal((E, D, 2 * F)).astype(np.float32)
    down = rng.standard_normal((E, F, D)).astype(np.float32)
    own = {f"{at}.gate.weight": rng.standard_normal((E, D)).astype(np.float32)}
    if per_expert:
        own |= {f"{at}.experts.{e}.gate_up_proj": both[e] for e in range(E)}
        own |= {f"{at}.experts.{e}.down_proj": down[e] for e in range(E)}
    else:
        own |= {f"{at}.experts.gate_up_proj": both, f"{at}.experts.down_proj": down}
    src = write_checkpoint(tmp_path / "src", config, own)
    family = load_family(transposed_family(tmp_path / "family.json", per_expert))
    with open_checkpoint(src) as checkpoint:
        model = describe(checkpoint, family=family)
        for e in range(E):
            for kind, wanted in (
                ("gate_proj", both[e, :, :F].T),
                ("up_proj", both[e, :, F:].T),
                ("down_proj", down[e].T),
            ):
                np.testing.assert_array_equal(model.matrices(checkpoint, 0, kind)[e], wanted)
    split = Split(((1, 0), (2,)), (None, None))
    monkeypatch.setitem(METHODS, "fixed", fixed_method(dict.fromkeys(KINDS, split)))
    convert(src, tmp_path / "small", ConvertConfig(method="fixed"), family=family)
    materialize(tmp_path / "small", tmp_path / "whole", family=family)
    same_weights(tmp_path / "whole", src)


# ------------------------------------------------------------------ refusals


def faulty(edit) -> dict:
    data = json.loads(
        (Path(__file__).parent.parent / "molae" / "arch" / "gpt_oss.json").read_text()
    )
    edit(data["layouts"][0]["tensors"])
    return data


def descriptions():
    def case(name, text, edit):
        return pytest.param(edit, text, id=name)

    def put(at, key, value):
        return lambda own: own[at].__setitem__(key, value)

    yield case("turned", r"molae reads \['E', 'F', 'D'\]", put(1, "shape", ["E", "D", "F"]))
    yield case("not turned", r"molae reads \['E', '2F', 'D'\]", put(0, "transposed", False))
    yield case(
        "a word", "transposed: expected true or false, got 'yes'", put(0, "transposed", "yes")
    )
    yield case("lone", "down_proj is interleaved", put(1, "interleaved", True))


@pytest.mark.parametrize(("edit", "text"), list(descriptions()))
def test_a_faulty_description(tmp_path, edit, text):
    path = tmp_path / "family.json"
    path.write_text(json.dumps(faulty(edit)))
    with pytest.raises(CheckpointError, match=text):
        load_family(path)


PREFIX = "model.layers.0.mlp.experts"


def faults():
    def case(name, text, edit):
        return pytest.param(edit, text, id=name)

    def drop(name):
        return lambda stored: stored.pop(f"{PREFIX}.{name}")

    def change(name, to):
        def edit(stored):
            stored[f"{PREFIX}.{name}"] = to(stored[f"{PREFIX}.{name}"])

        return edit

    yield case("no scales", f"{PREFIX}.down_proj_blocks: MXFP4, and", drop("down_proj_scales"))
    yield case("no blocks", f"{PREFIX}.down_proj_scales: scales without", drop("down_proj_blocks"))
    yield case(
        "scales' shape",
        rf"{PREFIX}.down_proj_scales: expected U8 of shape \(4, 32, 2\)",
        change("down_proj_scales", lambda a: a[:, :, :1].copy()),
    )
    yield case(
        "blocks' shape",
        rf"{PREFIX}.down_proj_blocks: expected U8 of shape",
        change("down_proj_blocks", lambda a: a[:, :, :, :8].copy()),
    )
    yield case("scales' type", "got I8", change("down_proj_scales", lambda a: a.view(np.int8)))

    def twice(stored):
        stored[f"{PREFIX}.down_proj"] = np.zeros((4, 64, 32), np.float32)

    yield case("twice", f"{PREFIX}.down_proj: there as it is, and encoded", twice)


@pytest.mark.parametrize(("edit", "text"), list(faults()))
def test_what_cannot_be_decoded_is_refused(tmp_path, edit, text):
    config = oss_config(quantized=True, L=1)
    stored, _ = oss_tensors(config)
    edit(stored)
    src = write_checkpoint(tmp_path / "src", config, stored)
    with pytest.raises(CheckpointError, match=text):
        open_checkpoint(src)


def test_a_nan_scale_is_named(tmp_path):
    config = oss_config(quantized=True, L=1)
    stored, _ = oss_tensors(config)
    stored[f"{PREFIX}.gate_up_proj_scales"][2, 5, 0] = 255
    src = write_checkpoint(tmp_path / "src", config, stored)
    with pytest.raises(NonFiniteError, match=r"gate_up_proj_blocks\[2\]: NaN .* row 5, column 0"):
        convert(src, tmp_path / "out", ConvertConfig(size=0.6))


def test_a_missing_bias(tmp_path):
    config = oss_config(quantized=False, L=1)
    _, plain = oss_tensors(config)
    del plain[f"{PREFIX}.down_proj_bias"]
    with (
        open_checkpoint(write_checkpoint(tmp_path / "src", config, plain)) as checkpoint,
        pytest.raises(CheckpointError, match="down_proj_bias: absent"),
    ):
        describe(checkpoint)
