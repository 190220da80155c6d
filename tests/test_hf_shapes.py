"""A checkpoint's counts by its config alone, and with compressed experts."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from checkpoints import FAMILIES, transformers_checkpoint
from hf_models import SETTINGS, SIZES

import molae
from molae.cli import main
from molae.convert.inspection import inspect_config
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
