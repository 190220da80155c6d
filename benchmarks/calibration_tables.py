"""Tables of the case 'calibration'."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["calibration"]

Result = Mapping[str, Any]
Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]


def calibration(found: Result, table: Table) -> Iterator[str]:
    """What was fitted, where the time goes, goals."""
    for row in found["rows"]:
        yield _what(row)
        yield _phases(row, table)
        yield _goals(row, table)


def _what(row: Result) -> str:
    ranks = ", ".join(f"{kind} {'/'.join(map(str, R))}" for kind, R in row["ranks"].items())
    errors = ", ".join(
        f"{kind} {' → '.join(f'{e:.4f}' for e in errors)}"
        for kind, errors in row["layer_error"].items()
    )
    rounds = "1 round" if row["rounds"] == 1 else f"medians of {row['rounds']} rounds"
    return (
        f"One layer fitted to a text: {row['shape']}, {row['E']} experts of {row['F']}×{row['D']} "
        f"in {row['dtype']}, {row['K']} a token,\n{row['N']:,} tokens ({row['fewest_rows']:,} to "
        f"{row['most_rows']:,} an expert), size {row['size']:g}, groups of {row['k']} and 1, "
        f"ranks: {ranks};\n{rounds}. Error of the layer before and after refits: {errors}; the "
        f"answers of torch's layer are {row['apart']:.4f} away."
    )


def _phases(row: Result, table: Table) -> str:
    cells = [
        [
            phase["phase"],
            _time(phase["seconds"]),
            _time(phase["bound_s"]),
            f"{phase['seconds'] / phase['bound_s']:.2f}×",
            "" if phase["peak_share"] is None else f"{phase['peak_share']:.0%}",
        ]
        for phase in row["phases"]
    ]
    total = row["times"]["molae"]["median_s"]
    cells.append(["all", _time(total), _time(row["bound_s"]), f"**{row['over_bound']:.2f}×**", ""])
    names = ["molae.fit.fit_layer", "s", "bound, s", "over it", "of peak"]
    paces = ", ".join(f"{name} {value:,.0f}" for name, value in row["gflops"].items())
    note = (
        f"Bound: products at the pace of a big one, {paces} GFLOP/s; eigenvectors, QR and "
        "Cholesky factors at LAPACK's own time."
    )
    return f"{table(names, cells)}\n\n{note}"


def _goals(row: Result, table: Table) -> str:
    theirs, against = row["times"]["PyTorch"]["median_s"], row["against"]
    over, bound_goal, bound_met = row["goals"]["over the bound"]
    faster, torch_goal, torch_met = row["goals"]["faster than torch"]
    share, memory_goal, memory_met = row["goals"]["over the estimate"]
    spread = f" ({against['ratio_low']:.2f}–{against['ratio_high']:.2f})"
    cells = [
        ["time over the bound", f"{over:.2f}×", f"at most {bound_goal:g}", _met(bound_met)],
        [
            f"times faster than the same in torch ({_time(theirs)} s)",
            f"{faster:.2f}×{spread if row['rounds'] > 1 else ''}",
            f"at least {torch_goal:g}",
            _met(torch_met),
        ],
        [
            f"anonymous memory ({row['memory_bytes'] / 1e6:,.0f} MB) over the plan's estimate "
            f"({row['estimated_bytes'] / 1e6:,.0f} MB)",
            f"{share:.2f}×",
            f"at most {memory_goal:g}",
            _met(memory_met),
        ],
    ]
    return table(["", "", "goal", ""], cells)


def _met(met: bool) -> str:
    return "reached" if met else "missed"


def _time(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3f}"
