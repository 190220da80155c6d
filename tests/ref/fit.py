"""Reference of csrc/fit: shared low-rank factors, by the SVD, in float64.

Nothing clever and nothing of molae. Letters as in molae.fit.
"""

import numpy as np


def stack(W, group, side):
    """(k F, D): the group's matrices with the shared side as columns."""
    parts = [np.asarray(W[i], dtype=np.float64) for i in group]
    return np.concatenate([p if side == "input" else p.T for p in parts])


def singular_values(W, group, side):
    return np.linalg.svd(stack(W, group, side), compute_uv=False)


def joint_factorization(W, group, side, rank):
    """(B, [A_i]): B = first R rows of Vᵀ, A_i = the expert's slice of U Σ."""
    U, s, Vt = np.linalg.svd(stack(W, group, side), full_matrices=False)
    B = Vt[:rank]
    slices = np.split(U[:, :rank] * s[:rank], len(group))
    return B, [A if side == "input" else A.T for A in slices]


def product(A, B, side):
    return A @ B if side == "input" else B.T @ A


def truncate(X, rank):
    """Eckart–Young: the best approximation of one matrix."""
    U, s, Vt = np.linalg.svd(np.asarray(X, dtype=np.float64), full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vt[:rank]


def least_squares(X, B):
    """argmin_A ‖X − A B‖."""
    return np.linalg.lstsq(B.T, np.asarray(X, dtype=np.float64).T, rcond=None)[0].T


def two_steps(W, group, rank):
    """The paper's conversion of a group: each expert to rank R, then the stack."""
    reduced = [truncate(W[i], rank) for i in group]
    B, A = joint_factorization(reduced, range(len(group)), "input", rank)
    return B, A


def kernel_intersection_dim(W, group, side, tol=1e-5):
    """dim ∩ ker X_i, expert by expert: each one's kernel inside what is left of the others'."""
    left = np.eye(np.asarray(W[0]).shape[1 if side == "input" else 0])
    for i in group:
        X = stack(W, [i], side)
        _, s, Vt = np.linalg.svd(X @ left)
        rank = int((s > tol * np.linalg.norm(X)).sum())
        left = left @ Vt[rank:].T
        if left.shape[1] == 0:
            break
    return left.shape[1]
