"""What molae was built with and what it uses."""

from __future__ import annotations

import platform
from typing import Any, Literal, overload

import numpy as np

from molae import _CORE_CHOICE, _core
from molae.errors import ArgumentError
from molae.threads import get_num_threads

__all__ = ["show_config"]


def _facts() -> dict[str, Any]:
    built = _core.build_info()
    blas = built["blas"]
    words = blas["config"].split()
    return {
        "molae": {
            "version": built["version"],
            "compiler": built["compiler"],
            "flags": built["flags"],
            "threads": get_num_threads(),
        },
        "kernels": {"isa": built["isa"], "usable": built["isas"]},
        "blas": {
            "name": words[0] if words else "OpenBLAS",
            "version": words[1] if len(words) > 1 else "unknown",
            "vendored": blas["vendored"],
            "prefix": blas["prefix"],
            "core": blas["core"],
            "core_asked": _CORE_CHOICE.core,
            "core_asked_by": _CORE_CHOICE.by,
            "threads": blas["threads"],
            "path": blas["path"],
            "config": blas["config"],
        },
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
            "numpy": np.__version__,
            "platform": platform.platform(),
        },
    }


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(str(v) for v in value)
    if value is None or value == "":
        return "-"
    return str(value)


@overload
def show_config(mode: Literal["print"] = "print") -> None: ...


@overload
def show_config(mode: Literal["dict"]) -> dict[str, Any]: ...


def show_config(mode: str = "print") -> dict[str, Any] | None:
    """Show the build, the kernels and the BLAS in use.

    Parameters
    ----------
    mode : {"print", "dict"}
        Print a table, or return the facts as nested dictionaries.

    Returns
    -------
    dict or None
        With ``mode="dict"``: ``molae`` (version, compiler, flags, threads),
        ``kernels`` (the instruction set in use, those usable), ``blas``
        (name, version, core type in use and who asked for it, threads, path)
        and ``python``.

    Raises
    ------
    ArgumentError
        If `mode` is neither.

    Examples
    --------
    >>> import molae
    >>> molae.show_config("dict")["molae"]["version"] == molae.__version__
    True
    """
    if mode not in ("print", "dict"):
        raise ArgumentError(f"mode: expected 'print' or 'dict', got {mode!r}")
    facts = _facts()
    if mode == "dict":
        return facts
    width = max(len(key) for part in facts.values() for key in part)
    for title, part in facts.items():
        print(title)
        for key, value in part.items():
            print(f"  {key.replace('_', ' '):<{width}}  {_text(value)}")
    return None
