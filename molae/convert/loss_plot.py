"""How the loss of each layer fell, as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from molae.convert.report import HealRow
from molae.io.writer import write_bytes_atomic

__all__ = ["PICTURE", "plot_losses"]

PICTURE = "molae-healing.png"


def plot_losses(path: Path, rows: Sequence[HealRow]) -> bool:
    """One line a layer, early layers dark; nothing where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return False
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    colors = colormaps["viridis"]
    few = len(rows) <= 8
    for at, row in enumerate(rows):
        color = colors(0.9 * at / max(1, len(rows) - 1))
        named = few or row in (rows[0], rows[-1])
        label = f"layer {row.layer}" if named else None
        steps, losses = zip(*row.losses, strict=True)
        axes.plot(steps, losses, color=color, marker="o", markersize=3, label=label)
    axes.set(xlabel="step", ylabel="relative error, tokens held out", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    write_bytes_atomic(path, picture.getvalue())
    return True
