"""A checkpoint's counts by its config alone, and with compressed experts."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from checkpoints import (
    FAMILIES,
    make_config,
    make_tensors,
    transformers_checkpoint,
    write_checkpoint,
)
from family_cases import CASES, make_model
from hf_models import SETTINGS, SIZES
from transformers import AutoModelForCausalLM, GptOssConfig

import molae
from molae import ConvertConfig
from molae.arch import find_family
from molae.cli import main
from molae.convert.inspection import inspect_config
from molae.convert.sketch import plan_config
from molae.errors import ArgumentError, CheckpointError, UnknownFamilyError
from molae.hf import hide_progress, latent_model
from molae.hf.shapes import tensors_of
from molae.io import read_config

hide_progress()

COUNTS = ("total_parameters", "expert_parameters", "active_parameters", "active_compressed")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("light", ["vectors", "narrow:1/4"])
def test_a_config_alone_counts_as_the_checkpoint_does(tmp_path, family, light):
    transformers_checkpoint(tmp_path, family, config=SETTINGS, **SIZES)
    asked = {"compressed_experts": 1, "light_module": light}
    whole = molae.inspect(tmp_path, **asked)
    config = read_config(tmp_path / "config.json")
    alone = inspect_config("config.json", config, tensors_of(config), **asked)
    for name in (*COUNTS, "family", "letters", "moe_layers", "shapes", "bytes", "dtype"):
        assert getattr(alone, name) == getattr(whole, name), name
    assert alone.files == 0


@pytest.mark.parametrize("light", ["vectors", "additive", "narrow:1/4"])
def test_a_config_alone_knows_biases(tmp_path, light):
    made = GptOssConfig(
        hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_local_experts=6, num_experts_per_tok=3,
        vocab_size=40,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    asked = {"compressed_experts": 2, "light_module": light}
    whole = molae.inspect(tmp_path, **asked)
    config = read_config(tmp_path / "config.json")
    alone = inspect_config("config.json", config, tensors_of(config), **asked)
    assert [getattr(alone, name) for name in COUNTS] == [getattr(whole, name) for name in COUNTS]
    numbers = {"vectors": 2 * 16 + 12, "additive": 16, "narrow:1/4": 10 * 16 + 2 * 3}[light]
    saved = 2 * 2 * (3 * 16 * 12 + 2 * 12 + 16 - numbers)
    assert whole.active_parameters - whole.active_compressed == saved


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", CASES)
def test_a_config_alone_of_every_family(tmp_path, family):
    """What is counted of it is what Transformers saves of its model, without other parts."""
    make_model(family).save_pretrained(tmp_path)
    whole = molae.inspect(tmp_path)
    config = read_config(tmp_path / "config.json")
    known_as = find_family(config).transformers
    alone = inspect_config("c", config, tensors_of(config, known_as=known_as))
    for name in ("letters", "moe_layers", "shapes", "dtype", "expert_parameters", "active_experts",
                 "active_parameters", "shared_parameters"):  # fmt: skip
        assert getattr(alone, name) == getattr(whole, name), name
    if "text_config" in config:
        assert alone.total_parameters < whole.total_parameters
    else:
        assert alone.total_parameters == whole.total_parameters
        assert alone.bytes == whole.bytes


def test_a_converted_config_alone(tmp_path):
    """Its factors are counted as the files hold them."""
    transformers_checkpoint(tmp_path / "src", "mixtral", config=SETTINGS, **SIZES)
    molae.convert(tmp_path / "src", tmp_path / "dst", ConvertConfig(size=0.8, group_size=3))
    whole = molae.inspect(tmp_path / "dst")
    config = read_config(tmp_path / "dst" / "config.json")
    alone = inspect_config("c", config, tensors_of(config))
    assert alone.factored == whole.factored
    for name in (*COUNTS, "active_experts", "bytes", "dtype"):
        assert getattr(alone, name) == getattr(whole, name), name


@pytest.mark.parametrize("latent", [{}, {"group_size": 3, "rank": 5}])
def test_what_would_be_active_is_what_then_is(tmp_path, latent):
    import transformers

    config = transformers.OlmoeConfig(
        hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=6, num_experts_per_tok=3, vocab_size=40,
    )  # fmt: skip
    if latent:
        latent_model(config, **latent).save_pretrained(tmp_path / "before")
    else:
        transformers.OlmoeForCausalLM(config).save_pretrained(tmp_path / "before")
    made = latent_model(config, num_compressed=2, light_module="narrow:4", **latent)
    made.save_pretrained(tmp_path / "after")
    asked = molae.inspect(tmp_path / "before", compressed_experts=2, light_module="narrow:4")
    assert asked.active_compressed == molae.inspect(tmp_path / "after").active_parameters


def test_what_makes_no_sense_is_refused(tmp_path):
    transformers_checkpoint(tmp_path, "qwen2_moe", config=SETTINGS, **SIZES)
    with pytest.raises(ArgumentError, match="compressed_experts: expected 0 to K - 1 = 1"):
        molae.inspect(tmp_path, compressed_experts=2)
    path = tmp_path / "other.json"
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_config(path)
    for text, said in (("{", "not valid JSON"), ("[]", "expected a JSON object")):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=said):
            read_config(path)
    with pytest.raises(UnknownFamilyError, match="'nobody'"):
        tensors_of({"model_type": "nobody"})
    with pytest.raises(CheckpointError, match="cannot build"):
        tensors_of({"model_type": "olmoe", "hidden_act": "nothing"})


def test_the_command_on_a_config(tmp_path, capsys):
    transformers_checkpoint(tmp_path, "qwen2_moe", config=SETTINGS, **SIZES)
    config = str(tmp_path / "config.json")
    assert main(["inspect", config, "--compressed-experts", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["active_compressed"] < found["active_parameters"]
    assert main(["inspect", config, "--compressed-experts", "1"]) == 0
    assert "so compressed" in capsys.readouterr().out
    assert main(["inspect", config, "--compressed-experts", "9"]) == 1
    assert "expected 0 to K - 1" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["latent", "molae"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_by_a_config_alone_is_that_of_the_checkpoint(tmp_path, family, method):
    transformers_checkpoint(tmp_path, family, config=SETTINGS, **SIZES)
    settings = ConvertConfig(method=method, size=0.9, group_size=4)
    whole = molae.plan(tmp_path, settings)
    config = read_config(tmp_path / "config.json")
    alone = plan_config("config.json", config, tensors_of(config), settings)
    for name in ("before", "after", "types", "spread", "settings", "letters", "size_reached"):
        assert getattr(alone, name) == getattr(whole, name), name
    assert alone.memory_bytes == whole.memory_bytes
    assert alone.seconds is None
    assert not alone.experts_only
    files = alone.after.total_bytes
    assert files < alone.disk_bytes < files + 20_000  # and headers
    blind = plan_config("config.json", config, None, settings, unknown="no torch")
    assert blind.experts_only
    assert blind.after.expert_bytes == whole.after.expert_bytes


def test_the_command_on_a_folder_with_a_config_alone(tmp_path, capsys, monkeypatch):
    transformers_checkpoint(tmp_path / "whole", "qwen2_moe", config=SETTINGS, **SIZES)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.json").write_text(
        (tmp_path / "whole" / "config.json").read_text()
    )
    asked = ["--size", "0.9", "--group-size", "4", "--json"]
    found = {}
    for name in ("whole", "alone"):
        assert main(["inspect", str(tmp_path / name), *asked]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    for name in (*COUNTS, "shared_parameters", "active_experts", "bytes"):
        assert found["alone"][name] == found["whole"][name], name
    assert found["alone"]["plan"]["after"] == found["whole"]["plan"]["after"]
    assert found["alone"]["layout"] is None
    assert main(["inspect", str(tmp_path / "alone"), "--size", "0.9"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "of shared experts" in out
    assert "the group size is measured on the weights" in out
    assert main(["inspect", str(tmp_path / "alone"), "--method", "molae"]) == 2
    assert "only with --size" in capsys.readouterr().err
    (tmp_path / "alone" / "pytorch_model.bin").write_bytes(b"")  # weights, and none that are read
    assert main(["inspect", str(tmp_path / "alone")]) == 1
    assert "save the model as safetensors" in capsys.readouterr().err

    import builtins

    imported = builtins.__import__

    def without_torch(name, *rest, **named):
        if name.split(".")[0] == "torch" or name == "molae.hf.shapes":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return imported(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    config = str(tmp_path / "whole" / "config.json")
    assert main(["inspect", config, "--size", "0.9"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "parameters not known" in out
    assert "torch is not installed (pip install 'molae[hf]')" in out
    assert "all, numbers" not in out
    assert "for the experts" in out


def test_what_transformers_would_read_in_another_way_is_not_counted(tmp_path, capsys):
    """Its defaults must not stand for keys that it does not know."""
    transformers_checkpoint(tmp_path, "qwen3_moe", config=SETTINGS, **SIZES)
    path = tmp_path / "config.json"
    config = read_config(path)
    config["vocab_size"] += 1
    built = tensors_of(config)
    assert inspect_config("c", config, built).total_parameters == sum(
        info.size for info in built.values()
    )
    del config["moe_intermediate_size"]
    config["intermediate_size_of_experts"] = 4
    with pytest.raises(CheckpointError, match="F is missing"):
        inspect_config("c", config, tensors_of(config))
    config["moe_intermediate_size"] = 4
    with pytest.raises(CheckpointError, match="one of the two does not fit"):
        inspect_config("c", config, built)


def test_parts_beside_the_language_model(tmp_path):
    """Next-token layers and a vision part are in a checkpoint's total, and not active."""
    config = make_config("qwen3_moe")
    tensors = make_tensors(config)
    before = molae.inspect(write_checkpoint(tmp_path / "src", config, tensors))
    assert before.notes == ()
    tensors["model.layers.2.eh_proj.weight"] = np.zeros((2, 3), np.float32)
    tensors["mtp.norm.weight"] = np.zeros(5, np.float32)
    after = molae.inspect(write_checkpoint(tmp_path / "more", config, tensors))
    assert after.total_parameters == before.total_parameters + 11
    assert after.active_parameters == before.active_parameters
    assert after.notes == (
        "11 numbers of next-token layers are in the total, and not among the active.",
    )
    outer = {"model_type": "qwen3_5_moe", "text_config": config | {"model_type": "text"}}
    outer["text_config"]["shared_expert_intermediate_size"] = 3
    tensors = {n.replace("model.", "model.language_model.", 1): x for n, x in tensors.items()}
    tensors["model.visual.norm.weight"] = np.zeros(7, np.float32)
    for n in range(2):
        at = f"model.language_model.layers.{n}.mlp.shared_expert"
        tensors[f"{at}.gate_proj.weight"] = tensors[f"{at}.up_proj.weight"] = np.ones((3, 16), "f4")
        tensors[f"{at}.down_proj.weight"] = np.ones((16, 3), np.float32)
        tensors[f"{at}_gate.weight"] = np.ones((1, 16), np.float32)
    seen = molae.inspect(write_checkpoint(tmp_path / "seen", outer, tensors))
    assert seen.shared_parameters == 2 * 3 * 3 * 16
    assert seen.total_parameters == after.total_parameters + 7 + seen.shared_parameters + 2 * 16
    assert seen.notes == (
        "11 numbers of next-token layers are in the total, and not among the active.",
        "7 numbers of parts beside the language model are in the total, and not among the active.",
    )
