"""Seeded weights: stacks of experts' matrices, and a checkpoint of OLMoE's shapes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from molae.io import ShardWriter, TensorSpec

__all__ = ["KINDS", "OLMOE", "Draw", "decaying_mixing", "experts", "write_checkpoint"]

#: What is drawn. gaussian: independent entries, nothing is shared. decaying: experts
#: W_i = Z_i diag(s) H^T with Z_i Gaussian, H orthogonal and the same for all experts, and
#: s_j = j^(-1/2): the singular values of a group's stack fall about as j^(-1/2).
KINDS = ("gaussian", "decaying")

#: Sizes of allenai/OLMoE-1B-7B-0924, from its config.json.
OLMOE = {"L": 16, "E": 64, "K": 8, "D": 2048, "F": 1024, "V": 50304}


def experts(
    kind: str,
    E: int,
    F: int,
    D: int,
    *,
    seed: int = 0,
    mixing: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float32]:
    """E matrices (F, D) in float32, with entries of about 1/sqrt(D).

    `mixing` (D, D) is diag(s) H^T of the kind 'decaying'; made by `decaying_mixing` if left out.
    """
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((E, F, D), dtype=np.float32)
    if kind == "gaussian":
        W *= np.float32(D**-0.5)
        return W
    mixing = decaying_mixing(D, seed) if mixing is None else mixing
    for i in range(E):
        W[i] = W[i] @ mixing
    return W


def decaying_mixing(D: int, seed: int) -> npt.NDArray[np.float32]:
    """diag(s) H^T (D, D), scaled so that the experts' entries are about 1/sqrt(D)."""
    rng = np.random.default_rng([seed, 1])
    H = np.linalg.qr(rng.standard_normal((D, D), dtype=np.float32))[0]
    s = np.arange(1, D + 1, dtype=np.float64) ** -0.5
    s /= np.sqrt((s**2).sum())
    mixed: npt.NDArray[np.float32] = s.astype(np.float32)[:, None] * H.T
    return mixed


def write_checkpoint(folder: Path, *, layers: int, E: int, F: int, D: int, V: int) -> int:
    """Write an OLMoE checkpoint in bfloat16, one shard a layer; returns bytes of its tensors.

    Experts are of the kind 'decaying', the same in each layer, which saves time here and
    changes nothing for a conversion. Attention and embeddings are there in full size.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_config(layers, E, F, D, V), indent=2) + "\n")
    first = {
        "model.embed_tokens.weight": (V, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (V, D),
    }
    files = [f"model-{n + 1:05d}-of-{layers:05d}.safetensors" for n in range(layers)]
    shapes = [_layer_shapes(n, E, F, D) | (first if n == 0 else {}) for n in range(layers)]
    outs = [
        ShardWriter(folder / file, [TensorSpec(name, "BF16", shape) for name, shape in own.items()])
        for file, own in zip(files, shapes, strict=True)
    ]
    draw = Draw(D)
    for of_first, shape in shapes[0].items():
        values = draw(of_first, shape)
        for n, out in enumerate(outs):
            name = of_first.replace("layers.0.", f"layers.{n}.")
            if name in shapes[n]:
                out.write(name, values)
    for out in outs:
        out.finish()
    total = 2 * sum(math.prod(shape) for own in shapes for shape in own.values())
    weight_map = {name: file for file, own in zip(files, shapes, strict=True) for name in own}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


class Draw:
    """Random bfloat16 values for a tensor, by its name."""

    def __init__(self, D: int) -> None:
        self._rng = np.random.default_rng(2)
        self._mixing = {
            kind: decaying_mixing(D, seed)
            for seed, kind in enumerate(("gate_proj", "up_proj", "down_proj"))
        }

    def __call__(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        values = self._rng.standard_normal(shape, dtype=np.float32)
        kind = next((kind for kind in self._mixing if kind in name), None)
        if kind is None:
            values *= np.float32(shape[-1] ** -0.5)
        elif kind == "down_proj":
            values = np.ascontiguousarray((values.T @ self._mixing[kind]).T)
        else:
            values = values @ self._mixing[kind]
        return values.astype(ml_dtypes.bfloat16)


def _config(layers: int, E: int, F: int, D: int, V: int) -> dict[str, Any]:
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "hidden_act": "silu",
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": E,
        "num_experts_per_tok": min(OLMOE["K"], E),
        "vocab_size": V,
        "tie_word_embeddings": False,
    }


def _layer_shapes(n: int, E: int, F: int, D: int) -> dict[str, tuple[int, ...]]:
    at = f"model.layers.{n}"
    shapes: dict[str, tuple[int, ...]] = {}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{at}.{norm}.weight"] = (D,)
    for proj in "qkvo":
        shapes[f"{at}.self_attn.{proj}_proj.weight"] = (D, D)
    for norm in ("q_norm", "k_norm"):
        shapes[f"{at}.self_attn.{norm}.weight"] = (D,)
    shapes[f"{at}.mlp.gate.weight"] = (E, D)
    for e in range(E):
        shapes[f"{at}.mlp.experts.{e}.gate_proj.weight"] = (F, D)
        shapes[f"{at}.mlp.experts.{e}.up_proj.weight"] = (F, D)
        shapes[f"{at}.mlp.experts.{e}.down_proj.weight"] = (D, F)
    return shapes
