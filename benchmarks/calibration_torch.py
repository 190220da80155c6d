"""What `molae.fit.fit_layer` does, written for torch, in plain form: the other contestant.

Passes over the tokens in float32 with weights widened once, factors and solves in float64.
Factors stay in float32: they are not stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn import functional

from molae.fit.layer import FLOOR, REFITS
from molae.fit.refit_metrics import TINY
from molae.fit.refitting import HOLD
from molae.fit.weighted import RIDGE, SHRINKAGE

__all__ = ["Factors", "Fit", "fit_layer"]

Tensor = torch.Tensor

#: Tokens that are worked on at once: more make longer products, fewer stay in cache.
CHUNK = 4096

#: Ranks are filled up with zeros to a multiple of this: products of odd widths take up to half as
#: long again.
WIDTHS = 16


@dataclass(frozen=True)
class Factors:
    """Of one matrix type: ``W_e ≈ A_e B_g``, for down ``W_e ≈ B_gᵀ A_e``.

    Attributes
    ----------
    groups : sequence of sequences of int
    shared : list of (R, D) Tensor
        B of each group, its last rows 0.
    private : list of (F, R) Tensor
        A of each expert; for down (R, F).
    """

    groups: Sequence[Sequence[int]]
    shared: list[Tensor]
    private: list[Tensor]

    def of(self, private: list[Tensor]) -> Factors:
        return Factors(self.groups, self.shared, private)

    def basis(self, e: int) -> Tensor:
        return next(B for group, B in zip(self.groups, self.shared, strict=True) if e in group)


class Layer(NamedTuple):
    gate: Factors
    up: Factors
    down: Factors


@dataclass(frozen=True)
class Fit:
    """The fitted layer, and its errors before and after each refit, by type."""

    layer: Layer
    layer_error: dict[str, list[float]]


def fit_layer(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    answers: Tensor,
    W: dict[str, list[Tensor]],
    groups: dict[str, Sequence[Sequence[int]]],
    ranks: dict[str, Sequence[int]],
) -> Fit:
    """As `molae.fit.fit_layer`, of x and answers (N, D) in float32 and matrices of any type."""
    text = _Text(x, index, weights, answers, len(W["gate_proj"]))
    gate, up, down = (
        [w.float() for w in W[kind]] for kind in ("gate_proj", "up_proj", "down_proj")
    )
    moments = _moments(text, gate, up, down)
    found = {
        kind: _input_side(own, moments.x, moments.rows[kind], groups[kind], ranks[kind])
        for kind, own in (("gate_proj", gate), ("up_proj", up))
    }
    layer = Layer(
        found["gate_proj"],
        found["up_proj"],
        _output_side(down, moments.hidden, groups["down_proj"], ranks["down_proj"]),
    )
    rows = moments.rows["up_proj"]
    latent = [(B := layer.up.basis(e)) @ C @ B.T for e, C in enumerate(moments.x)]
    del moments
    errors: dict[str, list[float]] = {}
    for kind, steps in REFITS:
        problem: _Refit = (
            _Up(text, layer, rows, latent) if kind == "up_proj" else _Down(text, layer)
        )
        layer, before, after = problem.solve(steps)
        errors.setdefault(kind, [before]).append(after)
    return Fit(layer, errors)


# ------------------------------------------------------------------------- passes


@dataclass
class _Chunk:
    """Some tokens, and which of them go to each expert."""

    x: Tensor
    answers: Tensor
    token: list[Tensor]
    weight: list[Tensor]

    def met(self, group: Sequence[int]) -> tuple[Tensor, list[Tensor | slice]]:
        """The tokens of a group, each once, and the places of each expert's among them."""
        if len(group) == 1:  # all of them: nothing is copied
            return self.token[group[0]], [slice(None)]
        hit = torch.zeros(len(self.x), dtype=torch.bool)
        for e in group:
            hit[self.token[e]] = True
        place = hit.cumsum(0) - 1
        return hit.nonzero().squeeze(1), [place[self.token[e]] for e in group]


@dataclass(frozen=True)
class _Text:
    x: Tensor
    index: Tensor
    weights: Tensor
    answers: Tensor
    E: int

    def chunks(self) -> Iterator[_Chunk]:
        K = self.index.shape[1]
        for at in range(0, len(self.x), CHUNK):
            some = slice(at, at + CHUNK)
            expert = self.index[some].reshape(-1)
            order = torch.argsort(expert, stable=True)
            counts = torch.bincount(expert, minlength=self.E + 1).tolist()
            token = torch.split(order // K, counts)[: self.E]
            weight = torch.split(self.weights[some].reshape(-1)[order], counts)[: self.E]
            yield _Chunk(self.x[some], self.answers[some], list(token), list(weight))


@dataclass
class _Moments:
    x: Tensor
    hidden: Tensor
    rows: dict[str, Tensor]


def _add_outer(to: Tensor, rows: Tensor) -> None:
    to.addmm_(rows.T, rows)


def _slope(gate: Tensor) -> Tensor:
    """Derivative of silu."""
    s = torch.sigmoid(gate)
    return torch.addcmul(s, gate * s, 1 - s)


def _moments(text: _Text, gate: list[Tensor], up: list[Tensor], down: list[Tensor]) -> _Moments:
    E, D, F = len(gate), text.x.shape[1], len(gate[0])
    x, hidden, by_gate, by_up = (torch.zeros(E, n, n) for n in (D, F, F, F))
    mass = torch.zeros(E)
    for chunk in text.chunks():
        for e, (token, g) in enumerate(zip(chunk.token, chunk.weight, strict=True)):
            if not len(token):
                continue
            rows, g = chunk.x[token], g[:, None]
            a, b = rows @ gate[e].T, rows @ up[e].T
            acted = functional.silu(a).mul_(g)
            _add_outer(x[e], rows.mul_(g))
            _add_outer(by_up[e], acted)
            _add_outer(hidden[e], acted.mul_(b))
            _add_outer(by_gate[e], _slope(a).mul_(b).mul_(g))
            mass[e] += g.square().sum()
    for own in (x, hidden):
        diagonal = own.diagonal(dim1=1, dim2=2)
        diagonal += FLOOR * diagonal.sum(1).mean() / own.shape[1]
    for slopes in (by_gate, by_up):
        some = mass > 0
        usual = (slopes.diagonal(dim1=1, dim2=2).sum(1)[some] / mass[some]).mean() / F
        slopes /= torch.where(some, mass, 1.0)[:, None, None]
        slopes[~some] = usual
    for e, w in enumerate(down):
        outer = w.T @ w
        by_gate[e] *= outer
        by_up[e] *= outer
    return _Moments(x, hidden, {"gate_proj": by_gate, "up_proj": by_up})


# ----------------------------------------------------------------- weighted factors


@dataclass
class _Group:
    """Moments of a group in float64, shrunk towards the pooled ones."""

    moments: Sequence[Tensor]
    pooled: Tensor = field(init=False)
    traces: list[float] = field(init=False)

    def __post_init__(self) -> None:
        n = len(self.moments[0])
        self.traces = [float(m.diagonal().sum(dtype=torch.float64)) for m in self.moments]
        self.pooled = torch.zeros(n, n, dtype=torch.float64)
        for m in self.moments:
            self.pooled += m
        self.pooled.diagonal().add_(RIDGE * self.trace / n)

    @property
    def trace(self) -> float:
        return sum(self.traces)

    def borrowed(self, at: int) -> float:
        return SHRINKAGE * self.traces[at] / self.trace + RIDGE

    def shrunk(self, at: int) -> Tensor:
        n = len(self.pooled)
        C = self.moments[at].double()
        C.diagonal().add_(RIDGE * self.traces[at] / n)
        return C.add_(self.pooled, alpha=self.borrowed(at))


def _input_side(
    W: list[Tensor],
    moments: Tensor,
    rows: Tensor,
    groups: Sequence[Sequence[int]],
    ranks: Sequence[int],
) -> Factors:
    shared, private = [], [W[0]] * len(W)
    for group, R in zip(groups, ranks, strict=True):
        own = _Group([moments[e] for e in group])
        gram = torch.zeros_like(own.pooled)
        for at, e in enumerate(group):
            omega = own.traces[at] / own.trace + own.borrowed(at)
            gram.add_(W[e].T @ (rows[e] @ W[e]), alpha=omega)
        L = torch.linalg.cholesky(own.pooled)
        vectors = torch.linalg.eigh(L.T @ gram @ L)[1][:, -R:]
        B = torch.linalg.solve_triangular(L, vectors.T, upper=False, left=False)
        for at, e in enumerate(group):
            Q = B @ own.shrunk(at)
            S = torch.linalg.cholesky(Q @ B.T)
            G = W[e] @ Q.float().T
            private[e] = _filled(torch.cholesky_solve(G.double().T, S).float()).T.contiguous()
        shared.append(_filled(B.float()))
    return Factors(groups, shared, private)


def _output_side(
    W: list[Tensor], moments: Tensor, groups: Sequence[Sequence[int]], ranks: Sequence[int]
) -> Factors:
    shared, private = [], [W[0]] * len(W)
    for group, R in zip(groups, ranks, strict=True):
        own = _Group([moments[e] for e in group])
        Z = torch.cat(
            [torch.linalg.cholesky(own.shrunk(at)).T @ W[e].double().T
             for at, e in enumerate(group)]
        )  # fmt: skip
        values, vectors = torch.linalg.eigh(Z @ Z.T)
        B = _filled(((vectors[:, -R:] / values[-R:].sqrt()).T @ Z).float())
        shared.append(B)
        for e in group:
            private[e] = B @ W[e]
    return Factors(groups, shared, private)


def _filled(rows: Tensor) -> Tensor:
    return functional.pad(rows, (0, 0, 0, -len(rows) % WIDTHS)).contiguous()


# ------------------------------------------------------------------------- refits


class _Seen(NamedTuple):
    """Of each expert what the student makes of a chunk: weighted intermediate, slope by up, and
    what up reads; then its answers."""

    hidden: list[Tensor]
    slope: list[Tensor]
    latent: list[Tensor]
    y: Tensor


def _forward(chunk: _Chunk, layer: Layer) -> _Seen:
    slope, latent = _read(chunk, layer)
    hidden = _acted(layer, slope, latent)
    return _Seen(hidden, slope, latent, _answered(chunk, layer, hidden))


def _read(chunk: _Chunk, layer: Layer) -> tuple[list[Tensor], list[Tensor]]:
    slope, latent = ([chunk.x] * len(layer.up.private) for _ in range(2))
    for group, B_gate, B_up in zip(
        layer.up.groups, layer.gate.shared, layer.up.shared, strict=True
    ):
        ids, places = chunk.met(group)
        rows = chunk.x[ids]
        z_gate, z_up = rows @ B_gate.T, rows @ B_up.T
        for e, place in zip(group, places, strict=True):
            latent[e] = z_up[place]
            gate = z_gate[place] @ layer.gate.private[e].T
            slope[e] = functional.silu(gate, inplace=True).mul_(chunk.weight[e][:, None])
    return slope, latent


def _acted(layer: Layer, slope: list[Tensor], latent: list[Tensor]) -> list[Tensor]:
    return [(z @ A.T).mul_(s) for z, A, s in zip(latent, layer.up.private, slope, strict=True)]


def _answered(chunk: _Chunk, layer: Layer, hidden: list[Tensor]) -> Tensor:
    y = torch.zeros_like(chunk.x)
    for group, B in zip(layer.down.groups, layer.down.shared, strict=True):
        ids, places = chunk.met(group)
        parts = [hidden[e] @ layer.down.private[e].T for e in group]
        out = parts[0]
        if len(group) > 1:
            out = chunk.x.new_zeros(len(ids), len(B))
            for place, part in zip(places, parts, strict=True):
                out.index_add_(0, place, part)
        y.index_add_(0, ids, out @ B)
    return y


class _Refit:
    """Least squares in one type's private factors, by preconditioned conjugate gradients.

    A subclass says what differs between up and down. Factors are written (F, R) by `_upright`.
    """

    def __init__(
        self,
        text: _Text,
        layer: Layer,
        own: Factors,
        rows: Sequence[Tensor],
        latent: Sequence[Tensor],
    ) -> None:
        self._text, self._layer, self._own = text, layer, own
        #: Of each expert: what its factor is measured by on the side of F, and on the other.
        self._rows, self._latent = rows, latent

    def solve(self, steps: int) -> tuple[Layer, float, float]:
        """The layer refitted, and its error before and after."""
        gradient = [torch.zeros_like(a) for a in self._own.private]
        squared = target = 0.0
        kept: list[_Seen] = []
        for chunk in self._text.chunks():
            missing, seen = chunk.answers.clone(), _forward(chunk, self._layer)
            kept.append(self._same(seen))
            target += _squared(missing)
            squared += _squared(missing.sub_(seen.y))
            self._backward(chunk, missing, seen, gradient)
            self._start(chunk, seen)
        self._factor()
        change = [torch.zeros_like(g) for g in gradient]
        held = [torch.zeros_like(g) for g in gradient]
        direction = self._precondition(gradient)
        rz = _dot(gradient, direction)
        objective = squared
        for step in range(steps):
            normal = [torch.zeros_like(g) for g in gradient]
            length = 0.0
            layer = self._with(direction)
            for chunk, same in zip(self._text.chunks(), kept, strict=True):
                seen = self._again(chunk, layer, same)
                length += _squared(seen.y)
                if step + 1 < steps:  # nothing asks for the last gradient
                    self._backward(chunk, seen.y, seen, normal)
            holding = self._held(direction)
            alpha = rz / (length + _dot(direction, holding))
            for e, p in enumerate(direction):
                change[e].add_(p, alpha=alpha)
                held[e].add_(holding[e], alpha=alpha)
                gradient[e].sub_(normal[e].add_(holding[e]), alpha=alpha)
            objective -= alpha * rz
            if step + 1 < steps:
                z = self._precondition(gradient)
                before, rz = rz, _dot(gradient, z)
                for p, a in zip(direction, z, strict=True):
                    p.mul_(rz / before).add_(a)
        after = objective - _dot(change, held)
        found = [a.add_(own) for a, own in zip(change, self._own.private, strict=True)]
        return self._with(found), (squared / target) ** 0.5, (after / target) ** 0.5

    def _with(self, private: list[Tensor]) -> Layer:
        raise NotImplementedError

    def _backward(self, chunk: _Chunk, dy: Tensor, seen: _Seen, grads: list[Tensor]) -> None:
        raise NotImplementedError

    def _start(self, chunk: _Chunk, seen: _Seen) -> None:
        """What else is learnt of the student in the first pass."""

    def _same(self, seen: _Seen) -> _Seen:
        """What no step changes; the rest is let go."""
        raise NotImplementedError

    def _again(self, chunk: _Chunk, layer: Layer, same: _Seen) -> _Seen:
        """What a step's layer makes of it."""
        raise NotImplementedError

    @staticmethod
    def _upright(a: Tensor) -> Tensor:
        return a

    def _factor(self) -> None:
        """Metrics are factored once for all steps."""
        self._levels = [HOLD * float(m.trace()) / len(m) for m in self._rows]
        self._row_roots = [
            _root(m, level) for m, level in zip(self._rows, self._levels, strict=True)
        ]
        self._latent_roots = [_root(m, TINY * float(m.trace()) / len(m)) for m in self._latent]

    def _held(self, factors: list[Tensor]) -> list[Tensor]:
        """Gradient of half of what holds the factors."""
        return [
            self._upright(self._upright(a) @ m).mul_(level)
            for a, m, level in zip(factors, self._latent, self._levels, strict=True)
        ]

    def _precondition(self, gradient: list[Tensor]) -> list[Tensor]:
        found = []
        for g, row, latent in zip(gradient, self._row_roots, self._latent_roots, strict=True):
            if row is None:
                found.append(torch.zeros_like(g))  # no token has reached it
                continue
            a = torch.cholesky_solve(self._upright(g).double(), row)
            a = torch.cholesky_solve(a.T, latent).T
            found.append(self._upright(a).float().contiguous())
        return found


class _Up(_Refit):
    def __init__(
        self, text: _Text, layer: Layer, rows: Sequence[Tensor], latent: Sequence[Tensor]
    ) -> None:
        super().__init__(text, layer, layer.up, rows, latent)

    def _with(self, private: list[Tensor]) -> Layer:
        return self._layer._replace(up=self._own.of(private))

    def _same(self, seen: _Seen) -> _Seen:
        return seen._replace(hidden=[], y=seen.y.new_empty(0))

    def _again(self, chunk: _Chunk, layer: Layer, same: _Seen) -> _Seen:
        hidden = _acted(layer, same.slope, same.latent)
        return same._replace(hidden=hidden, y=_answered(chunk, layer, hidden))

    def _backward(self, chunk: _Chunk, dy: Tensor, seen: _Seen, grads: list[Tensor]) -> None:
        down = self._layer.down
        for group, B in zip(down.groups, down.shared, strict=True):
            ids, places = chunk.met(group)
            p = dy[ids] @ B.T
            for e, place in zip(group, places, strict=True):
                slope = (p[place] @ down.private[e]).mul_(seen.slope[e])
                grads[e].addmm_(slope.T, seen.latent[e])


class _Down(_Refit):
    def __init__(self, text: _Text, layer: Layer) -> None:
        grams = {
            e: gram
            for group, B in zip(layer.down.groups, layer.down.shared, strict=True)
            for gram in (B @ B.T,)
            for e in group
        }
        F = layer.down.private[0].shape[1]
        rows = torch.zeros(text.E, F, F)
        super().__init__(text, layer, layer.down, rows, [grams[e] for e in range(text.E)])

    def _with(self, private: list[Tensor]) -> Layer:
        return self._layer._replace(down=self._own.of(private))

    def _same(self, seen: _Seen) -> _Seen:
        return seen._replace(slope=[], latent=[], y=seen.y.new_empty(0))

    def _again(self, chunk: _Chunk, layer: Layer, same: _Seen) -> _Seen:
        return same._replace(y=_answered(chunk, layer, same.hidden))

    def _backward(self, chunk: _Chunk, dy: Tensor, seen: _Seen, grads: list[Tensor]) -> None:
        for group, B in zip(self._own.groups, self._own.shared, strict=True):
            ids, places = chunk.met(group)
            p = dy[ids] @ B.T
            for e, place in zip(group, places, strict=True):
                grads[e].addmm_(p[place].T, seen.hidden[e])

    def _start(self, chunk: _Chunk, seen: _Seen) -> None:
        for rows, h in zip(self._rows, seen.hidden, strict=True):
            _add_outer(rows, h)

    @staticmethod
    def _upright(a: Tensor) -> Tensor:
        return a.T


def _root(m: Tensor, ridge: float) -> Tensor | None:
    """Cholesky factor in float64; None of nothing."""
    if not ridge > 0:
        return None
    m = m.double()
    m.diagonal().add_(ridge)
    return torch.linalg.cholesky(m)


def _squared(a: Tensor) -> float:
    return float(a.square().sum(dtype=torch.float64))


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x * y).sum(dtype=torch.float64)) for x, y in zip(a, b, strict=True))
