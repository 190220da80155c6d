"""Fine-tuning of checkpoints, ordinary or converted; needs the extras [hf] and [train].

A model is trained on texts, on conversations, or on what another model answers. See
``docs/training.md``.
"""

from __future__ import annotations

import molae.hf  # noqa: F401  (says what is missing, and makes converted checkpoints known)
from molae.train.examples import Example, Packed, pack, read_examples
from molae.train.finetune import finetune
from molae.train.selection import select_parameters
from molae.train.settings import FinetuneConfig, Finetuned
from molae.train.teachers import check_same_model

__all__ = [
    "Example",
    "FinetuneConfig",
    "Finetuned",
    "Packed",
    "check_same_model",
    "finetune",
    "pack",
    "read_examples",
    "select_parameters",
]
