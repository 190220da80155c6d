"""A look at what a checkpoint writes."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from molae.errors import ArgumentError
from molae.hf.opening import open_model

__all__ = ["Generation", "generate_path"]


@dataclass(frozen=True)
class Generation:
    """What a model wrote.

    Attributes
    ----------
    prompt, text : str
        What it was given, and what it added.
    tokens : int
        Tokens added, an end-of-text token included.
    seconds : float
        For all of them, the reading of the prompt included.
    """

    prompt: str
    text: str
    tokens: int
    seconds: float


def generate_path(
    path: str | os.PathLike[str],
    prompt: str,
    *,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: Any = "auto",
    device: Any = "cpu",
) -> Generation:
    """Load a checkpoint, ordinary or converted, and let it go on with a prompt.

    Parameters
    ----------
    path : str or os.PathLike
        Folder, or hub id.
    prompt : str
    max_new_tokens : int
        At most so many tokens are added; fewer, where the model ends its text or the context
        is full.
    temperature : float
        0 takes the most likely token each time. Above 0 tokens are drawn from the whole
        distribution, at this temperature.
    seed : int
        Of the drawing. torch's global generator is left as it was.
    dtype, device
        As in `molae.hf.opening.open_model`.

    Raises
    ------
    molae.errors.ArgumentError
        An empty prompt, one as long as the context, or a number that makes no sense.
    molae.errors.CheckpointError
    """
    import torch
    from transformers import GenerationConfig

    if not prompt:
        raise ArgumentError("prompt: it is empty")
    if max_new_tokens < 1:
        raise ArgumentError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ArgumentError(f"temperature: expected 0 or more, got {temperature}")
    model, tokenizer = open_model(path, dtype=dtype, device=device)
    given = tokenizer(prompt, return_tensors="pt").to(model.device)
    ids = given["input_ids"]
    limit = getattr(model.config, "max_position_embeddings", None)
    if not ids.shape[1] or (limit is not None and ids.shape[1] >= limit):
        raise ArgumentError(
            f"prompt: it has {ids.shape[1]} tokens, the model takes 1 to {limit and limit - 1}"
        )
    if limit is not None:
        max_new_tokens = min(max_new_tokens, limit - ids.shape[1])
    # A checkpoint's own settings of sampling must not mix with those asked for.
    drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    ends = model.generation_config.eos_token_id
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=_padding(tokenizer, ends),
        **(drawing if temperature else {"do_sample": False}),
    )
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(
            ids, attention_mask=given["attention_mask"], generation_config=settings
        )
    added = out[0, ids.shape[1] :]
    return Generation(
        prompt=prompt,
        text=tokenizer.decode(added, skip_special_tokens=True),
        tokens=len(added),
        seconds=time.perf_counter() - began,
    )


def _padding(tokenizer: Any, ends: Any) -> int:
    """Any token will do where nothing is padded, but Transformers asks for one."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return int(ends[0] if isinstance(ends, list) else ends or 0)
