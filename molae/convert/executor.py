"""Who computes the shards of a run: this process, or others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from molae import __version__, _core
from molae.convert import pipeline
from molae.convert.journal import Journal, file_sha256
from molae.info import show_config
from molae.io import Checkpoint

__all__ = [
    "Divisible",
    "Executor",
    "Here",
    "Recipe",
    "build_facts",
    "code_sha256",
    "extension_sha256",
]

#: Is told bytes of the source that are done, bytes in all, and what is next.
Progress = Callable[[int, int, str], None]


class Recipe(Protocol):
    """What another process needs to do the same work on the same checkpoint; can be pickled."""

    def work(
        self, checkpoint: Checkpoint, staged: Path | None
    ) -> AbstractContextManager[pipeline.Work]:
        """The work, with everything decided as it was where the recipe comes from. Of shards that
        something was staged for, the one that has it in this file is done."""


class Divisible(pipeline.Work, Protocol):
    """Work that may be divided among processes."""

    def recipe(self) -> Recipe:
        """For other processes.

        Raises
        ------
        ArgumentError
            Jobs depend on each other; the message says why and what to do.
        """

    def stage(self, number: int, path: Path) -> bool:
        """Write what a shard needs besides the recipe and the checkpoint to a file.

        Parameters
        ----------
        number : int
            Of the shard; they are asked for in ascending order.
        path : Path

        Returns
        -------
        bool
            False where it needs nothing; no file is written then.
        """


class Executor(Protocol):
    """Computes the shards of a run; planning, the journal and the small files are not its own."""

    def begin(self, work: Divisible) -> None:
        """Called before anything is written; refuses what cannot be done."""

    def run(self, work: Divisible, dst: Path, journal: Journal, progress: Progress) -> None:
        """Write every shard that the journal does not have, and add it there."""


class Here:
    """This process computes, one shard after the other."""

    def begin(self, work: Divisible) -> None:
        """Nothing can be amiss."""

    def run(self, work: Divisible, dst: Path, journal: Journal, progress: Progress) -> None:
        pipeline.run(work, dst, journal, progress)


def build_facts() -> dict[str, Any]:
    """What the bits of a result depend on besides its settings and source."""
    facts = show_config("dict")
    return {
        "blas": f"{facts['blas']['name']} {facts['blas']['version']}",
        "blas_core": facts["blas"]["core"],
        "isa": facts["kernels"]["isa"],
        "numpy": np.__version__,
    }


@cache
def extension_sha256() -> str:
    """Of the compiled extension: another compiler, or older C sources, may give other bits."""
    return file_sha256(Path(str(_core.__file__)))


@cache
def code_sha256() -> str:
    """Of molae's own Python sources and families, and its version: tells working copies of one
    version apart."""
    sha256 = hashlib.sha256(__version__.encode())
    folder = Path(__file__).parents[1]
    for path in sorted([*folder.rglob("*.py"), *folder.glob("arch/*.json")]):
        sha256.update(path.relative_to(folder).as_posix().encode() + b"\0")
        sha256.update(path.read_bytes() + b"\0")
    return sha256.hexdigest()
