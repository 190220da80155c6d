"""Reference of csrc/fit/weighted.c: factors in the metric of second moments, in float64.

Nothing clever and nothing of molae. X is W on the input side and Wᵀ on the output side.
"""

import numpy as np


def pooled(moments, shrinkage, ridge):
    """The group's moments and, for each expert, those it is fitted to."""
    n = len(moments[0])
    traces = [np.trace(C) for C in moments]
    total = sum(traces)
    if total == 0:
        return np.eye(n), [np.eye(n) for _ in moments]
    firm = [C + ridge * t / n * np.eye(n) for C, t in zip(moments, traces, strict=True)]
    C = sum(firm)
    shares = [shrinkage * t / total + ridge for t in traces]
    return C, [own + share * C for own, share in zip(firm, shares, strict=True)]


def root(C):
    """The symmetric root of C."""
    w, V = np.linalg.eigh(C)
    return (V * np.sqrt(np.maximum(w, 0))) @ V.T


def lost(X, approximation, C, side, rows=None):
    """Squared error of one expert in its metric."""
    error = X - approximation
    if side == "output":
        return np.trace(error.T @ C @ error)
    rows = np.eye(len(X)) if rows is None else rows
    return np.trace(rows @ error @ C @ error.T)


def output_optimum(X, moments, rank):
    """The least that any shared factor of this rank loses on the output side."""
    total = sum(x.T @ H @ x for x, H in zip(X, moments, strict=True))
    return np.sort(np.linalg.eigvalsh(total))[: len(total) - rank].sum()


def single_optimum(X, C, rank, rows=None):
    """Eckart–Young for one expert of the input side, in the metric."""
    rows = np.eye(len(X)) if rows is None else rows
    s = np.linalg.svd(root(rows) @ X @ root(C), compute_uv=False)
    return np.square(s[rank:]).sum()


def pooled_spectrum(X, C, shrunk, rows=None):
    """Singular values of the stack of √ω S^½ X C^½, ω an expert's share of the trace."""
    omega = [np.trace(own) / np.trace(C) for own in shrunk]
    rows = [np.eye(len(x)) for x in X] if rows is None else rows
    parts = [np.sqrt(o) * root(S) @ x @ root(C) for o, S, x in zip(omega, rows, X, strict=True)]
    return np.linalg.svd(np.concatenate(parts), compute_uv=False)
