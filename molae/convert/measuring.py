"""What the first pass over the original finds out, and keeps for another conversion.

For each layer and matrix type the spectra of its groups, and how far the model's answers move
when that type alone is small. See ``docs/theory.md``, section 8.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from molae.convert.budget import Curve
from molae.convert.fitting import Groups
from molae.errors import ArgumentError, CheckpointError, DestinationError
from molae.io import map_file, parse_json
from molae.io.writer import write_bytes_atomic

__all__ = ["TRIAL_SIZES", "Look", "Measurements"]

#: Each layer and type is tried at these sizes; what lies between is read off in log scale.
TRIAL_SIZES = (0.7, 0.45, 0.25, 0.12)

#: Beyond the trials the effect of an error grows as a power of its square between these.
FLATTEST, STEEPEST = 1.0, 3.0

#: A trial counts as at least this share of the median effect of all, whatever was measured.
LEAST_EFFECT = 0.02

#: Raised by one when what is measured changes.
FORMAT = "2"


#: What reading a damaged file ends in.
_DAMAGED = (
    CheckpointError, SafetensorError, LookupError, ValueError, TypeError, AttributeError, OSError,
)  # fmt: skip


def _need(fine: bool) -> None:
    if not fine:
        raise ValueError("an entry that cannot be")


def _finite(value: Any) -> float:
    _need(isinstance(value, (int, float)) and math.isfinite(value))
    return float(value)


@dataclass(frozen=True, eq=False)
class Look:
    """One layer's matrix type in groups of one size.

    Attributes
    ----------
    groups : list of tuple of int
    spectra : tuple of (p,) ndarray of float64
        Singular values of each group's weighted stack.
    ranks : list of tuple of int
        For each of `TRIAL_SIZES` what the groups had.
    effects : list of float
        For each of them how far the answers moved, in nats a token.
    """

    groups: Groups
    spectra: tuple[np.ndarray, ...]
    ranks: list[tuple[int, ...]] = field(default_factory=list)
    effects: list[float] = field(default_factory=list)

    @property
    def idle(self) -> int:
        """Groups at the end that are to have no rank."""
        return self.ranks[0].count(0)

    def curves(self, F: int, D: int, usual: Mapping[float, float]) -> list[Curve]:
        """Of each group that has a rank, in nats a token; `usual`: the median of each trial."""
        effects = np.array(
            [
                max(effect, LEAST_EFFECT * usual[share])
                for share, effect in zip(TRIAL_SIZES, self.effects, strict=True)
            ]
        )
        lost = [
            Curve.of(spectrum, 1.0, k=len(group), F=F, D=D).lost
            for spectrum, group in zip(self.spectra, self.groups, strict=True)
        ]
        at = np.array(
            [[curve[rank] for curve, rank in zip(lost, ranks, strict=True)] for ranks in self.ranks]
        )
        totals = np.maximum(at.sum(axis=1), np.finfo(np.float64).tiny)
        return [
            Curve(_effect(lost[n], at[:, n], effects * at[:, n] / totals), len(group), F, D)
            for n, group in enumerate(self.groups[: len(self.groups) - self.idle])
        ]


def _effect(lost: np.ndarray, at: np.ndarray, effect: np.ndarray) -> np.ndarray:
    """The effect of each of the errors `lost`, from that of those in `at`: straight lines in
    log scale."""
    points: list[tuple[float, float]] = []
    for x, y in sorted(zip(at, effect, strict=True)):
        if x > 0 and y > 0 and (not points or x > points[-1][0] * 1.0001):
            points.append((x, max(y, points[-1][1]) if points else y))
    found = np.zeros_like(lost)
    if not points:
        return found
    x, y = np.log(np.array(points)).T
    slopes = np.clip(np.diff(y) / np.diff(x), FLATTEST, STEEPEST) if len(x) > 1 else np.ones(1)
    some = lost > 0
    there = np.log(lost[some])
    value = np.interp(there, x, y)
    value += np.where(there < x[0], (there - x[0]) * slopes[0], 0.0)
    value += np.where(there > x[-1], (there - x[-1]) * slopes[-1], 0.0)
    found[some] = np.exp(value)
    return found


class Measurements:
    """All that was measured of one checkpoint with one text.

    Parameters
    ----------
    facts : mapping
        What it depends on: the checkpoint's fingerprint and the text's tokens.

    Attributes
    ----------
    tried : dict of (str, int, float) to float or None
        By matrix type, group size and size: the error of some layers' answers.
    looks : dict of (int, str, int) to Look
        By layer, matrix type and group size.
    compressed : dict of (int, int) to float
        By layer and n how far the answers move, in nats a token, where a token's last n experts
        do not run.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = {"trial_sizes": list(TRIAL_SIZES), "format": FORMAT, **facts}
        self.tried: dict[tuple[str, int, float], float | None] = {}
        self.looks: dict[tuple[int, str, int], Look] = {}
        self.compressed: dict[tuple[int, int], float] = {}

    @classmethod
    def load(cls, path: Path, facts: Mapping[str, Any], experts: int) -> Measurements:
        """What a file has of a model with so many experts a layer; nothing where there is none.

        Raises
        ------
        ArgumentError
            The file is none of these, or of another checkpoint or text.
        """
        found = cls(facts)
        if not path.exists():
            return found
        try:
            tensors = map_file(path)
            with safe_open(path, framework="numpy") as file:
                known = parse_json((file.metadata() or {})["molae_measurements"])
            wanted = json.loads(json.dumps(found.facts))
            others = sorted(k for k in wanted if known["facts"].get(k) != wanted[k])
            if known["facts"] == wanted:
                found._take(known, tensors, experts)
        except _DAMAGED as error:
            raise ArgumentError(
                f"stats: {path} holds no measurements of molae's ({error}); name another file"
            ) from error
        if known["facts"] != wanted:
            raise ArgumentError(
                f"stats: {path} was measured with another {' and '.join(others)}; name another "
                "file, or delete this one"
            )
        return found

    def _take(
        self, known: Mapping[str, Any], tensors: Mapping[str, np.ndarray], experts: int
    ) -> None:
        """What a file says; one of `_DAMAGED` where that cannot be."""
        for entry in known["entries"]:
            groups = [tuple(map(index, group)) for group in entry["groups"]]
            lengths = [index(length) for length in entry["lengths"]]
            values = np.array(tensors[entry["name"]])
            _need(sorted(i for group in groups for i in group) == list(range(experts)))
            _need(values.dtype == np.float64 and values.shape == (sum(lengths),))
            _need(len(lengths) == len(groups) and min(lengths) >= 0)
            _need(bool(np.isfinite(values).all()) and values.min(initial=0) >= 0)
            spectra = tuple(np.split(values, np.cumsum(lengths)[:-1]))
            ranks = [tuple(map(index, r)) for r in entry["ranks"]]
            effects = [_finite(effect) for effect in entry["effects"]]
            _need(len(ranks) == len(effects) == len(TRIAL_SIZES))
            for own in ranks:
                _need(len(own) == len(groups))
                _need(all(0 <= r <= n for r, n in zip(own, lengths, strict=True)))
            place = index(entry["layer"]), str(entry["kind"]), index(entry["k"])
            self.looks[place] = Look(groups, spectra, ranks, effects)
        for kind, k, size, value in known["tried"]:
            error = None if value is None else _finite(value)
            self.tried[str(kind), index(k), _finite(size)] = error
        for layer, n, effect in known["compressed"]:
            self.compressed[index(layer), index(n)] = _finite(effect)

    def save(self, path: Path) -> None:
        """Write all to a file, whole or not at all.

        Raises
        ------
        DestinationError
            It cannot be written.
        """
        tensors, entries = {}, []
        for (layer, kind, k), look in self.looks.items():
            name = f"{layer}.{kind}.{k}"
            tensors[name] = np.concatenate(look.spectra)
            entries.append(
                {
                    "name": name,
                    "layer": layer,
                    "kind": kind,
                    "k": k,
                    "groups": look.groups,
                    "lengths": [len(s) for s in look.spectra],
                    "ranks": look.ranks,
                    "effects": look.effects,
                }
            )
        tried = [[*place, error] for place, error in self.tried.items()]
        compressed = [[*place, effect] for place, effect in self.compressed.items()]
        known = {"entries": entries, "tried": tried, "compressed": compressed}
        text = json.dumps({"facts": self.facts, **known})
        data = save(tensors, {"molae_measurements": text})
        try:
            write_bytes_atomic(path, data)
        except DestinationError as error:
            raise DestinationError(f"stats: {error}") from error
