"""Tiny checkpoints for tests, made with NumPy or by Transformers itself."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from molae.io import DTYPES, DType

FAMILIES = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe")
LAYOUTS = ("per_expert", "fused")
NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
SIZES = {"L": 2, "E": 4, "K": 2, "D": 16, "F": 8, "V": 40, "S": 12}

_CLASSES = {
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig"),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig"),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig"),
}


def make_config(family: str, **sizes: int) -> dict[str, Any]:
    """The config.json of a tiny model; sizes are letters as in `SIZES`."""
    s = SIZES | sizes
    config: dict[str, Any] = {
        "architectures": [_CLASSES[family][0]],
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": s["D"],
        "num_hidden_layers": s["L"],
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts_per_tok": s["K"],
        "vocab_size": s["V"],
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    if family == "mixtral":
        return config | {"num_local_experts": s["E"], "intermediate_size": s["F"]}
    if family == "olmoe":
        return config | {"num_experts": s["E"], "intermediate_size": s["F"]}
    config |= {
        "num_experts": s["E"],
        "moe_intermediate_size": s["F"],
        "intermediate_size": 2 * s["F"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    if family == "qwen2_moe":
        return config | {"shared_expert_intermediate_size": s["S"]}
    return config | {"head_dim": s["D"] // 2}


def moe_layers(config: Mapping[str, Any]) -> list[int]:
    """The layers with experts, by the rule of the released Qwen code."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers", [])
    return [n for n in range(config["num_hidden_layers"]) if (n + 1) % step == 0 and n not in dense]


def make_tensors(
    config: Mapping[str, Any],
    layout: str = "per_expert",
    *,
    dtype: str = "F32",
    seed: int = 0,
    block: str | None = None,
) -> dict[str, np.ndarray]:
    """Random weights under the names that Transformers gives them.

    `block` is the module that holds router and experts; None for the family's own.
    """
    rng = np.random.default_rng(seed)
    family = config["model_type"]
    D, E = config["hidden_size"], config.get("num_experts", config.get("num_local_experts"))
    F = config.get("moe_intermediate_size", config["intermediate_size"])
    tensors: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape) / np.sqrt(shape[-1])
        tensors[name] = values.astype(NUMPY[dtype])

    add("model.embed_tokens.weight", config["vocab_size"], D)
    for n in range(config["num_hidden_layers"]):
        at = f"model.layers.{n}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(f"{at}{norm}.weight", D)
        for proj in "qkvo":
            add(f"{at}self_attn.{proj}_proj.weight", D, D)
            if family == "qwen2_moe" and proj != "o":
                add(f"{at}self_attn.{proj}_proj.bias", D)
        if family in ("olmoe", "qwen3_moe"):
            for norm in ("q_norm", "k_norm"):
                add(f"{at}self_attn.{norm}.weight", config.get("head_dim", D))
        if n not in moe_layers(config):
            _add_mlp(add, f"{at}mlp", D, config["intermediate_size"])
            continue
        own = "block_sparse_moe" if family == "mixtral" and layout == "per_expert" else "mlp"
        at += block or own
        add(f"{at}.gate.weight", E, D)
        if layout == "fused":
            add(f"{at}.experts.gate_up_proj", E, 2 * F, D)
            add(f"{at}.experts.down_proj", E, D, F)
        for e in range(E if layout == "per_expert" else 0):
            if family == "mixtral":
                add(f"{at}.experts.{e}.w1.weight", F, D)
                add(f"{at}.experts.{e}.w2.weight", D, F)
                add(f"{at}.experts.{e}.w3.weight", F, D)
            else:
                _add_mlp(add, f"{at}.experts.{e}", D, F)
        if family == "qwen2_moe":
            _add_mlp(add, f"{at}.shared_expert", D, config["shared_expert_intermediate_size"])
            add(f"{at}.shared_expert_gate.weight", 1, D)
    add("model.norm.weight", D)
    if not config.get("tie_word_embeddings"):
        add("lm_head.weight", config["vocab_size"], D)
    return tensors


def _add_mlp(add: Any, at: str, D: int, F: int) -> None:
    add(f"{at}.gate_proj.weight", F, D)
    add(f"{at}.up_proj.weight", F, D)
    add(f"{at}.down_proj.weight", D, F)


def write_checkpoint(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    shards: int = 1,
) -> Path:
    """Write a checkpoint with the safetensors library.

    With several shards the tensors are dealt out one by one, so that an expert's lie apart,
    and the index is sorted as text, as the released ones are.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        save_file(dict(tensors), path / "model.safetensors", {"format": "pt"})
        return path
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: a for j, (n, a) in enumerate(tensors.items()) if j % shards == i}
        save_file(part, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_index(path, weight_map, sum(a.nbytes for a in tensors.values()))
    return path


def write_index(path: Path, weight_map: Mapping[str, str], total_size: int = 0) -> None:
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def add_companions(path: Path, names: Iterable[str] = ("tokenizer.json", "LICENSE")) -> None:
    """Small files beside the weights."""
    for name in names:
        (path / name).write_text(f"the text of {name}\n")


def make_checkpoint(
    path: Path,
    family: str = "olmoe",
    layout: str = "per_expert",
    *,
    dtype: str = "F32",
    shards: int = 1,
    seed: int = 0,
    block: str | None = None,
    config: Mapping[str, Any] | None = None,
    replace: Mapping[str, np.ndarray | None] | None = None,
    **sizes: int,
) -> Path:
    """Write a whole tiny checkpoint.

    Parameters
    ----------
    config : dict, optional
        Keys to add to config.json; a value of None removes the key.
    replace : dict, optional
        Tensors to put in place of the random ones; None leaves the tensor out.
    **sizes : int
        Letters as in `SIZES`.
    """
    full = make_config(family, **sizes) | dict(config or {})
    full = {k: v for k, v in full.items() if v is not None}
    tensors = make_tensors(full, layout, dtype=dtype, seed=seed, block=block)
    tensors |= replace or {}  # type: ignore[arg-type]
    present = {n: a for n, a in tensors.items() if a is not None}
    return write_checkpoint(path, full, present, shards=shards)


def transformers_checkpoint(
    path: Path,
    family: str,
    *,
    original: bool = True,
    max_shard_size: str = "5KB",
    dtype: str = "float32",
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    **sizes: int,
) -> Any:
    """Let Transformers make a random tiny model and save it; the model is returned.

    `original` False saves the fused layout. The small shards tear experts apart.
    """
    import torch
    import transformers

    settings = make_config(family, **sizes) | dict(config or {})
    for key in ("model_type", "architectures"):
        settings.pop(key)
    torch.manual_seed(seed)
    made = getattr(transformers, _CLASSES[family][1])(
        **settings, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=getattr(torch, dtype)).eval()
    model.save_pretrained(path, save_original_format=original, max_shard_size=max_shard_size)
    return model


@cache
def library_types() -> tuple[str, ...]:
    """The types that the installed safetensors knows; older versions lack some."""

    def knows(dtype: DType) -> bool:
        entry = {"dtype": dtype.name, "shape": [8], "data_offsets": [0, dtype.nbytes(8)]}
        header = json.dumps({"x": entry}).encode()
        try:
            deserialize(struct.pack("<Q", len(header)) + header + bytes(dtype.nbytes(8)))
        except SafetensorError:
            return False
        return True

    return tuple(name for name, dtype in DTYPES.items() if knows(dtype))
