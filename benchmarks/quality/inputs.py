"""Which model is compared, on which texts."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import molae
import molae.demo
import molae.hf
from benchmarks import RESULTS, ROOT
from benchmarks.header import usable_cpus
from benchmarks.quality import second
from benchmarks.quality.model import Source, Text, load
from molae.demo import corpus
from molae.hf.calibrate import read_calibration_text
from molae.hf.windows import tokenize

__all__ = ["Inputs", "add_inputs", "begin", "find_inputs", "keep", "prepare", "say", "work_folder"]


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a comparison that trains works on.

    Attributes
    ----------
    source : Source
    text : Path
        Of the source's tokens, as a file to train with.
    scored : Text
    names : dict of str to str
        What model and texts are called.
    facts : dict
        About the model, for the tables.
    work : Path
    """

    source: Source
    text: Path
    scored: Text
    names: dict[str, str]
    facts: dict[str, Any]
    work: Path


def add_inputs(parser: argparse.ArgumentParser, work: str) -> None:
    """The options that `find_inputs` reads, and how much of the texts counts; `work` is the folder
    of what is kept, in ``build``."""
    parser.add_argument("--model", type=Path, help="a checkpoint; default: the demonstration's")
    parser.add_argument("--train-text", type=Path, help="train the second model on this text")
    parser.add_argument("--train-steps", type=int, default=second.SETTINGS.steps, metavar="N")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="text to calibrate with")
    parser.add_argument("--test", type=Path, metavar="FILE", help="text to score")
    parser.add_argument("--tokens", type=int, default=65536, help="to calibrate with")
    parser.add_argument("--length", type=int, default=512, help="of each sequence")
    parser.add_argument("--test-tokens", type=int, default=10**9, help="to score at most")
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--work", type=Path, default=ROOT / "build" / work)
    parser.add_argument("--json", type=Path, metavar="OUT", help="keep the figures in this file")


def find_inputs(args: argparse.Namespace) -> tuple[Path, str, str, dict[str, str]]:
    """The checkpoint, the text to calibrate with, the one to score, and what they are called."""
    names = {"model": str(args.model or "demonstration")}
    if args.train_text is not None:
        folder = args.work / "second"
        settings = replace(second.SETTINGS, steps=args.train_steps)
        path = second.train(args.train_text, folder, say, settings)
        texts = {"calibration": folder / "training.txt", "test": folder / "heldout.txt"}
        made = json.loads((folder / "training.json").read_text())
        names = {
            "model": f"second, trained on {args.train_text.name}",
            "trained": f"in {args.train_steps} steps, {made['training']['seconds']:.0f} s "
            f"on {made['device']}",
        }
    elif args.model is None:
        path = molae.demo.CHECKPOINT
        texts = {"calibration": None, "test": molae.demo.HELDOUT}
    else:
        path, texts = args.model, {"calibration": None, "test": None}
    for what in ("calibration", "test"):
        texts[what] = getattr(args, what) or texts[what]
    if texts["calibration"] is not None:
        text = read_calibration_text(texts["calibration"])
        names["calibration"] = texts["calibration"].name
    elif args.model is None:
        text = "\n".join(corpus.gather().documentation)
        names["calibration"] = "documentation of CPython"
    else:
        raise SystemExit("--calibration FILE: what to calibrate with")
    if texts["test"] is None:
        raise SystemExit("--test FILE: what to score")
    names["test"] = texts["test"].name
    return path, text, read_calibration_text(texts["test"]), names


def prepare(args: argparse.Namespace, *others: object) -> Inputs:
    """What `find_inputs` finds, opened; `others` is what else the work's folder depends on."""
    path, text, held_out, names = find_inputs(args)
    model, tokenizer = load(path)
    longest = getattr(model.config, "max_position_embeddings", None)
    length = min(args.length, longest or args.length)
    work = work_folder(args, path, text, held_out, *others)
    file = work / "text.txt"
    file.write_text(text, encoding="utf-8")
    tokens = tokenize(tokenizer, text).numpy()
    return Inputs(
        Source(path, tokens, max(1, args.tokens // length), length),
        file,
        Text(tokenizer, held_out, args.test_tokens, longest),
        names,
        {
            "kind": model.config.model_type,
            "parameters": sum(p.numel() for p in model.parameters()),
            "experts": model.config.num_experts,
            "num_experts_per_tok": model.config.num_experts_per_tok,
        },
        work,
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def begin(args: argparse.Namespace) -> None:
    """Threads, a folder for the work, no bars of others."""
    molae.set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    molae.hf.hide_progress()
    args.work.mkdir(parents=True, exist_ok=True)


def work_folder(args: argparse.Namespace, path: Path, *others: object) -> Path:
    """A folder for each set of inputs."""
    facts = [str(path), *others, args.tokens, args.length, args.test_tokens]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    folder: Path = args.work / key
    folder.mkdir(exist_ok=True)
    return folder


def keep(args: argparse.Namespace, result: Mapping[str, Any], name: str, whole: object) -> None:
    """Write the figures where they were asked for; a whole run of the usual inputs goes where the
    tables come from."""
    out = args.json
    if out is None and whole and not (args.model or args.calibration or args.test):
        out = RESULTS / f"{name}{'' if args.train_text is None else '_second'}.json"
    if out is None:
        say("not kept: --json names a file")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    say(f"kept in {out}; python -m benchmarks.readme writes the tables")
