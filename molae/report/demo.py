"""The table of ``molae demo``."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from molae.config import TYPES
from molae.demo.run import Demo

__all__ = ["demo_view"]


def demo_view(demo: Demo) -> RenderableType:
    """One line for the original and for each result."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("")
    names = ["size reached", "bytes", "FLOPs", "error gate", "up", "down"]
    if demo.evaluated:
        names += ["perplexity", "rise"]
    for name in names:
        table.add_column(name, justify="right")
    original = demo.rows[0].perplexity or 1.0
    for row in demo.rows:
        cells = [
            f"{row.size:.4f}",
            f"{row.bytes:,}",
            f"{row.flops_ratio:.3f}",
            *(f"{row.errors[kind]:.3f}" if kind in row.errors else "0" for kind in TYPES),
        ]
        if row.perplexity is not None:
            cells += [f"{row.perplexity:.2f} ± {row.perplexity_se:.2f}"]
            cells += [f"{row.perplexity / original - 1:+.1%}"]
        table.add_row(row.title, *cells)
    parts: list[RenderableType] = [
        Text("A small trained OLMoE, converted without data, and multiplied out again."),
        table,
        Text(
            "size: share of the experts' numbers. FLOPs: operations a token needs in the "
            "experts, over the original's.\nerror: relative Frobenius error of the weights."
        ),
    ]
    if demo.evaluated:
        parts += [
            Text(
                f"perplexity: on {demo.tokens:,} tokens of held-out text, ± its standard error; "
                "all rows read the same text, so their differences are surer than that."
            )
        ]
    else:
        parts += [Text("For the perplexity of each, install: pip install 'molae[hf]'")]
    parts += [Text(reason) for reason in demo.refused]
    if demo.out is not None:
        parts += [Text(f"The checkpoints are in {demo.out}")]
    return Group(*parts)
