# Native part of molae. Shapes stand in comments; the letters are those of csrc/molae.h.
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

class MolaeError(Exception): ...
class ShapeError(MolaeError, ValueError): ...
class ArgumentError(MolaeError, ValueError): ...

class NumericalError(MolaeError, ArithmeticError):
    expert: int | None
    group: int | None
    info: int | None

class NonFiniteError(NumericalError): ...
class ConvergenceWarning(UserWarning): ...
class PrecisionWarning(UserWarning): ...

# What was built and what is in use.
def build_info() -> dict[str, Any]: ...
def disable_isa(names: str, /) -> None: ...

# Memory: blocks not yet freed; the n-th allocation from now fails (0: off).
def mem_live() -> int: ...
def mem_fail_after(n: int, /) -> None: ...

# For tests. array (n) -> (n), or ((n), all finite), or the sum of squares.
def kernel(name: str, isa: str, array: npt.NDArray[Any], /) -> Any: ...

# gate, up, dh (n) -> h (n), or with dh: dgate (n), dup (n), w h (n), sum of dh h.
def act(
    isa: str,
    kind: int,
    gate: npt.NDArray[Any],
    up: npt.NDArray[Any],
    dh: npt.NDArray[Any] | None,
    w: float,
    alpha: float,
    limit: float,
    /,
) -> Any: ...

# For tests, in place; rows may lie apart. name: nt or nn, _f32 _bf16 _f64; bf16 as uint16.
# Y (N,r) [+]= X (N,k) W (r,k)^T or W (k,r); C (m,n) [+]= A (m,k) B (n,k)^T or B (k,n).
def stream(
    name: str,
    isa: str,
    Y: npt.NDArray[Any],
    X: npt.NDArray[Any],
    W: npt.NDArray[Any],
    accumulate: bool,
    /,
) -> None: ...
def gemm_bf16(
    layout: str,
    isa: str,
    C: npt.NDArray[np.float32],
    A: npt.NDArray[np.uint16],
    B: npt.NDArray[np.uint16],
    accumulate: bool,
    /,
) -> None: ...
def gemm_bf16_native(isa: str, /) -> bool: ...
def rows_f32(
    layout: str,
    isa: str,
    Y: npt.NDArray[np.float32],
    X: npt.NDArray[np.float32],
    W: npt.NDArray[np.float32],
    accumulate: bool,
    /,
) -> None: ...
def rows_f32_native(isa: str, /) -> bool: ...
def gauge_f32(
    isa: str,
    Z: npt.NDArray[np.float32],
    X: npt.NDArray[np.float32],
    row: npt.NDArray[np.int64],
    own: npt.NDArray[np.int32],
    rest: npt.NDArray[np.int32] | None,
    M: npt.NDArray[np.float32] | None,
    /,
) -> None: ...
def tn_f32(
    isa: str,
    dW: npt.NDArray[np.float32],
    dY: npt.NDArray[np.float32],
    X: npt.NDArray[np.float32],
    row: npt.NDArray[np.int64] | None,
    accumulate: bool,
    /,
) -> None: ...

# Whether the OpenMP that a library is linked with lends its threads.
def borrow_threads(library: str, /) -> bool: ...

# status (n) -> the loop's status, (n) the worker that ran each task (-1: none).
def parallel_probe(
    status: npt.ArrayLike, num_threads: int, borrowed: bool = False
) -> tuple[int, npt.NDArray[np.int64]]: ...
def raise_probe(status: int, what: str | None, expert: int, group: int, info: int, /) -> None: ...

# a (m,k), b (k,n) -> (m,n), on one thread.
def gemm(a: npt.ArrayLike, b: npt.ArrayLike, /) -> npt.NDArray[np.float32]: ...

# Of csrc/fit. W: E arrays (F,D), output side (D,F). ids (E), group_ptr (G+1), rank (G) or None.
# -> shared (R,D-R) or (R,D), perm (D) or None, private (k,F,R) or (k,R,F): lists of G;
#    spectrum (G,D), energy (E), residual (E) or None, used_svd (G).
def factor_shared(
    W: list[npt.NDArray[Any]],
    ids: npt.ArrayLike,
    group_ptr: npt.ArrayLike,
    rank: npt.ArrayLike | None,
    first_group: int,
    output_side: bool,
    gauge: bool,
    errors: bool,
    num_threads: int,
    /,
) -> tuple[Any, ...]: ...

# The same in the metric of moments: E arrays (D,D), or (F,F) on the output side; row_metric (F,F).
def factor_weighted(
    W: list[npt.NDArray[Any]],
    ids: npt.ArrayLike,
    group_ptr: npt.ArrayLike,
    rank: npt.ArrayLike | None,
    first_group: int,
    output_side: bool,
    gauge: bool,
    errors: bool,
    num_threads: int,
    moments: list[npt.NDArray[Any]],
    row_metric: list[npt.NDArray[Any]] | None,
    shrinkage: float,
    ridge: float,
    /,
) -> tuple[Any, ...]: ...

# Adds to C (E,W,W), mass (E,), count (E,); x (N,W) or (N,K,W), index and weight (N,K).
def second_moments(
    C: npt.NDArray[Any],
    mass: npt.NDArray[np.float64],
    count: npt.NDArray[np.int64],
    x: npt.NDArray[Any],
    index: npt.NDArray[np.int64],
    weight: npt.NDArray[Any],
    num_threads: int,
    /,
) -> None: ...

# op: 0 U with U^T U = M + ridge tr(M)/n I, 1 W (U^T U)^-1, 2 W M, 3 W M W^T; left: 1 (U^T U)^-1 W,
# 2 M W. E arrays each: W (rows,n), left (n,rows), moments (n,n), out
def moments_product(
    op: int,
    left: bool,
    out: list[npt.NDArray[Any]],
    W: list[npt.NDArray[Any]],
    moments: list[npt.NDArray[Any]],
    ridge: float,
    num_threads: int,
    /,
) -> None: ...

# Lists of w, m, v, g of one shape each: one step, in place; the norm of all g. max_norm 0: none
def adamw(
    weights: Sequence[npt.NDArray[Any]],
    m: Sequence[npt.NDArray[Any]],
    v: Sequence[npt.NDArray[Any]],
    gradients: Sequence[npt.NDArray[Any]],
    rates: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    max_norm: float,
    step: int,
    num_threads: int,
    /,
) -> float: ...

# Sum of a b; sums of squares of the rows of x (R,W) -> (R). In double.
def dot(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], /) -> float: ...
def row_lengths(x: npt.NDArray[np.float32], num_threads: int, /) -> npt.NDArray[np.float64]: ...

# src (R,W), index (N) -> src[index] (N,W).
def take_rows(
    src: npt.NDArray[Any], index: npt.NDArray[np.int64], num_threads: int, /
) -> npt.NDArray[Any]: ...

# outs: (h,) or (h, dgate, dup), of the shape of gate and up
def activate(
    outs: tuple[npt.NDArray[Any], ...],
    gate: npt.NDArray[Any],
    up: npt.NDArray[Any],
    activation: int,
    alpha: float,
    limit: float,
    num_threads: int,
    /,
) -> None: ...

# W: E arrays (rows,cols) -> (E,rows,cols), used_svd (E)
def reduce_rank(
    W: list[npt.NDArray[Any]], rank: int, num_threads: int, /
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]: ...

# B (R,D) -> M (R,D-R), perm (D)
def gauge(B: npt.NDArray[Any], /) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]: ...

# Of csrc/ops. index (N,K) of 0..E, group_of (E) or None -> expert_ptr (E+1), rows (<= N K),
# group_ptr (G+1) or None, tokens (<= N min(K,G)) or None.
def route(
    index: npt.ArrayLike, E: int, group_of: npt.ArrayLike | None, G: int, /
) -> tuple[Any, ...]: ...

# index, weights (N,K) -> main, aux (N,K)
def split_slots(
    index: npt.ArrayLike, weights: npt.NDArray[Any], E: int, n: int, /
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]: ...

# call: (x (N,D), index (N,K), weights (N,K), gate, up, down, E, F, activation, alpha, limit), where
# gate, up, down: (private: E arrays (F,D) or (F,R), down (D,F) or (R,F); group_of (E); rank (G), -1
# dense; shared: G arrays (R,D-R) or (R,D); perm: G arrays (D); gauge; an array of the weights'
# dtype; bias (E,F), down (E,D), or None). Items of lists may be None where there is nothing.
# y (N,D); saved: None or gate (N K,F), up (N K,F), z_gate, z_up, u (N,width): overwritten, but for
# what is known: a sum of 1 gate, 2 up, 4 z_up.
def experts_forward(
    y: npt.NDArray[Any],
    saved: tuple[Any, ...] | None,
    known: int,
    call: tuple[Any, ...],
    num_threads: int,
    borrowed: bool,
    /,
) -> None: ...

# grads: (dx (N,D), dweights (N,K), gate, up, down), the last three (private: E arrays, shared: G
# arrays, bias), everything None where not wanted, else set (overwrite) or added to.
def experts_backward(
    grads: tuple[Any, ...],
    overwrite: bool,
    dy: npt.NDArray[Any],
    saved: tuple[Any, ...],
    call: tuple[Any, ...],
    num_threads: int,
    borrowed: bool,
    /,
) -> None: ...
def empty(
    shape: int | tuple[int, ...], dtype: npt.DTypeLike, /
) -> npt.NDArray[Any]: ...  # as np.empty; large arrays in memory that is kept
def release_scratch() -> None: ...

# weight (R,C) bytes, scale (ceil, ceil) -> out (R,C); blocks (R,G,16), scales (R,G) bytes -> out
# (R,32 G). out float32 or bfloat16.
def decode_fp8(
    out: npt.NDArray[Any],
    weight: npt.NDArray[np.uint8],
    scale: npt.NDArray[np.float32],
    block_rows: int,
    block_cols: int,
    num_threads: int,
    /,
) -> None: ...
def decode_mxfp4(
    out: npt.NDArray[Any],
    blocks: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.uint8],
    num_threads: int,
    /,
) -> None: ...
