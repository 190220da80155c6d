"""``python -m benchmarks.compressed.plot``: perplexity over active parameters, for each result."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.compressed.forms import title
from benchmarks.pictures import STYLE, write

__all__ = ["draw"]

#: Results, and the pictures of them in docs.
PICTURES = {
    "compressed.json": "compressed.svg",
    "compressed_second.json": "compressed_second.svg",
}

LOOKS = {
    "stock": ("0.6", "x"), "plain": ("0.35", "."), "vectors": ("#7aa6c2", "o"),
    "additive": ("#e0a458", "s"), "narrow-8": ("#8c1c13", "D"), "narrow-4": ("#c8553d", "^"),
}  # fmt: skip


def draw(result: Mapping[str, Any]) -> Figure:
    """A line a form, from n = 1 to K − 1; dashed on latent experts, hollow where distilled."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots()
        whole = result["rows"][0]["active_parameters"]
        sizes = list(dict.fromkeys(row["size"] for row in result["rows"]))
        for size in sizes:
            rows = [r for r in result["rows"] if r["size"] == size]
            first = rows[0]
            for form in (form for form in LOOKS if any(r["form"] == form for r in rows)):
                color, mark = LOOKS[form]
                line = [first] + [
                    r for r in rows if r["form"] == form and r["stage"] in ("", "fitted")
                ]
                axes.plot(
                    [r["active_parameters"] / whole for r in line],
                    [r["rise"] for r in line],
                    color=color, marker=mark, markersize=5, linewidth=1.4,
                    linestyle="-" if size == sizes[0] else "--",
                    label=title(form, "") if size == sizes[0] else None,
                )  # fmt: skip
                for r in rows:
                    if r["form"] == form and r["stage"] == "distilled":
                        axes.plot(
                            r["active_parameters"] / whole, r["rise"], marker=mark, markersize=8,
                            markerfacecolor="none", color=color,
                        )  # fmt: skip
        axes.invert_xaxis()
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_yscale("symlog", linthresh=0.02)
        axes.set_yticks([0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.minorticks_off()
        axes.set_ylim(-0.001, 1.2 * max(row["rise"] for row in result["rows"]))
        axes.set_xlabel("active parameters of a token, over the original's")
        axes.set_ylabel("rise of the perplexity")
        axes.grid(True, color="0.9", linewidth=0.6)
        said = [f"Model: {result['names']['model']}."]
        if len(sizes) > 1:
            said.append(f"Dashed: latent experts of size {sizes[-1]:g}.")
        axes.set_title(" ".join([*said, "Hollow: distilled."]), fontsize=8, loc="left")
        figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=2)
        return figure


def main(argv: list[str] | None = None) -> int:
    return write("python -m benchmarks.compressed.plot", PICTURES, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
