"""Results as Markdown tables, readable as text too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import active_tables, calibration_tables, distill_tables, layer_tables

__all__ = ["benchmarks", "demo"]

Result = Mapping[str, Any]
KINDS = ("gate_proj", "up_proj", "down_proj")


def benchmarks(result: Result) -> str:
    """All tables of one run of ``python -m benchmarks``."""
    parts = [_header(result)]
    if "factor" in result:
        parts += _factor(result["factor"], result["bf16"]["rows"] if "bf16" in result else [])
    elif "bf16" in result:
        parts += [_against(result["bf16"]["rows"])]
    if "reduce" in result:
        parts += [_reduce(row) for row in result["reduce"]["rows"]]
    if "convert" in result:
        parts += [_convert(row) for row in result["convert"]["rows"]]
    if "layers" in result:
        parts += layer_tables.layers(result["layers"], table)
    if "models" in result:
        parts += layer_tables.models(result["models"], table)
    if "calibration" in result:
        parts += calibration_tables.calibration(result["calibration"], table)
    if "active" in result:
        parts += [active_tables.active(result["active"], table)]
    if "distill" in result:
        parts += [distill_tables.distill(result["distill"], table)]
    return "\n\n".join(parts)


def demo(result: Result) -> str:
    """The table of ``molae demo --json``."""
    rows = result["rows"]
    evaluated = rows[0]["perplexity"] is not None
    names = ["", "size reached", "bytes", "FLOPs", "error gate", "up", "down"]
    cells = []
    for row in rows:
        errors = [f"{row['errors'][k]:.3f}" if k in row["errors"] else "0" for k in KINDS]
        line = [
            row["title"],
            f"{row['size']:.4f}",
            f"{row['bytes']:,}",
            f"{row['flops_ratio']:.3f}",
            *errors,
        ]
        if evaluated:
            rise = row["perplexity"] / rows[0]["perplexity"] - 1
            line += [f"{row['perplexity']:.2f} ± {row['perplexity_se']:.2f}", f"{rise:+.1%}"]
        cells.append(line)
    if evaluated:
        names += ["perplexity", "rise"]
    notes = [
        "Size: share of the experts' numbers. FLOPs: operations a token needs in the experts, over",
        "the original's. Error: relative Frobenius error of the weights.",
    ]
    if evaluated:
        notes += [
            f"Perplexity: on {result['tokens']:,} tokens of held-out text, ± its standard error;",
            "all rows read the same text, so their differences are surer than that.",
        ]
    notes += [f"Refused: {reason}" for reason in result["refused"]]
    return f"{table(names, cells)}\n\n" + "\n".join(notes)


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded; all columns but the first are set to the right."""
    widths = [max(3, *(len(row[i]) for row in (names, *rows))) for i in range(len(names))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * w) if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(names), line(rule), *(line(row) for row in rows)])


def _short(blas: str) -> str:
    """Without the maker's praise."""
    name, _, threads = blas.rpartition(", ")
    return f"{name.partition(' for Intel')[0]}, {threads}"


def _header(result: Result) -> str:
    head, peaks = result["header"], result["peaks"]
    cpu = head["cpu"]
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    gflops = ", ".join(f"{name} {value:,.0f}" for name, value in peaks["gflops"].items())
    lines = [
        f"{cpu['model']}{', virtual' if cpu['virtual'] else ''} ({' '.join(cpu['features'])}), "
        f"{head['threads']} threads of {cpu['usable_cpus']} CPUs. {versions}; commit "
        f"{head['commit']}, {head['time']}.",
        f"BLAS: {'; '.join(f'{name} {_short(own)}' for name, own in head['blas'].items())}.",
        f"Measured peaks: float32 product {gflops} GFLOP/s; copy {peaks['copy_gbs']:.1f} GB/s.",
    ]
    if head["busy"]:
        lines.append(
            f"**The machine was busy** (others took {head['load_at_start']:.0%} at the start): "
            "read ratios, not seconds."
        )
    if result["quick"]:
        lines.append("**Tiny shapes**: these figures say nothing about speed.")
    return "\n".join(lines)


def _factor(found: Result, extra: Sequence[Result]) -> Iterator[str]:
    yield _against([*found["rows"], *extra])
    k_size = found["whole"]
    yield table(
        ["whole type, by molae alone", "groups", "rank", "s", "GFLOP/s", "of peak", "memory"],
        [
            [
                f"groups of {row['k']}",
                str(row["groups"]),
                str(row["rank"]),
                _time(row["median_s"]),
                f"{row['gflops']:,.0f}",
                f"{row['peak_share']:.0%}",
                _megabytes(row["memory_bytes"]),
            ]
            for row in k_size
        ],
    )
    if found["phases"]:
        yield table(
            ["where the time of a group of 8 goes", "s"],
            [[row["phase"], _time(row["seconds_a_group"])] for row in found["phases"]],
        )


def _against(rows: Sequence[Result]) -> str:
    others = [name for name in rows[0]["times"] if name != "molae"]
    names = ["groups of, weights, type, form", "rank", "error", "molae s"]
    names += [f"{name} s" for name in others]
    names += ["faster than the better SVD", "of peak", "memory (theirs)"]
    cells = []
    for row in rows:
        G = row["groups"]
        against = row["against"][row["better_svd"]]
        what = [str(row["k"]), row["weights"], row["dtype"], row["form"]]
        if row["side"] == "output":
            what[2] += " (down)"
        cells.append(
            [
                ", ".join(what),
                str(row["rank"]),
                f"{row['error']:.4f}",
                _time(row["times"]["molae"]["median_s"] / G),
                *(_time(row["times"][name]["median_s"] / G) for name in others),
                f"**{against['ratio']:.1f}×** "
                f"({against['ratio_low']:.1f}–{against['ratio_high']:.1f})",
                f"{row['peak_share']:.0%}",
                f"{_megabytes(row['memory_bytes']['molae'])} "
                f"({_megabytes(row['memory_bytes'][row['better_svd']])})",
            ]
        )
    goals = dict.fromkeys((row["k"], row["goal"]) for row in rows)
    goal_text = ", ".join(f"{goal:g}× for groups of {k}" for k, goal in goals)
    notes = (
        f"Seconds are for one group, medians; {rows[0]['groups']} groups were timed. In brackets: "
        f"range over the rounds.\nGoal: {goal_text}, against the better of the SVDs. "
        f"Missed by {sum(not _met(row) for row in rows)} of {len(rows)} rows."
    )
    return f"{table(names, cells)}\n\n{notes}"


def _met(row: Result) -> bool:
    return bool(row["against"][row["better_svd"]]["ratio"] >= row["goal"])


def _reduce(row: Result) -> str:
    cells = []
    for name, times in row["times"].items():
        against = row["against"].get(name)
        cells.append(
            [
                name,
                _time(times["median_s"] / row["experts"]),
                f"{against['ratio']:.1f}× ({against['ratio_low']:.1f}–{against['ratio_high']:.1f})"
                if against
                else "",
                _megabytes(row["memory_bytes"][name]),
            ]
        )
    title = f"each expert on its own ({row['F']}×{row['D']} to rank {row['rank']})"
    return table([title, "s an expert", "molae is faster", "memory"], cells)


def _convert(row: Result) -> str:
    facts = [
        ["checkpoint", f"{row['checkpoint_bytes'] / 1e9:.2f} GB, {row['layers']} layers"],
        ["result", f"{row['result_bytes'] / 1e9:.2f} GB, size {row['size']:.4f}"],
        ["wall time", f"{row['wall_s']:.1f} s"],
        ["start and choice of group sizes", f"{row['wall_s'] - row['run_s']:.1f} s"],
        ["the run after that", f"{row['run_s']:.1f} s"],
        ["of that, factorizing", f"{row['factor_s']:.1f} s"],
        ["throughput", f"{row['gbs'] * 1e3:.1f} MB/s of checkpoint"],
        ["a plain copy of the files", f"{row['copy_s']:.1f} s"],
        ["peak of anonymous memory", _megabytes(row["peak_rss_anon_bytes"])],
        ["its bound", _megabytes(row["bound_bytes"])],
        ["as the plan estimated", _megabytes(row["estimated_bytes"])],
    ]
    title = f"conversion ({row['E']} experts of {row['F']}×{row['D']} a layer, {row['dtype']})"
    return table([title, ""], facts)


def _time(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.4f}"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.0f} MB"
