"""The table of docs/reliability.md, from ``results.json`` beside this file."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import molae

__all__ = ["BEGIN", "END", "table_text", "write"]

RESULTS = Path(__file__).with_name("results.json")
BEGIN, END = "<!-- soak: written by make soak -->", "<!-- soak: end -->"


def write(page: Path, part: str, seed: int, found: Mapping[str, Any]) -> None:
    """Keep a part's result, and write the page's table anew."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[part] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": _machine(),
        "version": molae.__version__,
        "seed": seed,
        **found,
    }
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    text = page.read_text()
    before, rest = text.split(BEGIN)
    page.write_text(before + BEGIN + "\n" + table_text(results) + END + rest.split(END)[1])


def table_text(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One row a part, and what was found."""
    lines = [
        "| part | what was done | faults | seed | seconds | date | machine |",
        "|---|---|---|---|---|---|---|",
    ]
    for part, own in sorted(results.items()):
        lines.append(
            f"| {part} | {_said(own)} | {len(own['faults'])} | {own['seed']} "
            f"| {own['seconds']:,.0f} | {own['date']} | {own['machine']} |"
        )
    return "\n".join(lines) + "\n"


def _said(own: Mapping[str, Any]) -> str:
    """Counts in words; of a mapping its sum and its entries."""
    skipped = {"date", "machine", "version", "seed", "faults", "seconds"}
    found = []
    for name, value in sorted(own.items()):
        title = name.replace("_", " ")
        if isinstance(value, Mapping):
            each = ", ".join(f"{key} {n:,}" for key, n in sorted(value.items()))
            alike = name != "counts"  # those are of different things
            found.append(f"{title} {sum(value.values()):,} ({each})" if alike else each)
        elif name not in skipped:
            found.append(
                f"{title} {value:,.3g}" if isinstance(value, float) else f"{title} {value}"
            )
    return "; ".join(found)


def _machine() -> str:
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {os.cpu_count()} CPUs, Linux {platform.release().split('-')[0]}"
