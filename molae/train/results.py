"""What a run leaves on the disk: the mark of an unfinished one, and its result."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from molae.errors import DestinationError, MolaeError
from molae.hf.opening import first_line
from molae.io import write_text_atomic
from molae.io.writer import PART, destination_error
from molae.train.examples import Packed
from molae.train.settings import FinetuneConfig, Finetuned

__all__ = ["named_troubles", "prepare", "rows_digest", "write"]

#: In the folder of a run: which one it is.
NOTE = "run.txt"

#: What a run leaves in its result.
LOG, PICTURE = "finetune.json", "finetune.png"


def rows_digest(rows: Packed) -> str:
    """Of all that rows hold."""
    found = hashlib.sha256()
    for i in range(len(rows)):
        for _, tensor in sorted(rows[i].items()):
            found.update(tensor.numpy().tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def named_troubles(work: Path) -> Iterator[None]:
    """What the disk refuses is told as an error of molae's that names the folder of the run."""
    try:
        yield
    except MolaeError:
        raise
    except OSError as error:  # with a file's bare name, or none
        raise destination_error(error, work) from error
    except Exception as error:
        # No type of their own: safetensors, torch and tokenizers, in this order.
        said = any(word in str(error) for word in (" file ", "iostream"))
        torchs = isinstance(error, RuntimeError) and said
        if not (isinstance(error, SafetensorError) or torchs or type(error) is Exception):
            raise
        raise DestinationError(
            f"{work}: cannot be used: {first_line(error)}; check the disk and run the same command "
            "again"
        ) from error


def prepare(
    work: Path, facts: Any, overwrite: bool, *, keep: Collection[str] = ()
) -> str | None:  # fmt: skip
    """The folder of a run made ready, and the checkpoint of the same run to go on from.

    Parameters
    ----------
    work : Path
    facts : object
        All that the run depends on, as JSON takes it.
    overwrite : bool
        Throw another run away.
    keep : collection of str
        What of another run may still be of use, by its name.

    Raises
    ------
    molae.errors.DestinationError
        Another run is there.
    """
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    note = work / NOTE
    if work.exists() and any(path.name != note.name + PART for path in work.iterdir()):
        if note.is_file() and note.read_text() == digest:
            # One that was not finished lacks the file that comes last.
            whole = [p.parent for p in work.glob("checkpoint-*/trainer_state.json")]
            last = max(whole, key=lambda p: int(p.name.rpartition("-")[2]), default=None)
            return None if last is None else str(last)
        if not overwrite:
            raise DestinationError(
                f"{work}: an unfinished run with other settings or data; --overwrite replaces it"
            )
        note.unlink(missing_ok=True)
        for path in work.iterdir():
            if path.name in keep:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    work.mkdir(parents=True, exist_ok=True)
    write_text_atomic(note, digest)
    return None


def write(
    model: Any,
    tokenizer: Any,
    dst: Path,
    work: Path,
    found: Finetuned,
    config: FinetuneConfig,
) -> None:
    """All of it in a folder beside, then in one step where it belongs."""
    made = work / "result"
    if made.exists():
        shutil.rmtree(made)
    model.requires_grad_(True)
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    facts = {**dataclasses.asdict(config), **dataclasses.asdict(found)}
    (made / LOG).write_text(json.dumps(facts, indent=2) + "\n")
    _plot(found, made / PICTURE)
    if dst.exists():
        shutil.rmtree(dst)
    made.replace(dst)
    # The result is whole. What cannot be removed is not gone on from: the note goes first.
    with contextlib.suppress(OSError):
        (work / NOTE).unlink()
    shutil.rmtree(work, ignore_errors=True)


def _plot(found: Finetuned, path: Path) -> None:
    if find_spec("matplotlib") is None or not found.losses:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*found.losses, strict=True), color="#1f77b4")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
