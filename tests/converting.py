"""Helpers for tests of conversion: read a result by its documented format, compare folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from molae.convert import latent
from molae.convert.allocation import Allocation
from molae.convert.fitting import Method
from molae.factored import Split
from molae.io import open_checkpoint

TYPES = ("gate_proj", "up_proj", "down_proj")
REPORT, PAGE = "molae-report.json", "molae-report.html"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the report and its page, which hold times."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (REPORT, PAGE)
    }


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint, copied."""
    with open_checkpoint(folder) as checkpoint:
        return {name: np.array(checkpoint.array(name)) for name in checkpoint.tensors}


def bits(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return str(array.dtype), array.shape, array.tobytes()


def source_matrices(folder: Path, layer: int, kind: str) -> list[np.ndarray]:
    """The experts of an ordinary tiny checkpoint, found by name without molae's help."""
    own = tensors(folder)
    config = read_json(folder / "config.json")
    E = config.get("num_experts", config.get("num_local_experts"))
    mixtral = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    block = "block_sparse_moe" if any("block_sparse_moe" in name for name in own) else "mlp"
    prefix = f"model.layers.{layer}.{block}.experts"
    if f"{prefix}.down_proj" in own:
        if kind == "down_proj":
            return list(own[f"{prefix}.down_proj"])
        both = own[f"{prefix}.gate_up_proj"]
        F = both.shape[1] // 2
        return [m[:F] if kind == "gate_proj" else m[F:] for m in both]
    role = mixtral[kind] if config["model_type"] == "mixtral" else kind
    return [own[f"{prefix}.{e}.{role}.weight"] for e in range(E)]


def factored_matrices(folder: Path, layer: int, kind: str) -> list[np.ndarray] | None:
    """The experts of a converted checkpoint in float64, by docs/formats.md alone.

    None where the type has the source's form.
    """
    config = read_json(folder / "config.json")
    quant = config["quantization_config"]
    entry = quant["layers"].get(str(layer), {}).get(kind)
    if entry is None:
        return None
    own = tensors(folder)
    names = [n for n in own if f"layers.{layer}." in n and f".experts.{kind}." in n]
    prefix = names[0].split(f".{kind}.")[0]
    D = config["hidden_size"]
    F = config.get("moe_intermediate_size", config["intermediate_size"])
    matrices: dict[int, np.ndarray] = {}
    for g, (group, rank) in enumerate(zip(entry["groups"], entry["ranks"], strict=True)):

        def part(role: str, g: int = g) -> np.ndarray:
            array = own[f"{prefix}.{kind}.{g}.{role}"]
            return array if role == "perm" else array.astype(np.float64)

        for at, expert in enumerate(group):
            if rank is None:
                matrices[expert] = part("dense")[at]
            elif rank == 0:
                matrices[expert] = np.zeros((D, F) if kind == "down_proj" else (F, D))
            else:
                B = part("shared")
                if quant["form"] == "gauge":
                    placed = np.zeros((rank, D))
                    placed[:, part("perm")] = np.hstack([np.eye(rank), B])
                    B = placed
                A = part("private")[at]
                matrices[expert] = B.T @ A if kind == "down_proj" else A @ B
    return [matrices[e] for e in range(len(matrices))]


def relative_error(approximation: np.ndarray, exact: np.ndarray) -> float:
    exact = np.asarray(exact, dtype=np.float64)
    difference = np.asarray(approximation, dtype=np.float64) - exact
    return float(np.linalg.norm(difference) / np.linalg.norm(exact))


def fixed_method(
    splits: dict[str, Split], *, name: str = "fixed", layers: tuple[int, ...] | None = None
) -> Method:
    """A method with given groups and ranks, to reach what no budget would choose."""

    def allocate(model: Any, config: Any, probe: Any) -> Allocation:
        chosen = model.moe_layers if layers is None else layers
        return Allocation("gauge", dict.fromkeys(chosen, splits))

    return Method(name, "gauge", "for tests", allocate, latent.METHOD.fit)


def metadata(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            yield path.name, file.metadata()
