"""``python -m benchmarks.heal.plot``: perplexity over size, for each result."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.heal import figures
from benchmarks.heal.rows import ROWS
from benchmarks.pictures import STYLE, write

__all__ = ["draw"]

#: Results, and the pictures of them in docs.
PICTURES = {"heal.json": "healing.svg", "heal_second.json": "healing_second.svg"}

LOOKS = {
    "calibrated": ("0.35", "o"), "layers": ("#7aa6c2", "s"), "both": ("#e0a458", "^"),
    "tuned": ("#8c1c13", "D"), "reap-tuned": ("0.6", "x"),
}  # fmt: skip


def draw(result: Mapping[str, Any]) -> Figure:
    """A line a row, dashed for pruning."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots()
        sizes = list(dict.fromkeys(row["size"] for row in result["rows"] if row["size"] < 1))
        most = 0.0
        for name, (color, mark) in LOOKS.items():
            found = [row for size in sizes if (row := figures.find(result, name, size))]
            if not found:
                continue
            most = max(most, *(row["rise"] for row in found))
            axes.errorbar(
                [row["size"] for row in found],
                [row["rise"] for row in found],
                [row["rise_se"] for row in found],
                color=color, marker=mark, markersize=5, linewidth=1.4, elinewidth=0.8,
                linestyle="--" if name.startswith("reap") else "-", label=ROWS[name].title,
            )  # fmt: skip
        axes.invert_xaxis()
        axes.set_xticks(sizes)
        axes.set_yscale("symlog", linthresh=0.02)
        axes.set_yticks([-0.02, -0.01, 0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.minorticks_off()
        least = min(0.0, *(row.get("rise", 0.0) for row in result["rows"]))
        axes.set_ylim(1.2 * least - 0.001, 1.2 * most)
        axes.set_xlabel("size: share of the experts' numbers")
        axes.set_ylabel("rise of the perplexity")
        axes.grid(True, color="0.9", linewidth=0.6)
        axes.set_title(f"Model: {result['names']['model']}.", fontsize=8, loc="left")
        figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=2)
        return figure


def main(argv: list[str] | None = None) -> int:
    return write("python -m benchmarks.heal.plot", PICTURES, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
