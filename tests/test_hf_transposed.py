"""Experts that lie transposed in the files and not in the model: Qwen3-VL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import write_checkpoint
from converting import bits, fixed_method, tensors
from hf_models import tokens
from transformers import AutoModelForImageTextToText

from molae import ConvertConfig
from molae.arch import describe
from molae.convert import convert, inspect, materialize
from molae.convert.methods import METHODS
from molae.factored import Split, index_groups
from molae.hf import LatentExperts
from molae.io import open_checkpoint
from molae.threads import num_threads


@pytest.fixture(autouse=True)
def alone(one_thread: None) -> Iterator[None]:
    """Nothing here is large enough for threads."""
    with num_threads(1):
        yield


E, D, F = 4, 16, 12
FULL = Split(index_groups(E, 2), (D, D))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """As Transformers saves it, and with the order of the releases."""
    text = {
        "hidden_size": D, "intermediate_size": 24, "moe_intermediate_size": F, "num_experts": E,
        "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 40, "max_position_embeddings": 64,
        "decoder_sparse_step": 1, "norm_topk_prob": True, "initializer_range": 0.3,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "patch_size": 2,
        "out_hidden_size": D, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(
        "qwen3_vl_moe", text_config=text, vision_config=vision, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    folder = tmp_path_factory.mktemp("qwen3_vl_moe")
    model.save_pretrained(folder / "fused", save_original_format=False)
    own = tensors(folder / "fused")
    for name in [name for name in own if ".experts." in name]:
        own[name] = np.ascontiguousarray(own[name].transpose(0, 2, 1))
    settings = json.loads((folder / "fused" / "config.json").read_text())
    write_checkpoint(folder / "transposed", settings, own)
    return model, folder


def load(path: Any) -> Any:
    model, info = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(tokens()).logits


def test_shapes_tell_layouts_of_the_same_names_apart(source):
    model, folder = source
    experts = model.model.language_model.layers[1].mlp.experts
    for layout in ("transposed", "fused"):
        assert inspect(folder / layout).layout == layout
        with open_checkpoint(folder / layout) as checkpoint:
            described = describe(checkpoint)
            for e in range(E):
                gate, up = experts.gate_up_proj[e].chunk(2)
                for kind, wanted in (
                    ("gate_proj", gate), ("up_proj", up), ("down_proj", experts.down_proj[e]),
                ):  # fmt: skip
                    found = torch.from_numpy(described.matrices(checkpoint, 1, kind)[e].copy())
                    assert torch.equal(found, wanted), (layout, kind)


@pytest.mark.parametrize("layout", ["transposed", "fused"])
@pytest.mark.parametrize("kinds", [("gate_proj", "up_proj", "down_proj"), ("down_proj",)])
@pytest.mark.parametrize("layers", [None, (1,)])
def test_full_rank(source, tmp_path, monkeypatch, layout, kinds, layers):
    model, folder = source
    monkeypatch.setitem(METHODS, "fixed", fixed_method(dict.fromkeys(kinds, FULL), layers=layers))
    convert(folder / layout, tmp_path / "dst", ConvertConfig(method="fixed"))
    small, wanted = load(tmp_path / "dst"), logits(model)
    torch.testing.assert_close(logits(small), wanted, rtol=1e-3, atol=1e-3)
    assert isinstance(small.model.language_model.layers[1].mlp.experts, LatentExperts)
    small.save_pretrained(tmp_path / "saved")
    before, after = tensors(tmp_path / "dst"), tensors(tmp_path / "saved")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert bits(after[name]) == bits(array), name
    materialize(tmp_path / "dst", tmp_path / "whole")
    own, made = tensors(folder / layout), tensors(tmp_path / "whole")
    assert {n: a.shape for n, a in own.items()} == {n: a.shape for n, a in made.items()}
    torch.testing.assert_close(logits(load(tmp_path / "whole")), wanted, rtol=1e-3, atol=1e-3)
