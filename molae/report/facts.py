"""What a report says between its lines: names, figures of the headline, warnings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from molae.config import TYPES
from molae.convert import Report, TypeRow
from molae.report.units import percent, whole

__all__ = [
    "active_numbers",
    "by_layer",
    "calibrated",
    "final_errors",
    "foreseen",
    "kinds_of",
    "layer_errors",
    "mean_square",
    "mixed",
    "notes",
    "refit_ends",
    "source_title",
]

#: A layer whose answers are this far off is named.
FAR_OFF = 0.5


def source_title(plan: Mapping[str, Any]) -> str:
    """The source's hub id, or the name of its folder: no paths of the machine."""
    source = str(plan["source"])
    return str(plan.get("source_title") or PurePath(source).name or source)


def active_numbers(stored: Mapping[str, Any]) -> float:
    """Numbers that one token is multiplied with, as `molae inspect` counts them: two operations
    each in the experts, and all that is not an expert."""
    return float(stored["other_numbers"] + stored["flops_per_token"] / 2)


def calibrated(report: Report) -> bool:
    """Whether a text ran through the model."""
    return bool(report.settings.get("calibration"))


def kinds_of(report: Report) -> list[str]:
    """Matrix types in molae's form, in their usual order."""
    found = {row.kind for row in report.rows}
    return [kind for kind in TYPES if kind in found]


def by_layer(report: Report) -> dict[int, dict[str, TypeRow]]:
    """Rows by layer and type, the layers in order."""
    found: dict[int, dict[str, TypeRow]] = {}
    for row in sorted(report.rows, key=lambda row: row.layer):
        found.setdefault(row.layer, {})[row.kind] = row
    return found


def mean_square(values: Iterable[float]) -> float:
    """Root mean square; 0 of none."""
    squares = [value**2 for value in values]
    return math.sqrt(sum(squares) / len(squares)) if squares else 0.0


def refit_ends(rows: Mapping[str, TypeRow]) -> tuple[float, float] | None:
    """A layer's error before the first refit and after the last: down, up and down in turn."""
    down, up = (rows[k].layer_error if k in rows else None for k in ("down_proj", "up_proj"))
    found = down or up
    return (found[0], found[-1]) if found else None


def layer_errors(report: Report) -> dict[int, tuple[float, float]]:
    """By layer the error of its answers before and after the refits, where there were any."""
    ends = {layer: refit_ends(rows) for layer, rows in by_layer(report).items()}
    return {layer: both for layer, both in ends.items() if both is not None}


def final_errors(report: Report) -> dict[int, float]:
    """By layer the error of its answers on the calibration text when all was done."""
    found = {layer: after for layer, (_, after) in layer_errors(report).items()}
    found |= {row.layer: row.layer_error[-1] for row in report.healed}
    found |= {row.layer: row.layer_error[-1] for row in report.compressed}
    return dict(sorted(found.items()))


def foreseen(report: Report) -> float | None:
    """Nats a token that all types together were foreseen to cost, each as if alone."""
    found = [row.foreseen for row in report.rows]
    if not found or any(value is None for value in found):
        return None
    return sum(value for value in found if value is not None)


def notes(report: Report) -> list[str]:
    """What a person should know before the result is used."""
    found: list[str] = []
    plan = report.plan
    if report.kind == "materialize":
        found.append("The result has the original's full size: what the disk had saved is lost.")
    if report.kind == "convert" and plan["flops_ratio"] > 1:
        found.append(
            f"A token needs more operations than before ({plan['flops_ratio']:.3f} times): this "
            "saves memory, not work."
        )
    if encoding := plan.get("encoding"):
        found.append(
            f"The source holds tensors in {str(encoding).upper()}; all were decoded to "
            f"{plan['dtype']}, of which all sizes here are."
        )
    if report.mixed:
        found.append(
            "The machines that computed it were of several kinds, as was allowed: another run, or "
            "one machine alone, may give other last bits."
        )
    found += _of_tokens(report)
    found += _of_groups(report)
    found += _of_layers(report)
    found += mixed(report)
    return found


def mixed(report: Report) -> list[str]:
    """That machines of several kinds have computed, where that was allowed and is so."""
    differing = [row for row in report.workers if row.differs]
    if not differing:
        return []
    kinds = "; ".join(sorted({", ".join(row.differs) for row in differing}))
    return [
        "The workers that computed the layers were of several kinds, as was allowed: another run, "
        f"or one machine alone, may give other last bits. {len(differing)} of "
        f"{len(report.workers)} differ from where the run was planned: {kinds}."
    ]


def _of_tokens(report: Report) -> list[str]:
    found: list[str] = []
    little = report.little_read()
    if little and little[0]:
        found.append(
            f"{whole(little[0])} of {whole(little[1])} experts read fewer tokens of the "
            f"calibration text than the model is wide ({report.plan['letters']['D']:,}). Their "
            "fit leans on their group's; more text is better."
        )
    tokens = {row.layer: row.tokens for row in report.rows if row.tokens is not None}
    idle = sum(own.count(0) for own in tokens.values())
    if idle:
        found.append(f"{whole(idle)} of these read none of it.")
    return found


def _of_groups(report: Report) -> list[str]:
    found: list[str] = []
    ranks = [rank for row in report.rows for rank in row.ranks]
    if gone := ranks.count(0):
        found.append(
            f"{whole(gone)} of {whole(len(ranks))} groups of experts have rank 0: they answer "
            "nothing."
        )
    if dense := ranks.count(None):
        found.append(
            f"{whole(dense)} of {whole(len(ranks))} groups were left as they are in the source."
        )
    if svd := sum(any(row.used_svd) for row in report.rows):
        found.append(
            f"A direct singular value decomposition was needed for {whole(svd)} of "
            f"{whole(len(report.rows))} stacks, as their Gram matrix was too coarse."
        )
    return found


def _of_layers(report: Report) -> list[str]:
    found: list[str] = []
    far = [layer for layer, error in final_errors(report).items() if error > FAR_OFF]
    if far:
        found.append(
            f"The answers of {_layers(far)} are more than {percent(FAR_OFF)} off on the "
            "calibration text."
        )
    worse = [layer for layer, (before, after) in layer_errors(report).items() if after > before]
    if worse:
        found.append(f"Refits made the answers of {_layers(worse)} no better.")
    stuck = [row.layer for row in report.healed if row.layer_error[-1] >= row.layer_error[0]]
    if stuck:
        found.append(f"Training made the answers of {_layers(stuck)} no better.")
    return found


def _layers(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:8])
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"layer{'s' if len(numbers) > 1 else ''} {shown}{more}"
