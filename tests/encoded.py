"""Helpers for tests: tiny checkpoints in FP8 and MXFP4, and what they stand for by definition."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from checkpoints import make_config, make_tensors, write_checkpoint
from ref import decode as ref

BF16 = ml_dtypes.bfloat16
BLOCK = (6, 10)

FINITE = np.array([b for b in range(256) if b % 128 != 127], np.uint8)


def fp8_config(family: str, block: tuple[int, int] = BLOCK, **sizes: int) -> dict[str, Any]:
    """As the releases have it."""
    quant = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(block),
    }
    return make_config(family, **sizes) | {"quantization_config": quant, "dtype": "bfloat16"}


def fp8_tensors(
    config: Mapping[str, Any], layout: str = "per_expert", *, seed: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Of a checkpoint whose projections are FP8, and of the BF16 one it stands for."""
    rng = np.random.default_rng(seed)
    block = tuple(config["quantization_config"]["weight_block_size"])
    stored: dict[str, np.ndarray] = {}
    plain: dict[str, np.ndarray] = {}
    for name, array in make_tensors(config, layout, dtype="BF16", seed=seed).items():
        if "_proj" not in name or array.ndim < 2:
            stored[name] = plain[name] = array
            continue
        *front, rows, cols = array.shape
        bits = rng.choice(FINITE, array.shape)
        shape = (*front, -(-rows // block[0]), -(-cols // block[1]))
        scale = (0.002 * np.exp(rng.standard_normal(shape))).astype(np.float32)
        stored[name] = bits.view(ml_dtypes.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        flat = bits.reshape(-1, rows, cols), scale.reshape(-1, *shape[-2:])
        wide = np.stack([ref.fp8(w, s, block) for w, s in zip(*flat, strict=True)])
        plain[name] = ref.to_bf16(wide).view(BF16).reshape(array.shape)
    return stored, plain


def fp8_pair(
    path: Path, family: str = "qwen3_moe", layout: str = "per_expert", **sizes: int
) -> tuple[Path, Path]:
    """Both as folders."""
    config = fp8_config(family, **sizes)
    stored, plain = fp8_tensors(config, layout)
    ordinary = {key: value for key, value in config.items() if key != "quantization_config"}
    return (
        write_checkpoint(path / "fp8", config, stored, shards=3),
        write_checkpoint(path / "bf16", ordinary, plain),
    )


# ------------------------------------------------------------ gpt_oss: MXFP4

#: Widths are whole groups of 32 numbers.
OSS_SIZES = {"L": 2, "E": 4, "K": 2, "D": 32, "F": 64, "V": 40}


def oss_config(*, quantized: bool, **sizes: int) -> dict[str, Any]:
    """As the releases have it, and small."""
    s = OSS_SIZES | sizes
    config: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_act": "silu",
        "hidden_size": s["D"],
        "intermediate_size": s["F"],
        "num_hidden_layers": s["L"],
        "num_local_experts": s["E"],
        "num_experts_per_tok": s["K"],
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": s["V"],
        "max_position_embeddings": 64,
        "sliding_window": 8,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
    }
    if quantized:
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
        config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    return config


def oss_tensors(
    config: Mapping[str, Any], *, seed: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Of a checkpoint with MXFP4 experts, and of the BF16 one it stands for."""
    rng = np.random.default_rng(seed)
    E, D, F = (config[x] for x in ("num_local_experts", "hidden_size", "intermediate_size"))
    stored: dict[str, np.ndarray] = {}
    plain: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape) / np.sqrt(shape[-1])
        stored[name] = plain[name] = values.astype(BF16)

    def add_experts(name: str, outputs: int, inputs: int) -> None:
        blocks = rng.integers(0, 256, (E, outputs, inputs // 32, 16), dtype=np.uint8)
        scales = rng.integers(120, 126, blocks.shape[:-1], dtype=np.uint8)
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
        wide = np.stack([ref.mxfp4(b, s) for b, s in zip(blocks, scales, strict=True)])
        plain[name] = np.ascontiguousarray(wide.transpose(0, 2, 1)).astype(BF16)
        add(f"{name}_bias", E, outputs)

    add("model.embed_tokens.weight", config["vocab_size"], D)
    for n in range(config["num_hidden_layers"]):
        at, heads = f"model.layers.{n}.", config["num_attention_heads"]
        width = heads * config["head_dim"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(f"{at}{norm}.weight", D)
        for proj in "qkv":
            add(f"{at}self_attn.{proj}_proj.weight", width, D)
            add(f"{at}self_attn.{proj}_proj.bias", width)
        add(f"{at}self_attn.o_proj.weight", D, width)
        add(f"{at}self_attn.o_proj.bias", D)
        add(f"{at}self_attn.sinks", heads)
        add(f"{at}mlp.router.weight", E, D)
        add(f"{at}mlp.router.bias", E)
        add_experts(f"{at}mlp.experts.gate_up_proj", 2 * F, D)
        add_experts(f"{at}mlp.experts.down_proj", D, F)
    add("model.norm.weight", D)
    add("lm_head.weight", config["vocab_size"], D)
    return stored, plain


def oss_pair(path: Path, **sizes: int) -> tuple[Path, Path]:
    """Both as folders."""
    config = oss_config(quantized=True, **sizes)
    stored, plain = oss_tensors(config)
    ordinary = oss_config(quantized=False, **sizes)
    return (
        write_checkpoint(path / "mxfp4", config, stored, shards=2),
        write_checkpoint(path / "bf16", ordinary, plain),
    )
