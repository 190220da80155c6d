"""Random layers of experts for tests of molae.ops, and what they are as dense float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from ref import ops as ref

from molae import _core
from molae.ops import Projection

ROLES = ("gate", "up", "down")

#: Whether layers of bfloat16 multiply in bfloat16: the table in use has a native product.
NARROW = _core.gemm_bf16_native(_core.build_info()["isa"])


def partition(rng, E, G):
    """E experts in G groups of unequal size, in no order."""
    order = rng.permutation(E)
    cuts = np.sort(rng.choice(np.arange(1, E), min(G, E) - 1, replace=False)) if E > 1 else []
    return [part.tolist() for part in np.split(order, cuts)]


def projection(rng, role, E, D, F, form, ranks, G, dtype):
    """A random projection; ranks: one a group, None dense, cycled."""
    groups = partition(rng, E, G)
    picked = [ranks[g % len(ranks)] for g in range(len(groups))]
    private: list[Any] = []
    shared: list[Any] = []
    perm: list[Any] = []
    for group, rank in zip(groups, picked, strict=True):
        k, R = len(group), D if rank is None else rank
        shape = (k, R, F) if role == "down" else (k, F, R)
        scale = 1 / np.sqrt(F if role == "down" else D)
        private.append((rng.standard_normal(shape) * scale).astype(dtype))
        width = D - R if form == "gauge" else D
        latent = rank is not None
        shared.append(rng.standard_normal((R, width)).astype(dtype) if latent else None)
        perm.append(rng.permutation(D).astype(np.int32) if latent and form == "gauge" else None)
    return Projection(groups, picked, private, shared, perm, form=form)


def written_out(p, role, D, F, absolute=False):
    """Dense float64 (E, F, D) or (E, D, F); with absolute: of the factors' absolute values."""
    down = role == "down"
    W = np.zeros((p.num_experts, D, F) if down else (p.num_experts, F, D))
    for g, (group, rank) in enumerate(zip(p.groups, p.ranks, strict=True)):
        if rank == 0:
            continue
        A = p.private[g].astype(np.float64)
        B = None if rank is None else ref.basis(p.shared[g].astype(np.float64), p.perm[g])
        if absolute:
            A, B = np.abs(A), None if B is None else np.abs(B)
        for a, e in zip(A, group, strict=True):
            W[e] = a if B is None else ref.product(a, B, down)
    return W


@dataclass
class Layer:
    """Arguments of a call in the types of the test, and the dense float64 twin."""

    x: np.ndarray
    index: np.ndarray
    weights: np.ndarray
    gate: Any
    up: Any
    down: Any
    biases: dict[str, Any]
    act: dict[str, Any]

    @property
    def args(self):
        return self.x, self.index, self.weights, self.gate, self.up, self.down

    @property
    def options(self):
        return {**self.biases, **self.act}

    def dense(self, role, absolute=False):
        W = getattr(self, role)
        if isinstance(W, np.ndarray):
            return np.abs(W.astype(np.float64)) if absolute else W.astype(np.float64)
        D = self.x.shape[1]
        return written_out(W, role, D, self.F, absolute)

    @property
    def F(self):
        for role, axis in (("gate", 1), ("up", 1), ("down", 2)):
            W = getattr(self, role)
            for a in [W] if isinstance(W, np.ndarray) else W.private:
                if a is not None:
                    return a.shape[axis]
        return 1

    def reference_args(self):
        act = (self.act["activation"], self.act["alpha"], self.act["limit"])
        biases = [self.biases.get(f"{role}_bias") for role in ROLES]
        return (
            self.x.astype(np.float64),
            self.index,
            self.weights.astype(np.float64),
            *(self.dense(role) for role in ROLES),
            [None if b is None else b.astype(np.float64) for b in biases],
            act,
        )

    def sizes(self):
        """Slots that are somewhere, each with bounds of the terms in g, u, h and the output."""
        x = np.abs(self.x.astype(np.float64))
        W = {role: self.dense(role, absolute=True) for role in ROLES}
        b = {role: self.biases.get(f"{role}_bias") for role in ROLES}
        b = {k: None if v is None else np.abs(v.astype(np.float64)) for k, v in b.items()}
        for t, k in np.ndindex(*self.index.shape):
            e = self.index[t, k]
            if e == len(W["gate"]):
                continue
            g, u = W["gate"][e] @ x[t], W["up"][e] @ x[t]
            g = g if b["gate"] is None else g + b["gate"][e]
            u = u if b["up"] is None else u + b["up"][e]
            h = 2 * (g + g * g) * (u + 1)  # any activation
            out = W["down"][e] @ h
            yield t, k, e, g, u, h, out if b["down"] is None else out + b["down"][e]

    def roundings(self):
        """Relative error that rounding the products' inputs to bfloat16 may make on the way of a
        number, half a unit each: of z (for gate and up), h and u, and backward of dz, dgate, dup,
        with slopes of activations up to 1.2. float32 arithmetic has none of it."""
        types = {getattr(self, role).dtype for role in ROLES}
        return 16 * 2.0**-9 * (NARROW and {self.x.dtype, *types} == {np.dtype(ml_dtypes.bfloat16)})

    def bound(self):
        """Of each y: the sum of the absolute values of all terms."""
        w, y = np.abs(self.weights.astype(np.float64)), np.zeros(self.x.shape)
        for t, k, _, _, _, _, out in self.sizes():
            y[t] += w[t, k] * out
        return y

    def bound_backward(self, dy):
        """The same of each gradient of the dense layer, by name as in ref.backward."""
        x, dy = np.abs(self.x.astype(np.float64)), np.abs(dy.astype(np.float64))
        w = np.abs(self.weights.astype(np.float64))
        W = {role: self.dense(role, absolute=True) for role in ROLES}
        d = {"x": np.zeros(x.shape), "top_k_weights": np.zeros(w.shape)}
        for role in ROLES:
            d[role], d[f"{role}_bias"] = np.zeros(W[role].shape), np.zeros(W[role].shape[:2])
        for t, k, e, g, u, h, out in self.sizes():
            dh = w[t, k] * (W["down"][e].T @ dy[t])
            dg, du = dh * 4 * (1 + g) ** 2 * (u + 1), dh * 4 * (g + g * g)
            d["top_k_weights"][t, k] = dy[t] @ out
            d["down"][e] += w[t, k] * np.outer(dy[t], h)
            d["down_bias"][e] += w[t, k] * dy[t]
            d["gate"][e] += np.outer(dg, x[t])
            d["up"][e] += np.outer(du, x[t])
            d["gate_bias"][e] += dg
            d["up_bias"][e] += du
            d["x"][t] += W["gate"][e].T @ dg + W["up"][e].T @ du
        return d


def layer(
    seed,
    N,
    K,
    E,
    D,
    F,
    *,
    dtype=np.float64,
    io=None,
    form="gauge",
    ranks=(None,),
    groups=(1, 1, 1),
    bias=False,
    activation="silu",
    alpha=1.702,
    limit=7.0,
    sentinels=0.1,
    index=None,
):
    """A random layer. dtype: of the weights; io: of x."""
    rng = np.random.default_rng(seed)
    io = dtype if io is None else io
    work = np.float64 if io == np.float64 else np.float32
    if index is None:
        index = rng.integers(0, E, (N, K))
        index[rng.random((N, K)) < sentinels] = E
    made = {
        role: projection(rng, role, E, D, F, form, ranks, G, dtype)
        for role, G in zip(ROLES, groups, strict=True)
    }
    widths = {"gate": F, "up": F, "down": D}
    return Layer(
        x=rng.standard_normal((N, D)).astype(io),
        index=index,
        weights=rng.random((N, K)).astype(work),
        biases={
            f"{role}_bias": rng.standard_normal((E, widths[role])).astype(dtype) if bias else None
            for role in ROLES
        },
        act={"activation": activation, "alpha": alpha, "limit": limit},
        **made,
    )
