"""Drafts of families' descriptions: they convert as the shipped descriptions do."""

from __future__ import annotations

import json

import numpy as np
import pytest
from checkpoints import (
    FAMILIES,
    LAYOUTS,
    make_checkpoint,
    make_config,
    make_tensors,
    write_checkpoint,
)
from family_cases import CASES, NAMED, make_model, named_tensors

import molae
from molae import ConvertConfig, convert, materialize
from molae.arch import draft_family, families, load_family
from molae.cli import main
from molae.errors import CheckpointError
from molae.io import open_checkpoint

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

#: Of every case, what a draft cannot know is in no config and no name.
SETTINGS = ConvertConfig(size=0.7, group_size=2)


def rename(folder, model_type="mine"):
    """The same checkpoint of a family that nobody knows; the family it was of."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    family = families()[config["model_type"]]
    config["model_type"] = model_type
    path.write_text(json.dumps(config))
    return family


def drafted(src, path, capsys):
    """The family of a draft that the command wrote."""
    assert main(["inspect", str(src), "--draft", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["missing"] == []
    assert told["fault"] is None
    assert told["draft"] == json.loads(path.read_text())
    return load_family(path)


def converts_alike(src, tmp_path, capsys):
    """A draft and the shipped description give the same sizes, layers and bytes."""
    shipped = rename(src)
    own = drafted(src, tmp_path / "mine.json", capsys)
    for name, family in (("shipped", shipped), ("own", own)):
        convert(src, tmp_path / name, SETTINGS, family=family)
    files = sorted(path.name for path in (tmp_path / "shipped").glob("*.safetensors"))
    assert files
    for name in files:
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "shipped" / name).read_bytes()
    before = molae.inspect(src, family=shipped)
    after = molae.inspect(tmp_path / "own")  # which describes itself
    assert after.factored.layers.keys() == set(before.moe_layers)
    assert {x: after.letters[x] for x in "LEKDF"} == {x: before.letters[x] for x in "LEKDF"}
    return own


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_draft_of_a_plain_family(tmp_path, capsys, family, layout):
    src = make_checkpoint(tmp_path / "src", family, layout)
    own = converts_alike(src, tmp_path, capsys)
    materialize(tmp_path / "own", tmp_path / "back")
    with open_checkpoint(src) as old, open_checkpoint(tmp_path / "back") as new:
        assert {n: t.shape for n, t in new.tensors.items()} == {
            n: t.shape for n, t in old.tensors.items()
        }
    assert molae.inspect(tmp_path / "back", family=own).family == "mine"


@pytest.mark.parametrize("family", NAMED)
def test_a_draft_by_documented_names(tmp_path, capsys, family):
    write_checkpoint(tmp_path / "src", NAMED[family], named_tensors(family))
    converts_alike(tmp_path / "src", tmp_path, capsys)


@pytest.mark.parametrize(
    ("family", "fused"),
    [*((name, False) for name in CASES), ("deepseek_v3", True), ("gemma4", True)],
)
def test_a_draft_of_what_transformers_saves(tmp_path, capsys, family, fused):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    make_model(family).save_pretrained(tmp_path / "src", save_original_format=not fused)
    converts_alike(tmp_path / "src", tmp_path, capsys)


def test_some_layers_and_transposed_experts(tmp_path, capsys):
    """Of Qwen3-VL-MoE, whose released files exchange the axes of an expert's matrices."""
    config = make_config("qwen3_moe", L=4) | {"decoder_sparse_step": 2}
    plain = make_tensors(config, "fused")
    assert sum(name.endswith("experts.down_proj") for name in plain) == 2
    tensors = {
        name: np.ascontiguousarray(x.transpose(0, 2, 1)) if ".experts." in name else x
        for name, x in plain.items()
    }
    outer = {"model_type": "qwen3_vl_moe", "text_config": config | {"model_type": "text"}}
    write_checkpoint(tmp_path / "src", outer, tensors)
    own = converts_alike(tmp_path / "src", tmp_path, capsys)
    assert own.beneath == "text_config"
    assert all(tensor.transposed for tensor in own.layouts[0].tensors)
    assert own.read_moe_layers(outer) == (1, 3)


def test_gate_and_up_may_take_turns(tmp_path, capsys):
    """A draft says so; with the word added it is the description of such a family."""
    config = make_config("mixtral") | {"model_type": "gpt_oss"}
    tensors = {}
    for name, x in make_tensors(make_config("mixtral"), "fused").items():
        if name.endswith("experts.gate_up_proj"):
            x = np.stack(np.split(x, 2, axis=1), axis=2).reshape(x.shape)
        if ".experts." in name:
            x = np.ascontiguousarray(x.transpose(0, 2, 1))
        tensors[name.replace("mlp.gate.weight", "mlp.router.weight")] = x
    for n in range(2):
        at = f"model.layers.{n}.mlp."
        tensors[f"{at}router.bias"] = np.ones(4, np.float32)
        tensors[f"{at}experts.gate_up_proj_bias"] = np.ones((4, 16), np.float32)
        tensors[f"{at}experts.down_proj_bias"] = np.ones((4, 16), np.float32)
    src = write_checkpoint(tmp_path / "src", config, tensors)
    shipped = rename(src)
    path = tmp_path / "mine.json"
    assert main(["inspect", str(src), "--draft", str(path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert 'add "interleaved": true' in out
    assert "molae reads the checkpoint with --arch" in out
    data = json.loads(path.read_text())
    data["layouts"][0]["tensors"][0]["interleaved"] = True
    path.write_text(json.dumps(data))
    for name, family in (("shipped", shipped), ("own", load_family(path))):
        convert(src, tmp_path / name, SETTINGS, family=family)
    for own in (tmp_path / "own").glob("*.safetensors"):
        assert own.read_bytes() == (tmp_path / "shipped" / own.name).read_bytes()


def test_what_a_draft_cannot_know_is_said(tmp_path, capsys):
    """Keys of odd names are found by their values, and what has no key is left open."""
    config = make_config("olmoe")
    odd = {"hidden_size": "odd_width", "num_experts": "odd_experts"}
    config = {odd.get(key, key): value for key, value in config.items()}
    del config["num_experts_per_tok"]
    config |= {"model_type": "mine", "top_choices": 2, "one_more_width": 8}
    del config["intermediate_size"]
    config["yet_one_more"] = 8
    tensors = make_tensors(make_config("olmoe"))
    renamed = {
        name.replace("gate_proj", "alpha").replace("up_proj", "beta"): x
        for name, x in tensors.items()
    }
    src = write_checkpoint(tmp_path / "src", config, renamed)
    with open_checkpoint(src) as checkpoint:
        draft = draft_family(checkpoint.config, checkpoint.tensors)
    letters = draft.description["letters"]
    assert (letters["D"], letters["E"]) == ("odd_width", "odd_experts")
    assert letters["K"] == letters["F"] == "FILL IN"
    missing = "\n".join(draft.missing)
    assert "alpha.weight is taken" in missing
    assert "it may be top_choices" in missing
    assert "letters.F: the files say F=8, one_more_width, yet_one_more have that value" in missing
    assert main(["inspect", str(src), "--draft", str(tmp_path / "mine.json")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "molae does not read the checkpoint with it yet" in out
    assert "no 'FILL IN'" in out


def test_layers_that_no_key_tells(tmp_path):
    config = make_config("qwen3_moe", L=3) | {"mlp_only_layers": [1]}
    tensors = make_tensors(config)
    del config["mlp_only_layers"]
    src = write_checkpoint(tmp_path / "src", config, tensors)
    with open_checkpoint(src) as checkpoint:
        draft = draft_family(checkpoint.config, checkpoint.tensors)
    assert draft.description["moe_layers"] == {}
    assert any("[0, 2]; add a list of them to config.json" in line for line in draft.missing)


def test_experts_without_a_gate(tmp_path):
    config = make_config("olmoe")
    tensors = {n: x for n, x in make_tensors(config).items() if "gate_proj" not in n}
    src = write_checkpoint(tmp_path / "src", config | {"model_type": "mine"}, tensors)
    with open_checkpoint(src) as checkpoint:
        draft = draft_family(checkpoint.config, checkpoint.tensors)
    assert draft.description["unsupported"] == "its experts have no gate"
    (tmp_path / "mine.json").write_text(json.dumps(draft.description))
    own = load_family(tmp_path / "mine.json")
    found = molae.inspect(src, family=own)
    assert found.expert_parameters == 2 * 2 * 4 * 16 * 8
    assert found.active_experts == found.expert_parameters // 2
    assert list(found.shapes) == ["up_proj", "down_proj"]
    with pytest.raises(molae.errors.UnknownFamilyError, match="no gate; molae inspects it"):
        convert(src, tmp_path / "dst", SETTINGS, family=own)


def test_the_commands_with_a_family_of_ones_own(tmp_path, capsys):
    """What was converted is read without the file, and not with another one."""
    src = make_checkpoint(tmp_path / "src", "mixtral", config={"model_type": "mine"})
    own, dst, back = tmp_path / "mine.json", tmp_path / "dst", tmp_path / "back"
    size = ["--size", "0.7", "--group-size", "2", "--quiet"]
    assert main(["convert", str(src), str(dst), *size]) == 1
    err = capsys.readouterr().err
    assert "model_type 'mine' is unknown" in err
    assert "give it with --arch FILE ('molae inspect CHECKPOINT --draft FILE'" in err
    assert main(["inspect", str(src), "--draft", str(own)]) == 0
    assert main(["convert", str(src), str(dst), "--arch", str(own), *size]) == 0
    capsys.readouterr()
    assert main(["inspect", str(dst), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "mine"
    assert main(["materialize", str(dst), str(back), "--quiet"]) == 0
    assert main(["inspect", str(back)]) == 1
    assert main(["inspect", str(back), "--arch", str(own)]) == 0
    data = json.loads(own.read_text())
    data["head"] = "another.weight"
    own.write_text(json.dumps(data))
    capsys.readouterr()
    assert main(["materialize", str(dst), str(tmp_path / "no"), "--arch", str(own)]) == 1
    assert "leave --arch out" in capsys.readouterr().err


def test_refusals(tmp_path, capsys):
    src = make_checkpoint(tmp_path / "src")
    there = tmp_path / "there.json"
    there.write_text("{}")
    for options, said in (
        ((there,), "is there already"),
        ((tmp_path / "a.json", "--size", "0.5"), "--size: not with --draft"),
        ((tmp_path / "a.json", "--arch", there), "--arch: not with --draft"),
    ):
        assert main(["inspect", str(src), "--draft", *map(str, options)]) == 2
        assert said in capsys.readouterr().err
    convert(src, tmp_path / "dst", SETTINGS)
    assert main(["inspect", str(tmp_path / "dst"), "--draft", str(tmp_path / "a.json")]) == 1
    assert "draft from the original" in capsys.readouterr().err
    config = make_config("olmoe")
    dense = {n: x for n, x in make_tensors(config).items() if "expert" not in n}
    with pytest.raises(CheckpointError, match="no experts found"):
        write_checkpoint(tmp_path / "dense", config, dense)
        with open_checkpoint(tmp_path / "dense") as checkpoint:
            draft_family(checkpoint.config, checkpoint.tensors)
