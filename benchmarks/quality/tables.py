"""The comparison as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.quality.titles import TITLES
from benchmarks.tables import table

__all__ = ["quality", "rise_text"]

Result = Mapping[str, Any]

#: Whose errors are shown where there is no noise floor.
USUAL = 0.5


def quality(result: Result) -> str:
    """All tables of one run."""
    parts = [_about(result), _rises(result), _errors(result)]
    return "\n\n".join(part for part in parts if part)


def _about(result: Result) -> str:
    model, names = result["model"], result["names"]
    least = min(low / mean for low, mean, _ in model["tokens_per_expert"])
    most = max(high / mean for _, mean, high in model["tokens_per_expert"])
    return (
        f"Model: {' '.join(names[key] for key in ('model', 'trained') if key in names)} "
        f"({model['kind']}, {model['parameters'] / 1e6:.1f} M parameters, "
        f"{model['layers']} MoE layers of {model['experts']} experts, "
        f"{model['num_experts_per_tok']} a token; the router sends an expert from {least:.0%} to "
        f"{most:.0%} of its layer's mean). Perplexity {model['perplexity']:.2f} ± "
        f"{model['perplexity_se']:.2f} on {result['test_tokens']:,} tokens of {names['test']}; "
        f"{result['calibration_tokens']:,} tokens of {names['calibration']} to calibrate with."
    )


def _rises(result: Result) -> str:
    sizes = _sizes(result)
    cells = []
    for name in _names(result):
        cells.append([TITLES[name], *(_rise(_find(result, name, size)) for size in sizes)])
    note = (
        "Rise of the perplexity, with its standard error by paired windows, at each share of the "
        "experts' numbers. **Bold**: the lowest of its column, and what is within one paired "
        "standard error of it."
    )
    return f"{table(['', *(f'{size:g}' for size in sizes)], cells)}\n\n{note}"


def _rise(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    if "loss" not in row:
        return "–"
    text = rise_text(row)
    return f"**{text}**" if row["behind"] <= row["behind_se"] else text


def rise_text(row: Mapping[str, Any]) -> str:
    """Such as +1.23% ± 0.04%."""
    digits = 2 if abs(row["rise"]) < 0.1 else 1 if abs(row["rise"]) < 1 else 0
    return f"{row['rise']:+.{digits}%} ± {row['rise_se']:.{digits}%}"


def _errors(result: Result) -> str:
    """Of weights and outputs, at the size of the noise floor."""
    noise = result.get("noise") or {"size": USUAL, "weight_error": {}}
    cells = []
    for name in _names(result):
        row, floor = _find(result, name, noise["size"]), noise["weight_error"].get(name)
        if row is None or "loss" not in row:
            continue
        cells.append(
            [
                TITLES[name],
                row["note"],
                f"{row['reached']:.4f}",
                f"{row['weight_error']:.3f}",
                f"{row['output_error']:.3f}",
                "–" if floor is None else f"{floor:.3f}",
                f"{row['seconds']:.0f} s",
            ]
        )
    if not cells:
        return ""
    names = ["", "form", "reached", "weights", "outputs", "noise", "time"]
    note = (
        f"At size {noise['size']:g}. Weights: relative Frobenius error. Outputs: the same of what "
        "each matrix answers to the calibration text, by routing weight. Noise: error of the "
        "weights by the same code on Gaussian experts. Time: all of the row's, scoring included."
    )
    return f"{table(names, cells)}\n\n{note}"


def _sizes(result: Result) -> list[float]:
    return list(dict.fromkeys(row["size"] for row in result["rows"]))


def _names(result: Result) -> list[str]:
    return list(dict.fromkeys(row["name"] for row in result["rows"]))


def _find(result: Result, name: str, size: float) -> Mapping[str, Any] | None:
    return next((r for r in result["rows"] if (r["name"], r["size"]) == (name, size)), None)
