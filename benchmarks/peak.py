"""What the machine can do, measured in the same run: a big sgemm, a big copy, a big read."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.timing import PAUSE, seconds
from molae import _core

__all__ = ["Product", "Stream", "library_gflops", "peaks"]


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
    product = Product(threads, n)
    a, b = product.factors
    flops = 2.0 * n**3
    with ThreadPoolExecutor(threads) as pool:
        found = {"molae": product.flops / _best(product, repeats, pause) / 1e9}
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


def library_gflops(
    dtype: npt.DTypeLike, n: int = 1024, repeats: int = 7, pause: float = PAUSE
) -> float:
    """Most GFLOP/s of a product of this type by NumPy or torch, on the threads that they have."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((n, n)).astype(dtype) for _ in range(2))
    best = _best(lambda: a @ b, repeats, pause)
    if importlib.util.find_spec("torch"):
        import torch

        ta, tb = torch.from_numpy(a), torch.from_numpy(b)
        best = min(best, _best(lambda: ta @ tb, repeats, pause))
    return 2.0 * n**3 / best / 1e9


class Stream:
    """Reads a buffer from end to end, by the fastest of several ways that NumPy and torch have.

    torch allocates it, as it does weights: the size of its pages counts.

    Attributes
    ----------
    name : str
        The way.
    gbs : float
        Most GB/s that it reached.
    found : dict
        The same of each way.
    times : list of float
        Seconds of each call of `read`; clear it as you like.
    """

    def __init__(self, threads: int, nbytes: int, repeats: int = 5) -> None:
        import torch

        length = nbytes // 8 // threads * threads
        floats = torch.ones(2 * length)
        whole = floats.numpy().view(np.int64)
        parts = np.split(whole, threads)
        pool = ThreadPoolExecutor(threads)
        ways: dict[str, Callable[[], object]] = {
            "torch.sum": floats.sum,
            "torch.dot": lambda: torch.dot(floats, floats),
            "numpy.sum": _on_all(pool, threads, lambda i: parts[i].sum()),
            "numpy.max": _on_all(pool, threads, lambda i: parts[i].max()),
        }
        best = {name: _best(way, repeats, 0.0) for name, way in ways.items()}
        self.found = {name: round(whole.nbytes / t / 1e9, 1) for name, t in best.items()}
        self.name = min(best, key=lambda name: best[name])
        self.gbs = whole.nbytes / best[self.name] / 1e9
        self.nbytes = whole.nbytes
        self.times: list[float] = []
        self._way = ways[self.name]

    def read(self) -> None:
        """Once, so that nothing else is left in the caches."""
        self.times.append(seconds(self._way, 0.0))

    def usual_gbs(self) -> float:
        """GB/s by the median of `times`."""
        return self.nbytes / statistics.median(self.times) / 1e9


class Product:
    """A big float32 product a thread by molae's BLAS, as a contestant beside others.

    Attributes
    ----------
    factors : tuple of ndarray
        What is multiplied.
    flops : float
        Of a call.
    """

    def __init__(self, threads: int, n: int = 2048) -> None:
        rng = np.random.default_rng(0)
        a, b = (rng.standard_normal((n, n), dtype=np.float32) for _ in range(2))
        self.factors = a, b
        self.flops = 2.0 * n**3 * threads
        self._run = _on_all(ThreadPoolExecutor(threads), threads, lambda _: _core.gemm(a, b))

    def __call__(self) -> None:
        self._run()


def _on_all(
    pool: ThreadPoolExecutor, threads: int, work: Callable[[int], object]
) -> Callable[[], object]:
    return lambda: list(pool.map(work, range(threads)))


def _best(work: Callable[[], object], repeats: int, pause: float) -> float:
    work()
    return min(seconds(work, pause) for _ in range(repeats))
