"""The report of a finished run, kept beside its result as ``molae-report.json``."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from molae.errors import CheckpointError, shorten
from molae.io import parse_json

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
#: There while the run is not finished; see `molae.convert.journal`.
JOURNAL = ".molae-journal.jsonl"

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
        Its BLAS, BLAS core, instruction set, NumPy, and the hash of molae's extension.
    differs : list of str
        Where that is not what the run was planned with. Its files may then differ in their last
        bits from what one machine alone would have written.
    files : list of str
        That it computed.
    """

    address: str
    host: str
    threads: int
    build: dict[str, str]
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


def is_row(value: Any) -> bool:
    """Whether `value` is a row as a journal or a report holds it."""
    if not isinstance(value, dict):
        return False
    made = next((own for mark, (_, own) in ROWS.items() if mark in value), None)
    return made is not None and _is_made(made, value)


def is_worker(value: Any) -> bool:
    """Whether a journal's line can say that of who computed a file."""
    return isinstance(value, dict) and _is_made(WorkerRow, {**value, "files": []})


def _is_made(made: type, value: Any) -> bool:
    """Whether a dataclass of rows can be made of `value`."""
    if not isinstance(value, dict):
        return False
    entries = {entry.name: entry for entry in dataclasses.fields(made)}
    needed = [n for n, entry in entries.items() if entry.default is dataclasses.MISSING]
    return (
        set(needed) <= set(value) <= set(entries)
        and all(_fits(own, _hints(made)[name]) for name, own in value.items())
    )  # fmt: skip


@cache
def _hints(made: type) -> dict[str, Any]:
    return get_type_hints(made)


def _fits(value: Any, hint: Any) -> bool:
    """Whether what JSON gave is of a field's type."""
    inner = get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(own, inner[0]) for own in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(_fits(own, inner[1]) for own in value.values())
    if inner:
        return any(_fits(value, own) for own in inner)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


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
        version = data.get("molae_report") if isinstance(data, Mapping) else None
        if version != REPORT_VERSION:
            raise CheckpointError(
                f"molae_report: this molae reads version {REPORT_VERSION}, got {shorten(version)}"
            )
        entries = [entry.name for entry in dataclasses.fields(cls)]
        try:
            values = {name: data[name] for name in entries if name not in _ROW_TYPES}
            for name, made in _ROW_TYPES.items():
                given = data[name] if name == "rows" else data.get(name, ())
                values[name] = tuple(made(**own) for own in given)
                if not all(_is_made(made, own) for own in given):
                    raise TypeError(f"{name} has a row that cannot be")
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{REPORT}: missing or unknown entry: {error}") from error
        for name, value in values.items():
            wanted: Any = {"kind": str, "seconds": (int, float)}.get(name, Mapping)
            if name not in _ROW_TYPES and not isinstance(value, wanted):
                raise CheckpointError(f"{REPORT}: entry {name!r} is {shorten(value)}")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Report:
        """Read a report; `path` may be the folder of the result."""
        path = Path(path)
        path = path / REPORT if path.is_dir() else path
        try:
            data = parse_json(path.read_bytes())
        except FileNotFoundError:
            if (path.parent / JOURNAL).exists():
                raise CheckpointError(
                    f"{path}: not there yet: the run is not finished; the command that began it "
                    "goes on where it stopped"
                ) from None
            raise CheckpointError(f"{path}: no such report; is this a result of molae?") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise CheckpointError(
                f"{path}: not JSON: {error}; was it cut short on its way? Copy it again, or run "
                "again what wrote it"
            ) from error
        if not isinstance(data, dict):
            raise CheckpointError(f"{path}: not a report of molae's: no JSON object")
        return cls.from_dict(data)
