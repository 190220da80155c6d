"""What a worker is asked to do. Runs in the workers' processes.

A worker never touches a file by its own name: it writes under a name that no other try has, and
the client, which has the destination's lock, takes what it wants. So a worker that everybody
believes dead cannot spoil anything.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molae import __version__
from molae.convert.destination import WORKERS
from molae.convert.executor import Recipe, build_facts, code_sha256, extension_sha256
from molae.convert.pipeline import write_one
from molae.errors import MolaeError
from molae.io import Checkpoint, open_checkpoint
from molae.threads import num_threads

__all__ = ["Answer", "Order", "Unfit", "Unwanted", "answer", "describe_worker", "write_shard"]


class Unfit(MolaeError):
    """A worker that cannot take part; the message says why."""


class Unwanted(MolaeError):
    """Nobody waits for the result any longer."""


@dataclass(frozen=True)
class Order:
    """One file to be written.

    Attributes
    ----------
    run : str
        Of which run.
    source : str
        Folder of the checkpoint.
    facts : dict
        What `describe_worker` has said of the client, and of the worker where it may differ.
    recipe : Recipe
    number : int
        Of the shard.
    file, path : str
        The shard's name, and the file to make.
    staged : str, optional
        The file with what it needs besides.
    threads : int
        To compute with.
    """

    run: str
    source: str
    facts: dict[str, Any]
    recipe: Recipe
    number: int
    file: str
    path: str
    staged: str | None
    threads: int


@dataclass(frozen=True)
class Answer:
    """What came of a question: a value, or an error."""

    value: Any = None
    error: Exception | None = None


def answer(function: Callable[..., Any], *args: Any) -> Answer:
    """Call a function of this module and bring its error home, whatever that is made of: one that
    cannot be pickled would leave the client waiting."""
    try:
        return Answer(function(*args))
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return Answer(error=MolaeError(f"{type(error).__name__}: {error}"))
        return Answer(error=error)


def describe_worker(source: str, folder: str | None) -> dict[str, Any]:
    """What this process is, and what it sees of a run.

    Parameters
    ----------
    source : str
        Folder of the checkpoint.
    folder : str, optional
        The destination, where there is one already.

    Returns
    -------
    dict
        ``molae``, ``code`` and ``build`` are what results depend on; ``source`` the checkpoint's
        fingerprint, or a text about what is wrong with it; ``run`` the number of the run that it
        sees in the destination; ``host`` tells only who it is.
    """
    fingerprint: Any
    try:
        with open_checkpoint(Path(source)) as checkpoint:
            fingerprint = checkpoint.fingerprint()
    except (MolaeError, OSError) as error:
        fingerprint = str(error)
    return {
        "molae": __version__,
        "code": code_sha256(),
        "build": _build(),
        "source": fingerprint,
        "run": None if folder is None else _run_in(Path(folder)),
        "host": socket.gethostname(),
    }


def write_shard(order: Order) -> dict[str, Any]:
    """Compute one file of a result.

    Returns
    -------
    dict
        Its line for the journal.

    Raises
    ------
    Unfit
        This process is not the one that was looked at, or the source has changed since.
    Unwanted
        The run was ended, or another has begun in its place.
    """
    path = Path(order.path)

    def wanted() -> None:
        if _run_in(path.parent) != order.run:
            raise Unwanted(f"{order.file}: the run that asked for it is over")

    try:
        wanted()
        _check_same(order.facts)
        with num_threads(order.threads), open_checkpoint(Path(order.source)) as checkpoint:
            _check_source(checkpoint, order.facts["source"])
            staged = None if order.staged is None else Path(order.staged)
            with order.recipe.work(checkpoint, staged) as work:
                shard = work.shards[order.number]
                if shard.file != order.file:
                    raise Unfit(f"plans {shard.file} where {order.file} was asked for")
                entry = write_one(work, shard, path, wanted)
        wanted()
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return entry


def _build() -> dict[str, str]:
    return build_facts() | {"extension": extension_sha256()[:12]}


def _check_same(facts: dict[str, Any]) -> None:
    """Against what was said of this process: another may have come under its address."""
    own = {"molae": __version__, "code": code_sha256(), "build": _build()}
    if own != {name: facts[name] for name in own}:
        raise Unfit("is not the process that was looked at before; run the same command again")


def _check_source(checkpoint: Checkpoint, fingerprint: dict[str, Any]) -> None:
    if checkpoint.fingerprint() != fingerprint:
        raise Unfit("sees another source than at the start; let the other program finish")


def _run_in(folder: Path) -> str | None:
    """The run that a destination says it belongs to. Opening a file asks a network file system
    anew; whether there is one it may believe to know."""
    try:
        return (folder / WORKERS).read_text(encoding="utf-8").strip()
    except OSError:
        return None
