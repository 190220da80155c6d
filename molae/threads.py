"""How many threads molae computes on: one number for the whole process.

molae threads over groups and experts and keeps BLAS at one thread. Results
do not depend on the number. It starts as ``MOLAE_NUM_THREADS``, else as the
number of CPUs this process may run on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from molae.errors import ArgumentError

__all__ = ["get_num_threads", "num_threads", "set_num_threads"]


def _start() -> int:
    text = os.environ.get("MOLAE_NUM_THREADS", "")
    if text:
        try:
            return _checked(int(text))
        except ValueError:
            raise ArgumentError(
                f"MOLAE_NUM_THREADS: expected a whole number of 1 or more, got {text!r}"
            ) from None
    return len(os.sched_getaffinity(0))


def _checked(n: int) -> int:
    if isinstance(n, bool) or not isinstance(n, int):
        raise ArgumentError(f"n: expected a whole number of 1 or more, got {n!r}")
    if not 1 <= n <= 2**31 - 1:
        raise ArgumentError(f"n: expected 1 or more, got {n}")
    return n


_count = _start()


def get_num_threads() -> int:
    """Number of threads that the next computation uses.

    Examples
    --------
    >>> import molae
    >>> molae.get_num_threads() >= 1
    True
    """
    return _count


def set_num_threads(n: int) -> None:
    """Set the number of threads for the whole process.

    Parameters
    ----------
    n : int
        1 or more. More than the tasks at hand are not started.

    Raises
    ------
    ArgumentError
        If `n` is not a whole number of 1 or more.

    Examples
    --------
    >>> import molae
    >>> before = molae.get_num_threads()
    >>> molae.set_num_threads(2)
    >>> molae.get_num_threads()
    2
    >>> molae.set_num_threads(before)
    """
    global _count
    _count = _checked(n)


@contextlib.contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Use `n` threads inside a ``with`` block, then the former number again.

    The number is the process's: other Python threads see it too.

    Parameters
    ----------
    n : int
        1 or more.

    Raises
    ------
    ArgumentError
        If `n` is not a whole number of 1 or more.

    Examples
    --------
    >>> import molae
    >>> with molae.num_threads(1):
    ...     molae.get_num_threads()
    1
    """
    before = get_num_threads()
    set_num_threads(n)
    try:
        yield
    finally:
        set_num_threads(before)
