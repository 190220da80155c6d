"""The report of a finished run, kept beside its result as ``molae-report.json``."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molae.convert.journal import JOURNAL
from molae.errors import CheckpointError

if TYPE_CHECKING:
    from molae.fit import LayerDistillation

__all__ = [
    "PAGE",
    "REPORT",
    "CompressedRow",
    "HealRow",
    "Report",
    "Rows",
    "TypeRow",
    "WorkerRow",
    "sorted_rows",
    "total_error",
    "worker_rows",
]

REPORT = "molae-report.json"

#: The same facts as a page to look at, made of the report alone.
PAGE = "molae-report.html"

REPORT_VERSION = 1


@dataclass(frozen=True)
class TypeRow:
    """What was done to one layer's matrix type.

    Attributes
    ----------
    layer : int
    kind : str
    groups : list of list of int
    ranks : list of (int or None)
        One a group; None for a group left dense.
    stored_numbers, dense_numbers : int
        Numbers stored now (permutations not counted) and before.
    error : float
        Relative Frobenius error of the whole type, as stored.
    expert_error_min, expert_error_max : float
        The same for the best and the worst expert.
    discarded_energy : list of float
        One a group: share of the squared singular values beyond the rank. 0 for dense groups.
    effective_rank : list of (float or None)
    kernel_dim : list of (int or None)
        One a group: dimension of the common kernel of its experts. None for dense groups.
    used_svd : list of bool
        One a group: whether the Gram matrix was too coarse and a direct SVD was used.
    seconds : float
        Time of the factorization.
    output_error : float or None
        Relative error of the type's outputs on the calibration text, to first order and before
        the refit; None without a text.
    layer_error : list of float or None
        Relative error of the layer's answers on the calibration text before this type's refit and
        after each; None where it had none.
    tokens : list of int or None
        Of the calibration text, by expert.
    energy_curve : list of float or None
        Share of the squared singular values of all groups together beyond i/32 of the largest
        rank, i = 0 to 32, to four digits; None where no group is latent.
    effects : list of [float, float] or None
        How far the model's answers moved, in nats a token, while this type alone was this small:
        pairs of size and effect. None where that was not tried.
    foreseen : float or None
        The same at the ranks that were taken, read off between these; no refit is in it.
    """

    layer: int
    kind: str
    groups: list[list[int]]
    ranks: list[int | None]
    stored_numbers: int
    dense_numbers: int
    error: float
    expert_error_min: float
    expert_error_max: float
    discarded_energy: list[float]
    effective_rank: list[float | None]
    kernel_dim: list[int | None]
    used_svd: list[bool]
    seconds: float
    output_error: float | None = None
    layer_error: list[float] | None = None
    tokens: list[int] | None = None
    energy_curve: list[float] | None = None
    effects: list[list[float]] | None = None
    foreseen: float | None = None


@dataclass(frozen=True)
class CompressedRow:
    """How one layer's compressed experts were fitted.

    Attributes
    ----------
    layer, num_compressed : int
    layer_error : list of float
        Relative error of the layer's answers on the calibration text without them, after the
        linear part of the fit, and after all of it.
    tokens : int
        Of the text that they were fitted to.
    seconds : float
    """

    layer: int
    num_compressed: int
    layer_error: list[float]
    tokens: int
    seconds: float


@dataclass(frozen=True)
class HealRow:
    """How one layer was trained to answer as the original's does.

    Attributes
    ----------
    layer : int
    layer_error : list of float
        Relative error of the layer's answers on the calibration text before and after.
    losses : list of [int, float]
        The same on the tokens held out, by steps done.
    steps : int
        That were done; fewer than asked for where the layer no longer gained.
    seconds : float
    """

    layer: int
    layer_error: list[float]
    losses: list[list[float]]
    steps: int
    seconds: float

    @classmethod
    def of(cls, layer: int, found: LayerDistillation, seconds: float) -> HealRow:
        losses = [[step, loss] for step, loss in found.losses]
        return cls(layer, found.error.tolist(), losses, found.steps, seconds)


@dataclass(frozen=True)
class WorkerRow:
    """One of several processes that computed a result.

    Attributes
    ----------
    address, host : str
        Where it was.
    threads : int
        That it computed with.
    build : dict
        Its BLAS, BLAS core, instruction set and NumPy.
    differs : list of str
        Where that is not what the run was planned with. Its files may then differ in their last
        bits from what one machine alone would have written.
    files : list of str
        That it computed.
    """

    address: str
    host: str
    threads: int
    build: dict[str, Any]
    differs: list[str]
    files: list[str]


#: Rows of a shard by the name of what tells them apart.
ROWS: Mapping[str, tuple[str, type]] = {
    "kind": ("rows", TypeRow),
    "num_compressed": ("compressed", CompressedRow),
    "losses": ("healed", HealRow),
}


#: Of what type the rows in each entry of the report are.
_ROW_TYPES: Mapping[str, type] = {**dict(ROWS.values()), "workers": WorkerRow}

#: Rows by the entry of the report that they belong to.
Rows = Mapping[str, tuple[Any, ...]]


def sorted_rows(found: Sequence[Mapping[str, Any]]) -> Rows:
    """From those of a journal."""
    rows: dict[str, list[Any]] = {name: [] for name, _ in ROWS.values()}
    for row in found:
        name, made = next(own for mark, own in ROWS.items() if mark in row)
        rows[name].append(made(**row))
    return {name: tuple(own) for name, own in rows.items()}


def worker_rows(entries: Sequence[Mapping[str, Any]]) -> tuple[WorkerRow, ...]:
    """From the lines of a journal; empty where one process did it all."""
    found: dict[str, WorkerRow] = {}
    for entry in entries:
        if "worker" in entry:
            address = entry["worker"]["address"]
            row = found.setdefault(address, WorkerRow(**entry["worker"], files=[]))
            row.files.append(entry["file"])
    return tuple(found[address] for address in sorted(found))


def total_error(rows: Sequence[TypeRow]) -> float:
    """Root mean square of the relative errors of several layers and types; 0 of none.

    Each counts at its own scale, so that a layer with large weights does not hide the others.
    """
    return math.sqrt(sum(row.error**2 for row in rows) / len(rows)) if rows else 0.0


@dataclass(frozen=True)
class Report:
    """Facts about a finished run.

    Attributes
    ----------
    kind : {'convert', 'heal', 'materialize'}
    versions : dict
        Of molae, Python, NumPy, and the BLAS and instruction set in use.
    settings : dict
        As asked for; empty for 'materialize'.
    plan : dict
        What `Plan.to_dict` says: sizes, stored numbers, FLOPs.
    inputs : dict
        The source: ``path``, ``fingerprint``, and ``sha256`` by shard: of the tensors copied
        into it, and of each layer's matrix type (the experts' matrices one after the other).
    rows : tuple of TypeRow
        One for each layer and type in molae's form; empty for 'materialize'.
    files : dict
        Everything the run wrote but this report and its page: bytes and SHA-256.
    seconds : float
        Wall time of this run; where it was resumed, of its last part.
    compressed : tuple of CompressedRow
        One for each layer that has compressed experts.
    healed : tuple of HealRow
        One for each layer that was trained: of 'heal', and of 'convert' where it was asked for.
    workers : tuple of WorkerRow
        One for each process that computed files, where these were others than the one that planned
        the run.
    """

    kind: str
    versions: Mapping[str, Any]
    settings: Mapping[str, Any]
    plan: Mapping[str, Any]
    inputs: Mapping[str, Any]
    rows: tuple[TypeRow, ...]
    files: Mapping[str, Mapping[str, Any]]
    seconds: float
    compressed: tuple[CompressedRow, ...] = ()
    healed: tuple[HealRow, ...] = ()
    workers: tuple[WorkerRow, ...] = ()

    @property
    def mixed(self) -> bool:
        """Whether machines computed that differ in what the last bits depend on."""
        return any(row.differs for row in self.workers)

    def error(self, kind: str | None = None) -> float:
        """`total_error` of one matrix type, or of all that are in molae's form."""
        return total_error([row for row in self.rows if kind in (None, row.kind)])

    def little_read(self) -> tuple[int, int] | None:
        """Experts that fewer tokens of the calibration text reached than the model is wide, and
        experts in all; None without a text. Their fit leans on their group's moments."""
        tokens = {row.layer: row.tokens for row in self.rows if row.tokens is not None}
        if not tokens:
            return None
        width = self.plan["letters"]["D"]
        counts = [count for own in tokens.values() for count in own]
        return sum(count < width for count in counts), len(counts)

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"molae_report": REPORT_VERSION}
        for entry in dataclasses.fields(self):
            out[entry.name] = getattr(self, entry.name)
        for name in _ROW_TYPES:
            out[name] = [dataclasses.asdict(row) for row in getattr(self, name)]
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report written by `to_dict`.

        Raises
        ------
        CheckpointError
            It is not a report, or one that this molae cannot read.
        """
        version = data.get("molae_report")
        if version != REPORT_VERSION:
            raise CheckpointError(
                f"molae_report: this molae reads version {REPORT_VERSION}, got {version!r}"
            )
        try:
            names = [f.name for f in dataclasses.fields(cls) if f.name not in _ROW_TYPES]
            values = {name: data[name] for name in names}
            for name, row in _ROW_TYPES.items():
                given = data[name] if name == "rows" else data.get(name, ())
                values[name] = tuple(row(**own) for own in given)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{REPORT}: missing or unknown entry: {error}") from error
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Report:
        """Read a report; `path` may be the folder of the result."""
        path = Path(path)
        path = path / REPORT if path.is_dir() else path
        try:
            data = json.loads(path.read_bytes())
        except FileNotFoundError:
            if (path.parent / JOURNAL).exists():
                raise CheckpointError(
                    f"{path}: not there yet: the run is not finished; the command that began it "
                    "goes on where it stopped"
                ) from None
            raise CheckpointError(f"{path}: no such report; is this a result of molae?") from None
        except ValueError as error:
            raise CheckpointError(
                f"{path}: not JSON: {error}; was it cut short on its way? Copy it again, or run "
                "again what wrote it"
            ) from error
        if not isinstance(data, dict):
            raise CheckpointError(f"{path}: not a report of molae's: no JSON object")
        return cls.from_dict(data)
