"""Layers of experts with random weights, and the ways to compute them: molae's and others'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from benchmarks.settings import Shape, largest_rank
from molae.factored import Split, index_groups
from molae.hf import LatentExperts
from molae.hf.forward import forward_torch

__all__ = [
    "ALIGNMENT",
    "COMPILED",
    "Form",
    "Pool",
    "Subject",
    "dense",
    "distinct",
    "latent",
    "padded_rank",
]

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Named = dict[str, torch.Tensor]

KINDS = ("gate_proj", "up_proj", "down_proj")

#: Bytes that the strides of grouped_mm must be multiples of.
ALIGNMENT = 16

#: The form that needs a C++ compiler.
COMPILED = "torch.compile"

#: More than these copy or read too much to be worth a try: weights of each (token, expert) pair.
BATCHED_UP_TO, COMPILED_UP_TO = 4, 16


class Pool:
    """Random numbers in a hurry: windows of one block of normal ones, each at another place."""

    LENGTH = 3_999_971  # shares no factor with the sizes of matrices

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self._block = torch.randn(self.LENGTH, generator=self.generator)
        self._at = 0

    def draw(self, shape: tuple[int, ...], std: float, dtype: torch.dtype) -> torch.Tensor:
        return self.fill(torch.empty(shape, dtype=dtype), std)

    @torch.no_grad()
    def fill(self, tensor: torch.Tensor, std: float) -> torch.Tensor:
        """Overwrite a contiguous tensor."""
        block, flat, done = (self._block * std).to(tensor.dtype), tensor.view(-1), 0
        while done < len(flat):
            n = min(len(flat) - done, self.LENGTH - self._at)
            flat[done : done + n] = block[self._at : self._at + n]
            done, self._at = done + n, (self._at + n) % self.LENGTH
        return tensor

    def permutations(self, n: int, length: int) -> torch.Tensor:
        found = [torch.randperm(length, generator=self.generator) for _ in range(n)]
        return torch.stack(found).to(torch.int32)


@dataclass(frozen=True)
class Form:
    """One way to compute a layer.

    Attributes
    ----------
    name : str
    call : callable
        Of x (N, D), experts (N, K) and weights (N, K).
    leaves : tuple of Tensor
        What has a gradient besides x and the weights; none where there is no backward.
    named : callable
        Gradients of `leaves` under names that all forms of a layer share.
    most_tokens : int, optional
        It is not tried for more.
    """

    name: str
    call: Call
    leaves: tuple[torch.Tensor, ...] = ()
    named: Callable[[tuple[torch.Tensor, ...]], Named] = lambda grads: {}
    most_tokens: int | None = None

    def takes(self, N: int) -> bool:
        return self.most_tokens is None or self.most_tokens >= N


@dataclass(frozen=True)
class Subject:
    """A layer, molae's way to compute it and the others.

    Attributes
    ----------
    size : float
        1 for a dense layer.
    rank : int or None
    layer : LatentExperts
    ours : Form
    others : list of Form
    """

    size: float
    rank: int | None
    shape: Shape
    layer: LatentExperts
    ours: Form
    others: list[Form]

    def work(self, index: torch.Tensor) -> tuple[int, int]:
        """Bytes of weights that some routed tokens need, and flops of a forward pass."""
        s, element = self.shape, self.layer.factors()["gate_proj"][0]
        tensor = element.dense if element.private is None else element.private
        assert tensor is not None
        nbytes, pairs, hit = tensor.element_size(), index.numel(), len(index.unique())
        if self.rank is None:
            return 3 * hit * s.F * s.D * nbytes, 6 * pairs * s.F * s.D
        groups = index // s.k
        token = torch.arange(len(index))[:, None].expand_as(index)
        met = len((token * s.E + groups).unique())
        M = self.rank * (s.D - self.rank)
        read = hit * s.F * self.rank + len(groups.unique()) * M
        return 3 * read * nbytes, 6 * (pairs * s.F * self.rank + met * M)


# ---------------------------------------------------------------------------- dense


def dense(shape: Shape, dtype: torch.dtype, pool: Pool) -> Subject:
    """A layer without factors; Transformers' own module has the same tensors."""
    E, D, F = shape.E, shape.D, shape.F
    layer = _meta(shape, dtype, gate=None, up=None, down=None, fused=True)
    layer.gate_up_proj = nn.Parameter(pool.draw((E, 2 * F, D), D**-0.5, dtype))
    layer.down_proj = nn.Parameter(pool.draw((E, D, F), D**-0.5, dtype))
    leaves = (layer.gate_up_proj, layer.down_proj)

    def named(grads: tuple[torch.Tensor, ...]) -> Named:
        return dict(zip(("gate_up_proj", "down_proj"), grads, strict=True))

    others = []
    for way in ("eager", "grouped_mm", "batched_mm"):
        config = OlmoeConfig(
            num_experts=E, num_experts_per_tok=shape.K, hidden_size=D, intermediate_size=F
        )
        config._experts_implementation = way
        with torch.device("meta"):
            theirs = OlmoeExperts(config)
        theirs.gate_up_proj, theirs.down_proj = leaves
        most = BATCHED_UP_TO if way == "batched_mm" else None
        others.append(Form(way, theirs, leaves, named, most))
    return Subject(1.0, None, shape, layer, Form("molae", layer, leaves, named), others)


# --------------------------------------------------------------------------- latent


def latent(
    shape: Shape, size: float, dtype: torch.dtype, pool: Pool, *, rank: int | None = None
) -> Subject:
    """A layer of latent experts in gauge form, of one rank for all three types."""
    E, D, F, k = shape.E, shape.D, shape.F, shape.k
    R = largest_rank(k, F, D, size) if rank is None else rank
    groups = index_groups(E, k)
    split = Split(groups, (R,) * len(groups))
    layer = _meta(shape, dtype, gate=split, up=split, down=split)
    stacks = {}
    for kind in KINDS:
        # The norm of a dense matrix with entries of variance 1/D; see LatentExperts.
        std = (R * (2 - R / D)) ** -0.5
        A = pool.draw((E, R, F) if kind == "down_proj" else (E, F, R), std, dtype)
        M = pool.draw((len(groups), R, D - R), D**-0.5, dtype)
        perm = pool.permutations(len(groups), D)
        stacks[kind] = (A, M, perm)
        for g, group in enumerate(getattr(layer, kind)):
            group.private = nn.Parameter(A[g * k : (g + 1) * k])
            group.shared, group.perm = nn.Parameter(M[g]), perm[g]
    names, leaves = zip(*layer.named_parameters(), strict=True)

    def named(grads: tuple[torch.Tensor, ...]) -> Named:
        return dict(zip(names, grads, strict=True))

    def plain(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return forward_torch(layer, x, index, weights, layer.factors())

    padded = _Padded(shape, R, stacks)
    others = [
        Form("molae.hf.forward", plain, leaves, named),
        Form("grouped_mm", padded, padded.leaves, padded.named),
        Form(COMPILED, _Compiled(shape, stacks), most_tokens=COMPILED_UP_TO),
    ]
    return Subject(size, R, shape, layer, Form("molae", layer, leaves, named), others)


def _meta(shape: Shape, dtype: torch.dtype, **splits: Any) -> LatentExperts:
    return LatentExperts(shape.E, shape.D, shape.F, dtype=dtype, device="meta", **splits)


def padded_rank(R: int, dtype: torch.dtype) -> int:
    """The next rank whose rows have a length that grouped_mm takes."""
    step = ALIGNMENT // torch.empty(0, dtype=dtype).element_size()
    return -(-R // step) * step


def distinct(tokens: torch.Tensor, N: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of a group's rows, each once, and the place of each row's."""
    met = torch.zeros(N, dtype=torch.bool)
    met[tokens] = True
    return met.nonzero().squeeze(1), (met.cumsum(0) - 1)[tokens]


class _Padded:
    """All experts of a type in one ``grouped_mm``, for which the factors get zeros at their end.

    A row of zeros under M leaves a latent row the identity's part, which meets zeros in A.
    """

    def __init__(
        self, shape: Shape, R: int, stacks: dict[str, tuple[torch.Tensor, torch.Tensor, Any]]
    ) -> None:
        self.shape, self.R = shape, R
        self.wide = padded_rank(R, stacks["gate_proj"][0].dtype)
        if self.wide > shape.D:
            raise ValueError(f"rank {R} leaves no room for zeros at D={shape.D}")
        self.held: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        more = self.wide - R
        for kind, (A, M, perm) in stacks.items():
            down = kind == "down_proj"
            self.held[kind] = (
                functional.pad(A, (0, 0, 0, more) if down else (0, more)).requires_grad_(),
                functional.pad(M, (0, 0, 0, more)).requires_grad_(),
                torch.argsort(perm, 1) if down else perm,
            )
        self.leaves = tuple(t for A, M, _ in self.held.values() for t in (A, M))

    def __call__(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        E, k, K, R, wide = self.shape.E, self.shape.k, index.shape[1], self.R, self.wide
        flat = index.reshape(-1)
        rows = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=E)
        ends = counts.cumsum(0).to(torch.int32)
        tokens = (rows // K).split(counts.view(-1, k).sum(1).tolist())
        met = [distinct(part, len(x)) for part in tokens]
        inputs = [x.index_select(0, ids) for ids, _ in met]

        def project(kind: str) -> torch.Tensor:
            A, M, perm = self.held[kind]
            latents = []
            for g, ((ids, place), given) in enumerate(zip(met, inputs, strict=True)):
                if not len(ids):
                    continue
                placed = given.index_select(1, perm[g])
                z = torch.addmm(placed[:, :wide], placed[:, R:], M[g].t())
                latents.append(z.index_select(0, place))
            return functional.grouped_mm(torch.cat(latents), A.transpose(1, 2), offs=ends)

        hidden = functional.silu(project("gate_proj")) * project("up_proj")
        A, M, inverse = self.held["down_proj"]
        u = functional.grouped_mm(hidden, A.transpose(1, 2), offs=ends)
        u = (u * weights.reshape(-1, 1).index_select(0, rows)).float()
        y = x.new_zeros(x.shape, dtype=torch.float32)
        parts = u.split([len(part) for part in tokens])
        for g, ((ids, place), part) in enumerate(zip(met, parts, strict=True)):
            if not len(ids):
                continue
            total = part.new_zeros((len(ids), wide)).index_add_(0, place, part).to(x.dtype)
            lifted = torch.cat([total[:, :R], total @ M[g]], 1).index_select(1, inverse[g])
            y = y.index_add_(0, ids, lifted.float())
        return y.to(x.dtype)

    def named(self, grads: tuple[torch.Tensor, ...]) -> Named:
        found, k, pairs = {}, self.shape.k, iter(grads)
        for kind, A, M in zip(KINDS, pairs, pairs, strict=True):
            A = A[:, : self.R] if kind == "down_proj" else A[:, :, : self.R]
            for g in range(len(M)):
                found[f"{kind}.{g}.private"] = A[g * k : (g + 1) * k]
                found[f"{kind}.{g}.shared"] = M[g, : self.R]
        return found


@cache
def compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """One compilation for all layers of a type: the sizes stay open."""
    return torch.compile(function, dynamic=True)


class _Compiled:
    """Each (token, expert) pair on its own, the matrices read where they lie: for few tokens.

    torch.compile turns a product with gathered matrices into a loop that gathers nothing.
    """

    def __init__(self, shape: Shape, stacks: dict[str, Any]) -> None:
        self._k = shape.k
        self._factors = [t for A, M, _ in stacks.values() for t in (A, M)]
        perms = [perm.long() for _, _, perm in stacks.values()]
        self._gate, self._up, self._inverse = perms[0], perms[1], torch.argsort(perms[2], 1)

    def __call__(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        expert = index.reshape(-1)
        group = expert // self._k
        rows = x.repeat_interleave(index.shape[1], 0)
        placed = rows.gather(1, self._gate[group]), rows.gather(1, self._up[group])
        A_gate, M_gate, A_up, M_up, A_down, M_down = self._factors
        u = compiled(_pairs_in)(
            *placed, group, expert, weights.reshape(-1), A_gate, M_gate, A_up, M_up, A_down
        )
        lifted = compiled(_pairs_out)(u, group, M_down).gather(1, self._inverse[group])
        return lifted.view(*index.shape, -1).sum(1)


def _pairs_in(
    x_gate: torch.Tensor,
    x_up: torch.Tensor,
    group: torch.Tensor,
    expert: torch.Tensor,
    weights: torch.Tensor,
    A_gate: torch.Tensor,
    M_gate: torch.Tensor,
    A_up: torch.Tensor,
    M_up: torch.Tensor,
    A_down: torch.Tensor,
) -> torch.Tensor:
    """(pairs, R): weighted outputs in latent space."""
    R = M_gate.shape[1]
    z_gate = x_gate[:, :R] + (M_gate[group] * x_gate[:, None, R:]).sum(-1)
    z_up = x_up[:, :R] + (M_up[group] * x_up[:, None, R:]).sum(-1)
    gate = (A_gate[expert] * z_gate[:, None, :]).sum(-1)
    up = (A_up[expert] * z_up[:, None, :]).sum(-1)
    hidden = functional.silu(gate) * up * weights[:, None]
    return (A_down[expert] * hidden[:, None, :]).sum(-1)


def _pairs_out(u: torch.Tensor, group: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
    """(pairs, D): lifted, in the order of the pivots."""
    return torch.cat([u, torch.bmm(u[:, None, :], M[group])[:, 0]], 1)
