"""Which weights of a model learn."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from molae.errors import ArgumentError
from molae.hf.experts import LatentExperts, NarrowExperts
from molae.train.settings import Part

__all__ = ["select_parameters"]


def select_parameters(model: nn.Module, part: Part) -> int:
    """Let only these weights of a model learn; see `FinetuneConfig`.

    Returns
    -------
    int
        How many numbers they are.

    Raises
    ------
    molae.errors.ArgumentError
        The model has no such weights.

    Examples
    --------
    >>> import molae.demo
    >>> from molae.hf.opening import open_model
    >>> from molae.train import select_parameters
    >>> model, _ = open_model(molae.demo.CHECKPOINT)
    >>> select_parameters(model, "router")  # three of 32 experts, each of a hidden size of 128
    12288
    """
    model.requires_grad_(part == "all")
    if part != "all":
        for own in _selected(model, part):
            own.requires_grad_(True)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not count:
        what = {"light": "compressed experts", "experts": "latent or compressed experts"}
        raise ArgumentError(f"train: the model has no {what.get(part, 'routers')}")
    return count


def _selected(model: nn.Module, part: Part) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if part == "router":
            experts = getattr(module, "experts", None)
            gate = getattr(module, "gate", None) or getattr(module, "router", None)
            if experts is not None and isinstance(gate, nn.Module):
                yield from gate.parameters()
        elif isinstance(module, LatentExperts):
            if part == "experts" or isinstance(module, NarrowExperts):
                yield from module.parameters()
            elif module.compressed is not None:
                yield module.compressed
        elif part == "experts" and isinstance(getattr(module, "down_proj", None), nn.Parameter):
            yield from module.parameters()
