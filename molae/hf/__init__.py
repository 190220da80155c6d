"""What needs torch and transformers: converted checkpoints as models, and their measures.

After ``import molae.hf``, ``from_pretrained`` of Transformers loads what ``molae convert``
writes; see ``docs/transformers.md``. Importing this package without torch and transformers
says what to install.
"""

from __future__ import annotations

from importlib.util import find_spec

from molae.errors import MissingExtraError

_missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
if _missing:
    raise MissingExtraError(
        f"molae.hf needs {' and '.join(_missing)}; run: pip install 'molae[hf]'"
    )

from molae.hf.build import latent_model  # noqa: E402
from molae.hf.experts import LatentExperts  # noqa: E402
from molae.hf.loading import MolaeConfig, MolaeQuantizer  # noqa: E402

__all__ = ["LatentExperts", "MolaeConfig", "MolaeQuantizer", "hide_progress", "latent_model"]


def hide_progress() -> None:
    """Keep transformers from drawing its own progress bars, for the whole process.

    Examples
    --------
    >>> import molae.hf
    >>> molae.hf.hide_progress()
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
