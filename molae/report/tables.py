"""Plans, reports and checkpoints as tables for a person to read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from molae.arch import Draft
from molae.config import TYPES
from molae.convert import Inspection, Plan, Report
from molae.convert.planning import Storage
from molae.report.facts import mixed
from molae.report.units import size_text, time_text

__all__ = ["draft_view", "inspect_view", "plan_view", "report_view"]


def plan_view(plan: Plan) -> RenderableType:
    """Sizes, numbers by part, FLOPs, and what the run needs."""
    parts: list[RenderableType] = [_heading(plan), _sizes(plan)]
    if plan.types:
        parts += [_parts(plan)]
    if plan.candidates:
        parts += [_candidates(plan)]
    if plan.spread:
        parts += [Text("Share of the numbers that each layer and type keeps, and its ranks:")]
        parts += [_spread(plan)]
    parts += [_needs(plan), *_remarks(plan)]
    return Group(*parts)


def report_view(report: Report) -> RenderableType:
    """Errors by matrix type, and by layer where there are few layers."""
    parts: list[RenderableType] = []
    if report.rows:
        table = _table("type", "error", "best expert", "worst expert", "discarded energy", "time")
        for kind in TYPES:
            rows = [row for row in report.rows if row.kind == kind]
            if rows:
                shares = [share for row in rows for share in row.discarded_energy]
                table.add_row(
                    kind,
                    f"{report.error(kind):.4f}",
                    f"{min(row.expert_error_min for row in rows):.4f}",
                    f"{max(row.expert_error_max for row in rows):.4f}",
                    f"{sum(shares) / len(shares):.4f}",
                    f"{sum(row.seconds for row in rows):.1f} s",
                )
        parts += [Text("Relative Frobenius error of the weights, over all layers:"), table]
        if any(row.output_error is not None for row in report.rows):
            errors = ", ".join(
                f"{kind} {_mean_output_error(report, kind):.4f}"
                for kind in TYPES
                if any(row.kind == kind for row in report.rows)
            )
            parts += [Text(f"On the calibration text, by type and to first order: {errors}.")]
        if (little := report.little_read()) and little[0]:
            parts += [
                Text(
                    f"{little[0]:,} of {little[1]:,} experts read fewer tokens of it than the "
                    "model is wide; their fit leans on their group's (more text is better)."
                )
            ]
        svd = sum(any(row.used_svd) for row in report.rows)
        if svd:
            parts += [Text(f"A direct SVD was needed for {svd} of {len(report.rows)} stacks.")]
    if report.compressed:
        n = {row.num_compressed for row in report.compressed}
        start, _, end = (
            sum(row.layer_error[i] for row in report.compressed) / len(report.compressed)
            for i in range(3)
        )
        parts += [
            Text(
                f"The last {'/'.join(map(str, sorted(n)))} of a token's experts do not run. "
                f"Without them the layers' answers are {start:.4f} off; with what acts in their "
                f"place, fitted, {end:.4f}."
            )
        ]
    if report.healed:
        table = _table("layer", "error before", "after", "steps", "time")
        for row in report.healed:
            before, after = row.layer_error[0], row.layer_error[-1]
            table.add_row(
                str(row.layer), f"{before:.4f}", f"{after:.4f}", str(row.steps),
                f"{row.seconds:.1f} s",
            )  # fmt: skip
        parts += [Text("Relative error of the layers' answers, trained in the end:"), table]
    if report.workers:
        hosts = {row.host for row in report.workers}
        machines = "one machine" if len(hosts) == 1 else f"{len(hosts)} machines"
        parts += [Text(f"Computed by {len(report.workers)} workers on {machines}.")]
    parts += [Text(words) for words in mixed(report)]
    size = sum(entry["bytes"] for entry in report.files.values())
    parts += [Text(f"{len(report.files) + 1} files, {size_text(size)}, in {report.seconds:.1f} s.")]
    return Group(*parts)


def _mean_output_error(report: Report, kind: str) -> float:
    """Root mean square over the layers."""
    found = [row.output_error or 0.0 for row in report.rows if row.kind == kind]
    return math.sqrt(sum(error**2 for error in found) / len(found))


def _stored_as(found: Inspection) -> str:
    if found.encoding is None:
        return found.dtype
    return f"{found.encoding.upper()}, {'read' if found.files else 'counted'} as {found.dtype}"


def inspect_view(found: Inspection) -> RenderableType:
    """What a checkpoint is; its ranks where it is a converted one."""
    table = Table.grid(padding=(0, 2))
    letters = ", ".join(f"{letter}={size}" for letter, size in found.letters.items())
    layout = f", layout {found.layout}" if found.layout else ""
    shapes = ", ".join(f"{kind} {rows}x{cols}" for kind, (rows, cols) in found.shapes.items())
    for name, value in (
        ("family", f"{found.family}{layout}, experts in {_stored_as(found)}"),
        ("letters", letters),
        ("matrices", shapes),
        ("layers with experts", _spans(found.moe_layers)),
        ("parameters", _known(found.total_parameters)),
        ("of routed experts", _known(found.expert_parameters)),
        ("of shared experts", _known(found.shared_parameters)),
        ("active for a token", _known(found.active_parameters)),
        ("of these, experts", _known(found.active_experts)),
        ("size", _bytes_text(found)),
    ):
        table.add_row(name, value)
        if name == "active for a token" and found.active_compressed and found.active_parameters:
            change = found.active_compressed / found.active_parameters - 1
            table.add_row("  so compressed", f"{found.active_compressed:,} ({change:+.1%})")
    if found.unsupported:
        table.add_row("not converted", Text(found.unsupported))
    for note in found.notes:
        table.add_row("note", Text(note))
    factored = found.factored
    if factored is None:
        return table
    table.add_row(
        "converted", f"by molae {factored.molae_version}, method {factored.method}, "
        f"{factored.form} form"
    )  # fmt: skip
    if factored.compressed:
        counts = [f"{n} in layer {layer}" for layer, n in factored.compressed.items()]
        table.add_row("compressed", f"of a token's experts {', '.join(counts)}")
        table.add_row("in their place", factored.light.title)
    ranks = _table("layer", *TYPES)
    for layer, kinds in factored.layers.items():
        cells = []
        for kind in TYPES:
            split = kinds.get(kind)
            cells.append("as it was" if split is None else _groups_text(split.groups, split.ranks))
        ranks.add_row(str(layer), *cells)
    return Group(table, ranks) if factored.layers else table


def draft_view(draft: Draft, path: str, fault: str | None) -> RenderableType:
    """What a draft rests on, and whether the checkpoint can be read with it."""
    table = Table.grid(padding=(0, 2))
    for title, lines in (("found", draft.found), ("to fill in", draft.missing)):
        for line in lines:
            table.add_row(title, Text(line))
    end = (
        f"Written to {path}. molae reads the checkpoint with --arch {path}: read it over first."
        if fault is None
        else f"Written to {path}. molae does not read the checkpoint with it yet: {fault}"
    )
    return Group(table, Text(end))


def _known(count: int | None) -> str:
    if count is None:
        return "not known"
    for word, scale in (("billion", 1e9), ("million", 1e6)):
        if count >= scale:
            return f"{count:,} ({count / scale:.4g} {word})"
    return f"{count:,}"


def _bytes_text(found: Inspection) -> str:
    text = "not known"
    if found.bytes is not None:
        text = f"{found.bytes:,} bytes ({size_text(found.bytes)})"
    if found.files:
        text += f" in {found.files} files"
    elif found.total_parameters is None:
        text += ", the experts"
    if found.bytes != found.decoded_bytes:
        text += f"; {found.decoded_bytes:,} ({size_text(found.decoded_bytes)}) in {found.dtype}"
    return text


def _heading(plan: Plan) -> Text:
    letters = ", ".join(f"{letter}={plan.letters[letter]}" for letter in "LEKDF")
    what = {
        "convert": f"method {plan.method} ({plan.form} form)",
        "heal": f"its factors ({plan.form} form) are trained, layer after layer",
        "materialize": "multiplied out to an ordinary checkpoint",
    }[plan.kind]
    return Text(f"{plan.source}: {plan.family}, {letters}, {plan.dtype}; {what}")


def _sizes(plan: Plan) -> Table:
    table = _table("", "before", "after", "share")

    def row(name: str, before: float, after: float, show: Any) -> None:
        share = f"{after / before:.4f}" if before else ""
        table.add_row(name, show(before), show(after), share)

    before, after = plan.before, plan.after
    row("experts, numbers", before.expert_numbers, after.expert_numbers, _whole)
    if not plan.experts_only:
        row("all, numbers", before.total_numbers, after.total_numbers, _whole)
    row("experts, bytes", before.expert_bytes, after.expert_bytes, _whole)
    if not plan.experts_only:
        row("all, bytes", before.total_bytes, after.total_bytes, _whole)
    row("FLOPs a token, experts", before.flops_per_token, after.flops_per_token, _whole)
    return table


def _parts(plan: Plan) -> Table:
    stored: Storage = plan.before if plan.kind == "materialize" else plan.after
    table = _table("type", "experts a group", "ranks", "shared", "private", "dense", "indices")
    for kind in TYPES:
        numbers, summary = stored.numbers[kind], plan.types.get(kind)
        table.add_row(
            kind,
            _several(summary.group_sizes) if summary else "",
            _several(summary.ranks) if summary else "as it was",
            *(_whole(numbers[role]) for role in ("shared", "private", "dense", "perm")),
        )
    return table


def _candidates(plan: Plan) -> Table:
    table = _table("type", "experts a group", "rank", "error foreseen", "")
    for c in plan.candidates:
        table.add_row(
            c.kind,
            str(c.group_size),
            str(c.rank),
            "–" if c.error is None else f"{c.error:.4f}",
            "taken" if c.chosen else "",
        )
    return table


def _spread(plan: Plan) -> Table:
    table = _table("layer", *TYPES)
    for layer, kinds in plan.spread.items():
        cells = [
            f"{kinds[kind].share:.3f} ({_range(kinds[kind].ranks)})" if kind in kinds else ""
            for kind in TYPES
        ]
        table.add_row(str(layer), *cells)
    return table


def _range(ranks: Sequence[int | None]) -> str:
    known = [rank for rank in ranks if rank is not None]
    if not known:
        return "dense"
    low, high = min(known), max(known)
    return str(low) if low == high else f"{low}–{high}"


def _needs(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2))
    if plan.size_asked is not None:
        table.add_row("size", f"asked {plan.size_asked:g}, reached {plan.size_reached:.4f}")
    if plan.compressed:
        table.add_row("compressed", f"{plan.compressed_text}; {plan.light} act in their place")
    of = " for the experts" if plan.experts_only else ""
    table.add_row("disk", f"{plan.disk_bytes:,} bytes ({size_text(plan.disk_bytes)}){of}")
    if plan.scratch_bytes:
        table.add_row("temporary files", f"about {size_text(plan.scratch_bytes)}")
    table.add_row("peak memory", f"about {size_text(plan.memory_bytes)}")
    if plan.passes > 1:
        table.add_row(
            "passes", f"{plan.passes} over each layer's tokens, to stay within the memory"
        )
    if plan.parallel > 1:
        table.add_row("machines", f"up to {plan.parallel} may share the work (--scheduler)")
    if plan.seconds is not None:
        table.add_row("time", f"about {time_text(plan.seconds)}")
    return table


def _remarks(plan: Plan) -> Iterable[Text]:
    if any(c.error is None for c in plan.candidates):
        yield Text(
            "By the config alone: the group size is measured on the weights, the one taken here "
            "is not (--group-size)."
        )
    if plan.encoding is not None:
        yield Text(plan.encoding_text)
    if plan.kind == "materialize":
        yield Text("The result has the original's full size; what was saved on the disk is lost.")
    elif plan.kind == "heal":
        yield Text("Sizes stay as they are.")
    elif not plan.types and plan.compressed:
        yield Text(
            "The experts that run stay as they are; what acts in the others' place is added."
        )
    elif not plan.types and plan.encoding is None:
        yield Text("Nothing would be saved: every tensor stays as it is.")
    elif plan.flops_ratio > 1:
        yield Text(
            f"A token needs more operations than before ({plan.flops_ratio:.3f} times): "
            "this saves memory, not work."
        )


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right")
    return table


def _whole(count: float) -> str:
    return f"{count:,.0f}"


def _several(values: Sequence[int | None]) -> str:
    shown = ["dense" if value is None else str(value) for value in values]
    return ", ".join(shown) if len(shown) <= 4 else f"{shown[0]} to {shown[-1]}"


def _groups_text(groups: Sequence[Sequence[int]], ranks: Sequence[int | None]) -> str:
    sizes = list(dict.fromkeys(len(group) for group in groups))
    found = list(dict.fromkeys(ranks))
    return f"{len(groups)} groups of {_several(sizes)}: {_several(found)}"


def _spans(layers: Sequence[int]) -> str:
    """'0-15' or '1, 3, 5'."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers))
