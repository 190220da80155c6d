"""The forms that are compared, and what they are called. Apart, so that tables need no torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FORMS", "STAGES", "TRAINED", "Form", "title"]


@dataclass(frozen=True)
class Form:
    """What acts in the place of compressed experts.

    Attributes
    ----------
    title : str
    light : str or None
        As ``--light-module`` takes it; None where nothing does.
    uniform : bool
        The same n in each layer. Only for dense experts: latent ones would have even ranks, too.
    """

    title: str
    light: str | None
    uniform: bool = False


FORMS = {
    "stock": Form("the router's own top-(K − n)", None),
    "plain": Form("nothing (plain top-(K − n))", None),
    "vectors": Form("vectors (the paper's form)", "vectors"),
    "additive": Form("additive vectors", "additive"),
    "narrow-8": Form("narrow experts of 1/8", "narrow:1/8"),
    "even-8": Form("the same with the same n in each layer", "narrow:1/8", uniform=True),
    "narrow-4": Form("narrow experts of 1/4", "narrow:1/4"),
}

#: What was done to a form: nothing; fitted layer by layer; then what acts in the experts' place
#: distilled; or all weights fine-tuned. 'from-1' is the paper's way: from vectors of 1.
STAGES = {
    "": "",
    "fitted": "fitted",
    "distilled": "fitted, distilled",
    "tuned": "fitted, fine-tuned",
    "from-1": "fine-tuned from 1",
}

#: Rows with training, at n = K / 2: form and stage.
TRAINED = (
    ("vectors", "distilled"),
    ("additive", "distilled"),
    ("narrow-8", "distilled"),
    ("full", "tuned"),
    ("stock", "tuned"),
    ("vectors", "from-1"),
    ("vectors", "tuned"),
    ("narrow-8", "tuned"),
)


def title(form: str, stage: str) -> str:
    """Such as 'narrow experts of 1/8, fitted, distilled'."""
    name = "all K experts" if form == "full" else FORMS[form].title
    said = "fine-tuned" if form in ("full", "stock") and stage == "tuned" else STAGES[stage]
    return f"{name}, {said}" if said else name
