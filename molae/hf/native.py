"""The same layer by molae's C kernels, on the CPU: tensors are read where they lie.

One autograd function serves training and inference. Its backward computes what is asked for and
nothing else, so that frozen factors cost nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch
from torch.autograd.function import once_differentiable

from molae import _core
from molae.config import TYPES
from molae.hf.activation import known_activation
from molae.ops import ACTIVATIONS
from molae.ops.projection import latent_width
from molae.threads import get_num_threads

if TYPE_CHECKING:
    from molae.hf.experts import Factors, LatentExperts

__all__ = ["forward_native"]

Split = Sequence["Factors"]


# Sizes depend on the routing and the kernels are not torch's: torch.compile calls it as it is.
@torch.compiler.disable
def forward_native(
    module: LatentExperts, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor | None:
    """The forward pass of `LatentExperts` through ``molae._core``, with its gradients.

    Parameters
    ----------
    module : LatentExperts
    x : (T, D) tensor
    index : (T, K) tensor of integers
        Expert numbers; E and above for "not here".
    weights : (T, K) tensor

    Returns
    -------
    (T, D) tensor of the type of `x`, or None
        None where the kernels do not compute this: outside the CPU, for other types than float32,
        float64 and bfloat16, weights in another type than `x` or dense ones whose matrices do not
        lie in C order, or an activation that `molae.ops` does not have.

    Notes
    -----
    Threads: torch's own where molae has leave to use as many, else the fewer of the two numbers.
    Results do not depend on them.
    """
    learns = torch.is_grad_enabled()
    ready = None if learns else _ready.get(module)
    if ready is None or not ready.holds():
        _ready.pop(module, None)
        factors = module.factors()
        if not _takes(module, x, factors):
            return None
        if not learns:
            ready = _remember(module, factors)
    elif (
        x.dtype != ready.dtype
        or x.device.type != "cpu"
        or known_activation(module.act_fn) is None
        or any(t.dtype != x.dtype or t.device != x.device for t in module.biases or ())
    ):
        del _ready[module]  # it holds on to weights that the module may have left
        return None
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    index = index.clamp(max=module.num_experts).to(torch.int64).contiguous()
    x, weights = x.contiguous(), weights.to(work).contiguous()
    activation = known_activation(module.act_fn)
    assert activation is not None
    layer = (module.num_experts, module.intermediate_dim, activation)
    biases = module.biases or (None,) * len(TYPES)
    if learns:
        vectors, count = module.vectors or (None, 0)
        y: torch.Tensor = _Experts.apply(
            (*layer, module.form, factors, count),
            index, x, weights, vectors, *biases, *_tensors(factors),
        )  # fmt: skip
        return y
    y = torch.empty_like(x)
    projections = ready.projections if ready else _own_projections(module, factors)
    call = _call(layer, index, x, weights, projections, biases, *(module.vectors or ()))
    _core.experts_forward(_array(y), None, 0, call, *_threads())
    return y


def _takes(module: LatentExperts, x: torch.Tensor, factors: Mapping[str, Split]) -> bool:
    """Whether the kernels compute this layer for this input."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return False
    if known_activation(module.act_fn) is None:
        return False
    if (module.transposed or module.interleaved) and not all(
        group.dense is None or group.dense[:1].is_contiguous()
        for groups in factors.values()
        for group in groups
    ):
        return False
    return all(
        t.dtype == x.dtype
        and t.device == x.device
        and type(t) in (torch.Tensor, torch.nn.Parameter)
        for t in (*_tensors(factors), *(module.vectors or ())[:1], *(module.biases or ()))
    )


# ------------------------------------------------------------- what a module has ready


class _Ready:
    """A module's weights as _core takes them, and how to see that it still has the same.

    Preparing them takes as long as a small layer's products, so that decoding would feel it.
    """

    def __init__(
        self, entries: list[tuple[dict[str, Any], str, Any]], groups: list[Any], projections: Any
    ) -> None:
        self._entries, self._groups = entries, groups
        self._addresses = [(t, t.data_ptr()) for _, _, t in entries if isinstance(t, torch.Tensor)]
        self.dtype = next((t.dtype for t, _ in self._addresses if t.is_floating_point()), None)
        self.projections = projections

    def holds(self) -> bool:
        return (
            all(held.get(name) is value for held, name, value in self._entries)
            and all(tensor.data_ptr() == address for tensor, address in self._addresses)
            and not any(_is_wrapped(group) for group in self._groups)
        )


# Weak: what is ready goes with its module.
_ready: weakref.WeakKeyDictionary[LatentExperts, _Ready] = weakref.WeakKeyDictionary()


def _is_wrapped(group: Any) -> bool:
    """Whether hooks may change what a group gives from call to call."""
    return bool(group._forward_hooks or group._forward_pre_hooks or "forward" in group.__dict__)


def _remember(module: LatentExperts, factors: Mapping[str, Split]) -> _Ready | None:
    """Keeps what is prepared, where the module's own tensors are all there is to it."""
    entries: list[tuple[dict[str, Any], str, Any]] = []
    groups = []
    for name, child in module._modules.items():
        if name not in factors:
            continue
        entries.append((module._modules, name, child))
        for place, group in child._modules.items():  # type: ignore[union-attr]
            if type(group) is not module.group_type or _is_wrapped(group):
                return None
            groups.append(group)
            entries.append((child._modules, place, group))  # type: ignore[union-attr]
            entries += [(group._parameters, role, t) for role, t in group._parameters.items()]
            entries += [(group._buffers, role, t) for role, t in group._buffers.items()]
    entries += [(module._parameters, name, t) for name, t in module._parameters.items()]
    ready = _Ready(entries, groups, _own_projections(module, factors))
    _ready[module] = ready
    return ready


# ------------------------------------------------------------------- tensors as arrays


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


def _weights(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The same of what is only read.

    `Tensor.numpy` would forbid torch to ever let go of that memory alone, as FSDP does with the
    weights that it has gathered for a layer.
    """
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return np.from_dlpack(tensor.view(torch.int16)).view(ml_dtypes.bfloat16)
    return np.from_dlpack(tensor)


def _empty(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """A tensor, not set, of the type of `like` in memory that molae keeps.

    What one step leaves serves the next: fresh pages would cost as much as many products.
    """
    return torch.from_numpy(_core.empty(tuple(shape), _array(like).dtype))


def _stack(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """An array of matrices that C can read; a copy where an adapter made a strange layout."""
    array = _weights(tensor)
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


def _projections(
    factors: Mapping[str, Split], E: int, form: str, tensors: Iterable[torch.Tensor]
) -> list[Any]:
    """All types as _core takes them, with the tensors in the order of `_tensors`."""
    arrays = iter([_stack(tensor) for tensor in tensors])
    return [_projection(groups, E, form, arrays) for groups in factors.values()]


def _own_projections(module: LatentExperts, factors: Mapping[str, Split]) -> list[Any]:
    return _projections(factors, module.num_experts, module.form, _tensors(factors))


def _call(
    layer: Any,
    index: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    projections: Any,
    biases: Sequence[torch.Tensor | None],
    vectors: torch.Tensor | None = None,
    num_compressed: int = 0,
) -> tuple[Any, ...]:
    """The layer and its inputs as _core takes them."""
    E, F, (activation, alpha, limit) = layer
    like = _array(x)
    number = ACTIVATIONS.index(activation)
    each = (
        (*projection, like, None if bias is None else _weights(bias))
        for projection, bias in zip(projections, biases, strict=True)
    )
    compressed = None
    if vectors is not None:
        compressed = np.ascontiguousarray(_weights(vectors)), num_compressed
    return (like, index.numpy(), _array(weights), *each, E, F, number, alpha, limit, compressed)


_can_borrow = _core.borrow_threads(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


def _threads() -> tuple[int, bool]:
    """How many, and whether they are torch's.

    Between two layers torch's threads look out for work on the very cores that molae's would want.
    """
    theirs = torch.get_num_threads()
    count = min(get_num_threads(), theirs)
    return count, _can_borrow and count == theirs


# ---------------------------------------------------------------------------- gradients


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: Any,
        index: torch.Tensor,
        x: torch.Tensor,
        weights: torch.Tensor,
        vectors: torch.Tensor | None,
        gate_bias: torch.Tensor | None,
        up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        *tensors: Any,
    ) -> torch.Tensor:
        _, F, _, _, factors, _ = layer
        biases = gate_bias, up_bias, down_bias
        (N, _), K = x.shape, index.shape[1]
        y = torch.empty_like(x)
        kept: tuple[torch.Tensor, ...] = ()
        if any(ctx.needs_input_grad):
            widths = [latent_width((g.rank for g in groups), K) for groups in factors.values()]
            shapes = [(N * K, F), (N * K, F), *((N, width) for width in widths)]
            kept = tuple(_empty(shape, weights) for shape in shapes)
        call = _Experts.call(layer, index, x, weights, vectors, biases, tensors)
        saved = tuple(_array(t) for t in kept) or None
        _core.experts_forward(_array(y), saved, 0, call, *_threads())
        ctx.layer = layer
        ctx.save_for_backward(index, x, weights, vectors, *biases, *kept, *tensors)
        return y

    @staticmethod
    def call(
        layer: Any,
        index: torch.Tensor,
        x: torch.Tensor,
        weights: torch.Tensor,
        vectors: torch.Tensor | None,
        biases: Sequence[torch.Tensor | None],
        tensors: Any,
    ) -> tuple[Any, ...]:
        E, F, activation, form, factors, count = layer
        projections = _projections(factors, E, form, tensors)
        return _call((E, F, activation), index, x, weights, projections, biases, vectors, count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        E, _, _, form, factors, _ = ctx.layer
        index, x, weights, vectors, *rest = ctx.saved_tensors
        biases, kept, tensors = rest[:3], rest[3:8], rest[8:]
        wanted = ctx.needs_input_grad[2:]
        inputs = x, weights, vectors, *biases, *tensors
        # Wide, as sums of many products; autograd gets them in the types of the tensors.
        grads = [
            _empty(t.shape, weights) if want else None
            for t, want in zip(inputs, wanted, strict=True)
        ]
        dx, dweights, dvectors, *rest = (None if g is None else _array(g) for g in grads)
        dbiases, arrays = rest[:3], iter(rest[3:])
        to = []
        for groups, dbias in zip(factors.values(), dbiases, strict=True):
            private, _, _, shared, _, _ = _projection(groups, E, form, arrays)
            to.append((private, shared, dbias))
        _core.experts_backward(
            (dx, dweights, *to, dvectors),
            True,
            _array(dy.contiguous()),
            tuple(_array(t) for t in kept),
            _Experts.call(ctx.layer, index, x, weights, vectors, biases, tensors),
            *_threads(),
        )
        found = [None if g is None else g.to(t.dtype) for g, t in zip(grads, inputs, strict=True)]
        return None, None, *found
