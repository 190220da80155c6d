"""Equality before timing, for layers: some tokens against float64, all against molae's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.check import WrongAnswer

__all__ = ["agree", "check_forward", "check_gradients", "reference", "tolerance"]


def tolerance(dtype: torch.dtype, n: int) -> float:
    """Largest relative error of a layer's output, in the 2-norm of a token.

    On its way a value is rounded to its type at most sixteen times (latent row, gate, up, their
    product, latent output, weight, lift, output, and some sum up the experts in it), by half an
    eps each: independent, they make sqrt(16) times that. Likewise the error of a sum of n
    products in float32 grows as sqrt(n) (Higham and Mary 2019); there are four in a row. With
    random weights none of the steps amplifies a relative error.
    """
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return 2 * torch.finfo(dtype).eps + 4 * n**0.5 * wide


def reference(
    layer: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """(T, D) in float64: a `LatentExperts` by its definition, expert by expert.

    Differentiable in `x` and `weights`, which may be float64.
    """
    x, weights = x.double(), weights.double()
    parts = layer.factors()
    F = layer.intermediate_dim
    gate, up = (_project(x, index, parts[kind], F) for kind in ("gate_proj", "up_proj"))
    hidden = layer.act_fn(gate) * up * weights[..., None]
    y = torch.zeros_like(x)
    for group in parts["down_proj"]:
        total: Any = 0.0
        for matrix, (t, j) in _members(group, index):
            out = hidden[t, j] @ matrix.T
            total = total + out.new_zeros((len(x), out.shape[1])).index_add(0, t, out)
        if isinstance(total, float):
            continue
        if group.dense is None:
            total = _lift(total, group)
        y = y + total
    return y


def _project(x: torch.Tensor, index: torch.Tensor, groups: Any, F: int) -> torch.Tensor:
    """(T, K, F)."""
    rows = x.new_zeros((*index.shape, F))
    for group in groups:
        z = None
        for matrix, (t, j) in _members(group, index):
            if z is None:
                z = x if group.dense is not None else _reduce(x, group)
            rows = rows.index_put((t, j), z[t] @ matrix.T)
    return rows


def _members(group: Any, index: torch.Tensor) -> Any:
    """Matrix in float64, and places in `index`, of each expert of a group that has any."""
    stack = group.private if group.dense is None else group.dense
    for place, expert in enumerate(group.experts):
        t, j = (index == expert).nonzero(as_tuple=True)
        if len(t):
            yield stack[place].detach().double(), (t, j)


def _reduce(x: torch.Tensor, group: Any) -> torch.Tensor:
    placed = x[:, group.perm.long()]
    return placed[:, : group.rank] + placed[:, group.rank :] @ group.shared.detach().double().T


def _lift(u: torch.Tensor, group: Any) -> torch.Tensor:
    placed = torch.cat([u, u @ group.shared.detach().double()], 1)
    return placed[:, torch.argsort(group.perm)]


def check_forward(
    name: str,
    y: torch.Tensor,
    truth: torch.Tensor,
    sample: torch.Tensor,
    ours: torch.Tensor | None,
    tol: float,
) -> float:
    """Largest relative error of the sampled tokens; raises unless all tokens are right.

    Parameters
    ----------
    y : (N, D) tensor
    truth : (T, D) tensor of float64
        Of the tokens `sample`.
    ours : (N, D) tensor or None
        molae's, for the tokens that have no truth.
    tol : float

    Raises
    ------
    WrongAnswer
    """
    found = _far(y[sample].double(), truth)
    if not found <= tol:
        raise WrongAnswer(f"{name}: relative error {found:.3g}, expected at most {tol:.3g}")
    if ours is not None:
        apart = _far(y, ours)
        if not apart <= 2 * tol:
            raise WrongAnswer(f"{name}: {apart:.3g} from molae's, expected at most {2 * tol:.3g}")
    return found


def check_gradients(
    name: str,
    dx: torch.Tensor,
    dweights: torch.Tensor,
    truth: tuple[torch.Tensor, torch.Tensor],
    sample: torch.Tensor,
    tol: float,
) -> None:
    """The same for the gradients that belong to a token: of x (N, D) and of weights (N, K)."""
    for what, found, exact in (("dx", dx, truth[0]), ("dweights", dweights, truth[1])):
        far = _far(found[sample].double(), exact)
        if not far <= tol:
            raise WrongAnswer(f"{name}: {what} off by {far:.3g}, expected at most {tol:.3g}")


def agree(
    name: str, found: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor], tol: float
) -> None:
    """Gradients of the parameters against molae's, each in the Frobenius norm."""
    if found.keys() != ours.keys():
        raise WrongAnswer(f"{name}: gradients of {sorted(found)}, molae's of {sorted(ours)}")
    for key, tensor in found.items():
        norm = torch.linalg.vector_norm(ours[key])
        apart = torch.linalg.vector_norm(tensor - ours[key])
        if not apart <= tol * norm:
            raise WrongAnswer(
                f"{name}: d{key} is {float(apart / norm):.3g} from molae's, "
                f"expected at most {tol:.3g}"
            )


def _far(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest relative distance of a row; NaN if there is one."""
    exact = exact.to(torch.promote_types(exact.dtype, torch.float32))
    apart = torch.linalg.vector_norm(found - exact, dim=1)
    return float((apart / torch.linalg.vector_norm(exact, dim=1)).max())
