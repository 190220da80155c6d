"""What a layer of latent experts computes, in plain torch: any device, any floating type.

Rows are (token, expert) pairs in the order of their experts. Each group projects each of its
tokens once, and for down sums its experts' latent outputs before one lift.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from molae import ops
from molae.errors import ArgumentError
from molae.hf.activation import gated

if TYPE_CHECKING:
    from molae.hf.experts import Factors, LatentExperts

__all__ = ["forward_torch", "split_slots", "weighted_rows"]

#: What `torch.nn.functional.grouped_mm` takes, by device. On a GPU it also saves a launch an
#: expert; on a CPU it was 5 to 20 % faster than a loop.
GROUPED = {"cpu": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.bfloat16,)}
#: Bytes that its strides must be multiples of. Ranks are often odd: then it is the loop.
ALIGNMENT = 16
# Before 2.11 the CPU's wanted aligned addresses too, which mapped weights do not have.
_HAS_GROUPED = hasattr(functional, "grouped_mm") and torch.__version__ >= "2.11"


# Sizes depend on the routing, so nothing is gained by tracing it: torch.compile calls it as it is.
@torch.compiler.disable
def forward_torch(
    module: LatentExperts,
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    factors: dict[str, tuple[Factors, ...]],
) -> torch.Tensor:
    """The forward pass of `LatentExperts`; autograd gives the backward pass.

    Parameters
    ----------
    module : LatentExperts
    x : (T, D) tensor
    index : (T, K) tensor of integers
        Expert numbers; E and above for "not here".
    weights : (T, K) tensor
    factors : dict of tuples of Factors
        What ``module.factors()`` gave.

    Returns
    -------
    (T, D) tensor of the type of `x`

    Notes
    -----
    Operations of each matrix type: 2·R·D (2·R·(D − R) in gauge form) for each group and each
    token that meets it, and 2·F·R for each row.
    """
    F, theta = module.intermediate_dim, None
    if module.vectors is not None:
        index, theta = _compress(index, weights, *module.vectors, module.num_experts)
    routing = _Routing(index, module.num_experts)
    biases = module.biases
    if theta is None:
        gate, up = _inputs(x, routing, factors["gate_proj"], factors["up_proj"], F)
        gate, up = _biased(routing, factors["gate_proj"], gate, up, biases)
        hidden = gated(module.act_fn, gate, up)
    else:
        D = x.shape[1]
        first, middle, last = theta.split([D, F, D], 1)
        (gate,) = _project(x * first, routing, [factors["gate_proj"]], F)
        (up,) = _project(x * last, routing, [factors["up_proj"]], F)
        order = _order(factors["gate_proj"])
        up = routing.reorder(up, _order(factors["up_proj"]), order)
        gate, up = _biased(routing, factors["gate_proj"], gate, up, biases)
        tokens = routing.rows(order)[0] // routing.K
        hidden = gated(module.act_fn, gate, up) * middle.index_select(0, tokens)
    hidden = routing.reorder(hidden, _order(factors["gate_proj"]), _order(factors["down_proj"]))
    y = _outputs(x, hidden, weights, routing, factors["down_proj"])
    if biases is not None:
        y = y + weighted_rows(biases[2], index, weights, module.num_experts)
    return y.to(x.dtype)


def weighted_rows(
    rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, E: int
) -> torch.Tensor:
    """(T, D): of each token the rows (E, D) of its experts, weighted and summed."""
    here = index < E
    scale = torch.where(here, weights, 0).to(rows.dtype)
    chosen = index.clamp(max=E - 1)
    return functional.embedding_bag(chosen, rows, per_sample_weights=scale, mode="sum")


def _biased(
    routing: _Routing,
    factors: Sequence[Factors],
    gate: torch.Tensor,
    up: torch.Tensor,
    biases: tuple[torch.Tensor, ...] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up of rows in the order of gate's experts, with the bias of each row's expert."""
    if biases is None:
        return gate, up
    experts = routing.flat[routing.rows(_order(factors))[0]]
    return gate + biases[0].index_select(0, experts), up + biases[1].index_select(0, experts)


def split_slots(
    index: torch.Tensor, weights: torch.Tensor, n: int, E: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `molae.ops.split_slots`, of tensors on any device."""
    index, wide = index.clamp(max=E), weights.detach()
    if wide.device.type == "cpu":
        wide = wide if wide.dtype == torch.float64 else wide.to(torch.float32)
        main, aux = ops.split_slots(index.numpy(), wide.numpy(), E, n)
        return torch.from_numpy(main), torch.from_numpy(aux)
    last = _last_slots(index, wide, n)
    kept = torch.full_like(index, E).scatter(1, last, index.gather(1, last))
    return index.scatter(1, last, E), kept


def _last_slots(index: torch.Tensor, weights: torch.Tensor, n: int) -> torch.Tensor:
    """(T, n): each token's slots of least weight; of equal ones the largest numbers."""
    K = index.shape[1]
    if n >= K:
        raise ArgumentError(f"num_compressed: expected 0 to K - 1 = {K - 1}, got {n}")
    by_index = torch.argsort(index, dim=1, stable=True)
    by_weight = torch.argsort(weights.gather(1, by_index), dim=1, descending=True, stable=True)
    return by_index.gather(1, by_weight)[:, K - n :]


def _compress(
    index: torch.Tensor, weights: torch.Tensor, vectors: torch.Tensor, n: int, E: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is left to run, and each token's vectors; see `molae.ops.compressed_experts_forward`."""
    index = index.clamp(max=E)
    aux = _last_slots(index, weights, n)
    chosen = index.gather(1, aux)
    here = chosen < E
    shares = torch.where(here, weights.gather(1, aux), 0)
    total, met = shares.sum(1, keepdim=True), here.sum(1, keepdim=True)
    even = here.to(shares.dtype) / met.clamp(min=1)
    shares = torch.where(total != 0, shares / torch.where(total != 0, total, 1), even)
    rows = vectors.index_select(0, chosen.clamp(max=E - 1).reshape(-1)).unflatten(0, chosen.shape)
    theta = (shares.unsqueeze(2) * rows).sum(1)
    return index.scatter(1, aux, E), torch.where(met > 0, theta, 1).to(vectors.dtype)


class _Routing:
    """Rows of the routed pairs, in any order of the experts."""

    def __init__(self, index: torch.Tensor, E: int) -> None:
        self.flat, self.E = index.reshape(-1), E
        self.K = index.shape[1]
        self.T = index.shape[0]
        self._rows: dict[tuple[int, ...], tuple[torch.Tensor, list[int]]] = {}

    def rows(self, order: tuple[int, ...]) -> tuple[torch.Tensor, list[int]]:
        """Flat positions of the pairs by the order of their experts, and how many each has."""
        if order not in self._rows:
            key = self.flat
            if order != self._natural:
                place = torch.full((self.E + 1,), self.E, device=key.device)
                place[torch.tensor(order, device=key.device)] = torch.arange(
                    self.E, device=key.device
                )
                key = place[key.clamp(max=self.E)]
            counts = torch.bincount(key, minlength=self.E)[: self.E].tolist()
            # Stable, so that a token's rows have the same order however it is batched.
            rows = torch.argsort(key, stable=True)[: sum(counts)]
            self._rows[order] = rows, counts
        return self._rows[order]

    def reorder(
        self, values: torch.Tensor, old: tuple[int, ...], new: tuple[int, ...]
    ) -> torch.Tensor:
        """Rows in the order `old` of the experts, put into the order `new`."""
        if old == new:
            return values
        before, after = self.rows(old)[0], self.rows(new)[0]
        place = torch.empty_like(self.flat)
        place[before] = torch.arange(len(before), device=before.device, dtype=place.dtype)
        return values.index_select(0, place[after])

    @cached_property
    def _natural(self) -> tuple[int, ...]:
        return tuple(range(self.E))

    def groups(self, factors: Sequence[Factors]) -> list[_Rows]:
        """The rows of each group, in the order that `_order` gives."""
        rows, counts = self.rows(_order(factors))
        tokens = rows // self.K
        found, row, expert = [], 0, 0
        for group in factors:
            own = counts[expert : expert + len(group.experts)]
            found.append(_Rows(row, row + sum(own), own, tokens[row : row + sum(own)], self))
            row, expert = row + sum(own), expert + len(group.experts)
        return found


class _Rows:
    """The rows of one group: a slice of all, how many each expert has, and their tokens."""

    def __init__(
        self, start: int, stop: int, counts: list[int], tokens: torch.Tensor, routing: _Routing
    ) -> None:
        self.start, self.stop, self.counts, self.tokens = start, stop, counts, tokens
        self._routing = routing

    @property
    def idle(self) -> bool:
        """Whether it can be left out. In training it runs: its factors get a gradient of 0."""
        return self.start == self.stop and not torch.is_grad_enabled()

    @cached_property
    def distinct(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens, each once, and for each row the place of its token among them.

        None where no token can come twice.
        """
        if self._routing.K == 1 or len(self.counts) == 1:
            return self.tokens, None
        met = torch.zeros(self._routing.T, dtype=torch.bool, device=self.tokens.device)
        met[self.tokens] = True
        place = met.cumsum(0) - 1
        return met.nonzero().squeeze(1), place[self.tokens]


def _order(factors: Sequence[Factors]) -> tuple[int, ...]:
    return tuple(expert for group in factors for expert in group.experts)


def _members(factors: Sequence[Factors]) -> list[tuple[int, ...]]:
    return [group.experts for group in factors]


def _inputs(
    x: torch.Tensor, routing: _Routing, gate: Sequence[Factors], up: Sequence[Factors], F: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, F) of gate and of up, both in gate's order."""
    if _members(gate) == _members(up):  # they share the gathered tokens
        first, second = _project(x, routing, [gate, up], F)
        return first, second
    (first,), (second,) = _project(x, routing, [gate], F), _project(x, routing, [up], F)
    return first, routing.reorder(second, _order(up), _order(gate))


def _project(
    x: torch.Tensor, routing: _Routing, types: Sequence[Sequence[Factors]], F: int
) -> list[torch.Tensor]:
    """(rows, F) for each of several types with the same groups."""
    outputs: list[list[torch.Tensor]] = [[] for _ in types]
    for rows, *groups in zip(routing.groups(types[0]), *types, strict=True):
        if rows.idle:
            continue
        sources = _Sources(x, rows)
        for group, output in zip(groups, outputs, strict=True):
            output.append(_project_group(sources, rows, group, F))
    return [torch.cat(parts) if parts else x.new_zeros((0, F)) for parts in outputs]


class _Sources:
    """The inputs of a group's rows, gathered when they are first wanted."""

    def __init__(self, x: torch.Tensor, rows: _Rows) -> None:
        self.x, self._rows = x, rows

    @cached_property
    def of_rows(self) -> torch.Tensor:
        return self.x.index_select(0, self._rows.tokens)

    @cached_property
    def of_tokens(self) -> torch.Tensor:
        return self.x.index_select(0, self._rows.distinct[0])


def _project_group(sources: _Sources, rows: _Rows, group: Factors, F: int) -> torch.Tensor:
    if group.dense is not None:
        return _by_expert(sources.of_rows, group.dense, rows.counts)
    if group.shared is None or group.private is None:  # rank 0
        return sources.x.new_zeros((rows.stop - rows.start, F))
    z = _reduce(sources.of_tokens, group.shared, group.perm)
    inverse = rows.distinct[1]
    if inverse is not None:
        z = z.index_select(0, inverse)
    return _by_expert(z, group.private, rows.counts)


def _outputs(
    x: torch.Tensor,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    routing: _Routing,
    down: Sequence[Factors],
) -> torch.Tensor:
    """(T, D): the down projections of (rows, F), weighted and summed, in float32 at least."""
    chosen = weights.reshape(-1, 1).index_select(0, routing.rows(_order(down))[0])
    y = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    for rows, group in zip(routing.groups(down), down, strict=True):
        if rows.idle or group.rank == 0:
            continue
        some, scale = hidden[rows.start : rows.stop], chosen[rows.start : rows.stop]
        if group.dense is not None:
            tokens, values = rows.tokens, scale * _by_expert(some, group.dense, rows.counts)
        else:
            assert group.shared is not None
            assert group.private is not None
            tokens, inverse = rows.distinct
            latent = _by_expert(some, group.private, rows.counts)
            # Summed before the lift, so that a token is lifted once a group.
            total = scale * latent
            if inverse is not None:
                wide = total.to(y.dtype)
                total = wide.new_zeros((len(tokens), wide.shape[1])).index_add_(0, inverse, wide)
            values = _lift(total.to(latent.dtype), group.shared, group.perm)
        y = y.index_add_(0, tokens, values.to(y.dtype))
    return y


def _reduce(x: torch.Tensor, shared: torch.Tensor, perm: torch.Tensor | None) -> torch.Tensor:
    """(n, R): B x."""
    if perm is None:
        return functional.linear(x, shared)
    R = shared.shape[0]
    placed = x.index_select(1, perm)
    return torch.addmm(placed[:, :R], placed[:, R:], shared.t())


def _lift(u: torch.Tensor, shared: torch.Tensor, perm: torch.Tensor | None) -> torch.Tensor:
    """(n, D): Bᵀ u."""
    lifted = u @ shared
    if perm is None:
        return lifted
    inverse = torch.empty_like(perm)
    inverse[perm.long()] = torch.arange(len(perm), dtype=perm.dtype, device=perm.device)
    return torch.cat([u, lifted], 1).index_select(1, inverse)


def _by_expert(rows: torch.Tensor, matrices: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """(n, out): each expert's rows (n, in) times its own of the `matrices` (k, out, in)."""
    if _grouped_takes(rows, matrices):
        ends = torch.tensor(counts, device=rows.device).cumsum(0).to(torch.int32)
        return functional.grouped_mm(rows, matrices.transpose(1, 2), offs=ends)
    # unbind, since its gradient is one stack; a slice's would be a stack an expert.
    pairs = list(zip(rows.split(list(counts)), matrices.unbind(0), strict=True))
    some = [(part, matrix) for part, matrix in pairs if len(part)] or pairs[:1]
    return torch.cat([functional.linear(part, matrix) for part, matrix in some])


def _grouped_takes(rows: torch.Tensor, matrices: torch.Tensor) -> bool:
    if not _HAS_GROUPED or not len(rows) or rows.dtype != matrices.dtype:
        return False
    device = rows.device.type
    if rows.dtype not in GROUPED.get(device, ()) or torch.is_autocast_enabled(device):
        return False
    if device == "cuda" and torch.cuda.get_device_capability(rows.device) < (8, 0):
        return False
    return (
        all(
            tensor.stride(-1) == 1
            and all(step * tensor.element_size() % ALIGNMENT == 0 for step in tensor.stride()[:-1])
            for tensor in (rows, matrices)
        )
        and matrices.shape[1] * matrices.element_size() % ALIGNMENT == 0
    )
