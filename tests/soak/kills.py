"""Runs killed (SIGKILL) at random moments, each then resumed: to the bytes of one that was not.

All is imported once; each run is a forked child, so that the moments fall into the work and not
into the imports. Between a kill and what resumes it, every file under its own name must be whole.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import add_companions, make_checkpoint
from converting import REPORT, tree

from molae import ConvertConfig, HealConfig, convert, heal, materialize
from molae.convert import layer_state
from molae.convert.destination import LOCK
from molae.convert.journal import JOURNAL
from molae.errors import DestinationError
from soak.outcome import Findings

__all__ = ["PHASES", "Outcome", "run"]

#: A run that takes longer hangs.
SECONDS = 300.0

Run = Callable[[Path], object]


@dataclass
class Outcome(Findings):
    """Kills by the kind of run and by what they left, and what must not be."""

    kills: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)


def run(count: int, seed: int, kinds: Sequence[str] = ()) -> Outcome:
    """So many kills, spread evenly over the kinds of runs, or some of them."""
    rng, found, started = random.Random(f"kills {seed}"), Outcome(), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        runs = {name: go for name, go in _runs(work).items() if name in (kinds or PHASES)}
        for at, phase in enumerate(runs):
            kills = count // len(runs) + (at < count % len(runs))
            if kills:
                _phase(found, phase, runs[phase], kills, work, rng)
    found.seconds = time.perf_counter() - started
    return found


PHASES = ("data-free", "materialize", "calibrated", "compressed experts", "healed", "heal")


def _runs(work: Path) -> dict[str, Run]:
    from molae.hf.calibrate import Calibration

    source = make_checkpoint(
        work / "src", L=3, E=4, D=16, F=8, dtype="BF16", config={"eos_token_id": 2}
    )
    add_companions(source)
    converted = work / "converted"
    convert(source, converted, ConvertConfig(size=0.6, group_size=2))
    tokens = np.random.default_rng(0).integers(0, 40, 1024)
    layer_state.EVERY, layer_state.SHARE = 0.0, 0.0  # a state after every step

    def calibration() -> Calibration:
        scratch = work / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        return Calibration(source, tokens, sequences=16, length=64, folder=scratch)

    def calibrated(**settings: Any) -> Run:
        config = ConvertConfig(size=0.7, group_size=2, **settings)

        def go(dst: Path) -> None:
            with calibration() as own:
                convert(source, dst, config, calibration=own)

        return go

    def heal_it(dst: Path) -> None:
        with calibration() as own:
            heal(converted, dst, source, HealConfig(passes=3), calibration=own)

    return {
        "data-free": lambda dst: convert(source, dst, ConvertConfig(size=0.5, group_size=2)),
        "materialize": lambda dst: materialize(converted, dst),
        "calibrated": calibrated(),
        "compressed experts": calibrated(compressed_experts=1, light_module="narrow:2"),
        "healed": calibrated(heal=3),
        "heal": heal_it,
    }


def _phase(found: Outcome, phase: str, go: Run, kills: int, work: Path, rng: random.Random) -> None:
    dst = work / "dst"
    go(dst)  # here: what it imports on the way is there for all children
    begun, taken = _finished(go, dst, work)
    wanted, report = tree(dst), _without_times(dst)
    longest = {True: taken - begun, False: taken}
    done = 0
    while done < kills:
        if dst.exists():
            shutil.rmtree(dst)
        # Most of them after the work on the shards has begun; a quarter is killed again.
        moments = [(rng.random() < 0.8, rng.random()) for _ in range(1 + (rng.random() < 0.25))]
        trouble = None
        for working, share in moments:
            if not _killed(go, dst, work, working, share * longest[working]):
                longest[working] *= 0.9  # it was done before: the machine is less busy now
                break
            trouble = _torn(found, dst, wanted)
            if trouble or _done(dst):
                break
        else:
            trouble = ""
        if trouble is None:
            continue
        done += 1
        found.kills[phase] += 1
        trouble = trouble or _resumed(go, dst, work, wanted, report)
        if trouble:
            found.faults.append({"phase": phase, "moments": moments, "fault": trouble})
    shutil.rmtree(dst)


def _killed(go: Run, dst: Path, work: Path, working: bool, seconds: float) -> bool:
    """Start a run and kill it so long after its beginning, or after the journal's; False where it
    was done before."""
    child, until = _fork(go, dst, work), None if working else time.monotonic() + seconds
    while until is None or time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            if status != 0:
                raise RuntimeError((work / "error").read_text())
            return False
        if until is None and (dst / JOURNAL).exists():
            until = time.monotonic() + seconds
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def _done(dst: Path) -> bool:
    return (dst / REPORT).exists() and not (dst / JOURNAL).exists()


def _torn(found: Outcome, dst: Path, wanted: dict[str, str]) -> str:
    """What lies there after a kill; a fault where a file is not whole."""
    there = tree(dst) if dst.exists() else {}
    found.left[_left(dst, there)] += 1
    torn = [name for name, sha in there.items() if name in wanted and wanted[name] != sha]
    return f"not whole under its own name: {torn}" if torn else ""


def _resumed(go: Run, dst: Path, work: Path, wanted: dict[str, str], report: Any) -> str:
    if not _done(dst):
        _finished(go, dst, work)
    now = tree(dst)
    now.pop(LOCK, None)  # of a run that was killed on its way out
    if now != wanted:
        return f"other bytes: {sorted(n for n in now if now[n] != wanted.get(n))}"
    return "" if _without_times(dst) == report else "another report"


def _left(dst: Path, there: dict[str, str]) -> str:
    """What a kill left, in words."""
    if not there:
        return "nothing yet"
    if not (dst / JOURNAL).exists():
        return "all" if (dst / REPORT).exists() else "a lock"
    if (dst / layer_state.STATE).exists():
        return "a layer half trained"
    done = sum(name.endswith(".safetensors") for name in there)
    return "no shard" if done == 0 else "some shards" if done < 3 else "all shards"


def _fork(go: Run, dst: Path, work: Path) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        try:
            go(dst)
        except DestinationError as error:
            (work / "error").write_text(str(error))
            raise
        code = 0
    except BaseException:
        (work / "error").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def _finished(go: Run, dst: Path, work: Path) -> tuple[float, float]:
    """Run to the end; seconds until there was a journal, and in all."""
    if _done(dst):
        shutil.rmtree(dst)
    started, begun = time.monotonic(), 0.0
    child = _fork(go, dst, work)
    while time.monotonic() - started < SECONDS:
        if not begun and (dst / JOURNAL).exists():
            begun = time.monotonic() - started
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            if status != 0:
                raise RuntimeError((work / "error").read_text())
            return begun, time.monotonic() - started
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise RuntimeError(f"a run took more than {SECONDS} seconds")


def _without_times(dst: Path) -> Any:
    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: bare(own) for key, own in value.items() if key != "seconds"}
        return [bare(own) for own in value] if isinstance(value, list) else value

    return bare(json.loads((dst / REPORT).read_text()))
