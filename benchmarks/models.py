"""The case 'models': tokens a second of whole models, original and converted."""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, OlmoeConfig

import molae
import molae.hf
import molae.hf.experts
from benchmarks.layer_check import check_forward, reference, tolerance
from benchmarks.layer_forms import Pool
from benchmarks.settings import SIZES, Settings, largest_rank
from benchmarks.timing import alternate, ratio, seconds, summary
from benchmarks.weights import OLMOE
from molae.demo import CHECKPOINT

__all__ = ["GROUP_SIZE", "models"]

Row = dict[str, Any]

GROUP_SIZE = 8
REPEATS = 3

#: Tokens that are read before new ones are written, and tokens of the check.
START, CHECKED = 8, 16

#: Transformers' ways to compute experts: which to try for a prompt, and which for one token.
WAYS = {"prefill": ("grouped_mm", "eager"), "decode": ("grouped_mm", "eager", "batched_mm")}


def models(s: Settings) -> dict[str, Any]:
    """The demonstration model and a generated one of OLMoE's shapes, in float32 and bfloat16."""
    molae.hf.hide_progress()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="molae-benchmark-") as name:
        folder = Path(name)
        demo = {size: folder / f"demo-{size}" for size in SIZES}
        for size, path in demo.items():
            molae.convert(CHECKPOINT, path, molae.ConvertConfig(size=size, group_size=GROUP_SIZE))
        rows += _measure(s, "demo", CHECKPOINT, demo)
        original, converted = _generated(s, folder)
        rows += _measure(s, f"OLMoE, {s.layers} layers", original, converted)
    return {"new_tokens": s.new_tokens, "rows": rows}


# ------------------------------------------------------------------ the generated model


def _generated(s: Settings, folder: Path) -> tuple[Path, dict[float, Path]]:
    """Checkpoints in bfloat16 with random weights, original and factored.

    The vocabulary is cut as the layers are, so that its share of the work stays that of the
    whole model.
    """
    config = OlmoeConfig(
        hidden_size=s.D,
        intermediate_size=s.F,
        num_hidden_layers=s.layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=s.E,
        num_experts_per_tok=min(OLMOE["K"], s.E),
        vocab_size=max(s.V * s.layers // OLMOE["L"], 64),
        eos_token_id=None,
        pad_token_id=0,
    )
    pool = Pool()
    paths = {size: folder / f"generated-{size}" for size in SIZES}
    for size, path in paths.items():
        rank = largest_rank(GROUP_SIZE, s.F, s.D, size)
        model = molae.hf.latent_model(
            config, group_size=GROUP_SIZE, rank=rank, dtype=torch.bfloat16, device="meta"
        )
        _save(model, path, pool)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    _save(model, folder / "generated", pool)
    return folder / "generated", paths


@torch.no_grad()
def _save(model: Any, path: Path, pool: Pool) -> None:
    model.to_empty(device="cpu")
    for name, tensor in model.named_parameters():
        if name.endswith("norm.weight"):
            tensor.fill_(1.0)
            continue
        *_, rows, columns = tensor.shape
        private = name.endswith("private")
        # A B has the norm of a dense matrix with entries of variance 1/D; see LatentExperts.
        R = rows if ".down_proj." in name else columns
        std = (R * (2 - R / model.config.hidden_size)) ** -0.5 if private else columns**-0.5
        if name.endswith("shared"):
            std = model.config.hidden_size**-0.5
        pool.fill(tensor, std)
    for name, tensor in model.named_buffers():
        if name.endswith("perm"):
            tensor.copy_(pool.permutations(1, len(tensor))[0])
    model.save_pretrained(path)


# ------------------------------------------------------------------------ measuring


def _measure(s: Settings, title: str, original: Path, converted: dict[float, Path]) -> list[Row]:
    rows = []
    for dtype in ("float32", "bfloat16"):
        theirs = _load(original, dtype)
        best: dict[str, str] = {}
        for size, path in converted.items():
            ours = _load(path, dtype)
            _check(f"{title}, {dtype}, {size}", ours)
            rows += _rows(s, theirs, ours, best, model=title, dtype=dtype, size=size)
            del ours
            gc.collect()
        del theirs
        gc.collect()
    return rows


def _load(path: Path, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()


def _rows(s: Settings, theirs: Any, ours: Any, best: dict[str, str], **what: Any) -> Iterator[Row]:
    limit = theirs.config.max_position_embeddings
    prompt, new = min(s.prompt, limit), min(s.new_tokens, limit - START)
    ids = _ids(theirs, prompt)
    for phase, tokens in (("prefill", prompt), ("decode", new)):
        works = {
            "Transformers": partial(_run, theirs, phase, ids, new),
            "molae": partial(_run, ours, phase, ids, new),
        }
        pause = min(s.pause, 0.1)
        if phase not in best:
            tried = {way: _try(theirs, way, works["Transformers"], pause) for way in WAYS[phase]}
            best[phase] = min(tried, key=lambda way: tried[way])
        theirs.set_experts_implementation(best[phase])
        works["molae"]()  # brings the pages in
        times = alternate(works, min(s.repeats, REPEATS), pause)
        yield {
            **what,
            "phase": phase,
            "tokens": tokens,
            "implementation": best[phase],
            "times": {name: summary(found) for name, found in times.items()},
            "tokens_per_s": {
                name: tokens / statistics.median(found) for name, found in times.items()
            },
            "against": ratio(times["Transformers"], times["molae"]),
        }


def _try(model: Any, way: str, work: Callable[[], object], pause: float) -> float:
    model.set_experts_implementation(way)
    work()
    return seconds(work, pause)


@torch.no_grad()
def _run(model: Any, phase: str, ids: torch.Tensor, new: int) -> Any:
    if phase == "prefill":
        return model(ids, use_cache=True, logits_to_keep=1).logits
    settings = GenerationConfig(
        max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
    )
    start = ids[:, :START]
    found = model.generate(start, attention_mask=torch.ones_like(start), generation_config=settings)
    if found.shape[1] != START + new:
        raise RuntimeError(f"expected {new} new tokens, got {found.shape[1] - START}")
    return found


def _ids(model: Any, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, (1, length), generator=generator)


# ------------------------------------------------------------------------- checking


def _check(name: str, model: Any) -> None:
    """Each layer's experts, on what reaches them, against float64.

    The whole model is not compared: where rounding turns the choice of an expert, outputs differ
    by more than any rounding.
    """
    calls: list[tuple[Any, tuple[torch.Tensor, ...], torch.Tensor]] = []
    with (
        torch.no_grad(),
        _watching(model, calls),
        mock.patch.object(
            molae.hf.experts,
            "forward_torch",
            side_effect=RuntimeError(f"{name}: not by the kernels"),
        ),
    ):
        model(_ids(model, CHECKED))
    if not calls:
        raise RuntimeError(f"{name}: no latent experts were called")
    for layer, (x, index, weights), y in calls:
        tol = tolerance(x.dtype, max(layer.hidden_dim, layer.intermediate_dim))
        sample = torch.arange(0, len(x), 4)
        with torch.no_grad():
            truth = reference(layer, x[sample], index[sample], weights[sample])
        check_forward(name, y, truth, sample, None, tol)


@contextmanager
def _watching(model: Any, calls: list[Any]) -> Iterator[None]:
    def keep(layer: Any, given: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        calls.append((layer, tuple(t.clone() for t in given), y.clone()))

    hooks = [
        module.register_forward_hook(keep)
        for module in model.modules()
        if isinstance(module, molae.hf.LatentExperts)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
