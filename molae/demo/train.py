"""Train the demonstration checkpoint: ``python -m molae.demo.train``.

The command gathers the text (:mod:`molae.demo.corpus`), trains a tokenizer, a
small OLMoE and a dense model of the same active size, measures both on the
held-out text, and writes the checkpoint, the text and a record of it all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from molae.demo.corpus import Corpus, gather

__all__ = ["Settings", "main"]

END, PADDING = "<|endoftext|>", "<|padding|>"


@dataclass(frozen=True)
class Settings:
    """How the models are built and trained.

    Attributes
    ----------
    steps : int
        Optimizer steps.
    seed : int
        Seed of the weights and of the order of the text.
    vocabulary : int
        Size of the tokenizer.
    hidden, width, layers, heads, experts, active : int
        Hidden size, width of one expert, and the counts of layers, attention
        heads, experts, and experts used per token.
    length, batch : int
        Tokens per sequence, sequences per step.
    rate, decay, warmup, clip : float
        Peak learning rate, weight decay, share of the steps that warm up, and
        largest gradient norm.
    dropout : float
        Dropout after the embedding and after each attention and expert block.
    balance : float
        Weight of the load-balancing loss.
    average : float
        Decay of the running average of the weights.
    prose_first, prose_last : float
        Share of documentation (the rest is source code) in the first and in
        the last batch; it moves from one to the other in a straight line.
    initial : float
        Standard deviation of the first weights.
    """

    steps: int = 2600
    seed: int = 0
    vocabulary: int = 2048
    hidden: int = 128
    width: int = 64
    layers: int = 3
    heads: int = 4
    experts: int = 32
    active: int = 4
    length: int = 512
    batch: int = 8
    rate: float = 6e-3
    decay: float = 0.2
    warmup: float = 0.03
    clip: float = 1.0
    dropout: float = 0.1
    balance: float = 0.01
    average: float = 0.995
    prose_first: float = 0.3
    prose_last: float = 0.8
    initial: float = 0.05


def build_tokenizer(corpus: Corpus, settings: Settings) -> Any:
    """Train a byte-level BPE tokenizer on the training documentation.

    Returns
    -------
    transformers.PreTrainedTokenizerFast
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.documentation, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PADDING,
        model_max_length=settings.length,
        clean_up_tokenization_spaces=False,
    )


def build_model(settings: Settings, tokenizer: Any, dense: bool = False) -> Any:
    """Make an untrained model.

    Parameters
    ----------
    settings : Settings
    tokenizer : transformers.PreTrainedTokenizerFast
    dense : bool
        Make the baseline: one expert as wide as all the active ones together,
        always chosen, so that a token meets as many weights as in the mixture.

    Returns
    -------
    transformers.OlmoeForCausalLM
    """
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(settings.seed)
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.width * (settings.active if dense else 1),
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        num_experts=1 if dense else settings.experts,
        num_experts_per_tok=1 if dense else settings.active,
        max_position_embeddings=settings.length,
        router_aux_loss_coef=settings.balance,
        norm_topk_prob=False,
        tie_word_embeddings=True,
        initializer_range=settings.initial,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return OlmoeForCausalLM._from_config(
        config, experts_implementation="eager" if dense else "grouped_mm"
    )


def encode(documents: Iterable[str], tokenizer: Any) -> Any:
    """One long row of tokens: each document ends with the end token."""
    import torch

    tokens: list[int] = []
    for text in documents:
        tokens += [*tokenizer.backend_tokenizer.encode(text).ids, tokenizer.eos_token_id]
    return torch.tensor(tokens)


class Stream:
    """Endless sequences from a row of tokens.

    Every pass cuts the row anew, from a random first token on, and shuffles
    the pieces, so that no pass shows the same sequences again.
    """

    def __init__(self, tokens: Any, length: int, generator: Any) -> None:
        self.tokens, self.length, self.generator = tokens, length, generator
        self.pieces: list[Any] = []
        self.passes = 0.0

    def __next__(self) -> Any:
        import torch

        if not self.pieces:
            skip = int(torch.randint(self.length, (1,), generator=self.generator))
            usable = (len(self.tokens) - skip) // self.length * self.length
            rows = self.tokens[skip : skip + usable].view(-1, self.length)
            self.pieces = list(rows[torch.randperm(len(rows), generator=self.generator)])
        self.passes += self.length / len(self.tokens)
        return self.pieces.pop()


def train(
    model: Any,
    documentation: Any,
    source: Any,
    validation: Any,
    settings: Settings,
    log: Callable[[str], None] = lambda line: None,
    state: Path | None = None,
) -> dict[str, Any]:
    """Train a model and leave in it the weights that validated best.

    Parameters
    ----------
    model : transformers.OlmoeForCausalLM
        On the device that shall train it.
    documentation, source, validation : torch.Tensor
        Rows of tokens.
    settings : Settings
    log : callable
        Gets one line of text now and then.
    state : Path, optional
        Where to keep everything now and then. If the file is there and of the
        same settings, the training goes on from it.

    Returns
    -------
    dict
        What happened: seconds, tokens, passes over the text, best validation
        loss and its step.
    """
    import torch
    from torch.nn import functional as F
    from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

    generator = torch.Generator().manual_seed(settings.seed)
    prose = Stream(documentation, settings.length, generator)
    code = Stream(source, settings.length, generator)
    config = model.config
    mixture = config.num_experts > 1
    device = next(model.parameters()).device

    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": settings.decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.95), fused=True)
    averaged = {name: p.detach().clone() for name, p in model.named_parameters()}
    best, best_step, best_weights = math.inf, 0, averaged

    hooks = []
    if settings.dropout:

        def drop(module: Any, inputs: Any, output: Any) -> Any:
            if not module.training:
                return output
            first, *rest = output if isinstance(output, tuple) else (output,)
            first = F.dropout(first, settings.dropout)
            return (first, *rest) if rest else first

        places = [model.model.embed_tokens]
        places += [part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]
        hooks = [place.register_forward_hook(drop) for place in places]

    began, spent = 0, 0.0
    running = None
    if state is not None and state.exists():
        saved = torch.load(state, map_location=device, weights_only=True)
        if saved["settings"] == asdict(settings):
            began, spent, running = saved["step"], saved["seconds"], saved["running"]
            best, best_step, best_weights = (saved[key] for key in ("best", "best_step", "weights"))
            averaged = saved["averaged"]
            _load(model, saved["current"])
            optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["random"].cpu())
            log(f"going on from step {began}")

    started = time.perf_counter() - spent
    for step in range(settings.steps):
        done = step / settings.steps
        share = settings.prose_first + (settings.prose_last - settings.prose_first) * done
        picks = torch.rand(settings.batch, generator=generator) < share
        tokens = torch.stack([next(prose if pick else code) for pick in picks])
        if step < began:
            continue  # drawn again only to come to the same place in the text
        tokens = tokens.to(device)
        warm = min(1.0, (step + 1) / max(1.0, settings.warmup * settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = (
                settings.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
            )

        model.train()
        output = model(input_ids=tokens, output_router_logits=mixture, use_cache=False)
        loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        total = loss
        if mixture:
            # Balanced layer by layer: the sum over layers would let one layer make up for another.
            for logits in output.router_logits:
                balance = load_balancing_loss_func(
                    (logits,), config.num_experts, config.num_experts_per_tok
                )
                total = total + settings.balance * balance
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()

        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        # A short average early on, so that the first random weights are soon forgotten.
        keep = min(settings.average, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.values()), list(model.parameters()), 1 - keep)

        if (step + 1) % max(1, settings.steps // 40) == 0 or step + 1 == settings.steps:
            current = {name: p.detach().clone() for name, p in model.named_parameters()}
            _load(model, averaged)
            held = _loss(model, validation, settings.length)
            if held < best:
                best, best_step = held, step + 1
                best_weights = {name: p.clone() for name, p in averaged.items()}
            _load(model, current)
            if state is not None:
                everything = {
                    "settings": asdict(settings),
                    "step": step + 1,
                    "seconds": time.perf_counter() - started,
                    "running": running,
                    "best": best,
                    "best_step": best_step,
                    "weights": best_weights,
                    "averaged": averaged,
                    "current": current,
                    "optimizer": optimizer.state_dict(),
                    "random": torch.get_rng_state(),
                }
                # Renamed into place, so that a cut leaves the old file or the new one.
                torch.save(everything, state.with_suffix(".part"))
                state.with_suffix(".part").replace(state)
            log(
                f"step {step + 1}/{settings.steps}  train {running:.4f}  validation {held:.4f}"
                f"  best {best:.4f}  {time.perf_counter() - started:.0f} s"
            )
    for hook in hooks:
        hook.remove()
    _load(model, best_weights)
    model.eval()
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "tokens": settings.steps * settings.batch * settings.length,
        "passes_documentation": round(prose.passes, 2),
        "passes_source": round(code.passes, 2),
        "validation_loss": round(best, 5),
        "best_step": best_step,
    }


def _load(model: Any, weights: dict[str, Any]) -> None:
    """Copy named weights into a model."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def _loss(model: Any, tokens: Any, length: int) -> float:
    """Mean loss per token over pieces of a row of tokens."""
    import torch
    from torch.nn import functional as F

    model.eval()
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    losses = []
    with torch.no_grad():
        for batch in rows.to(next(model.parameters()).device).split(16):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
            losses.append(
                F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            )
    return torch.cat(losses).mean().item()


def tokens_per_expert(model: Any, tokens: Any, length: int) -> list[list[int]]:
    """Count how many tokens each expert of each layer is chosen for."""
    import torch

    config = model.config
    counts = torch.zeros(config.num_hidden_layers, config.num_experts, dtype=torch.long)
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    with torch.no_grad():
        for batch in rows.split(16):
            output = model(input_ids=batch, output_router_logits=True, use_cache=False)
            for count, logits in zip(counts, output.router_logits, strict=True):
                chosen = logits.topk(config.num_experts_per_tok, dim=-1).indices
                count += torch.bincount(chosen.flatten(), minlength=config.num_experts)
    return counts.tolist()


def sizes(model: Any) -> dict[str, int]:
    """Parameters in all, and those one token meets."""
    config = model.config
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    total = sum(p.numel() for p in model.parameters())
    idle = experts - experts * config.num_experts_per_tok // config.num_experts
    return {"parameters": total, "active_parameters": total - idle}


def measure(model: Any, tokenizer: Any, text: str) -> dict[str, float]:
    """Perplexity on a text, per token and per byte."""
    from molae.hf.evaluate import evaluate

    found = evaluate(model, tokenizer, text)
    bits = found.loss * found.tokens / math.log(2) / len(text.encode())
    kept = {key: getattr(found, key) for key in ("perplexity", "perplexity_se", "loss", "loss_se")}
    return {
        **{key: round(value, 5) for key, value in kept.items()},
        "bits_per_byte": round(bits, 5),
        "tokens": found.tokens,
        "windows": found.windows,
    }


def readme(record: dict[str, Any]) -> str:
    """The text of the folder's README, from the record of the training."""
    settings, text, made = record["settings"], record["text"], record["made_with"]
    mixture, dense = record["mixture"], record["dense"]

    def row(name: str, model: dict[str, Any]) -> str:
        held = model["heldout"]
        return (
            f"| {name} | {model['parameters']:,} | {model['active_parameters']:,} "
            f"| {held['perplexity']:.3f} ± {held['perplexity_se']:.3f} "
            f"| {held['bits_per_byte']:.4f} | {model['training']['seconds']:,.0f} |"
        )

    experts = "\n".join(
        f"| {layer} | {min(counts):,} | {sum(counts) // len(counts):,} | {max(counts):,} |"
        for layer, counts in enumerate(record["tokens_per_expert"])
    )
    trained = mixture["training"]
    return f"""\
# The demonstration checkpoint

A tiny mixture-of-experts language model in the OLMoE layout, trained, with its
tokenizer, so that everything molae does can be tried without a download.
It knows a little of Python's documentation and nothing else: it is for
measuring compression on, not for use.

* `checkpoint/`: weights in bfloat16, configuration and tokenizer; transformers
  loads it with `AutoModelForCausalLM` and `AutoTokenizer`.
  {record["bytes"]["checkpoint"]:,} bytes.
* `heldout.txt`: text the model has not seen, to measure perplexity on.
  {text["heldout_bytes"]:,} bytes.
* `training.json`: the record this page is written from.

The model has {settings["layers"]} layers of hidden size {settings["hidden"]},
{settings["heads"]} attention heads, and {settings["experts"]} experts of width
{settings["width"]} per layer, of which each token uses {settings["active"]}. The
vocabulary has {record["vocabulary"]:,} tokens, a window {settings["length"]}.

## How it was made

    {record["command"]}

on {made["cores"]} CPU cores that other work shared, with Python {made["python"]},
torch {made["torch"]} and transformers {made["transformers"]}.

The text is what every CPython ships: the topics of `help()` and the docstrings
of the standard library ({text["documentation_tokens"]:,} tokens of
documentation, seen {trained["passes_documentation"]:.1f} times), and the source files
({text["source_tokens"]:,} tokens, seen {trained["passes_source"]:.1f} times).
In all the model saw {trained["tokens"]:,} tokens in {settings["steps"]:,} steps.
Whole topics and modules, chosen by a hash of their names, were kept apart:
{text["validation_tokens"]:,} tokens to choose the weights by, and the held-out text,
which was measured once, at the end. Paragraphs that also occur in the training
text were dropped from both.

The shipped weights are a running average over the last steps of AdamW, taken
where they did best on the validation text.

## How well it does

On `heldout.txt`, {mixture["heldout"]["tokens"]:,} tokens, each scored with at
least half a window before it; ± is one standard error. The dense model has one
expert per layer, as wide as the {settings["active"]} active ones together, and
was trained in the same way on the same tokens. The mixture is measured as shipped,
after rounding to bfloat16, and so is the dense model.

| model | parameters | active per token | perplexity | bits per byte | training, s |
|---|---:|---:|---:|---:|---:|
{row("mixture, shipped", mixture)}
{row("dense, same active size", dense)}

## Tokens per expert

On the held-out text, each token counted once for each expert it uses:

| layer | fewest | mean | most |
|---:|---:|---:|---:|
{experts}

## Rights

The held-out text is from CPython and under the Python Software Foundation
License, version 2; copyright 2001 onwards, Python Software Foundation, all rights
reserved. The weights were learned from text under the same licence.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m molae.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("molae-demo"), help="folder to write to")
    parser.add_argument("--minutes", type=float, help="time for the mixture, instead of --steps")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    for field in fields(Settings):
        kind = type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    options = parse(arguments)
    try:
        import torch
        import transformers

        from molae import hf  # noqa: F401  # says what to install
    except ImportError as error:
        print(
            f"training needs torch and transformers; run: pip install 'molae[hf]' ({error})",
            file=sys.stderr,
        )
        return 1

    def log(line: str) -> None:
        print(line, flush=True)

    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    checkpoint = options.out / "checkpoint"
    checkpoint.mkdir(parents=True, exist_ok=True)

    corpus = gather()
    tokenizer = build_tokenizer(corpus, settings)
    parts = (corpus.documentation, corpus.source, corpus.validation)
    documentation, source, validation = (encode(part, tokenizer) for part in parts)
    heldout_bytes = len(corpus.heldout.encode())
    log(
        f"{len(documentation):,} tokens of documentation, {len(source):,} of source, "
        f"{len(validation):,} for validation; {heldout_bytes:,} bytes held out"
    )

    def learn(model: Any, settings: Settings, **options: Any) -> dict[str, Any]:
        return train(model, documentation, source, validation, settings, **options)

    # Bytes, so that no system turns the line ends into its own.
    (options.out / "heldout.txt").write_bytes(corpus.heldout.encode())

    if options.minutes is not None:
        trial = replace(settings, steps=30)
        seconds = learn(build_model(trial, tokenizer), trial)["seconds"]
        settings = replace(settings, steps=max(30, round(options.minutes * 60 / seconds * 30)))
        log(f"{settings.steps} steps for {options.minutes:g} minutes")

    record: dict[str, Any] = {
        "command": " ".join(
            ["python -m molae.demo.train", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "settings": asdict(settings),
        "vocabulary": len(tokenizer),
        "made_with": {
            "cores": os.cpu_count(),
            "threads": options.threads,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "text": {
            "documentation_tokens": len(documentation),
            "source_tokens": len(source),
            "validation_tokens": len(validation),
            "heldout_bytes": heldout_bytes,
        },
    }
    for name in ("mixture", "dense"):
        log(f"{name}:")
        model = build_model(settings, tokenizer, dense=name == "dense")
        report = learn(model, settings, log=log, state=options.out / f"{name}.pt")
        # Rounded to what is shipped, and measured in float32 like any checkpoint.
        model.to(torch.bfloat16)
        if name == "mixture":
            model.save_pretrained(checkpoint)
            tokenizer.save_pretrained(checkpoint)
            for path in checkpoint.iterdir():
                path.chmod(0o644)
        model.float()
        record[name] = {
            **sizes(model),
            "training": report,
            "heldout": measure(model, tokenizer, corpus.heldout),
        }
        if name == "mixture":
            record["tokens_per_expert"] = tokens_per_expert(
                model, encode([corpus.heldout], tokenizer), settings.length
            )
        log(json.dumps(record[name]))
    record["bytes"] = {
        "checkpoint": sum(path.stat().st_size for path in checkpoint.iterdir()),
        "weights": (checkpoint / "model.safetensors").stat().st_size,
        "tokenizer": (checkpoint / "tokenizer.json").stat().st_size,
    }
    (options.out / "training.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    (options.out / "README.md").write_text(readme(record), "utf-8")
    log(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
