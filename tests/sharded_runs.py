"""Trainings that several processes share, for test_finetune_processes.py: run by each of them.

One is not interrupted, one is and goes on, one has adapters.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from finetuning import settings
from torch.distributed.tensor import DTensor

from molae.hf import hide_progress
from molae.train import finetune, trainer

WHOLE = {"batch_size": 4, "learning_rate": 1e-3, "teacher_top_k": 20}
ADAPTED = {"batch_size": 4, "learning_rate": 1e-3, "lora": 2, "train": "experts"}


class Stopped(BaseException):
    pass


def stop_at(step: int) -> None:
    """Every process, at the same place: with one alone the others would wait for it."""
    count = 0
    loss = trainer.distilling_loss

    def counting(model, *args):
        nonlocal count
        assert all(isinstance(p, DTensor) for p in model.parameters()), "nothing is shared"
        count += 1
        if count == step:
            trainer.distilling_loss = loss
            raise Stopped
        return loss(model, *args)

    trainer.distilling_loss = counting


def main(src: str, text: str, teacher: str, out: str) -> None:
    hide_progress()
    torch.set_num_threads(1)
    config, adapted = settings(**WHOLE), settings(**ADAPTED)
    dst = Path(out)
    finetune(src, dst / "whole", text, config, teacher=teacher)
    stop_at(6)
    try:
        finetune(src, dst / "resumed", text, config, teacher=teacher)
        raise AssertionError("it was not stopped")
    except Stopped:
        print("stopped")
    seen: list[int] = []
    finetune(
        src, dst / "resumed", text, config, teacher=teacher,
        progress=lambda done, *rest: seen.append(done),
    )  # fmt: skip
    assert seen in ([5, 6], []), seen  # from the checkpoint after step 4; the first one tells
    finetune(src, dst / "adapted", text, adapted, teacher=teacher)


if __name__ == "__main__":
    main(*sys.argv[1:])
