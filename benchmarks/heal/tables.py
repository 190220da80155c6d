"""The comparison as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.compressed.tables import about
from benchmarks.heal import figures
from benchmarks.heal.rows import ROWS, STEPS
from benchmarks.quality.tables import rise_text
from benchmarks.tables import table

__all__ = ["heal"]

Result = Mapping[str, Any]


def heal(result: Result) -> str:
    """All tables of one run, once its figures are found to be made of each other."""
    figures.check(result)
    sizes = list(dict.fromkeys(row["size"] for row in result["rows"] if row["size"] < 1))
    names = list(dict.fromkeys(row["name"] for row in result["rows"]))
    parts = [about(result), _rises(result, names, sizes)]
    if "original-tuned" in names:
        parts.append(_tuned(result, names, sizes))
    if any(row.get("steps") for row in result["rows"]):
        parts.append(_costs(result, sizes))
    return "\n\n".join(parts)


def _rises(result: Result, names: list[str], sizes: list[float]) -> str:
    cells = []
    for name in (n for n in names if ROWS[n].sized):
        line = [ROWS[name].title]
        for size in sizes:
            row = figures.find(result, name, size)
            if row is None or "loss" not in row:
                line += ["" if row is None else "–", ""]
                continue
            share = row.get("taken_back")
            line += [rise_text(row), "" if share is None else f"{share:.0%}"]
        cells.append(line)
    heads = [""]
    for size in sizes:
        heads += [f"size {size:g}: rise", "back"]
    pruned = " (for REAP: of *REAP, pruning*)" if "reap" in names else ""
    note = (
        "Rise: of the perplexity over the original's, with its standard error by paired windows. "
        f"Back: share of the rise of *molae calibrated*{pruned} that the "
        f"steps after it take back.{_experts(result, sizes)}"
    )
    return f"{table(heads, cells)}\n\n{note}\n\n{_settings(result, names)}"


def _experts(result: Result, sizes: list[float]) -> str:
    """What is left of them where whole ones go."""
    kept = [row["experts"] for size in sizes if (row := figures.find(result, "reap", size))]
    if not kept:
        return ""
    counts = ", ".join(str(count) for count in kept)
    return f" REAP keeps whole experts, {counts} of {result['model']['experts']}."


def _settings(result: Result, names: list[str]) -> str:
    made = result["training"]
    learned = {0.0: "the text", 1.0: "the original's distributions (KL)"}.get(
        made["distill"],
        f"the original's distributions (KL, {made['distill']:.0%}) and the text",
    )
    layers = made["layers"]
    again = (
        f"; *on the conversion's text* over the {result['calibration_tokens']:,} that the "
        "conversion has read"
    )
    own = "; the original's own is on the text"
    more = (
        f" REAP, which has no factors to train layer by layer, has {made['more_steps']} steps of "
        "fine-tuning more, which read the text of the layers' training once."
    )
    return (
        f"Layer by layer: {layers['passes']} passes over "
        f"{layers['sequences'] * made['length']:,} tokens of the text at rate "
        f"{layers['rate']:g}{again if 'again' in names else ''}. Routers: "
        f"{made['router_steps']} steps of {made['batch']} rows of {made['length']} tokens, on the "
        "original's distributions (KL), at rate "
        f"{made['router_rate']:g}. Fine-tuning: all weights, {made['tune_steps']} such steps on "
        f"{learned}, at rate {made['tune_rate']:g}{own if 'original-tuned' in names else ''}."
        f"{more if 'reap-tuned' in names else ''}"
    )


def _tuned(result: Result, names: list[str], sizes: list[float]) -> str:
    cells = []
    for name in (n for n in names if ROWS[n].sized and ROWS[n].tuned):
        line = [ROWS[name].title]
        for size in sizes:
            row = figures.find(result, name, size)
            over = {} if row is None else {
                "rise": row["rise_tuned"], "rise_se": row["rise_tuned_se"]
            }  # fmt: skip
            line.append(rise_text(over) if over else "")
        cells.append(line)
    tuned = figures.find(result, "original-tuned", 1.0)
    assert tuned is not None
    note = (
        f"Over the *fine-tuned* original, whose perplexity is {tuned['perplexity']:.2f} "
        f"({rise_text(tuned)} over the original's):"
    )
    return f"{note}\n\n{table(['', *(f'size {size:g}: rise' for size in sizes)], cells)}"


def _costs(result: Result, sizes: list[float]) -> str:
    """Of each step, by what it begins with."""
    found: dict[tuple[str, ...], dict[float, Mapping[str, Any]]] = {}
    for row in result["rows"]:
        for n, step in enumerate(row.get("steps", ()), 1):
            found.setdefault(ROWS[row["name"]].steps[:n], {})[row["size"]] = step
    cells, begun = [], []
    for steps, costs in found.items():
        own = STEPS[steps[-1]]
        line = [f"{own}, after {STEPS[steps[-2]]}" if len(steps) > 1 else own]
        if 1.0 in costs:
            line[0] = f"{own}, of the original"
            costs = {sizes[0]: costs[1.0]}
        for size in sizes:
            if (cost := costs.get(size)) is None:
                line.append("")
                continue
            begun.append(cost["start_bytes"])
            more = (cost["peak_bytes"] - cost["start_bytes"]) / 1e6
            line.append(f"{cost['cpu_seconds']:.1f} ({cost['seconds']:.0f}) s, {more:,.0f} MB")
        cells.append(line)
    head = result["header"]
    note = (
        f"What each step takes on {head['threads']} thread{'s' * (head['threads'] > 1)} of "
        f"{head['cpu']['model']}: seconds of the processor (of the clock, on a machine that others "
        "may use, too), and the peak of anonymous memory beyond the "
        f"{max(begun) / 1e6:,.0f} MB that Python holds with PyTorch and Transformers loaded. Each "
        "step is a process of its own, and each conversion measures the original anew."
    )
    return f"{table(['', *(f'size {size:g}' for size in sizes)], cells)}\n\n{note}"
