"""Write docs/families.md from the descriptions of families: ``python docs/make_families.py``.

With ``--check`` nothing is written, and the exit status says whether the page is what this
writes. What was tried of a family is read from the cases of its tests.
"""

from __future__ import annotations

import sys
from pathlib import Path

from molae.arch import Family, families
from molae.arch.family import MoeLayers

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "families.md"

#: Tried in the tests that all features have, with sizes of their own.
FIRST = ("gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")

#: Tried in tests of their own, and how far.
OWN = {
    "qwen3_vl_moe": "**runs**, but for a calibration text and compressed experts",
}

HEAD = """# Families

Written by `docs/make_families.py` from `molae/arch/*.json`; [formats.md](formats.md) says how such
a file reads, and which types of weights are. Layers without experts, shared experts, routers with
their biases, next-token heads and models for pictures are copied as they are.

*Tried* is what the tests do with tiny random models under the released config's keys. **runs**:
made by Transformers, converted at full rank with the original's logits, converted to 0.7, loaded,
run layer by layer (as for a calibration text), generated from, made ordinary again and loaded so,
saved, and given compressed experts. **files**: converted and made ordinary again, with equal
weights; the installed Transformers does not build the model. **inspected**: counted by the released
config, and by a checkpoint's files, but not converted.

| `model_type` | releases | layouts | layers with experts | router | shared experts | tried |
|---|---|---|---|---|---|---|
"""


def page() -> str:
    """The text of the page."""
    found = {family.model_type: family for family in families().values()}
    rows = [row(family) for family in found.values()]
    notes = [
        f"- `{family.model_type}`: {family.about['notes']}"
        for family in found.values()
        if "notes" in family.about
    ]
    return HEAD + "\n".join(rows) + "\n\n## Notes\n\n" + "\n".join(notes) + "\n"


def row(family: Family) -> str:
    """A family's line of the table."""
    about = family.about
    cells = (
        ", ".join(f"`{name}`" for name in family.model_types),
        ", ".join(about.get("released", ())),
        ", ".join(f"`{layout.name}`" for layout in family.layouts),
        layers(family.moe_layers),
        str(about.get("router", "")),
        str(about.get("shared", "none")),
        tried(family),
    )
    return f"| {' | '.join(cells)} |"


def layers(rule: MoeLayers) -> str:
    """Which layers have experts, in words."""
    said = []
    if rule.first:
        said.append(f"l ≥ `{rule.first}`")
    if rule.last:
        said.append(f"l ≤ `{rule.last}`")
    if rule.every:
        said.append(f"l % `{rule.every}` = {f'`{rule.offset}`' if rule.offset else 0}")
    if rule.step:
        said.append(f"(l + 1) % `{rule.step}` = 0")
    if rule.excluded:
        said.append(f"l not in `{rule.excluded}`")
    if rule.enabled:
        said.append(f"where `{rule.enabled}`")
    text = ", ".join(said) or "all"
    if rule.pattern:
        return f"by `{rule.pattern}`"
    for key in (rule.types, rule.only):
        if key:
            text += f"; or by `{key}`"
    return text


def tried(family: Family) -> str:
    """What the tests do with it."""
    if family.unsupported:
        return f"**inspected** only: {family.unsupported}"
    if family.model_type in OWN:
        return OWN[family.model_type]
    cases = str(ROOT / "tests")
    if cases not in sys.path:
        sys.path.append(cases)
    from family_cases import CASES, NAMED

    run = [name for name in family.model_types if name in (*CASES, *FIRST)]
    read = [name for name in family.model_types if name in NAMED and name not in run]
    return ", ".join(
        f"**{way}**"
        + (
            ""
            if len(names) == len(family.model_types)
            else f" ({', '.join(f'`{n}`' for n in names)})"
        )
        for way, names in (("runs", run), ("files", read))
        if names
    )


def main() -> int:
    """Write the page, or compare."""
    text = page()
    if sys.argv[1:] == ["--check"]:
        return 0 if PAGE.read_text("utf-8") == text else 1
    PAGE.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
