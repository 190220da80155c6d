"""What the steps are; each is done in a process of its own: see `making`."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import molae
import molae.hf
from benchmarks.memory import anonymous_bytes
from benchmarks.quality.baselines import reap
from benchmarks.quality.model import Source, layers_of, load, replaced
from molae.errors import CalibrationWarning
from molae.train import FinetuneConfig, finetune

__all__ = ["KINDS", "main", "serve"]


@dataclass(frozen=True, eq=False)
class Task:
    """From `src`, made of the original `source`, to `dst`."""

    source: Source
    text: Path
    src: Path
    dst: Path
    settings: Mapping[str, Any]


def _convert(task: Task) -> None:
    config = molae.ConvertConfig(**task.settings)
    if config.method == "molae":
        molae.convert(task.src, task.dst, config)
        return
    with task.source.calibration() as calibration:
        molae.convert(task.src, task.dst, config, calibration=calibration)


def _prune(task: Task) -> None:
    """By REAP: an ordinary checkpoint of fewer experts."""
    model, tokenizer = load(task.src)
    with task.source.calibration() as calibration:
        layers = layers_of(model, calibration, fisher=False)
    found = [reap.compress(layer, task.settings["size"]) for layer in layers]
    with replaced(model, found):
        model.config.num_experts = int(found[0].kept.sum())
        model.save_pretrained(task.dst)
    tokenizer.save_pretrained(task.dst)


def _heal(task: Task) -> None:
    settings = dict(task.settings)
    source = replace(task.source, sequences=settings.pop("sequences"))
    config = molae.HealConfig(**settings)
    with source.calibration() as calibration:
        molae.heal(task.src, task.dst, task.source.path, config, calibration=calibration)


def _finetune(task: Task) -> None:
    config = FinetuneConfig(**task.settings, length=task.source.length, save_every=10**6)
    teacher = task.source.path if config.distill else None
    finetune(task.src, task.dst, task.text, config, teacher=teacher)


KINDS: Mapping[str, Callable[[Task], None]] = {
    "convert": _convert,
    "prune": _prune,
    "heal": _heal,
    "finetune": _finetune,
}


def serve() -> None:
    """Fork a process for each line of standard input, a spec and a file for what is found; its
    number and its exit code are the answers."""
    _ = transformers.Trainer  # what the first use loads counts for no step
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            os.dup2(2, 1)
            code = 1
            try:
                main(*json.loads(line))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def main(spec: str, out: str) -> None:
    """Do what the file `spec` says; seconds, of the clock and of the processor,
    and memory at the start go to `out`."""
    given = json.loads(Path(spec).read_text())
    molae.set_num_threads(given["threads"])
    torch.set_num_threads(given["threads"])
    molae.hf.hide_progress()
    warnings.simplefilter("ignore", CalibrationWarning)
    path, tokens, sequences, length = given["source"]
    task = Task(
        Source(Path(path), np.load(tokens), sequences, length),
        Path(given["text"]),
        Path(given["src"]),
        Path(given["dst"]),
        given["settings"],
    )
    start_bytes = anonymous_bytes()
    began = time.perf_counter(), time.process_time()
    KINDS[given["kind"]](task)
    found = {
        "seconds": round(time.perf_counter() - began[0], 2),
        "cpu_seconds": round(time.process_time() - began[1], 2),
        "start_bytes": start_bytes,
    }
    Path(out).write_text(json.dumps(found))
