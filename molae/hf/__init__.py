"""What needs torch and transformers: loading models to measure them.

Importing this package without them says what to install.
"""

from __future__ import annotations

from importlib.util import find_spec

_missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
if _missing:
    raise ImportError(f"molae.hf needs {' and '.join(_missing)}; run: pip install 'molae[hf]'")


def hide_progress() -> None:
    """Keep transformers from drawing its own progress bars, for the whole process."""
    from transformers.utils import logging

    logging.disable_progress_bar()
