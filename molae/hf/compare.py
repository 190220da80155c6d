"""Two models on the same text: how far their next-token distributions are apart."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from molae.errors import ArgumentError, NonFiniteError
from molae.hf.evaluate import Evaluation, evaluation_mode, summary
from molae.hf.opening import open_model
from molae.hf.windows import decoded, ratio, read_text, tokenize, windows

__all__ = ["Comparison", "compare", "compare_paths"]

#: Places worked on at a time: in float64 a large vocabulary needs a megabyte for each.
PLACES = 64


@dataclass(frozen=True)
class Comparison:
    """Two models' scores on one text, and how far apart they are, token by token.

    With p the distributions of `against` (the reference) and q those of `model`, in nats,
    means over the scored tokens; standard errors as in `Evaluation`.

    Attributes
    ----------
    model, against : Evaluation
        Their seconds are each model's own.
    kl, kl_se : float
        KL(p || q) = sum p log(p / q): what is lost when `model` stands in for `against`.
    kl_reverse, kl_reverse_se : float
        KL(q || p).
    agreement, agreement_se : float
        Share of tokens for which both have the same most likely next token.
    loss_difference, loss_difference_se : float
        Loss of `model` less that of `against`; both read the same windows, so this error is
        much smaller than those of the two losses.
    """

    model: Evaluation
    against: Evaluation
    kl: float
    kl_se: float
    kl_reverse: float
    kl_reverse_se: float
    agreement: float
    agreement_se: float
    loss_difference: float
    loss_difference_se: float


def compare(
    model: Any,
    against: Any,
    tokenizer: Any,
    text: str | bytes,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], object] | None = None,
) -> Comparison:
    """Compare a model with a reference, on windows as in `molae.hf.evaluate.evaluate`.

    Parameters
    ----------
    model, against : transformers.PreTrainedModel
        Causal language models with one vocabulary; both are in memory at once.
    tokenizer : transformers.PreTrainedTokenizerBase
    text, window, stride, batch_size, progress
        As in `evaluate`.

    Returns
    -------
    Comparison

    Raises
    ------
    molae.errors.ArgumentError
        As `evaluate`, and for vocabularies of different sizes.
    molae.errors.NonFiniteError
        A model gives numbers that are not finite.

    Notes
    -----
    The distributions are taken in float64 from the logits as they are.
    """
    import torch

    sizes_of = [m.get_output_embeddings().weight.shape[0] for m in (model, against)]
    if sizes_of[0] != sizes_of[1]:
        raise ArgumentError(
            f"different vocabularies: the models give {sizes_of[0]} and {sizes_of[1]} logits a "
            "token; only models with one vocabulary can be compared"
        )
    limits = [getattr(m.config, "max_position_embeddings", None) for m in (model, against)]
    plan = windows(
        tokenize(tokenizer, decoded(text)),
        limit=min((x for x in limits if x is not None), default=None),
        window=window,
        stride=stride,
        batch_size=batch_size,
    )
    sums: list[list[float]] = []
    sizes: list[int] = []
    seconds = [0.0, 0.0]
    with evaluation_mode(model, against):
        for rows, begins in plan.batches(model.device):
            logits = []
            for number, one in enumerate((model, against)):
                began = time.perf_counter()
                logits.append(one(input_ids=rows.to(one.device), use_cache=False).logits)
                seconds[number] += time.perf_counter() - began
            for begin, row, q, p in zip(begins, rows, *logits, strict=True):
                total = torch.zeros(5, dtype=torch.float64)
                for at in range(begin, plan.window, PLACES):
                    end = min(at + PLACES, plan.window)
                    places = slice(at - 1, end - 1)
                    total += _distances(
                        q[places].double(), p[places].to(q.device).double(), row[at:end]
                    )
                sums.append(total.tolist())
                sizes.append(plan.window - begin)
            if progress is not None:
                progress(len(sums), len(plan.starts))
    columns = list(zip(*sums, strict=True))
    threads = torch.get_num_threads()
    scores = [
        summary(column, sizes, plan, spent, threads)
        for column, spent in zip(columns[:2], seconds, strict=True)
    ]
    kl, reverse, agreement = (ratio(column, sizes) for column in columns[2:])
    difference = ratio([a - b for a, b in zip(*columns[:2], strict=True)], sizes)
    if not math.isfinite(kl.mean + reverse.mean):
        raise NonFiniteError("the distance of the models' distributions is not finite")
    return Comparison(
        model=scores[0],
        against=scores[1],
        kl=kl.mean,
        kl_se=kl.se,
        kl_reverse=reverse.mean,
        kl_reverse_se=reverse.se,
        agreement=agreement.mean,
        agreement_se=agreement.se,
        loss_difference=difference.mean,
        loss_difference_se=difference.se,
    )


def _distances(q: Any, p: Any, targets: Any) -> Any:
    """Sums over tokens: both losses, KL(p || q), KL(q || p), and how often the tops agree."""
    import torch

    log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
    gap = log_p - log_q
    return torch.stack(
        [
            -log_q.gather(-1, targets[:, None]).sum(),
            -log_p.gather(-1, targets[:, None]).sum(),
            (log_p.exp() * gap).sum(),
            -(log_q.exp() * gap).sum(),
            (q.argmax(-1) == p.argmax(-1)).double().sum(),
        ]
    ).cpu()


def compare_paths(
    path: str | os.PathLike[str],
    against: str | os.PathLike[str],
    text_or_file: str | bytes | os.PathLike[str],
    *,
    dtype: Any = "float32",
    device: Any = "cpu",
    **options: Any,
) -> Comparison:
    """Load two checkpoints, ordinary or converted, and compare them on a text.

    Parameters
    ----------
    path, against : str or os.PathLike
        The checkpoint in question and the reference.
    text_or_file, dtype, device, **options
        As in `molae.hf.evaluate.evaluate_path`.

    Raises
    ------
    molae.errors.ArgumentError
        As `compare`, and if the two tokenizers split the text differently.
    molae.errors.CheckpointError
        If there is no whole checkpoint with a tokenizer at a path.
    """
    text = read_text(text_or_file)
    model, tokenizer = open_model(path, dtype=dtype, device=device)
    reference, other = open_model(against, dtype=dtype, device=device)
    if not _same(tokenize(tokenizer, text), tokenize(other, text)):
        raise ArgumentError(
            f"different vocabularies: the tokenizers of {path} and {against} split the text "
            "differently; only models with one vocabulary can be compared"
        )
    return compare(model, reference, tokenizer, text, **options)


def _same(one: Any, other: Any) -> bool:
    return one.shape == other.shape and bool((one == other).all())
