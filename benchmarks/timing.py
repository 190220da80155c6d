"""Contestants take turns, A B C A B C, so that a slow spell of the machine hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["alternate", "ratio", "seconds", "summary"]

#: Before each run: thread pools that spin while they wait for more work have gone to sleep.
PAUSE = 0.25


def seconds(work: Callable[[], object], pause: float = PAUSE) -> float:
    """Wall time of one call."""
    time.sleep(pause)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(
    contestants: Mapping[str, Callable[[], object]],
    repeats: int,
    pause: float = PAUSE,
    before: Callable[[str], object] | None = None,
) -> dict[str, list[float]]:
    """Wall times of each contestant, round by round.

    `before` is called with the contestant's name ahead of each run, untimed. The rest comes
    before it: what it leaves awake and in the caches is there when the clock starts.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, work in contestants.items():
            if before is None:
                times[name].append(seconds(work, pause))
                continue
            time.sleep(pause)
            before(name)
            times[name].append(seconds(work, 0.0))
    return times


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Median, least and all of some wall times."""
    return {
        "median_s": statistics.median(times),
        "min_s": min(times),
        "times_s": [round(t, 6) for t in times],
    }


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times `fast` is faster: ratio of medians, and the range over the rounds."""
    rounds = [s / f for s, f in zip(slow, fast, strict=True)]
    return {
        "ratio": statistics.median(slow) / statistics.median(fast),
        "ratio_low": min(rounds),
        "ratio_high": max(rounds),
    }
