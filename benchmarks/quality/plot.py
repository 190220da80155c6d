"""``python -m benchmarks.quality.plot``: the comparison as a picture for each result."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.pictures import STYLE, write
from benchmarks.quality.titles import TITLES

__all__ = ["draw"]

#: Results, and the pictures of them in docs.
PICTURES = {"quality.json": "quality.svg", "quality_second.json": "quality_second.svg"}

#: molae's own rows stand out; the others are told apart by their marks.
OWN = {"blind": ("#7aa6c2", "o"), "even": ("#e0a458", "s"), "one-shot": ("#c8553d", "^"),
       "calibrated": ("#8c1c13", "D")}  # fmt: skip
OTHERS = {"molae": "v", "mobe": "*", "svd-llm": "x", "d2-moe": "+", "reap": "1", "hc-smoe": "2"}

#: Rises below this are drawn at it: the scale is logarithmic.
LEAST = 1e-4


def draw(result: Mapping[str, Any]) -> Figure:
    """Rise of the perplexity over the share of the numbers that is kept."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes = figure.subplots()
        for name in dict.fromkeys(row["name"] for row in result["rows"]):
            rows = [r for r in result["rows"] if r["name"] == name and "loss" in r]
            if not rows:
                continue
            color, mark = OWN.get(name, ("0.55", OTHERS.get(name, ".")))
            axes.errorbar(
                [row["size"] for row in rows],
                [max(row["rise"], LEAST) for row in rows],
                yerr=[
                    [max(0.0, max(r["rise"], LEAST) - max(r["rise"] - r["rise_se"], LEAST))
                     for r in rows],
                    [r["rise_se"] for r in rows],
                ],
                color=color, marker=mark, markersize=5, linewidth=1.8 if name in OWN else 0.9,
                elinewidth=0.7, label=TITLES[name],
            )  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
        axes.invert_xaxis()
        axes.set_xlabel("share of the experts' numbers that is stored")
        axes.set_ylabel("rise of the perplexity")
        axes.grid(True, which="major", color="0.9", linewidth=0.6)
        axes.set_title(f"Model: {result['names']['model']}", fontsize=9, loc="left")
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        return figure


def main(argv: list[str] | None = None) -> int:
    return write("python -m benchmarks.quality.plot", PICTURES, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
