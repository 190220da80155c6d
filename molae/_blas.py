"""Loads the extension, and with it molae's own copy of OpenBLAS on the right kernels.

OpenBLAS chooses its kernels ("core type") when its library is loaded, from
the processor's maker and model. The wheels carry no kernels for recent AMD
processors and take those for Haswell there, at half the speed that the
processor's AVX-512 units give with the kernels named ``SkylakeX``. OpenBLAS
reads ``OPENBLAS_CORETYPE`` at that moment, so the variable is set by the
features of the CPU while the library loads, and put back afterwards.

- Only molae's vendored copy is meant. A system's OpenBLAS is left alone, and
  NumPy's own copy is loaded before the variable is touched.
- A user's ``OPENBLAS_CORETYPE`` is left as it is.
- ``MOLAE_BLAS_CORE`` names the core type for molae alone; ``default`` leaves
  the choice to OpenBLAS.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

__all__ = ["CoreChoice", "choose_core", "cpu_flags", "environment", "load_core"]

#: What the kernels of OpenBLAS's SkylakeX need, as Linux spells it.
SKYLAKEX_FLAGS = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"})

LIBRARY = Path(__file__).parent / ".libs" / "libmolae_openblas.so"


@dataclass(frozen=True)
class CoreChoice:
    """The core type asked of OpenBLAS (None: its own choice) and who asked."""

    core: str | None
    by: str


def cpu_flags(path: str = "/proc/cpuinfo") -> frozenset[str]:
    """Features of the first CPU, as Linux lists them; empty where there is no such file."""
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() == "flags":
                    return frozenset(value.split())
    except OSError:
        pass
    return frozenset()


def choose_core(environ: Mapping[str, str], flags: frozenset[str], vendored: bool) -> CoreChoice:
    """Which core type to ask for, given the environment and the CPU's features."""
    if not vendored:
        return CoreChoice(None, "OpenBLAS")
    own = environ.get("MOLAE_BLAS_CORE", "")
    if own == "default":
        return CoreChoice(None, "MOLAE_BLAS_CORE")
    if own:
        return CoreChoice(own, "MOLAE_BLAS_CORE")
    theirs = environ.get("OPENBLAS_CORETYPE", "")
    if theirs:
        return CoreChoice(theirs, "OPENBLAS_CORETYPE")
    if flags >= SKYLAKEX_FLAGS:
        return CoreChoice("SkylakeX", "CPU features")
    return CoreChoice(None, "OpenBLAS")


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables and puts back what was there, whatever happens."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def load_core() -> tuple[ModuleType, CoreChoice]:
    """Import ``molae._core`` with the core type chosen; returns the module and the choice."""
    vendored = LIBRARY.exists()
    choice = choose_core(os.environ, cpu_flags(), vendored)
    values = {}
    if vendored:
        # molae threads by itself: without this OpenBLAS starts a thread a CPU as it loads.
        values["OPENBLAS_NUM_THREADS"] = "1"
        if choice.core is not None:
            values["OPENBLAS_CORETYPE"] = choice.core
    importlib.import_module("numpy")  # its own BLAS must not see these variables
    with environment(values):
        core = importlib.import_module("molae._core")
    core.disable_isa(os.environ.get("MOLAE_DISABLE_ISA", ""))
    return core, choice
