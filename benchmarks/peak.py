"""What the machine can do, measured in the same run: a big sgemm and a big copy."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.timing import PAUSE, seconds
from molae import _core

__all__ = ["peaks"]


def peaks(threads: int, *, quick: bool = False) -> dict[str, Any]:
    """Most GFLOP/s of a float32 product by each library, and most GB/s of a copy.

    Returns
    -------
    dict
        ``gflops``: by contestant, best of several. molae's BLAS runs on one thread, so one
        product a thread is run at once. ``best_gflops``: the greatest of them.
        ``copy_gbs``: bytes read and written a second by as many threads.
    """
    n = 512 if quick else 2048
    repeats = 3 if quick else 7
    pause = 0.0 if quick else PAUSE
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((n, n), dtype=np.float32) for _ in range(2))
    flops = 2.0 * n**3
    with ThreadPoolExecutor(threads) as pool:
        together = _on_all(pool, threads, lambda _: _core.gemm(a, b))
        found = {"molae": threads * flops / _best(together, repeats, pause) / 1e9}
        found["NumPy"] = flops / _best(lambda: a @ b, repeats, pause) / 1e9
        if importlib.util.find_spec("torch"):
            import torch

            ta, tb = torch.from_numpy(a), torch.from_numpy(b)
            found["PyTorch"] = flops / _best(lambda: ta @ tb, repeats, pause) / 1e9
        size = (8 if quick else 256) * 2**20 // threads
        buffers = [(np.ones(size, np.uint8), np.ones(size, np.uint8)) for _ in range(threads)]
        copy = _on_all(pool, threads, lambda i: np.copyto(*buffers[i]))
        copied = 2.0 * size * threads / _best(copy, repeats, pause) / 1e9
    return {
        "gflops": {name: round(value, 1) for name, value in found.items()},
        "best_gflops": round(max(found.values()), 1),
        "copy_gbs": round(copied, 1),
    }


def _on_all(
    pool: ThreadPoolExecutor, threads: int, work: Callable[[int], object]
) -> Callable[[], object]:
    return lambda: list(pool.map(work, range(threads)))


def _best(work: Callable[[], object], repeats: int, pause: float) -> float:
    work()
    return min(seconds(work, pause) for _ in range(repeats))
