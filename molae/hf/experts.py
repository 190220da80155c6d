"""The routed experts of a layer with shared latent factors, as a module of torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from molae.config import TYPES
from molae.errors import ArgumentError
from molae.factored import FORMS, VECTORS, Form, LightModule, Split, group_tensors
from molae.hf.activation import activation_module
from molae.hf.forward import forward_torch, split_slots, weighted_rows
from molae.hf.native import forward_native

__all__ = ["Factors", "Group", "LatentExperts", "NarrowExperts"]

#: Standard deviation of a dense expert's matrix whose size the factors start with.
DEFAULT_STD = 0.02


class Factors(NamedTuple):
    """The tensors of one group as they are used, adapters included.

    Attributes
    ----------
    experts : tuple of int
        The k members, in the order of `private` and `dense`.
    rank : int or None
        R; None for a dense group.
    shared : (R, D) or, in gauge form, (R, D - R) tensor, or None
    perm : (D,) int32 tensor, or None
        None in plain form: `shared` is B. Else ``B[:, perm] = [I | shared]``.
    private : (k, F, R) or, for down, (k, R, F) tensor, or None
    dense : (k, F, D) or, for down, (k, D, F) tensor, or None
    """

    experts: tuple[int, ...]
    rank: int | None
    shared: torch.Tensor | None = None
    perm: torch.Tensor | None = None
    private: torch.Tensor | None = None
    dense: torch.Tensor | None = None


class Group(nn.Module):
    """The factors of one group of experts, under the names that a checkpoint gives them.

    It computes nothing. Calling it gives the tensors *as they are now*, which is how
    adapters that wrap the module (PEFT's ``target_parameters``) and hooks that bring
    offloaded weights get to take part.
    """

    shared: torch.Tensor | None
    perm: torch.Tensor | None
    private: torch.Tensor | None
    dense: torch.Tensor | None

    def __init__(
        self,
        kind: str,
        experts: tuple[int, ...],
        rank: int | None,
        *,
        F: int,
        D: int,
        form: Form,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.experts, self.rank = kind, experts, rank
        parts = {
            part.role: part
            for part in group_tensors("", kind, 0, len(experts), rank, F=F, D=D, form=form)
        }
        for role in ("shared", "private", "dense"):
            value = None
            if role in parts:
                value = nn.Parameter(torch.empty(parts[role].shape, device=device, dtype=dtype))
            self.register_parameter(role, value)
        perm = None
        if "perm" in parts:
            perm = torch.empty(parts["perm"].shape, device=device, dtype=torch.int32)
        self.register_buffer("perm", perm)

    def forward(self, x: torch.Tensor | None = None) -> Factors:
        """The group's tensors; `x` is not looked at (wrappers insist on an argument)."""
        return Factors(self.experts, self.rank, self.shared, self.perm, self.private, self.dense)

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """See `LatentExperts.reset_parameters`."""
        if self.dense is not None:
            nn.init.normal_(self.dense, std=std)
        if self.shared is None or self.private is None or self.rank is None:
            return
        R = self.rank
        D = self.shared.shape[1] + (R if self.perm is not None else 0)
        if self.shared.numel():  # none at R = D
            nn.init.normal_(self.shared, std=1 / math.sqrt(D))
        row = 1.0  # expected squared norm of a row of B
        if self.perm is not None:
            row += (D - R) / D
            self.perm.copy_(torch.randperm(D, device=self.perm.device))
        nn.init.normal_(self.private, std=std * math.sqrt(D / (R * row)))

    def extra_repr(self) -> str:
        what = "dense" if self.rank is None else f"rank={self.rank}"
        return f"experts={len(self.experts)}, {what}"


class LatentExperts(nn.Module):
    """The routed experts of one layer, any mix of latent and dense groups.

    It takes the place of a family's own module (``OlmoeExperts`` and the like) and has its
    signature. Names in its state dict are those of the checkpoint format, such as
    ``gate_proj.0.shared``; see ``docs/formats.md``.

        gate_i, up_i = A_i (B x)           one B x serves all experts of a group
        y = sum over groups of Bᵀ (sum over k of w_k A_k h_k),   h = act(gate) * up

    Parameters
    ----------
    num_experts, hidden_size, intermediate_size : int
        E, D and F.
    gate, up, down : Split or None
        Groups and ranks of each matrix type. None keeps all experts in one dense parameter
        ``gate_proj`` (E, F, D), ``up_proj`` (E, F, D) or ``down_proj`` (E, D, F).
    form : {'gauge', 'plain'}
        Of the shared factors. The identity of the gauge form is an index, no product.
    activation : str or callable
        A name that Transformers knows, or a module; `molae.hf.activation.ClampedSwiglu` is called
        with gate and up.
    fused : bool
        With neither `gate` nor `up`: one parameter ``gate_up_proj`` (E, 2F, D) for both.
    transposed : bool
        Parameters of matrix types that are None have their last two axes exchanged.
    interleaved : bool
        Gate and up take turns in ``gate_up_proj``, gate first; otherwise gate is the first half.
    bias : bool
        Experts have biases: parameters ``gate_up_proj_bias`` (E, 2F), ordered as `interleaved`
        says, and ``down_proj_bias`` (E, D).
    num_compressed : int
        How many of a token's experts, the last by their weights, do not run.
    light : LightModule
        What acts in their place: the rows of one parameter ``compressed`` (E, 2D + F), see
        `molae.ops.compressed_experts_forward`, or a module ``light`` of `NarrowExperts`.
    device, dtype
        Of the parameters. `perm` is int32 and stays so.

    Raises
    ------
    molae.errors.ArgumentError
        Groups that do not hold each expert once, a rank above D, an unknown form, less than no
        compressed experts.

    Notes
    -----
    A new module is initialized by `reset_parameters`. Inputs are (T, D) hidden states,
    (T, K) expert numbers and (T, K) weights; a number E stands for "not here" (expert
    parallelism) and adds nothing. Sums are taken in float32 at least.

    Examples
    --------
    >>> import torch
    >>> from molae.factored import VECTORS, Split, index_groups
    >>> from molae.hf import LatentExperts
    >>> half = Split(index_groups(4, 2), (3, 3))
    >>> experts = LatentExperts(4, 8, 6, gate=half, up=half, down=None)
    >>> y = experts(torch.ones(5, 8), torch.tensor([[0, 2]] * 5), torch.full((5, 2), 0.5))
    >>> y.shape
    torch.Size([5, 8])
    """

    #: What holds a group's factors as long as no adapter has wrapped it.
    group_type = Group

    compressed: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        gate: Split | None,
        up: Split | None,
        down: Split | None,
        form: Form = "gauge",
        activation: str | Callable[[torch.Tensor], torch.Tensor] = "silu",
        fused: bool = False,
        transposed: bool = False,
        interleaved: bool = False,
        bias: bool = False,
        num_compressed: int = 0,
        light: LightModule = VECTORS,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = (
            num_experts, hidden_size, intermediate_size,
        )  # fmt: skip
        if form not in FORMS:
            raise ArgumentError(f"form: expected one of {FORMS}, got {form!r}")
        self.form: Form = form
        self.act_fn = activation_module(activation)
        splits = dict(zip(TYPES, (gate, up, down), strict=True))
        E, D, F = num_experts, hidden_size, intermediate_size
        if fused and (gate is not None or up is not None):
            raise ArgumentError("fused: only where neither gate nor up is split")
        self.transposed, self.interleaved, self.has_bias = transposed, interleaved, bias

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        if fused:
            self.gate_up_proj = parameter(*((E, D, 2 * F) if transposed else (E, 2 * F, D)))
        if bias:
            self.gate_up_proj_bias = parameter(E, 2 * F)
            self.down_proj_bias = parameter(E, D)
        for kind, split in splits.items():
            if split is None:
                if fused and kind != "down_proj":
                    continue
                rows_last = (kind == "down_proj") != transposed
                self.register_parameter(kind, parameter(*((E, D, F) if rows_last else (E, F, D))))
                continue
            _check_split(kind, split, E, D)
            groups = (
                Group(kind, experts, rank, F=F, D=D, form=form, device=device, dtype=dtype)
                for experts, rank in zip(split.groups, split.ranks, strict=True)
            )
            self.add_module(kind, nn.ModuleList(groups))
        if num_compressed < 0:
            raise ArgumentError(f"num_compressed: expected 0 or more, got {num_compressed}")
        self.num_compressed, compressed = num_compressed, None
        self.light: NarrowExperts | None = None
        if num_compressed and light.units is None:
            compressed = nn.Parameter(torch.empty(E, 2 * D + F, device=device, dtype=dtype))
        elif num_compressed:
            assert light.units is not None
            self.light = NarrowExperts(
                E, D, light.units, biased=light.biased, activation=self.act_fn, device=device,
                dtype=dtype,
            )  # fmt: skip
        self.register_parameter("compressed", compressed)
        if torch.empty(0, device=device).device.type != "meta":
            self.reset_parameters()

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum of the chosen experts, weighted.

        Parameters
        ----------
        hidden_states : (T, D) tensor
        top_k_index : (T, K) tensor of integers
            Expert numbers; E for "not here".
        top_k_weights : (T, K) tensor

        Returns
        -------
        (T, D) tensor of the type of `hidden_states`
        """
        if self.light is None:
            return self._sum(hidden_states, top_k_index, top_k_weights)
        main, aux = split_slots(top_k_index, top_k_weights, self.num_compressed, self.num_experts)
        y = self._sum(hidden_states, main, top_k_weights)
        answer: torch.Tensor = y + self.light(hidden_states, aux, top_k_weights)
        return answer

    def _sum(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The one place that chooses how the layer is computed."""
        y = forward_native(self, x, index, weights)
        return forward_torch(self, x, index, weights, self.factors()) if y is None else y

    @property
    def vectors(self) -> tuple[torch.Tensor, int] | None:
        """Those of the compressed experts, and how many of a token's these are."""
        return None if self.compressed is None else (self.compressed, self.num_compressed)

    @property
    def biases(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Of gate (E, F), up (E, F) and down (E, D), contiguous; None where there are none."""
        if not self.has_bias:
            return None
        gate, up = self._halves(self.gate_up_proj_bias)
        return gate.contiguous(), up.contiguous(), self.down_proj_bias

    def _halves(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate and up, of a tensor with 2F on its second axis."""
        if self.interleaved:
            return both[:, ::2], both[:, 1::2]
        F = self.intermediate_dim
        return both[:, :F], both[:, F:]

    def factors(self) -> dict[str, tuple[Factors, ...]]:
        """The tensors of each matrix type, group by group, as they are now."""
        return {kind: self._factors(kind) for kind in TYPES}

    def _factors(self, kind: str) -> tuple[Factors, ...]:
        held = getattr(self, kind, None)
        if isinstance(held, nn.ModuleList):
            # The argument is what wrappers of a module insist on.
            return tuple(group(None) for group in held)
        fused = held is None
        whole: Any = self.gate_up_proj if fused else held
        if self.transposed:
            whole = whole.transpose(1, 2)
        if fused:
            whole = self._halves(whole)[kind == "up_proj"]
        return (Factors(tuple(range(self.num_experts)), None, dense=whole),)

    def reset_parameters(self, std: float = DEFAULT_STD) -> None:
        """Draw new values, for training from scratch.

        Dense matrices are normal with standard deviation `std`. Of a latent group, the
        entries of `shared` have variance 1/D, `perm` is a random permutation, and `private`
        has the variance that gives every expert's product the expected squared Frobenius
        norm F·D·std² of a dense matrix: std²·D/R in plain form, std²·D/(R·(2 − R/D)) in
        gauge form. Compressed experts begin at 1, where they change nothing.
        """
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                if name == "compressed":
                    nn.init.ones_(parameter)
                elif name.endswith("bias"):
                    nn.init.zeros_(parameter)
                else:
                    nn.init.normal_(parameter, std=std)
        for module in self.modules():
            if isinstance(module, Group):
                module.reset_parameters(std)
        if self.light is not None:
            self.light.reset_parameters(std)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_dim}, "
            f"intermediate_size={self.intermediate_dim}, form={self.form!r}"
            + (f", num_compressed={self.num_compressed}" if self.num_compressed else "")
        )


class NarrowExperts(LatentExperts):
    """Of each expert one of a few units and a bias, which answers where the expert is compressed.

    Parameters
    ----------
    num_experts, hidden_size : int
        E and D.
    units : int
        m, 0 or more; with 0 the bias (E, D) is all there is.
    biased : bool
        Gate and up have biases too, ``gate_bias`` and ``up_bias`` (E, m).
    activation, device, dtype
        As of `LatentExperts`.

    Examples
    --------
    >>> import torch
    >>> from molae.hf.experts import NarrowExperts
    >>> narrow = NarrowExperts(4, 8, 2)
    >>> narrow(torch.ones(5, 8), torch.tensor([[0, 4]] * 5), torch.full((5, 2), 0.5)).shape
    torch.Size([5, 8])
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        units: int,
        *,
        biased: bool = False,
        activation: str | Callable[[torch.Tensor], torch.Tensor] = "silu",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_experts, hidden_size, units, gate=None, up=None, down=None,
            activation=activation, device=device, dtype=dtype,
        )  # fmt: skip
        if units == 0:
            for kind in TYPES:
                setattr(self, kind, None)

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

        self.bias = zeros(num_experts, hidden_size)
        self.biased = biased
        if biased:
            self.gate_bias, self.up_bias = zeros(num_experts, units), zeros(num_experts, units)

    @property
    def biases(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Where gate and up have some; else the one of down is added beside what runs."""
        return (self.gate_bias, self.up_bias, self.bias) if self.biased else None

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As of `LatentExperts`."""
        if self.biased:
            return self._sum(hidden_states, top_k_index, top_k_weights)
        y = weighted_rows(self.bias, top_k_index, top_k_weights, self.num_experts)
        y = y.to(hidden_states.dtype)
        if self.intermediate_dim:
            y = y + self._sum(hidden_states, top_k_index, top_k_weights)
        return y


def _check_split(kind: str, split: Split, E: int, D: int) -> None:
    members = sorted(expert for group in split.groups for expert in group)
    if members != list(range(E)) or not all(split.groups):
        raise ArgumentError(
            f"{kind}: expected each of the E={E} experts in one group, got {members}"
        )
    if len(split.ranks) != len(split.groups):
        raise ArgumentError(
            f"{kind}: expected a rank for each of {len(split.groups)} groups, got {split.ranks}"
        )
    if not all(rank is None or 0 <= rank <= D for rank in split.ranks):
        raise ArgumentError(f"{kind}: expected ranks from 0 to D={D} or None, got {split.ranks}")
