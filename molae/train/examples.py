"""Texts and conversations as packed rows of tokens, for fine-tuning."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from molae.errors import ArgumentError
from molae.hf.windows import json_lines, read_text

__all__ = ["Example", "Packed", "pack", "read_examples"]

#: The label of a token that is not learned.
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """Tokens that belong together, and of which of them a model is to learn.

    Attributes
    ----------
    tokens : tuple of int
    learned : tuple of bool
        As many. A token is learned from those before it.
    """

    tokens: tuple[int, ...]
    learned: tuple[bool, ...]


def read_examples(path: str | os.PathLike[str], tokenizer: Any) -> list[Example]:
    """The examples of a file.

    Parameters
    ----------
    path : str or path
        A text, of which all is learned; or a .jsonl file of objects with ``prompt`` and
        ``completion`` (the completion is learned), ``messages`` (what the assistant says is
        learned; the tokenizer needs a chat template), or ``text``.
    tokenizer : transformers.PreTrainedTokenizerBase

    Returns
    -------
    list of Example

    Raises
    ------
    molae.errors.ArgumentError
        It cannot be read, is empty, not UTF-8, or a line is none of these; the line is named.

    Examples
    --------
    >>> import pathlib, tempfile, molae.demo
    >>> from molae.hf.opening import open_tokenizer
    >>> from molae.train import read_examples
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "data.jsonl")
    ...     _ = file.write_text('{"prompt": "One and one", "completion": " is two."}')
    ...     (found,) = read_examples(file, open_tokenizer(molae.demo.CHECKPOINT))
    >>> found.learned.index(True) < len(found.tokens) == len(found.learned)
    True
    """
    text = read_text(Path(path))
    if Path(path).suffix != ".jsonl":
        return [_all_of(_ids(tokenizer, text))]
    found = []
    for where, entry in json_lines(path, text):
        example = _example(entry, tokenizer, where)
        if any(example.learned[1:]):
            found.append(example)
    if not found:
        raise ArgumentError(f"{path}: nothing in it that could be learned")
    return found


def _example(entry: Any, tokenizer: Any, where: str) -> Example:
    if isinstance(entry, Mapping):
        if isinstance(entry.get("prompt"), str) and isinstance(entry.get("completion"), str):
            prompt = _ids(tokenizer, entry["prompt"])
            rest = _ids(tokenizer, entry["completion"], alone=False)
            rest += _end(tokenizer)
            learned = (False,) * len(prompt) + (True,) * len(rest)
            return Example(prompt + rest, learned)
        if isinstance(entry.get("messages"), Sequence):
            return _conversation(entry["messages"], tokenizer, where)
        if isinstance(entry.get("text"), str):
            return _all_of(_ids(tokenizer, entry["text"]) + _end(tokenizer))
    raise ArgumentError(f"{where}: expected prompt and completion, messages, or text")


def _conversation(messages: Any, tokenizer: Any, where: str) -> Example:
    """Rendered turn by turn, so that what the assistant adds is known."""
    if not getattr(tokenizer, "chat_template", None):
        raise ArgumentError(
            f"{where}: messages need a tokenizer with a chat template, and this checkpoint's has "
            "none; give prompt and completion instead"
        )
    tokens: tuple[int, ...] = ()
    learned: tuple[bool, ...] = ()
    for turn in range(len(messages)):
        says = messages[turn].get("role") if isinstance(messages[turn], Mapping) else None
        if says is None:
            raise ArgumentError(f"{where}: message {turn + 1} has no role")
        before = _rendered(tokenizer, messages[:turn], True) if says == "assistant" else tokens
        now = _rendered(tokenizer, messages[: turn + 1], False)
        if now[: len(before)] != before or before[: len(tokens)] != tokens:
            raise ArgumentError(
                f"{where}: the chat template renders message {turn + 1} in another way once "
                "others follow, so that what is learned cannot be told; give prompt and completion"
            )
        learned += (False,) * (len(before) - len(tokens))
        learned += (says == "assistant",) * (len(now) - len(before))
        tokens = now
    return Example(tokens, learned)


def _rendered(tokenizer: Any, messages: Any, ask: bool) -> tuple[int, ...]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    return _ids(tokenizer, text, alone=False)


def _ids(tokenizer: Any, text: str, *, alone: bool = True) -> tuple[int, ...]:
    """Tokens; `alone` with those that begin a text."""
    ids = tokenizer(text, verbose=False, add_special_tokens=alone)["input_ids"]
    end = tokenizer.eos_token_id
    return tuple(ids[:-1] if ids and ids[-1] == end else ids)


def _end(tokenizer: Any) -> tuple[int, ...]:
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


def _all_of(tokens: tuple[int, ...]) -> Example:
    return Example(tokens, (True,) * len(tokens))


class Packed(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of one length, each of several examples that do not see each other.

    Every example counts its positions from 0, and from that Transformers makes the mask. What is
    left of a row is filled with tokens that nobody learns.
    """

    def __init__(self, rows: Sequence[Sequence[Example]], length: int, filler: int) -> None:
        self._rows, self._length, self._filler = list(rows), length, filler

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        for example in self._rows[index]:
            tokens += example.tokens
            # The first has nothing before it to be learned from.
            known = (False, *example.learned[1:])
            labels += [t if own else IGNORED for t, own in zip(example.tokens, known, strict=True)]
            positions += range(len(example.tokens))
        left = self._length - len(tokens)
        return {
            "input_ids": torch.tensor(tokens + [self._filler] * left),
            "labels": torch.tensor(labels + [IGNORED] * left),
            "position_ids": torch.tensor([*positions, *range(left)]),
        }

    @property
    def learned(self) -> int:
        """Tokens that are learned, of all rows."""
        return sum(sum(example.learned[1:]) for row in self._rows for example in row)


def pack(examples: Sequence[Example], length: int, *, filler: int = 0) -> Packed:
    """Lay examples into rows of a length, the longest first, each where it fits best.

    Parameters
    ----------
    examples : sequence of Example
        One that is longer than a row is cut into rows.
    length : int
        Tokens of a row.
    filler : int
        A token for the rest of a row.

    Raises
    ------
    molae.errors.ArgumentError
        A length below 2.

    Examples
    --------
    >>> from molae.train import Example, pack
    >>> some = [Example((1,) * n, (True,) * n) for n in (3, 9, 4)]
    >>> rows = pack(some, 8)
    >>> len(rows), rows.learned, rows[0]["position_ids"].tolist()
    (2, 12, [0, 1, 2, 3, 4, 5, 6, 7])
    """
    if length < 2:
        raise ArgumentError(f"length: expected at least 2 tokens, got {length}")
    pieces = [piece for example in examples for piece in _cut(example, length)]
    order = sorted(range(len(pieces)), key=lambda i: (-len(pieces[i].tokens), i))
    rows: list[list[Example]] = []
    # Rows by what they have left: best fit without a search through all.
    by_room: list[list[int]] = [[] for _ in range(length + 1)]
    for i in order:
        need = len(pieces[i].tokens)
        room = next((r for r in range(need, length + 1) if by_room[r]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, length
        else:
            row = by_room[room].pop()
        rows[row].append(pieces[i])
        by_room[room - need].append(row)
    return Packed(rows, length, filler)


def _cut(example: Example, length: int) -> Iterator[Example]:
    for at in range(0, len(example.tokens), length):
        piece = Example(example.tokens[at : at + length], example.learned[at : at + length])
        if any(piece.learned[1:]):
            yield piece
