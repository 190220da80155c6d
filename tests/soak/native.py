"""Every native function under failing allocations, poisoned inputs and many calls."""

from __future__ import annotations

import contextlib
import gc
import itertools
import resource
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from molae import _core, ops
from molae.errors import MolaeError
from soak.calls import Case, arrays, cases, swapped
from soak.outcome import Findings

__all__ = ["Outcome", "allocations", "leaks", "poisons"]

#: Memory that many calls may add: what the allocator keeps in pieces.
GROWTH = 4 << 20


@dataclass
class Outcome(Findings):
    """Counts, and what must not be."""

    counts: Counter[str] = field(default_factory=Counter)

    def fault(self, case: Case, what: str) -> None:
        self.faults.append({"case": case.name, "fault": what})


def _quiet() -> Any:
    context = warnings.catch_warnings()
    context.__enter__()
    warnings.simplefilter("ignore")
    return context


def _bits(value: Any) -> list[bytes]:
    return [a.tobytes() for a in arrays(value)]


def allocations(names: str = "") -> Outcome:
    """Each allocation of each call fails once: MemoryError, no leak, and the call works again."""
    found, started, context = Outcome(), time.perf_counter(), _quiet()
    for case in cases():
        if names not in case.name:
            continue
        wanted, given = _bits(case.call(*case.given)), _bits(case.given)
        ops.release_scratch()
        live = _core.mem_live()
        for n in itertools.count(1):
            _core.mem_fail_after(n)
            try:
                made = case.call(*case.given)
            except MemoryError:
                found.counts["failed allocations"] += 1
            except BaseException as error:
                found.fault(case, f"allocation {n}: {type(error).__name__}: {error}")
            else:
                left = _core.mem_fail_after(0)
                del left
                if _bits(made) != wanted:
                    found.fault(case, f"allocation {n}: another result")
                break
            finally:
                _core.mem_fail_after(0)
            if _core.mem_live() != live:
                found.fault(case, f"allocation {n}: {_core.mem_live() - live} blocks leak")
                break
            if n > 100_000:
                found.fault(case, "no end of allocations")
                break
        if _bits(case.call(*case.given)) != wanted:
            found.fault(case, "does not work again")
        if _bits(case.given) != given:
            found.fault(case, "an input was changed")
        found.counts["calls"] += 1
    found.seconds = time.perf_counter() - started
    context.__exit__(None, None, None)
    return found


#: What an entry of an array is set to.
def _bad(dtype: np.dtype) -> Iterator[tuple[str, float]]:
    info = ml_dtypes.finfo(dtype)
    yield from (("NaN", np.nan), ("Inf", np.inf), ("-Inf", -np.inf))
    yield from (("huge", float(info.max)), ("-huge", float(info.min)))
    yield from (("denormal", float(info.smallest_subnormal)), ("-0", -0.0))


def poisons(names: str = "") -> Outcome:
    """One entry of one input is NaN, Inf, huge, denormal: a result or an error of molae's.

    Functions that refuse NaN and Inf must not answer them with numbers that look sound.
    """
    found, started, context = Outcome(), time.perf_counter(), _quiet()
    for case in cases():
        if names not in case.name:
            continue
        wanted = _bits(case.call(*case.given))
        for number, array in enumerate(list(arrays(case.given))):
            if array.dtype.kind in "iu":
                continue
            for what, value in _bad(array.dtype):
                for at in {0, array.size // 2, array.size - 1}:
                    bad = array.copy()
                    bad.reshape(-1)[at] = value
                    _poisoned(found, case, array, bad, f"{what} at {at} of input {number}")
            entire = np.full_like(array, np.nan)
            _poisoned(found, case, array, entire, f"NaN in all of input {number}")
        if _bits(case.call(*case.given)) != wanted:
            found.fault(case, "does not work again")
    found.seconds = time.perf_counter() - started
    context.__exit__(None, None, None)
    return found


def _poisoned(found: Outcome, case: Case, old: np.ndarray, new: np.ndarray, what: str) -> None:
    kept = new.tobytes()
    with np.errstate(all="ignore"):
        bad = not np.isfinite(new.astype(np.float64)).all()
        try:
            made = case.call(*swapped(case.given, old, new))
        except MolaeError as error:
            found.counts[type(error).__name__] += 1
        except BaseException as error:
            found.fault(case, f"{what}: {type(error).__name__}: {error}")
        else:
            finite = all(
                np.isfinite(a.astype(np.float64)).all() for a in arrays(made) if a.dtype.kind != "i"
            )
            found.counts["finite results" if finite else "results with NaN or Inf"] += 1
            if bad and case.refuses:
                found.fault(case, f"{what}: not refused")
    if new.tobytes() != kept:
        found.fault(case, f"{what}: an input was changed")


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def leaks(count: int, names: str = "") -> Outcome:
    """So many calls of each function, and as many that are refused: memory stays flat."""
    found, started, context = Outcome(), time.perf_counter(), _quiet()
    for case in cases():
        if names not in case.name:
            continue
        first = next((a for a in arrays(case.given) if a.dtype.kind not in "iu"), None)
        broken = None
        if first is not None and case.refuses:
            broken = swapped(case.given, first, np.full_like(first, np.nan))
        _times(case, broken, max(20, count // 10))
        gc.collect()
        before, live = _resident(), _core.mem_live()
        _times(case, broken, count)
        gc.collect()
        grown = _resident() - before
        found.counts["calls"] += count * (1 + (broken is not None))
        found.counts["functions"] += 1
        found.counts["most bytes grown"] = max(found.counts["most bytes grown"], grown)
        if grown > GROWTH:
            found.fault(case, f"{grown} bytes more after {count} calls")
        if _core.mem_live() != live:
            found.fault(case, f"{_core.mem_live() - live} more blocks are live")
    found.seconds = time.perf_counter() - started
    context.__exit__(None, None, None)
    return found


def _times(case: Case, broken: Any, count: int) -> None:
    for _ in range(count):
        case.call(*case.given)
        if broken is not None:
            with contextlib.suppress(MolaeError):
                case.call(*broken)
