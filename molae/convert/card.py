"""The model card of a result: what was done to which model, figures, how to load it.

It holds no times and no paths, so that the same run writes the same card.
"""

from __future__ import annotations

from collections.abc import Sequence

from molae import __version__
from molae.config import TYPES
from molae.convert.planning import Plan
from molae.convert.report import REPORT, HealRow, TypeRow, total_error

__all__ = ["convert_card", "heal_card", "materialize_card"]


def convert_card(plan: Plan, rows: Sequence[TypeRow], kept: Sequence[str]) -> str:
    """The ``README.md`` of a converted checkpoint; `kept` names the copied files."""
    ratio, compressed = plan.flops_ratio, bool(plan.compressed)
    data = "fitted to a calibration text" if plan.settings.get("calibration") else "without data"
    lines = [
        *_front_matter(plan),
        f"# {plan.source_title}, converted by molae",
        "",
        f"The routed experts of this {plan.family} checkpoint are stored as shared latent factors.",
        f"Made by molae {__version__}, method `{plan.method}` ({plan.form} form), {data}.",
        *_decoded(plan),
        *(
            [_sentence(f"{plan.compressed_text}; {plan.light} act in their place.")]
            if compressed
            else []
        ),
        "",
        "| | before | after | share |",
        "|---|---|---|---|",
        _row("numbers of the experts", plan.before.expert_numbers, plan.after.expert_numbers),
        _row("numbers in all", plan.before.total_numbers, plan.after.total_numbers),
        _row("bytes in all", plan.before.total_bytes, plan.after.total_bytes),
        "",
        f"Operations a token needs in the experts {'rise' if ratio > 1 else 'fall'} to "
        f"{ratio:.3f} of the original's.",
        "",
    ]
    if rows:
        lines += [
            "Relative Frobenius error of the weights, over all layers:",
            "",
            "| type | experts a group | ranks | error | worst expert |",
            "|---|---|---|---|---|",
        ]
        for kind in (kind for kind in TYPES if kind in plan.types):
            mine = [row for row in rows if row.kind == kind]
            summary = plan.types[kind]
            lines.append(
                f"| `{kind}` | {_several(summary.group_sizes)} | {_several(summary.ranks)} "
                f"| {total_error(mine):.4f} | {max(row.expert_error_max for row in mine):.4f} |"
            )
        lines += [
            "",
            "A weight error says little about the text a model writes: measure that too.",
            "",
        ]
    elif not compressed and plan.encoding is None:
        lines += ["Nothing was changed: every tensor has the source's bytes.", ""]
    lines += [
        *_loading(compressed),
        f"`{REPORT}` has the figures of each layer.",
        "",
        *_licence(kept),
    ]
    return "\n".join(lines)


def _decoded(plan: Plan) -> list[str]:
    return [] if plan.encoding is None else [plan.encoding_text]


def heal_card(plan: Plan, rows: Sequence[HealRow], kept: Sequence[str]) -> str:
    """The ``README.md`` of a checkpoint that was trained to answer as the original does."""
    lines = [
        *_front_matter(plan),
        f"# {plan.source_title}, healed by molae",
        "",
        f"A {plan.family} checkpoint in molae's form. The factors of each layer were trained by",
        f"molae {__version__} to answer as the original's experts do, on a calibration text.",
        "",
        "Relative error of the layers' answers on that text:",
        "",
        "| layer | before | after | steps |",
        "|---|---|---|---|",
        *(
            f"| {row.layer} | {row.layer_error[0]:.4f} | {row.layer_error[-1]:.4f} | {row.steps} |"
            for row in rows
        ),
        "",
        *_loading(bool(plan.compressed)),
        f"`{REPORT}` has the figures of each layer.",
        "",
        *_licence(kept),
    ]
    return "\n".join(lines)


def _loading(compressed: bool) -> list[str]:
    return [
        "## Loading",
        "",
        "    import molae.hf  # pip install 'molae[hf]'",
        "    from transformers import AutoModelForCausalLM",
        "",
        '    model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        "",
        "runs it as it is, factored. Without the first line Transformers only warns, and fills the",
        "experts with random numbers.",
        "",
        *(_NO_ORDINARY_FORM if compressed else _ORDINARY_FORM),
    ]


_ORDINARY_FORM = (
    "    molae materialize THIS_FOLDER NEW_FOLDER",
    "",
    "multiplies the factors out to an ordinary checkpoint, of the original's full size, that",
    "Transformers, vLLM and llama.cpp load.",
)

_NO_ORDINARY_FORM = (
    "There is no ordinary checkpoint that computes the same: other programs know no compressed",
    "experts.",
)


def materialize_card(plan: Plan, kept: Sequence[str]) -> str:
    """The ``README.md`` of a materialized checkpoint."""
    lines = [
        *_front_matter(plan),
        f"# {plan.source_title}, materialized by molae",
        "",
        f"An ordinary {plan.family} checkpoint, multiplied out by molae {__version__} from shared",
        f"latent factors (method `{plan.method}`). It has the original's full size,",
        f"{plan.after.total_numbers:,} numbers in {plan.after.total_bytes:,} bytes, and computes",
        f"what the factors compute: the experts carry {plan.size_reached:.4g} of the original's",
        "numbers of information.",
        "",
        "Load it as any checkpoint of its family.",
        "",
        *_licence(kept),
    ]
    return "\n".join(lines)


def _front_matter(plan: Plan) -> list[str]:
    lines = ["---", "tags:", "- molae", "- moe"]
    if plan.hub_id is not None:
        lines += [f"base_model: {plan.hub_id}"]
    return [*lines, "---", ""]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _row(what: str, before: int, after: int) -> str:
    return f"| {what} | {before:,} | {after:,} | {after / before:.4f} |"


def _several(values: Sequence[int | None]) -> str:
    shown = ["dense" if value is None else str(value) for value in values]
    return ", ".join(shown[:4]) + (f" ... {shown[-1]}" if len(shown) > 4 else "")


def _licence(kept: Sequence[str]) -> list[str]:
    files = [name for name in kept if name.lower().startswith(("license", "licence", "notice"))]
    lines = ["## Licence", "", "The original model's licence applies to this checkpoint too."]
    if files:
        lines += [f"It came with: {', '.join(f'`{name}`' for name in files)}."]
    else:
        lines += ["The source has no licence file; look at where it came from."]
    if "README.source.md" in kept:
        lines += ["The original's model card is `README.source.md`."]
    return [*lines, ""]
