"""Perplexity of a language model on a text, with its standard error."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from molae.errors import NonFiniteError
from molae.hf.opening import open_model
from molae.hf.windows import Windows, decoded, ratio, read_text, tokenize, windows

__all__ = ["Evaluation", "evaluate", "evaluate_path", "peak_memory"]


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
    tokens_per_second : float
        Tokens run, those of the overlaps included, over `seconds`.
    """

    perplexity: float
    perplexity_se: float
    loss: float
    loss_se: float
    tokens: int
    windows: int
    seconds: float
    threads: int
    tokens_per_second: float


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

    plan = windows(
        tokenize(tokenizer, decoded(text)),
        limit=getattr(model.config, "max_position_embeddings", None),
        window=window,
        stride=stride,
        batch_size=batch_size,
    )
    sums: list[float] = []
    sizes: list[int] = []
    began = time.perf_counter()
    with evaluation_mode(model):
        for rows, begins in plan.batches(model.device):
            logits = model(input_ids=rows, use_cache=False).logits
            for begin, row, scores in zip(begins, rows, logits, strict=True):
                losses = functional.cross_entropy(
                    scores[begin - 1 : -1].float(), row[begin:], reduction="none"
                )
                sums.append(losses.double().sum().item())
                sizes.append(plan.window - begin)
            if progress is not None:
                progress(len(sums), len(plan.starts))
    seconds = time.perf_counter() - began
    return summary(sums, sizes, plan, seconds, torch.get_num_threads())


@contextlib.contextmanager
def evaluation_mode(*models: Any) -> Iterator[None]:
    """Without dropout and gradients; each model's mode is put back at the end."""
    import torch

    before = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for model, training in zip(models, before, strict=True):
            model.train(training)


def summary(
    sums: Sequence[float], sizes: Sequence[int], plan: Windows, seconds: float, threads: int
) -> Evaluation:
    """What the losses of the windows come to."""
    if not math.isfinite(math.fsum(sums)):
        raise NonFiniteError("the model gives losses that are not finite")
    loss = ratio(sums, sizes)
    perplexity = math.exp(loss.mean)
    return Evaluation(
        perplexity=perplexity,
        perplexity_se=perplexity * loss.se,
        loss=loss.mean,
        loss_se=loss.se,
        tokens=sum(sizes),
        windows=len(plan.starts),
        seconds=seconds,
        threads=threads,
        tokens_per_second=len(plan.starts) * plan.window / seconds,
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
        Folder of an ordinary or of a converted checkpoint, or a hub id.
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
        If there is no whole checkpoint with a tokenizer at `path`.
    """
    text = read_text(text_or_file)  # before the load, which takes the longest
    model, tokenizer = open_model(path, dtype=dtype, device=device)
    return evaluate(model, tokenizer, text, **options)


def peak_memory() -> dict[str, int]:
    """Most memory that this process has held so far, in bytes.

    Returns
    -------
    dict of str to int
        ``resident``: in RAM, mapped pages of files included. ``gpu``, where torch has used
        one: what its tensors took on the current one.
    """
    import torch

    peak = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak
