"""What an expert makes of its gate and its up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from molae.errors import CheckpointError

__all__ = [
    "NAMES_BY_TYPE",
    "ClampedSwiglu",
    "activation_module",
    "activation_of",
    "gated",
    "known_activation",
]

#: Transformers' names of the activations that csrc/ops has.
NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}

#: Functions that some families have in the place of a module.
FUNCTIONS = {nn.functional.silu: "silu", nn.functional.gelu: "gelu"}


class ClampedSwiglu(nn.Module):
    """That of gpt-oss: ``(up + 1) · g · sigmoid(alpha · g)``, g = gate cut at `limit`, and up at
    ±`limit`.

    Unlike an activation of gate alone it is called with both.

    Examples
    --------
    >>> import torch
    >>> from molae.hf.activation import ClampedSwiglu
    >>> ClampedSwiglu(1.0, 2.0)(torch.tensor([9.0, 0.0]), torch.tensor([-9.0, 1.0]))
    tensor([-1.7616,  0.0000])
    """

    def __init__(self, alpha: float = 1.702, limit: float = 7.0) -> None:
        super().__init__()
        self.alpha, self.limit = float(alpha), float(limit)

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate = gate.clamp(max=self.limit)
        up = up.clamp(min=-self.limit, max=self.limit)
        return (up + 1) * (gate * torch.sigmoid(self.alpha * gate))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, limit={self.limit:g}"


NAMES_BY_TYPE: dict[type, str] = {
    **{type(ACT2FN[theirs]): ours for theirs, ours in NAMES.items()},
    ClampedSwiglu: "swiglu_clamped",
}


def activation_module(activation: Any) -> Any:
    """An activation by its name in Transformers, as a function or as a module: the module."""
    name = activation if isinstance(activation, str) else FUNCTIONS.get(activation)
    return activation if name is None else ACT2FN[name]


def known_activation(act_fn: Any) -> tuple[str, float, float] | None:
    """Name, alpha and limit as `molae.ops` takes them; None where it has no such activation."""
    name = NAMES_BY_TYPE.get(type(act_fn))
    if name is None:
        return None
    return name, getattr(act_fn, "alpha", 0.0), getattr(act_fn, "limit", 0.0)


def gated(act_fn: Callable[..., torch.Tensor], gate: torch.Tensor, up: torch.Tensor) -> Any:
    """The intermediate of an expert."""
    return act_fn(gate, up) if isinstance(act_fn, ClampedSwiglu) else act_fn(gate) * up


def activation_of(experts: Any) -> Any:
    """The activation of a family's own module of experts.

    Raises
    ------
    CheckpointError
        It combines gate and up in a way that molae does not have.
    """
    own = getattr(experts, "act_fn", None)
    apply = getattr(experts, "_apply_gate", None)
    if own is not None:
        found = activation_module(own)
        if apply is None or _answers_alike(apply, found, 100):
            return found
    alpha, limit = getattr(experts, "alpha", None), getattr(experts, "limit", None)
    if own is None and isinstance(alpha, float) and isinstance(limit, float) and apply is not None:
        found = ClampedSwiglu(alpha, limit)
        if _answers_alike(apply, found, 2 * limit):
            return found
    raise CheckpointError(
        f"{type(experts).__name__}: this version of Transformers gives these experts an "
        "activation that molae does not have; install the version that molae was tested with"
    )


def _answers_alike(apply: Callable[..., torch.Tensor], act_fn: Any, most: float) -> bool:
    """Whether experts make of gate and up, up to ±`most`, what `gated` does. Names alone would not
    tell if a version computes another thing, and some clamp both beside act(gate) · up."""
    line = torch.linspace(-most, most, 41, dtype=torch.float64, device="cpu")
    gate, up = (x.reshape(-1, 1) for x in torch.meshgrid(line, line, indexing="ij"))
    # With one unit it is the same whether gate and up take turns or not.
    found = apply(torch.cat([gate, up], -1))
    return torch.allclose(found, gated(act_fn, gate, up), rtol=1e-6, atol=1e-9)
