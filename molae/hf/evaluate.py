"""Perplexity of a language model on a text, with its standard error."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molae.errors import ArgumentError, CheckpointError, NonFiniteError

__all__ = ["Evaluation", "evaluate", "evaluate_path"]

#: Longest window by default. More context lowers the perplexity a little, and costs time.
DEFAULT_WINDOW = 512


@dataclass(frozen=True)
class Evaluation:
    """What a model scored on a text.

    Attributes
    ----------
    perplexity : float
        ``exp(loss)``.
    perplexity_se : float
        Standard error of `perplexity`, by the delta method:
        ``perplexity * loss_se``.
    loss : float
        Mean of the negative log-likelihood per scored token, in nats.
    loss_se : float
        Standard error of `loss`, from the spread of the means of the windows.
        The tokens of a sentence are easy or hard together, so a token is no
        independent sample; a few hundred neighbours as one sample come much
        nearer to it. Long passages on one matter still tie windows together,
        so take it as a lower estimate.
    tokens : int
        Tokens scored: all but the first one.
    windows : int
        Windows run.
    seconds : float
        Time spent on the windows.
    threads : int
        Threads torch was allowed.
    """

    perplexity: float
    perplexity_se: float
    loss: float
    loss_se: float
    tokens: int
    windows: int
    seconds: float
    threads: int


def evaluate(
    model: Any,
    tokenizer: Any,
    text: str | bytes,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], object] | None = None,
) -> Evaluation:
    """Measure the perplexity of a model on a text.

    The text is read through overlapping windows. Each window scores only the
    tokens that no window before it scored, so every token but the first is
    scored exactly once, and after the first window each has at least
    ``window - stride`` tokens before it in its window. The last window is
    moved back to end with the text.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model. It is run as it is, on its device and in its
        type, in evaluation mode; the losses are taken in float32.
    tokenizer : transformers.PreTrainedTokenizerBase
        Its tokenizer.
    text : str or bytes
        The text; bytes have to be UTF-8.
    window : int, optional
        Tokens per window. By default 512, or what the model allows if less.
    stride : int, optional
        Tokens from one window to the next; by default half a window.
    batch_size : int
        Windows run at once. It changes the time and the memory only.
    progress : callable, optional
        Called with the windows done and the windows in all.

    Returns
    -------
    Evaluation

    Raises
    ------
    molae.errors.ArgumentError
        If the text is empty, is not UTF-8, or does not fill a window and one
        token more, or if a size makes no sense.
    molae.errors.NonFiniteError
        If the model gives losses that are not finite.
    """
    import torch
    from torch.nn import functional

    text = _decoded(text)
    limit = getattr(model.config, "max_position_embeddings", None)
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

    # `verbose=False` only silences the remark that the text is longer than a model's window.
    tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    count = len(tokens)
    if count <= window:
        # With a single window there is no spread to take a standard error from.
        raise ArgumentError(
            f"the text is too short: it has {count} tokens, and a window of {window} needs "
            f"at least {window + 1}; give more text or a smaller window"
        )
    tokens = tokens.to(model.device)
    starts = [*range(0, count - window, stride), count - window]

    sums: list[float] = []
    sizes: list[int] = []
    scored = 1  # tokens before this place are done; the first has nothing to be told from
    training = model.training
    model.eval()
    began = time.perf_counter()
    try:
        with torch.inference_mode():
            for first in range(0, len(starts), batch_size):
                some = starts[first : first + batch_size]
                rows = torch.stack([tokens[start : start + window] for start in some])
                logits = model(input_ids=rows, use_cache=False).logits
                for start, row, scores in zip(some, rows, logits, strict=True):
                    begin = scored - start
                    losses = functional.cross_entropy(
                        scores[begin - 1 : -1].float(), row[begin:], reduction="none"
                    )
                    sums.append(losses.double().sum().item())
                    sizes.append(window - begin)
                    scored = start + window
                if progress is not None:
                    progress(len(sums), len(starts))
    finally:
        model.train(training)
    seconds = time.perf_counter() - began

    total = sum(sizes)
    loss = math.fsum(sums) / total
    if not math.isfinite(loss):
        raise NonFiniteError("the model gives losses that are not finite")
    # The mean is a ratio of two sums over windows, since the first and the last window
    # score other numbers of tokens than the rest; this is the usual error of such a ratio.
    spread = math.fsum((s - n * loss) ** 2 for s, n in zip(sums, sizes, strict=True))
    loss_se = math.sqrt(spread * len(sums) / (len(sums) - 1)) / total
    perplexity = math.exp(loss)
    return Evaluation(
        perplexity=perplexity,
        perplexity_se=perplexity * loss_se,
        loss=loss,
        loss_se=loss_se,
        tokens=total,
        windows=len(starts),
        seconds=seconds,
        threads=torch.get_num_threads(),
    )


def evaluate_path(
    path: str | os.PathLike[str],
    text_or_file: str | bytes | os.PathLike[str],
    *,
    dtype: Any = "float32",
    device: Any = "cpu",
    **options: Any,
) -> Evaluation:
    """Load a checkpoint with its tokenizer and measure it on a text.

    Parameters
    ----------
    path : str or os.PathLike
        Folder of an ordinary checkpoint, one that transformers loads without
        help from molae.
    text_or_file : str, bytes or os.PathLike
        The text itself; or a file with it, given as a path object.
    dtype : str or torch.dtype
        Type to compute in. float32 by default, whatever the file holds, so
        that two checkpoints are told apart by their weights and not by the
        rounding of the arithmetic.
    device : str or torch.device
        Where to compute.
    **options
        Passed to `evaluate`.

    Returns
    -------
    Evaluation

    Raises
    ------
    molae.errors.ArgumentError
        As `evaluate`, and if the file cannot be read.
    molae.errors.CheckpointError
        If there is no checkpoint at `path`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(path)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no checkpoint here (no config.json)")
    if isinstance(text_or_file, os.PathLike):
        file = Path(text_or_file)
        try:
            text_or_file = file.read_bytes()
        except OSError as error:
            raise ArgumentError(f"{file}: cannot be read: {error.strerror}") from error
    text = _decoded(text_or_file)  # before the load, which takes the longest

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    return evaluate(model.to(device), tokenizer, text, **options)


def _decoded(text: str | bytes) -> str:
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
