"""A second trained model, of another family and other text than the demonstration's.

Its router is trained with a stronger balancing loss. ``python -m benchmarks.quality.second TEXT
FOLDER`` takes one to two hours on a CPU (``--device cuda``: ten minutes); the weights are no part
of the project.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from molae.demo.corpus import Corpus
from molae.demo.train import Settings, build_tokenizer, encode, measure, sizes, tokens_per_expert
from molae.demo.train import train as train_model

__all__ = ["SETTINGS", "train"]

#: About 8.5 million parameters, 32 experts of which a token uses 4.
SETTINGS = Settings(
    steps=2600,
    vocabulary=4096,
    hidden=192,
    width=96,
    layers=4,
    heads=6,
    rate=4e-3,
    decay=0.1,
    dropout=0.05,
    balance=0.05,
    prose_first=1.0,
    prose_last=1.0,
)

#: The text is cut into so many pieces; of each PERIOD pieces one is for validation, one held out.
PIECES, PERIOD = 200, 50


def train(
    text: Path,
    folder: Path,
    log: Callable[[str], None] = lambda line: None,
    settings: Settings = SETTINGS,
    device: str = "cpu",
) -> Path:
    """Train the model on a text, or find it trained already.

    Parameters
    ----------
    text : Path
        A UTF-8 text of some megabytes.
    folder : Path
        Where everything goes; a training that was cut off goes on from there.
    log : callable
    settings : Settings
    device : str
        Where torch trains it.

    Returns
    -------
    Path
        The checkpoint. Beside it are ``training.txt``, ``heldout.txt``, the parts of the text
        that it has seen and has not, and ``training.json``, the record.
    """
    import torch

    checkpoint, record = folder / "checkpoint", folder / "training.json"
    if record.exists() and json.loads(record.read_text())["settings"] == asdict(settings):
        return checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    seen, validation, heldout = _split(text.read_text("utf-8"))
    (folder / "training.txt").write_text(seen, "utf-8")
    (folder / "heldout.txt").write_text(heldout, "utf-8")
    tokenizer = build_tokenizer(Corpus((seen,), (), (validation,), heldout), settings)
    tokens, other = encode([seen], tokenizer), encode([validation], tokenizer)
    log(f"{len(tokens):,} tokens to train on, {len(other):,} for validation")
    model = _build(settings, tokenizer).to(device)
    # The grouped product takes float32 on the CPU alone.
    model.set_experts_implementation("grouped_mm" if device == "cpu" else "eager")
    report = train_model(model, tokens, tokens, other, settings, log, folder / "state.pt")
    model.to("cpu", torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    model.float()
    facts: dict[str, Any] = {
        "settings": asdict(settings),
        "training": report,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        **sizes(model),
        "heldout": measure(model, tokenizer, heldout),
        "tokens_per_expert": tokens_per_expert(
            model, encode([heldout], tokenizer), settings.length
        ),
    }
    record.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    return checkpoint


def _split(text: str) -> tuple[str, str, str]:
    """To train on, for validation, held out: pieces from all over the text."""
    step = -(-len(text) // PIECES)
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    for number, at in enumerate(range(0, len(text), step)):
        place = number % PERIOD
        parts[1 if place == 0 else 2 if place == PERIOD // 2 else 0].append(text[at : at + step])
    seen, validation, heldout = ("".join(part) for part in parts)
    return seen, validation, heldout


def _build(settings: Settings, tokenizer: Any) -> Any:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(settings.seed)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.width * settings.active,
        moe_intermediate_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        head_dim=settings.hidden // settings.heads,
        num_experts=settings.experts,
        num_experts_per_tok=settings.active,
        norm_topk_prob=True,
        max_position_embeddings=settings.length,
        tie_word_embeddings=True,
        initializer_range=settings.initial,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3MoeForCausalLM._from_config(config)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.second")
    parser.add_argument("text", type=Path, help="UTF-8 text to train on")
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--device", default="cpu", help="where torch trains: cpu, cuda")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    import torch

    torch.set_num_threads(args.threads)
    checkpoint = train(
        args.text, args.folder, lambda line: print(line, flush=True), device=args.device
    )
    print((args.folder / "training.json").read_text())
    print(checkpoint)
    return 0


if __name__ == "__main__":
    sys.exit(main())
