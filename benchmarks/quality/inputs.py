"""Which model is compared, on which texts."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import molae.demo
from benchmarks import ROOT
from benchmarks.header import usable_cpus
from benchmarks.quality import second
from molae.demo import corpus
from molae.hf.calibrate import read_calibration_text

__all__ = ["add_inputs", "find_inputs", "say"]


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


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
