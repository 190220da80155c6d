"""Reference of compressed experts: a token at a time, in float64, from the paper's formula.

Nothing of molae. Embeddings are three arrays e1 (E, D), e2 (E, F), e3 (E, D).
"""

import numpy as np

from . import ops


def split(weights, index, n):
    """Slots of one token that run, and those that do not: sorted by weight, ties by expert."""
    order = sorted(range(len(weights)), key=lambda k: (-weights[k], index[k], k))
    return order[: len(order) - n], order[len(order) - n :]


def theta(weights, index, n, e, E):
    """The token's three vectors."""
    _, aux = split(weights, index, n)
    aux = [k for k in aux if index[k] < E]
    if not aux:
        return tuple(np.ones(part.shape[1]) for part in e)
    g = np.array([weights[k] for k in aux])
    share = g / g.sum() if g.sum() != 0 else np.full(len(g), 1 / len(g))
    return tuple(sum(s * part[index[k]] for s, k in zip(share, aux, strict=True)) for part in e)


def forward(x, index, weights, gate, up, down, biases, act, e, n):
    y, E = np.zeros((len(x), down.shape[1])), len(gate)
    bias = [np.zeros(W.shape[:2]) if b is None else b
            for b, W in zip(biases, (gate, up, down), strict=True)]  # fmt: skip
    for t in range(len(x)):
        e1, e2, e3 = theta(weights[t], index[t], n, e, E)
        for k in split(weights[t], index[t], n)[0]:
            i = index[t, k]
            if i == E:
                continue
            g = gate[i] @ (x[t] * e1) + bias[0][i]
            u = up[i] @ (x[t] * e3) + bias[1][i]
            h = ops.activate(act[0], g, u, *act[1:]) * e2
            y[t] += weights[t, k] * (down[i] @ h + bias[2][i])
    return y
