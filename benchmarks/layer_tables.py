"""Tables of the cases 'layers' and 'models'."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["layers", "models"]

Result = Mapping[str, Any]
Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]


def layers(found: Result, table: Table) -> Iterator[str]:
    """Few tokens, many, backward, goals."""
    rows = found["rows"]
    few = [row for row in rows if "read_share" in row]
    forward = [row for row in rows if row["direction"] == "forward" and "read_share" not in row]
    backward = [row for row in rows if row["direction"] == "backward"]
    yield (
        "Layers of experts. Each cell: time by molae, share of what the machine can do, times "
        "faster than the best form of\nthe same layer in torch (range over the rounds), times "
        "faster than the dense layer in Transformers. Size 1 is the\ndense layer.\n"
        f"Up to {found['few']} tokens: share of the read bandwidth, {_usual(few, 'read_gbs'):.1f} "
        f"GB/s ({found['read_way']} over {found['stream_bytes'] / 2**20:,.0f} MiB);\n"
        f"from {found['many']} tokens: of a big float32 product, "
        f"{_usual(forward + backward, 'product_gflops'):.0f} GFLOP/s. Both in the same rounds."
    )
    for title, some in (
        ("few tokens", few),
        ("more tokens", forward),
        ("backward", backward),
    ):
        if some:
            yield _grid(title, some, table)
    lines = [
        f"Best torch form of a latent layer: {_wins(r for r in rows if r['rank'] is not None)}.",
        f"Best of Transformers for the dense layer: {_wins(r for r in rows if r['rank'] is None)}.",
    ]
    if found["not_compiled"]:
        lines.append(f"torch.compile did not work here: {found['not_compiled']}.")
    yield "\n".join(lines)
    yield from _goals(rows, table)


def _usual(rows: Sequence[Result], key: str) -> float:
    found = [row[key] for row in rows if key in row]
    return statistics.median(found) if found else 0.0


def _grid(title: str, rows: Sequence[Result], table: Table) -> str:
    """A line for each layer, a column for each number of tokens."""
    tokens = sorted({row["N"] for row in rows})
    cells: dict[tuple[str, str, float], dict[int, str]] = {}
    for row in rows:
        cells.setdefault((row["shape"], row["dtype"], row["size"]), {})[row["N"]] = _cell(row)
    lines = [
        [f"{shape}, {dtype}, {size:g}", *(own.get(N, "") for N in tokens)]
        for (shape, dtype, size), own in cells.items()
    ]
    return table([f"{title}: layer, type, size", *(f"N = {N}" for N in tokens)], lines)


def _cell(row: Result) -> str:
    share = row.get("read_share", row.get("peak_share"))
    parts = [f"{row['times']['molae']['median_s'] * 1e3:,.1f} ms"]
    if share is not None:
        parts.append(f"{share:.0%}")
    best = row["against_best"]
    parts.append(f"**{best['ratio']:.2f}×** ({best['ratio_low']:.2f}–{best['ratio_high']:.2f})")
    parts.append(f"{row['against_dense']['ratio']:.2f}×")
    return " · ".join(parts)


def _wins(rows: Iterable[Result]) -> str:
    """Which form was best, and how often."""
    count: dict[str, int] = {}
    for row in rows:
        count[row["best"]] = count.get(row["best"], 0) + 1
    return ", ".join(f"{name} {n}×" for name, n in sorted(count.items(), key=lambda x: -x[1]))


def _goals(rows: Sequence[Result], table: Table) -> Iterator[str]:
    found: dict[str, list[tuple[float, float, Result]]] = {}
    for row in rows:
        for name, (value, goal) in row["goals"].items():
            found.setdefault(name, []).append((value, goal, row))
    if not found:
        return
    lines = []
    for name, values in found.items():
        met = sum(value >= goal for value, goal, _ in values)
        least, goal, row = min(values, key=lambda entry: entry[0])
        most = max(value for value, _, _ in values)
        where = f"{row['shape']}, {row['dtype']}, {row['size']:g}, N = {row['N']}"
        lines.append(
            [
                name,
                f"{goal:g}",
                "reached" if met == len(values) else "missed",
                f"{met} of {len(values)}",
                f"{least:.2f} to {most:.2f}",
                where,
            ]
        )
    names = ["goal", "at least", "", "rows that reach it", "range", "least at"]
    yield table(names, lines)


def models(found: Result, table: Table) -> Iterator[str]:
    """Tokens a second of whole models."""
    cells = []
    for row in found["rows"]:
        against = row["against"]
        rates = row["tokens_per_s"]
        cells.append(
            [
                f"{row['model']}, {row['dtype']}, {row['size']:g}",
                row["phase"],
                str(row["tokens"]),
                f"{rates['Transformers']:,.1f}",
                f"{rates['molae']:,.1f}",
                f"**{against['ratio']:.2f}×** "
                f"({against['ratio_low']:.2f}–{against['ratio_high']:.2f})",
                row["implementation"],
            ]
        )
    names = ["model, type, size", "", "tokens", "original, tokens/s", "converted, tokens/s"]
    yield table([*names, "faster", "original's experts"], cells)
    faster = sum(row["against"]["ratio"] >= 1 for row in found["rows"])
    yield f"The converted model is at least as fast in {faster} of {len(cells)} rows."
