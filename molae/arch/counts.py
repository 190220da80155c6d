"""Count numbers and floating-point operations of expert layers.

Letters: E experts, K experts a token, F expert width, D model width, R rank, k experts of a
group. A multiplication and an addition are two operations. Counted are the matrix products
of the experts; the activation, the routing and the permutation of the gauge form are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

from molae.errors import ArgumentError

__all__ = ["active_numbers", "dense_flops", "hit_probabilities", "latent_flops"]


def hit_probabilities(sizes: Sequence[int], K: int) -> tuple[float, ...]:
    """Probability that a token's K experts include one of a group, for each group.

    ``p_g = 1 - C(E - k_g, K) / C(E, K)``, with E the sum of the sizes.

    Parameters
    ----------
    sizes : sequence of int
        Experts of each group, k_g.
    K : int
        Experts a token, at most E.

    Returns
    -------
    tuple of float
        Their sum is the expected number of distinct groups hit.

    Raises
    ------
    ArgumentError
        An empty group, or K not in 1..E.

    Notes
    -----
    The K experts are taken as drawn evenly, without replacement. A real router prefers some
    experts; where it prefers experts of one group together, fewer groups are hit.

    Examples
    --------
    >>> hit_probabilities([4, 4], 1)
    (0.5, 0.5)
    >>> sum(hit_probabilities([1] * 8, 3))
    3.0
    """
    E = sum(sizes)
    if any(k < 1 for k in sizes):
        raise ArgumentError(f"sizes: expected at least 1 expert in each group, got {list(sizes)}")
    if not 1 <= K <= E:
        raise ArgumentError(f"K: expected 1 to E={E}, got {K}")
    draws = comb(E, K)
    return tuple((draws - comb(E - k, K)) / draws for k in sizes)


def dense_flops(K: int, F: int, D: int) -> int:
    """Operations a token of one dense matrix type: ``2 K F D``.

    Examples
    --------
    >>> 3 * dense_flops(8, 1024, 2048)  # gate, up and down of an OLMoE-1B-7B layer
    100663296
    """
    return 2 * K * F * D


def active_numbers(
    sizes: Sequence[int], ranks: Sequence[int | None], *, form: str, K: int, F: int, D: int
) -> float:
    """Expected numbers of one factored matrix type that one token is multiplied with.

    For a group of k experts and rank R, hit with probability p: ``p R D + (K/E) k F R`` in
    the plain form, ``p R (D - R) + (K/E) k F R`` in the gauge form, ``(K/E) k F D`` left dense.

    Parameters
    ----------
    sizes : sequence of int
        Experts of each group.
    ranks : sequence of (int or None)
        Rank of each group; 0 for a group that keeps nothing, None for one left dense.
    form : {'gauge', 'plain'}
    K, F, D : int

    Returns
    -------
    float

    Raises
    ------
    ArgumentError
        Another form, unequal lengths, a rank outside 0..D, or as `hit_probabilities`.
    """
    if form not in ("gauge", "plain"):
        raise ArgumentError(f"form: expected 'gauge' or 'plain', got {form!r}")
    if len(sizes) != len(ranks):
        raise ArgumentError(
            f"ranks: expected one for each of {len(sizes)} groups, got {len(ranks)}"
        )
    E = sum(sizes)
    total = 0.0
    for k, R, p in zip(sizes, ranks, hit_probabilities(sizes, K), strict=True):
        if R is None:
            total += K * k * F * D / E
        elif not 0 <= R <= D:
            raise ArgumentError(f"ranks: expected None or 0 to D={D}, got {R}")
        else:
            total += p * R * (D - R if form == "gauge" else D) + K * k * F * R / E
    return total


def latent_flops(
    sizes: Sequence[int], ranks: Sequence[int | None], *, form: str, K: int, F: int, D: int
) -> float:
    """Expected operations a token of one factored matrix type: two for each active number.

    The same for gate, up and down: a token is projected once for every group it hits (for
    down, the group's latent outputs are summed first and lifted once). See `active_numbers`.

    Examples
    --------
    At R = F the plain form costs more than the dense layer, the gauge form can cost less:

    >>> sizes, ranks = [8] * 8, [1024] * 8
    >>> dense = dense_flops(8, 1024, 2048)
    >>> round(latent_flops(sizes, ranks, form="plain", K=8, F=1024, D=2048) / dense, 3)
    1.179
    >>> round(latent_flops(sizes, ranks, form="gauge", K=8, F=1024, D=2048) / dense, 3)
    0.84
    """
    return 2 * active_numbers(sizes, ranks, form=form, K=K, F=F, D=D)
