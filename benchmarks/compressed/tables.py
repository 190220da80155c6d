"""The comparison as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.compressed.forms import title
from benchmarks.tables import table

__all__ = ["about", "compressed"]

Result = Mapping[str, Any]


def compressed(result: Result) -> str:
    """All tables of one run."""
    sizes = list(dict.fromkeys(row["size"] for row in result["rows"]))
    parts = [about(result)]
    parts += [_untrained(result, size) for size in sizes]
    if any(row["stage"] in ("distilled", "tuned", "from-1") for row in result["rows"]):
        parts.append(_trained(result, sizes))
    return "\n\n".join(parts)


def about(result: Result) -> str:
    """Which model, and which texts; the first row is the original."""
    model, names = result["model"], result["names"]
    return (
        f"Model: {' '.join(names[key] for key in ('model', 'trained') if key in names)} "
        f"({model['kind']}, {model['parameters'] / 1e6:.1f} M parameters, "
        f"{model['experts']} experts, {model['num_experts_per_tok']} a token). Perplexity "
        f"{result['rows'][0]['perplexity']:.2f} on {result['test_tokens']:,} tokens of "
        f"{names['test']}; {result['calibration_tokens']:,} tokens of {names['calibration']} to "
        "calibrate with."
    )


def _untrained(result: Result, size: float) -> str:
    rows = [r for r in result["rows"] if r["size"] == size and r["stage"] in ("", "fitted")]
    counts = sorted({row["n"] for row in rows if row["n"]})
    names = ["in the place of the last n experts"]
    for n in counts:
        names += [f"n = {n}: rise", "closed", "active"]
    whole = next(row for row in rows if row["n"] == 0)
    cells = []
    for form in dict.fromkeys(row["form"] for row in rows if row["n"]):
        line = [title(form, "")]
        for n in counts:
            row = next((r for r in rows if (r["form"], r["n"]) == (form, n)), None)
            line += ["", "", ""] if row is None else _cells(row, whole)
        cells.append(line)
    what = "The original" if size == 1 else f"Latent experts of size {size:g}"
    note = (
        f"{what}, without training: perplexity {whole['perplexity']:.2f} ({whole['rise']:+.2%}) "
        f"with all K experts, {whole['active_parameters']:,} active parameters. Rise: of the "
        "perplexity over the original's, with its standard error by paired windows. Closed: share "
        "of the loss between plain top-(K − n) and all K that is won back. Active: parameters a "
        "token needs, over those with all K."
    )
    return f"{note}\n\n{table(names, cells)}"


def _cells(row: Mapping[str, Any], whole: Mapping[str, Any]) -> list[str]:
    closed = row.get("closed")
    return [
        f"{row['rise']:+.2%} ± {row['rise_se']:.2%}",
        "" if closed is None else f"{closed:.0%}",
        f"{row['active_parameters'] / whole['active_parameters']:.3f}",
    ]


def _trained(result: Result, sizes: list[float]) -> str:
    rows = [r for r in result["rows"] if r["stage"] in ("distilled", "tuned", "from-1")]
    cells = []
    for form, stage in dict.fromkeys((row["form"], row["stage"]) for row in rows):
        line = [title(form, stage)]
        for size in sizes:
            row = next(
                (r for r in rows if (r["form"], r["stage"], r["size"]) == (form, stage, size)), None
            )
            full = next((r for r in rows if (r["form"], r["size"]) == ("full", size)), None)
            if row is None:
                line += ["", "", ""]
                continue
            closed = row.get("closed")
            against = ""
            if full is not None and stage != "distilled":
                against = f"{row['perplexity'] / full['perplexity']:.4f}"
            line += [
                f"{row['rise']:+.2%} ± {row['rise_se']:.2%}",
                "" if closed is None else f"{closed:.0%}",
                against,
            ]
        cells.append(line)
    names = [f"n = {result['model']['num_experts_per_tok'] // 2}"]
    for size in sizes:
        names += [f"size {size:g}: rise", "closed", "over all K tuned"]
    made = result["training"]
    note = (
        f"With {made['steps']} steps of {made['batch']} rows of {made['length']} tokens of the "
        "calibration's text. Distilled: only what acts in the experts' place learns, from the "
        f"original's distributions. Fine-tuned: all weights, at rate {made['rate']:g}, on the "
        "text; the last column is the perplexity over that of the model with all K experts and the "
        "same steps."
    )
    return f"{note}\n\n{table(names, cells)}"
