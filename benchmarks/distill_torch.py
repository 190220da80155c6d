"""What `molae.fit.distill_layer` does, written for torch: the other contestant.

A layer in gauge form has several good programs in torch, and which is the fastest depends on its
size. All sort a batch's rows by expert once, and give the same gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from benchmarks.layer_forms import ALIGNMENT, distinct
from molae.fit.adamw import cosine
from molae.fit.descent import BATCH, WARMUP

__all__ = ["FORMS", "Batch", "Batched", "Grouped", "Looped", "Stack", "Trained", "distill"]

Tensor = torch.Tensor
Array = npt.NDArray[Any]


class Stack(NamedTuple):
    """One type of matrix in gauge form, all groups of k experts and of one rank.

    ``private`` (E, F, R), for down (E, R, F), ``shared`` M (G, R, D − R), ``perm`` (G, D): the
    shared factor of group g is ``[I | M]`` in the columns ``perm[g]``.
    """

    private: Tensor
    shared: Tensor
    perm: Tensor

    @property
    def k(self) -> int:
        return len(self.private) // len(self.shared)

    @property
    def rank(self) -> int:
        return self.shared.shape[1]


class Batch(NamedTuple):
    """Rows of some tokens, sorted by expert: whose they are, their routing weights (S, 1), and how
    many each expert has."""

    x: Tensor
    token: Tensor
    weight: Tensor
    counts: Tensor

    @classmethod
    def of(cls, x: Tensor, index: Tensor, weights: Tensor, E: int) -> Batch:
        flat = index.reshape(-1)
        order = torch.argsort(flat, stable=True)
        weight = weights.reshape(-1, 1).index_select(0, order)
        return cls(x, order // index.shape[1], weight, torch.bincount(flat, minlength=E))


class _Columns(torch.autograd.Function):
    """Columns of each matrix of a stack (G, R, D) in the order (G, D). The gradient is a gather as
    well: autograd's own, which adds, takes longer."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return matrix.gather(2, order.unsqueeze(1).expand_as(matrix))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,), (back,) = grads, ctx.saved_tensors
        return grad.gather(2, back.unsqueeze(1).expand_as(grad)), None, None


class _Order(torch.autograd.Function):
    """Columns of one matrix in another order; the same."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return matrix.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,), (back,) = grads, ctx.saved_tensors
        return grad.index_select(1, back), None, None


# ------------------------------------------------------------------------- the forms


class Looped:
    """Expert by expert, in gauge form: a group projects each of its tokens once.

    Each matrix is a leaf of its own, so that no gradient is put together from parts.
    """

    name = "a loop"

    def __init__(self, layer: Sequence[Stack]) -> None:
        self.num_experts = len(layer[0].private)
        self._k = [stack.k for stack in layer]
        self._perm = [list(stack.perm) for stack in layer]
        self._back = [list(torch.argsort(stack.perm, 1)) for stack in layer]
        self._private = [[_leaf(A) for A in stack.private] for stack in layer]
        self._shared = [[_leaf(M) for M in stack.shared] for stack in layer]

    @property
    def leaves(self) -> list[list[Tensor]]:
        """Of each type the private and the shared ones."""
        pairs = zip(self._private, self._shared, strict=True)
        return [own for pair in pairs for own in pair]

    def stacked(self) -> list[Tensor]:
        """The leaves as `Stack` has them."""
        return [torch.stack([leaf.detach() for leaf in own]) for own in self.leaves]

    def __call__(self, batch: Batch) -> Tensor:
        counts = batch.counts.tolist()
        hidden = functional.silu(self._inner(0, batch, counts)) * self._inner(1, batch, counts)
        hidden = hidden * batch.weight
        outs, ids, k = [], [], self._k[2]
        rows, tokens = hidden.split(counts), batch.token.split(_summed(counts, k))
        for g, M in enumerate(self._shared[2]):
            some = range(g * k, (g + 1) * k)
            u = torch.cat([rows[e] @ self._private[2][e].t() for e in some])
            met = tokens[g]
            if k > 1:
                met, place = distinct(met, len(batch.x))
                u = u.new_zeros((len(met), u.shape[1])).index_add(0, place, u)
            lifted = torch.cat([u, u @ M], 1)
            outs.append(_Order.apply(lifted, self._back[2][g], self._perm[2][g]))
            ids.append(met)
        y = torch.zeros_like(batch.x)
        return y.index_add(0, torch.cat(ids), torch.cat(outs))

    def _inner(self, kind: int, batch: Batch, counts: list[int]) -> Tensor:
        """(S, F): rows of gate or of up."""
        k, parts = self._k[kind], []
        for g, met in enumerate(batch.token.split(_summed(counts, k))):
            M, some = self._shared[kind][g], range(g * k, (g + 1) * k)
            ids, place = distinct(met, len(batch.x))
            placed = batch.x.index_select(0, ids).index_select(1, self._perm[kind][g])
            R = len(M)
            z = torch.addmm(placed[:, :R], placed[:, R:], M.t()).index_select(0, place)
            rows = z.split([counts[e] for e in some])
            parts += [own @ self._private[kind][e].t() for e, own in zip(some, rows, strict=True)]
        return torch.cat(parts)


class _Plain:
    """All experts of a type at once, with shared factors written out anew in each step.

    Ranks are filled up with rows of zeros, whose gradients are zeros too.
    """

    step = 1

    def __init__(self, layer: Sequence[Stack]) -> None:
        self.num_experts = len(layer[0].private)
        self._ranks = [stack.rank for stack in layer]
        self._perm = [stack.perm for stack in layer]
        self._back = [torch.argsort(stack.perm, 1) for stack in layer]
        self._k = [stack.k for stack in layer]
        self._private, self._shared, self._eye = [], [], []
        for at, stack in enumerate(layer):
            more = -stack.rank % self.step
            fill = (0, 0, 0, more) if at == 2 else (0, more)
            self._private.append(_leaf(functional.pad(stack.private, fill)))
            self._shared.append(_leaf(functional.pad(stack.shared, (0, 0, 0, more))))
            eye = torch.eye(stack.rank + more, stack.rank, dtype=stack.shared.dtype)
            self._eye.append(eye.expand(len(stack.shared), -1, -1))

    @property
    def leaves(self) -> list[list[Tensor]]:
        pairs = zip(self._private, self._shared, strict=True)
        return [[own] for pair in pairs for own in pair]

    def stacked(self) -> list[Tensor]:
        found = []
        for at, R in enumerate(self._ranks):
            A, M = self._private[at].detach(), self._shared[at].detach()
            found += [A[:, :R] if at == 2 else A[:, :, :R], M[:, :R]]
        return found

    def _bases(self, kind: int) -> Tensor:
        """(G, R, D)."""
        placed = torch.cat([self._eye[kind], self._shared[kind]], 2)
        found: Tensor = _Columns.apply(placed, self._back[kind], self._perm[kind])
        return found


class Grouped(_Plain):
    """By ``grouped_mm`` on rows in the order of experts."""

    name = "grouped_mm"
    step = ALIGNMENT // 4

    def __call__(self, batch: Batch) -> Tensor:
        ends = batch.counts.cumsum(0).to(torch.int32)
        x = batch.x.index_select(0, batch.token)
        gate, up = (self._inner(kind, x, ends) for kind in (0, 1))
        hidden = functional.silu(gate) * up * batch.weight
        u = functional.grouped_mm(hidden, self._private[2].transpose(1, 2), offs=ends)
        out = functional.grouped_mm(u, self._bases(2), offs=ends[self._k[2] - 1 :: self._k[2]])
        return torch.zeros_like(batch.x).index_add(0, batch.token, out)

    def _inner(self, kind: int, x: Tensor, ends: Tensor) -> Tensor:
        of_groups = ends[self._k[kind] - 1 :: self._k[kind]]
        z = functional.grouped_mm(x, self._bases(kind).transpose(1, 2), offs=of_groups)
        return functional.grouped_mm(z, self._private[kind].transpose(1, 2), offs=ends)


class Batched(_Plain):
    """By ``bmm``: each expert has as many rows as the one with the most, the others zeros."""

    name = "bmm"

    def __call__(self, batch: Batch) -> Tensor:
        N, D = batch.x.shape
        counts, E = batch.counts, len(batch.counts)
        most = int(counts.max())
        starts = counts.cumsum(0) - counts
        expert = torch.repeat_interleave(torch.arange(E), counts)
        place = expert * most + torch.arange(len(expert)) - starts[expert]
        token = torch.full((E * most,), N).scatter(0, place, batch.token)
        weight = batch.weight.new_zeros(E * most, 1).index_copy(0, place, batch.weight)
        x = functional.pad(batch.x, (0, 0, 0, 1)).index_select(0, token)
        gate, up = (self._inner(kind, x, E) for kind in (0, 1))
        hidden = functional.silu(gate) * up * weight.view(E, most, 1)
        u = hidden @ self._private[2].transpose(1, 2)
        B = self._bases(2)
        out = (u.reshape(len(B), -1, u.shape[2]) @ B).view(-1, D)
        return batch.x.new_zeros(N + 1, D).index_add(0, token, out)[:N]

    def _inner(self, kind: int, x: Tensor, E: int) -> Tensor:
        B = self._bases(kind)
        z = x.view(len(B), -1, x.shape[1]) @ B.transpose(1, 2)
        return z.view(E, -1, z.shape[2]) @ self._private[kind].transpose(1, 2)


FORMS = (Looped, Grouped, Batched)
Form = Looped | Grouped | Batched


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).requires_grad_()


def _summed(counts: list[int], k: int) -> list[int]:
    return [sum(counts[at : at + k]) for at in range(0, len(counts), k)]


# -------------------------------------------------------------------------- the loop


@dataclass(frozen=True, eq=False)
class Trained:
    """Factors after the last step, as in `Stack`, and when each step began; the end is last."""

    factors: list[Tensor]
    stamps: list[float]

    @property
    def steps(self) -> list[float]:
        """Seconds of each."""
        return [end - start for start, end in pairwise(self.stamps)]


def distill(
    form: Form,
    text: Mapping[str, Tensor],
    seen: Array,
    target: float,
    *,
    epochs: int,
    rate: float,
    seed: int,
) -> Trained:
    """Steps of AdamW, as `molae.fit.descent.descend` takes them.

    Parameters
    ----------
    form : Looped, Grouped or Batched
        Its leaves are trained in place.
    text : mapping of str to Tensor
        ``x`` and ``answers`` (N, D), ``index`` and ``weights`` (N, K).
    seen : (n,) ndarray of int
        Numbers of the tokens that are trained on.
    target : float
        What the loss is divided by.
    epochs, rate, seed
        As of `descend`. One rate serves all arrays of a type and role, which must begin with one
        root mean square.
    """
    rates = [rate * _rms(own) for own in form.stacked()]  # without what fills up ranks
    descent = torch.optim.AdamW(
        [{"params": own, "lr": r} for own, r in zip(form.leaves, rates, strict=True)],
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        fused=True,  # of its ways the fastest on a CPU
    )
    per_epoch = max(1, -(-len(seen) // BATCH))
    steps, rng = epochs * per_epoch, np.random.default_rng(seed)
    stamps = []
    for epoch in range(epochs):
        order = rng.permutation(seen)
        for i, some in enumerate(np.array_split(order, per_epoch)):
            stamps.append(perf_counter())
            share = cosine(epoch * per_epoch + i, steps, int(WARMUP * steps))
            for group, own in zip(descent.param_groups, rates, strict=True):
                group["lr"] = share * own
            tokens = torch.from_numpy(some)
            x, index, weights, aim = (
                text[name].index_select(0, tokens) for name in ("x", "index", "weights", "answers")
            )
            y = form(Batch.of(x, index, weights, form.num_experts))
            loss = functional.mse_loss(y, aim, reduction="sum") * (0.5 / target)
            descent.zero_grad()
            loss.backward()
            descent.step()
    stamps.append(perf_counter())
    return Trained(form.stacked(), stamps)


def _rms(tensor: Tensor) -> float:
    return math.sqrt(float(tensor.double().square().mean()))
