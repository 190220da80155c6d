"""Random operations, one after another, on random checkpoints, each checked by what it promises.

What is in a result is read by the documented format alone (`converting.factored_matrices`).
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import FAMILIES, LAYOUTS, add_companions, make_checkpoint
from converting import TYPES, factored_matrices, source_matrices, tree

from molae import ConvertConfig, convert, materialize, num_threads
from molae.convert import Report, Watcher, inspect
from molae.errors import ArgumentError, CheckpointError, DestinationError
from molae.report.page import page_text
from soak.outcome import Findings

__all__ = ["Outcome", "run"]

#: Largest relative distance of a product from its rounding to a type.
ROUNDING = {"F32": 1e-6, "F16": 1e-3, "BF16": 8e-3}

#: Checkpoints that are kept at a time.
KEPT = 3


@dataclass
class Outcome(Findings):
    """Operations by name, and what must not be."""

    operations: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)


def run(operations: int, seed: int) -> Outcome:
    """So many operations; the same seed does the same."""
    found, started = Outcome(), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        walk = _Walk(Path(name), random.Random(f"walk {seed}"), found)
        for number in range(operations):
            walk.step(number)
    found.seconds = time.perf_counter() - started
    return found


@dataclass
class _Source:
    path: Path
    E: int
    dtype: str


class _Stop(Watcher):
    """Interrupts a run at one of the times at which it tells of its progress."""

    def __init__(self, after: int) -> None:
        self._left = after

    def advanced(self, done: int, total: int, what: str) -> None:
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt


class _Walk:
    def __init__(self, work: Path, rng: random.Random, found: Outcome) -> None:
        self._work, self._rng, self._found = work, rng, found
        self._sources: list[_Source] = []
        self._config: ConvertConfig | None = None

    def step(self, number: int) -> None:
        choices: list[Callable[[_Source], None]] = [
            self._converted, self._interrupted, self._overwritten, self._materialized,
            self._refusals,
        ]  # fmt: skip
        if len(self._sources) < KEPT or self._rng.random() < 0.2:
            self._draw(number)
        own, operation = self._rng.choice(self._sources), self._rng.choice(choices)
        self._found.operations[operation.__name__.strip("_")] += 1
        self._config = None
        try:
            operation(own)
        except Exception:
            self._found.faults.append(
                {
                    "step": number,
                    "operation": operation.__name__,
                    "config": repr(self._config),
                    "fault": traceback.format_exc(limit=-4),
                }
            )
        for path in self._work.glob("dst*"):
            shutil.rmtree(path)

    # ------------------------------------------------------------------ what is drawn

    def _draw(self, number: int) -> None:
        rng = self._rng
        if len(self._sources) == KEPT:
            shutil.rmtree(self._sources.pop(0).path)
        sizes = {
            "L": rng.randint(1, 3), "E": rng.randint(2, 9), "D": 2 * rng.randint(2, 20),
            "F": rng.randint(2, 24), "K": 1 + rng.randrange(2),
        }  # fmt: skip
        dtype = rng.choice(sorted(ROUNDING))
        path = make_checkpoint(
            self._work / f"src{number}", rng.choice(FAMILIES), rng.choice(LAYOUTS),
            dtype=dtype, shards=rng.randint(1, 3), seed=number, **sizes,
        )  # fmt: skip
        add_companions(path)
        self._sources.append(_Source(path, sizes["E"], dtype))

    def _settings(self, own: _Source) -> ConvertConfig:
        rng = self._rng
        group: Any = rng.choice(["auto", rng.randint(1, own.E)])
        if rng.random() < 0.3:
            group = {rng.choice(TYPES): rng.randint(1, own.E)}
        method = "molae" if rng.random() < 0.2 else "latent"
        if method == "molae" and not isinstance(group, str | int):
            group = "auto"
        self._config = ConvertConfig(
            method=method, size=round(rng.uniform(0.15, 1.0), 3), group_size=group
        )
        return self._config

    def _reached(self, own: _Source, dst: Path) -> ConvertConfig | None:
        """Settings by which `dst` was made; None where their size was out of reach."""
        config = self._settings(own)
        try:
            convert(own.path, dst, config)
        except ArgumentError as error:
            left = dst.exists() and any(dst.iterdir())
            if left or not ("reach" in str(error) or "group_size" in str(error)):
                raise AssertionError(f"a refusal that leaves {left}: {error}") from error
            self._found.refused["size out of reach"] += 1
            return None
        return config

    # ------------------------------------------------------------------ the operations

    def _converted(self, own: _Source) -> None:
        """A result is of the size that was asked, its errors are those of its report, and other
        threads write the same bytes."""
        dst, other = self._work / "dst", self._work / "dst-other"
        config = self._reached(own, dst)
        if config is None:
            return
        report = Report.from_file(dst)
        assert report.plan["size_reached"] <= config.target_size + 1e-9
        for row in report.rows:
            exact = source_matrices(own.path, row.layer, row.kind)
            stored = factored_matrices(dst, row.layer, row.kind)
            assert stored is not None
            error = _distance(stored, exact)
            assert abs(error - row.error) <= 1e-5 + 1e-3 * error, (row.layer, row.kind, error)
        with num_threads(1 + self._rng.randrange(3)):
            convert(own.path, other, config)
        assert tree(dst) == tree(other), "other threads, other bytes"
        facts = inspect(dst)
        assert (facts.factored is not None) == bool(report.rows)
        assert page_text(report).startswith("<!")

    def _interrupted(self, own: _Source) -> None:
        """A run that was interrupted, again and again, comes to the same bytes."""
        dst, other = self._work / "dst", self._work / "dst-other"
        config = self._reached(own, dst)
        if config is None:
            return
        for _ in range(1 + self._rng.randrange(3)):
            try:
                convert(own.path, other, config, watcher=_Stop(self._rng.randrange(12)))
            except KeyboardInterrupt:
                assert not (other / "config.json").exists()
            else:
                break
        else:
            convert(own.path, other, config)
        assert tree(dst) == tree(other), "resumed to other bytes"

    def _overwritten(self, own: _Source) -> None:
        """A result in the place of another is that of an empty folder."""
        dst, other = self._work / "dst", self._work / "dst-other"
        if self._reached(own, dst) is None:
            return
        second = self._rng.choice(self._sources)
        config = self._reached(second, other)
        if config is None:
            return
        convert(second.path, dst, config, overwrite=True)
        assert tree(dst) == tree(other), "what was there before shows"

    def _materialized(self, own: _Source) -> None:
        """Multiplied out it is what its factors say, rounded, and converts like any other."""
        dst, whole = self._work / "dst", self._work / "dst-whole"
        if self._reached(own, dst) is None:
            return
        rows = Report.from_file(dst).rows
        if not rows:
            self._found.refused["nothing to multiply out"] += 1
            return
        materialize(dst, whole)
        for row in rows:
            stored = factored_matrices(dst, row.layer, row.kind)
            written = source_matrices(whole, row.layer, row.kind)
            assert stored is not None
            assert _distance(written, stored) <= ROUNDING[own.dtype], (row.layer, row.kind)
        assert inspect(whole).total_parameters == inspect(own.path).total_parameters

    def _refusals(self, own: _Source) -> None:
        """What makes no sense is refused, and nothing is changed by it."""
        dst, again = self._work / "dst", self._work / "dst-again"
        if self._reached(own, dst) is None:
            return
        before = tree(dst)
        nonsense: list[tuple[type[Exception], Callable[[], object]]] = [
            (ArgumentError, lambda: ConvertConfig(size=1.5)),
            (ArgumentError, lambda: convert(own.path, again, ConvertConfig(method="other"))),
            (DestinationError, lambda: convert(own.path, dst, ConvertConfig(size=0.9))),
            (DestinationError, lambda: convert(own.path, own.path / "inside")),
        ]
        if Report.from_file(dst).rows:
            nonsense.append((CheckpointError, lambda: convert(dst, again)))
        nonsense.append((CheckpointError, lambda: materialize(own.path, again)))
        for wanted, call in nonsense:
            try:
                call()
            except wanted:
                self._found.refused[wanted.__name__] += 1
            else:
                raise AssertionError(f"no {wanted.__name__}")
        assert tree(dst) == before
        assert not again.exists()


def _distance(some: list[np.ndarray], exact: list[np.ndarray]) -> float:
    """Relative, Frobenius, of all experts together."""
    off = whole = 0.0
    for one, other in zip(some, exact, strict=True):
        wide = np.asarray(other, np.float64)
        off += float(((np.asarray(one, np.float64) - wide) ** 2).sum())
        whole += float((wide**2).sum())
    return float(np.sqrt(off / whole)) if whole else 0.0
