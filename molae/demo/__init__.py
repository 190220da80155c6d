"""A tiny trained OLMoE checkpoint, its tokenizer, and text it has never seen.

The model was made by ``python -m molae.demo.train`` from text that every
CPython ships; ``README.md`` in this folder says how, and how well it does.
"""

from pathlib import Path

__all__ = ["CHECKPOINT", "HELDOUT"]

#: Folder of the checkpoint, in the layout ``AutoModelForCausalLM`` reads.
CHECKPOINT = Path(__file__).with_name("checkpoint")

#: Held-out text: documentation that neither training nor tuning looked at.
HELDOUT = Path(__file__).with_name("heldout.txt")
