"""Teachers: which fit a model, and what one answered, kept in files."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from molae.errors import ArgumentError, NonFiniteError
from molae.hf.opening import find_folder, open_model, open_tokenizer
from molae.io import open_checkpoint, parse_json, read_config
from molae.train.examples import IGNORED, Packed
from molae.train.loss import Head, Target, learned_states, log_probabilities, pieces

__all__ = [
    "KeptAnswers",
    "Numbered",
    "answers_digest",
    "check_same_model",
    "check_same_tokenizer",
    "keep_answers",
    "open_teacher",
]

#: Of a model, with the names that families have for it.
FACTS = (
    ("model_type",),
    ("hidden_size",),
    ("num_hidden_layers",),
    ("vocab_size",),
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"),
)

#: What a folder of answers holds; the note comes last, and without it the rest counts for nothing.
TOKENS, VALUES, REST, NOTE = "tokens.npy", "log_probabilities.npy", "rest.npy", "answers.json"

#: Raised by one when the files' form changes.
FORMAT = 1

#: Seconds between looks of the processes that wait for the one that writes.
WAIT = 1.0


def check_same_model(student: str | os.PathLike[str], teacher: str | os.PathLike[str]) -> None:
    """Refuse a teacher that is not the model a student was made from.

    For methods that compare the two layer by layer. `finetune` asks less of a teacher: any
    model with the same tokenizer will do.

    Parameters
    ----------
    student, teacher : str or path
        Folders of checkpoints, ordinary or converted, or hub ids.

    Raises
    ------
    molae.errors.ArgumentError
        Another model_type, number of layers, experts or active experts, hidden size, size of the
        vocabulary, or tokenizer; each is named, with both values.
    molae.errors.CheckpointError
        No checkpoint, or no tokenizer there.

    Examples
    --------
    >>> import molae.demo
    >>> from molae.train import check_same_model
    >>> check_same_model(molae.demo.CHECKPOINT, molae.demo.CHECKPOINT)
    """
    both = [read_config(find_folder(p) / "config.json") for p in (student, teacher)]
    both = [config | config.get("text_config", {}) for config in both]
    found = []
    for names in FACTS:
        one, other = (next((c[n] for n in names if n in c), None) for c in both)
        if one != other:
            found.append(f"{names[0]} {other!r} instead of {one!r}")
    if not found and _tokenizer(student).get_vocab() != _tokenizer(teacher).get_vocab():
        found.append("another tokenizer")
    if found:
        raise ArgumentError(
            f"teacher: {teacher} is not the model that {student} was made from: it has "
            f"{', '.join(found)}; give the original"
        )


def check_same_tokenizer(path: str | os.PathLike[str], tokenizer: Any) -> None:
    """Refuse a teacher whose tokenizer is not the model's.

    Raises
    ------
    molae.errors.ArgumentError
    """
    if _tokenizer(path).get_vocab() != tokenizer.get_vocab():
        raise ArgumentError(
            f"teacher: {path} has another tokenizer than the model, so that their distributions "
            "are of different tokens"
        )


def open_teacher(path: str | os.PathLike[str], device: Any) -> Any:
    """A teacher's model, ready to answer, in the type of its files."""
    model, _ = open_model(path, dtype="auto", device=device)
    return model.eval().requires_grad_(False)


def _tokenizer(path: str | os.PathLike[str]) -> Any:
    return open_tokenizer(find_folder(path), path)


# ------------------------------------------------------------------ answers in files


class Numbered(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows that know their numbers, by which `KeptAnswers` finds theirs."""

    def __init__(self, rows: Packed) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**self._rows[index], "row": torch.tensor(index)}


class KeptAnswers:
    """What a teacher answered to all rows, read from the files of `keep_answers` where needed.

    A batch must be of `Numbered` rows.
    """

    def __init__(self, folder: Path, rows: Packed) -> None:
        counts = [int((rows[i]["labels"][1:] != IGNORED).sum()) for i in range(len(rows))]
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self._tokens = np.load(folder / TOKENS, mmap_mode="r", allow_pickle=False)
        self._values = np.load(folder / VALUES, mmap_mode="r", allow_pickle=False)
        self._rest = (
            np.load(folder / REST, mmap_mode="r", allow_pickle=False)
            if (folder / REST).exists()
            else None
        )

    def targets(self, inputs: Mapping[str, Any]) -> Callable[[slice], Target]:
        """See `molae.train.loss.Teacher`."""
        device = inputs["input_ids"].device
        at = [(self._starts[i], self._ends[i]) for i in inputs["row"].tolist()]

        def read(array: np.ndarray) -> torch.Tensor:
            found = np.concatenate([array[start:end] for start, end in at])
            return torch.from_numpy(found).to(device)

        values, tokens = read(self._values), read(self._tokens)
        rest = None if self._rest is None else read(self._rest)

        def target(some: slice) -> Target:
            return Target(values[some], tokens[some].long(), None if rest is None else rest[some])

        return target


def answers_digest(teacher: str | os.PathLike[str], rows_digest: str, count: int) -> str:
    """Of all that a teacher's answers depend on: its files, the rows, and how many are kept."""
    with open_checkpoint(teacher) as checkpoint:
        facts = [FORMAT, checkpoint.fingerprint(), rows_digest, count]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def keep_answers(
    folder: Path,
    rows: Packed,
    teacher: str | os.PathLike[str],
    count: int,
    digest: str,
    *,
    batch_size: int,
    device: Any,
    writer: bool,
) -> KeptAnswers:
    """A teacher's answers to all rows, computed where they are not there yet.

    The teacher is in memory only within this function.

    Parameters
    ----------
    folder : Path
        Of the answers. What is there of another digest, or half written, is thrown away.
    rows : Packed
    teacher : str or path
    count : int
        Tokens a position.
    digest : str
        By `answers_digest`.
    batch_size : int
        Rows at a time.
    device : str or torch.device
    writer : bool
        Of several processes one computes, and the others wait for it.
    """
    note = folder / NOTE
    if writer and not _is_of(note, digest):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        _write_answers(folder, rows, open_teacher(teacher, device), count, batch_size, device)
        gc.collect()  # so that the teacher is gone now
        made = note.with_suffix(".part")
        made.write_text(json.dumps({"digest": digest}))
        made.replace(note)
    # By the file and not by a barrier, whose time has a limit; a writer that fails ends them all.
    while not _is_of(note, digest):
        time.sleep(WAIT)
    return KeptAnswers(folder, rows)


def _is_of(note: Path, digest: str) -> bool:
    try:
        return bool(parse_json(note.read_bytes())["digest"] == digest)
    except (OSError, ValueError, LookupError, TypeError):
        return False


@torch.no_grad()
def _write_answers(
    folder: Path, rows: Packed, model: Any, count: int, batch_size: int, device: Any
) -> None:
    vocabulary = Head.of(model).weight.shape[0]
    whole, N = count >= vocabulary, min(count, vocabulary)
    P = rows.learned
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        TOKENS: ((P, N), np.int32), VALUES: ((P, N), np.float32),
    }  # fmt: skip
    if not whole:
        shapes[REST] = ((P,), np.float32)
    arrays = {
        name: np.lib.format.open_memmap(folder / name, mode="w+", dtype=dtype, shape=shape)
        for name, (shape, dtype) in shapes.items()
    }
    done = 0
    for at in range(0, len(rows), batch_size):
        batch = [rows[i] for i in range(at, min(at + batch_size, len(rows)))]
        inputs = {name: torch.stack([row[name] for row in batch]).to(device) for name in batch[0]}
        hidden, _, _ = learned_states(model, inputs)
        for some in pieces(len(hidden)):
            every = log_probabilities(Head.of(model), hidden[some])
            if every.isnan().any():
                raise NonFiniteError("teacher: its distributions have NaN in them")
            found = every.topk(N, dim=1)
            to = slice(done, done := done + len(every))
            arrays[VALUES][to] = _finite(found.values)
            arrays[TOKENS][to] = found.indices.cpu().numpy()
            if not whole:
                others = every.scatter(1, found.indices, -torch.inf)
                arrays[REST][to] = _finite(others.logsumexp(1))
    for name, array in arrays.items():
        array.flush()
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())


def _finite(logs: torch.Tensor) -> np.ndarray:
    """Logs of what is nothing as large as may be: then 0 · log 0 is 0 in a divergence, not NaN."""
    found: np.ndarray = logs.clamp(min=torch.finfo(torch.float32).min).cpu().numpy()
    return found
