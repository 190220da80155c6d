"""The same model with Gaussian experts: what a method's weight error is where there is nothing
to find."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.quality.model import load, moe_layers

__all__ = ["gaussian_twin"]


def gaussian_twin(path: Path, folder: Path, *, seed: int = 0) -> Path:
    """Each expert's matrix drawn anew, with its own mean square."""
    model, tokenizer = load(path)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, experts in moe_layers(model):
            for tensor in (experts.gate_up_proj, experts.down_proj):
                assert isinstance(tensor, torch.Tensor)
                scale = tensor.square().mean(dim=(1, 2), keepdim=True).sqrt()
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
