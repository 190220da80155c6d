"""Runs killed (SIGKILL) at random moments, each then resumed: to the bytes of one that was not.

Between a kill and what resumes it, every file under its own name must be whole.
"""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converting import REPORT, tree

from molae.convert import layer_state
from molae.convert.destination import LOCK
from molae.convert.journal import JOURNAL
from soak.bench import Bench
from soak.outcome import Findings

__all__ = ["Outcome", "run"]


@dataclass
class Outcome(Findings):
    """Kills by the kind of run and by what they left, and what must not be."""

    kills: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)


def run(count: int, seed: int, kinds: Sequence[str] = ()) -> Outcome:
    """So many kills, spread evenly over the commands, or some of them."""
    rng, found, started = random.Random(f"kills {seed}"), Outcome(), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name))
        phases = [name for name in bench.commands if name in kinds or not kinds]
        phases = [name for name in phases if name != "finetune"]  # which has no journal to wait for
        for at, phase in enumerate(phases):
            kills = count // len(phases) + (at < count % len(phases))
            if kills:
                _phase(found, phase, bench, kills, rng)
    found.seconds = time.perf_counter() - started
    return found


def _phase(found: Outcome, phase: str, bench: Bench, kills: int, rng: random.Random) -> None:
    bench.clear()
    bench.run(phase)  # here: what it imports on the way is there for all children
    bench.clear()
    begun, taken = _finished(bench, phase)
    wanted, report = tree(bench.dst), _without_times(bench.dst)
    longest = {True: taken - begun, False: taken}
    done = 0
    while done < kills:
        bench.clear()
        # Most of them after the work on the shards has begun; a quarter is killed again.
        moments = [(rng.random() < 0.8, rng.random()) for _ in range(1 + (rng.random() < 0.25))]
        trouble = None
        for working, share in moments:
            if not _killed(bench, phase, working, share * longest[working]):
                longest[working] *= 0.9  # it was done before: the machine is less busy now
                break
            trouble = _torn(found, bench.dst, wanted)
            if trouble or bench.done:
                break
        else:
            trouble = ""
        if trouble is None:
            continue
        done += 1
        found.kills[phase] += 1
        trouble = trouble or _resumed(bench, phase, wanted, report)
        if trouble:
            found.faults.append({"phase": phase, "moments": moments, "fault": trouble})


def _killed(bench: Bench, phase: str, working: bool, seconds: float) -> bool:
    """Start a run and kill it so long after its beginning, or after the journal's; False where it
    was done before."""
    child, until = bench.start(phase), None if working else time.monotonic() + seconds
    while until is None or time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            if status != 0:
                raise RuntimeError(bench.said)
            return False
        if until is None and (bench.dst / JOURNAL).exists():
            until = time.monotonic() + seconds
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def _torn(found: Outcome, dst: Path, wanted: dict[str, str]) -> str:
    """What lies there after a kill; a fault where a file is not whole."""
    there = tree(dst) if dst.exists() else {}
    found.left[_left(dst, there)] += 1
    torn = [name for name, sha in there.items() if name in wanted and wanted[name] != sha]
    return f"not whole under its own name: {torn}" if torn else ""


def _resumed(bench: Bench, phase: str, wanted: dict[str, str], report: Any) -> str:
    if not bench.done:
        _finished(bench, phase)
    now = tree(bench.dst)
    now.pop(LOCK, None)  # of a run that was killed on its way out
    if now != wanted:
        return f"other bytes: {sorted(n for n in now if now[n] != wanted.get(n))}"
    return "" if _without_times(bench.dst) == report else "another report"


def _left(dst: Path, there: dict[str, str]) -> str:
    """What a kill left, in words."""
    if not there:
        return "nothing yet"
    if not (dst / JOURNAL).exists():
        return "all" if (dst / REPORT).exists() else "a lock"
    if (dst / layer_state.STATE).exists():
        return "a layer half trained"
    done = sum(name.endswith(".safetensors") for name in there)
    return "no shard" if done == 0 else "some shards" if done < 2 else "all shards"


def _finished(bench: Bench, phase: str) -> tuple[float, float]:
    """Run to the end; seconds until there was a journal, and in all."""
    started, begun = time.monotonic(), 0.0
    child = bench.start(phase)
    while True:
        if not begun and (bench.dst / JOURNAL).exists():
            begun = time.monotonic() - started
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            if status != 0:
                raise RuntimeError(bench.said)
            return begun, time.monotonic() - started
        time.sleep(0.002)


def _without_times(dst: Path) -> Any:
    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: bare(own) for key, own in value.items() if key != "seconds"}
        return [bare(own) for own in value] if isinstance(value, list) else value

    return bare(json.loads((dst / REPORT).read_text()))
