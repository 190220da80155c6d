"""The rows that are compared, and the steps that make them. Apart, so that tables need no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ROWS", "STEPS", "Row"]


@dataclass(frozen=True)
class Row:
    """A checkpoint that is scored.

    Attributes
    ----------
    title : str
    steps : tuple of str
        That make it of the original, one after the other.
    before : str
        The row that it heals; '' where it heals none.
    """

    title: str
    steps: tuple[str, ...]
    before: str = ""

    @property
    def sized(self) -> bool:
        """Whether it is there at each size; otherwise it is the original's own."""
        return any(step in ("published", "pruned", "calibrated") for step in self.steps)

    @property
    def tuned(self) -> bool:
        return "tuned" in self.steps or "tuned-more" in self.steps


#: What the steps are called.
STEPS: Mapping[str, str] = {
    "published": "conversion as published",
    "pruned": "pruning by REAP",
    "calibrated": "calibrated conversion",
    "layers": "layer by layer",
    "layers-anchored": "layer by layer, anchored",
    "layers-again": "layer by layer, on the conversion's text",
    "routers": "routers",
    "tuned": "fine-tuning",
    "tuned-more": "fine-tuning, with the layers' text",
}

#: By name; each after the row that it heals.
ROWS: Mapping[str, Row] = {
    "original": Row("the original", ()),
    "original-tuned": Row("the original, fine-tuned", ("tuned",)),
    "published": Row("MoLAE as published, best group size", ("published",)),
    "reap": Row("REAP, pruning", ("pruned",)),
    "reap-routers": Row("REAP + routers", ("pruned", "routers"), "reap"),
    "reap-tuned": Row(
        "REAP + routers + fine-tuning", ("pruned", "routers", "tuned-more"), "reap"
    ),
    "calibrated": Row("molae calibrated", ("calibrated",)),
    "again": Row(
        "molae + layer by layer, on the conversion's text", ("calibrated", "layers-again"),
        "calibrated",
    ),
    "anchored": Row(
        "molae + layer by layer, anchored", ("calibrated", "layers-anchored"), "calibrated"
    ),
    "layers": Row("molae + layer by layer", ("calibrated", "layers"), "calibrated"),
    "routers": Row("molae + routers", ("calibrated", "routers"), "calibrated"),
    "both": Row(
        "molae + layer by layer + routers", ("calibrated", "layers", "routers"), "calibrated"
    ),
    "tuned": Row(
        "molae + layer by layer + routers + fine-tuning",
        ("calibrated", "layers", "routers", "tuned"),
        "calibrated",
    ),
}  # fmt: skip
