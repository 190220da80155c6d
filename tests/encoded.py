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
