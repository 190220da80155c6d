"""A text as overlapping windows, and means over them with their standard errors."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molae.errors import ArgumentError
from molae.io import parse_json

__all__ = ["Ratio", "Windows", "decoded", "json_lines", "ratio", "read_text", "tokenize", "windows"]

#: Longest window by default. More context lowers the perplexity a little, and costs time.
DEFAULT_WINDOW = 512


def read_text(text_or_file: str | bytes | os.PathLike[str]) -> str:
    """A text that has something in it, given as itself or as a path object.

    Raises
    ------
    molae.errors.ArgumentError
        The file cannot be read, the text is not UTF-8, or there is none.
    """
    if isinstance(text_or_file, os.PathLike):
        file = Path(text_or_file)
        try:
            text_or_file = file.read_bytes()
        except OSError as error:
            raise ArgumentError(f"{file}: cannot be read: {error.strerror}") from error
    return decoded(text_or_file)


def json_lines(path: str | os.PathLike[str], text: str) -> Iterator[tuple[str, Any]]:
    """Where each line of a .jsonl file is, and what it says; empty ones are left out.

    Raises
    ------
    molae.errors.ArgumentError
        A line is no JSON.
    """
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            yield where, parse_json(line)
        except ValueError as error:
            raise ArgumentError(f"{where} is no JSON: {error}") from error


def decoded(text: str | bytes) -> str:
    """Text as a string that has something in it."""
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ArgumentError(f"the text is not UTF-8: {error}") from error
    if not isinstance(text, str):
        raise ArgumentError(f"text must be a str or bytes, got {type(text).__name__}")
    if not text.strip():
        raise ArgumentError("the text is empty")
    return text


def tokenize(tokenizer: Any, text: str) -> Any:
    """(count,) tensor of a text's tokens."""
    # `verbose=False` only silences the remark that the text is longer than a model's window.
    return tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]


@dataclass(frozen=True)
class Windows:
    """Where a text's windows start; each scores what no window before it scored.

    Attributes
    ----------
    tokens : (count,) tensor
    window, batch_size : int
    starts : tuple of int
    """

    tokens: Any
    window: int
    batch_size: int
    starts: tuple[int, ...]

    def batches(self, device: Any) -> Iterator[tuple[Any, tuple[int, ...]]]:
        """(n, window) tokens, and for each row the place of its first token to score."""
        import torch

        tokens = self.tokens.to(device)
        scored = 1  # tokens before this place are done; the first has nothing to be told from
        for first in range(0, len(self.starts), self.batch_size):
            some = self.starts[first : first + self.batch_size]
            begins = []
            for start in some:
                begins.append(scored - start)
                scored = start + self.window
            yield (
                torch.stack([tokens[start : start + self.window] for start in some]),
                tuple(begins),
            )


def windows(
    tokens: Any,
    *,
    limit: int | None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> Windows:
    """Lay windows over a text's tokens; the last one is moved back to end with the text.

    Parameters
    ----------
    tokens : (count,) tensor
    limit : int or None
        Longest window that the model takes.
    window, stride, batch_size
        As in `molae.hf.evaluate.evaluate`.

    Raises
    ------
    molae.errors.ArgumentError
        A size makes no sense, or the text does not fill a window and one token more.
    """
    if window is None:
        window = min(limit or DEFAULT_WINDOW, DEFAULT_WINDOW)
    if stride is None:
        stride = max(1, window // 2)
    if window < 2 or (limit is not None and window > limit):
        raise ArgumentError(f"window must be from 2 to {limit or 'any number'}, got {window}")
    if not 1 <= stride < window:
        raise ArgumentError(f"stride must be from 1 to window - 1 = {window - 1}, got {stride}")
    if batch_size < 1:
        raise ArgumentError(f"batch_size must be at least 1, got {batch_size}")
    count = len(tokens)
    if count <= window:
        # With a single window there is no spread to take a standard error from.
        raise ArgumentError(
            f"the text is too short: it has {count} tokens, and a window of {window} needs "
            f"at least {window + 1}; give more text or a smaller window"
        )
    starts = (*range(0, count - window, stride), count - window)
    return Windows(tokens, window, batch_size, starts)


@dataclass(frozen=True)
class Ratio:
    """A mean over tokens, and its standard error from the spread of the windows."""

    mean: float
    se: float


def ratio(sums: Sequence[float], sizes: Sequence[int]) -> Ratio:
    """The mean of what was summed window by window.

    It is a ratio of two sums over windows, since the first and the last window score other
    numbers of tokens than the rest; the error is the usual one of such a ratio.
    """
    total = sum(sizes)
    mean = math.fsum(sums) / total
    spread = math.fsum((s - n * mean) ** 2 for s, n in zip(sums, sizes, strict=True))
    return Ratio(mean, math.sqrt(spread * len(sums) / (len(sums) - 1)) / total)
