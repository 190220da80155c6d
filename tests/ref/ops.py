"""Reference of csrc/ops: layers of routed experts, row by row, in float64.

Nothing clever and nothing of molae. Weights are dense (E, F, D), (E, D, F); `product` and
`factor_gradients` go between them and factors. Letters as in molae.ops.
"""

import math

import numpy as np

_erfc = np.vectorize(math.erfc, otypes=[float])


def sigmoid(x):
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-np.asarray(x, dtype=np.float64)))


def normal_cdf(x):
    return 0.5 * _erfc(-x / math.sqrt(2))


def tanh_cdf(x):
    """(1 + tanh v) / 2 for the v of the tanh form; as a sigmoid it keeps its digits in the tail."""
    return sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def activate(kind, g, u, alpha=1.702, limit=7.0):
    """h of the gate's and up's outputs."""
    if kind == "silu":
        return g * sigmoid(g) * u
    if kind == "gelu":
        return g * normal_cdf(g) * u
    if kind == "gelu_tanh":
        return g * tanh_cdf(g) * u
    if kind == "relu":
        return np.maximum(g, 0) * u
    if kind == "relu2":
        return np.maximum(g, 0) ** 2 * u
    g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
    return (u + 1) * g * sigmoid(alpha * g)


def activate_gradient(kind, g, u, dh, alpha=1.702, limit=7.0):
    """dg, du."""
    if kind == "silu":
        s = sigmoid(g)
        return dh * u * (s + g * s * (1 - s)), dh * g * s
    if kind == "gelu":
        cdf = normal_cdf(g)
        pdf = np.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
        return dh * u * (cdf + g * pdf), dh * g * cdf
    if kind == "gelu_tanh":
        c = math.sqrt(2 / math.pi)
        s = tanh_cdf(g)
        slope = s + g * 2 * s * (1 - s) * c * (1 + 3 * 0.044715 * g * g)
        return dh * u * slope, dh * g * s
    if kind == "relu":
        return dh * u * (g > 0), dh * np.maximum(g, 0)
    if kind == "relu2":
        return dh * u * 2 * np.maximum(g, 0), dh * np.maximum(g, 0) ** 2
    inside_g, inside_u = g <= limit, np.abs(u) <= limit
    g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
    s = sigmoid(alpha * g)
    return dh * (u + 1) * (s + alpha * g * s * (1 - s)) * inside_g, dh * g * s * inside_u


def forward(x, index, weights, gate, up, down, biases, act):
    """y (N, D). biases: three arrays or None. act: (kind, alpha, limit)."""
    y = np.zeros((len(x), down.shape[1]))
    for t, k in np.ndindex(*index.shape):
        e = index[t, k]
        if e == len(gate):
            continue
        g, u = gate[e] @ x[t], up[e] @ x[t]
        g = g if biases[0] is None else g + biases[0][e]
        u = u if biases[1] is None else u + biases[1][e]
        out = down[e] @ activate(act[0], g, u, *act[1:])
        y[t] += weights[t, k] * (out if biases[2] is None else out + biases[2][e])
    return y


def backward(dy, x, index, weights, gate, up, down, biases, act):
    """Gradients by name, of the dense weights."""
    E = len(gate)
    d = {
        "x": np.zeros_like(x),
        "top_k_weights": np.zeros_like(weights),
        "gate": np.zeros_like(gate),
        "up": np.zeros_like(up),
        "down": np.zeros_like(down),
        "gate_bias": np.zeros(gate.shape[:2]),
        "up_bias": np.zeros(up.shape[:2]),
        "down_bias": np.zeros(down.shape[:2]),
    }
    for t, k in np.ndindex(*index.shape):
        e, w = index[t, k], weights[t, k]
        if e == E:
            continue
        g, u = gate[e] @ x[t], up[e] @ x[t]
        g = g if biases[0] is None else g + biases[0][e]
        u = u if biases[1] is None else u + biases[1][e]
        h = activate(act[0], g, u, *act[1:])
        out = down[e] @ h
        out = out if biases[2] is None else out + biases[2][e]
        d["top_k_weights"][t, k] = dy[t] @ out
        d["down"][e] += w * np.outer(dy[t], h)
        d["down_bias"][e] += w * dy[t]
        dg, du = activate_gradient(act[0], g, u, w * (down[e].T @ dy[t]), *act[1:])
        d["gate"][e] += np.outer(dg, x[t])
        d["up"][e] += np.outer(du, x[t])
        d["gate_bias"][e] += dg
        d["up_bias"][e] += du
        d["x"][t] += gate[e].T @ dg + up[e].T @ du
    return d


def basis(shared, perm):
    """B (R, D) of its stored form."""
    if perm is None:
        return shared
    R, D = shared.shape[0], len(perm)
    B = np.zeros((R, D))
    B[:, perm] = np.hstack([np.eye(R), shared])
    return B


def product(A, B, down):
    return B.T @ A if down else A @ B


def factor_gradients(dW, A, B, down):
    """dA (k, ..) and dB of a group from the gradients dW (k, ..) of its products."""
    if down:
        return np.einsum("rd,kdf->krf", B, dW), np.einsum("krf,kdf->rd", A, dW)
    return np.einsum("kfd,rd->kfr", dW, B), np.einsum("kfr,kfd->rd", A, dW)


def rows_by_expert(index, E):
    """[(token, slot)] of each expert, ascending."""
    return [[(t, k) for t, k in np.ndindex(*index.shape) if index[t, k] == e] for e in range(E)]
