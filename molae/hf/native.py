"""The same layer by molae's C kernels, on the CPU: tensors are read where they lie.

One autograd function serves training and inference. Its backward computes what is asked for and
nothing else, so that frozen factors cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN

from molae import _core
from molae.ops import ACTIVATIONS
from molae.threads import get_num_threads

if TYPE_CHECKING:
    from molae.hf.experts import Factors, LatentExperts

__all__ = ["forward_native", "native_takes"]

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
_BY_TYPE = {type(ACT2FN[theirs]): ours for theirs, ours in NAMES.items()}

Split = Sequence["Factors"]


def native_takes(module: LatentExperts, x: torch.Tensor, factors: Mapping[str, Split]) -> bool:
    """Whether `forward_native` computes this layer for this input.

    On the CPU, for float32, float64 and bfloat16, weights in the type of `x`, and activations
    that `molae.ops` has.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return False
    return type(module.act_fn) in _BY_TYPE and all(
        t.dtype == x.dtype
        and t.device == x.device
        and type(t) in (torch.Tensor, torch.nn.Parameter)
        for t in _tensors(factors)
    )


# Sizes depend on the routing and the kernels are not torch's: torch.compile calls it as it is.
@torch.compiler.disable
def forward_native(
    module: LatentExperts,
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    factors: Mapping[str, Split],
) -> torch.Tensor:
    """The forward pass of `LatentExperts` through ``molae._core``, with its gradients.

    Parameters
    ----------
    module : LatentExperts
    x : (T, D) tensor
    index : (T, K) tensor of integers
        Expert numbers; E and above for "not here".
    weights : (T, K) tensor
    factors : dict of sequences of Factors
        What ``module.factors()`` gave.

    Returns
    -------
    (T, D) tensor of the type of `x`

    Notes
    -----
    Threads: the fewer of molae's and torch's. Results do not depend on them.
    """
    E = module.num_experts
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    layer = (E, module.intermediate_dim, _BY_TYPE[type(module.act_fn)], module.form, factors)
    y: torch.Tensor = _Experts.apply(
        layer,
        index.clamp(max=E).to(torch.int64).contiguous(),
        x.contiguous(),
        weights.to(work).contiguous(),
        *_tensors(factors),
    )
    return y


def _tensors(factors: Mapping[str, Split]) -> Iterator[torch.Tensor]:
    """Every tensor that has a gradient, in the one order that this file uses."""
    for groups in factors.values():
        for group in groups:
            for tensor in (group.private, group.dense, group.shared):
                if tensor is not None:
                    yield tensor


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor's memory as an array."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _stack(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """An array of matrices that C can read; a copy where an adapter made a strange layout."""
    array = _array(tensor)
    if array.ndim == 3 and array[:1].flags.c_contiguous:
        return array  # the first half of a fused tensor is read where it lies
    return np.ascontiguousarray(array)


def _projection(
    groups: Split, E: int, form: str, arrays: Iterator[Any]
) -> tuple[list[Any], Any, Any, list[Any], list[Any], bool]:
    """One type as _core takes it, with the next of `arrays` for its tensors."""
    private: list[Any] = [None] * E
    shared: list[Any] = []
    group_of = np.empty(E, dtype=np.int64)
    for g, group in enumerate(groups):
        group_of[list(group.experts)] = g
        if group.private is not None or group.dense is not None:
            stack = next(arrays)
            if stack is not None:
                for place, expert in enumerate(group.experts):
                    private[expert] = stack[place]
        shared.append(next(arrays) if group.shared is not None else None)
    rank = np.array([-1 if g.rank is None else g.rank for g in groups], dtype=np.int64)
    perm = [None if g.perm is None else g.perm.numpy() for g in groups]
    return private, group_of, rank, shared, perm, form == "gauge"


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: Any,
        index: torch.Tensor,
        x: torch.Tensor,
        weights: torch.Tensor,
        *tensors: Any,
    ) -> torch.Tensor:
        _, F, _, _, factors = layer
        (N, _), K = x.shape, index.shape[1]
        y = torch.empty_like(x)
        kept: tuple[torch.Tensor, ...] = ()
        if any(ctx.needs_input_grad):
            widths = [
                min(sum(ranks), K * max(ranks, default=0))
                for ranks in ([g.rank for g in groups if g.rank] for groups in factors.values())
            ]
            shapes = [(N * K, F), (N * K, F), *((N, width) for width in widths)]
            kept = tuple(weights.new_empty(shape) for shape in shapes)
        call = _call(layer, index, x, weights, tensors)
        saved = tuple(_array(t) for t in kept) or None
        _core.experts_forward(_array(y), saved, call, _threads())
        ctx.layer = layer
        ctx.save_for_backward(index, x, weights, *kept, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        E, _, _, form, factors = ctx.layer
        index, x, weights, *rest = ctx.saved_tensors
        kept, tensors = rest[:5], rest[5:]
        wanted = ctx.needs_input_grad[2:]
        # Wide, as sums of many products; autograd gets them in the types of the tensors.
        grads = [
            torch.zeros(t.shape, dtype=weights.dtype) if want else None
            for t, want in zip((x, weights, *tensors), wanted, strict=True)
        ]
        arrays = iter([None if g is None else _array(g) for g in grads[2:]])
        to = []
        for groups in factors.values():
            private, _, _, shared, _, _ = _projection(groups, E, form, arrays)
            to.append((private, shared, None))
        _core.experts_backward(
            (*(None if g is None else _array(g) for g in grads[:2]), *to),
            _array(dy.contiguous()),
            tuple(_array(t) for t in kept),
            _call(ctx.layer, index, x, weights, tensors),
            _threads(),
        )
        found = [
            None if g is None else g.to(t.dtype)
            for g, t in zip(grads, (x, weights, *tensors), strict=True)
        ]
        return None, None, *found


def _threads() -> int:
    return min(get_num_threads(), torch.get_num_threads())


def _call(
    layer: Any, index: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, tensors: Sequence[Any]
) -> tuple[Any, ...]:
    """The layer and its inputs as _core takes them."""
    E, F, activation, form, factors = layer
    like = _array(x)
    arrays = iter([_stack(tensor) for tensor in tensors])
    projections = (
        (*_projection(groups, E, form, arrays), like, None) for groups in factors.values()
    )
    number = ACTIVATIONS.index(activation)
    return (like, index.numpy(), _array(weights), *projections, E, F, number, 0.0, 0.0)
