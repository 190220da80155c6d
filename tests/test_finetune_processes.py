"""Several processes train as one does, each with the whole model or with a share of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from finetuning import DEMO, compressed_demo, settings, write_text

from molae.cli import main
from molae.errors import ArgumentError
from molae.hf import hide_progress
from molae.train import finetune

hide_progress()
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    return compressed_demo(tmp_path_factory.mktemp("compressed"))


CALL = ["--steps", "6", "--batch-size", "4", "--length", "64", "--learning-rate", "1e-3",
        "--teacher", str(DEMO), "--quiet"]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


def launch(*command, **environ):
    """Run Python in a process that starts others."""
    tests = str(Path(__file__).parent)
    paths = os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environ},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def losses_of(folder):
    return json.loads((folder / "finetune.json").read_text())["losses"]


def assert_same_losses(found, wanted):
    assert [step for step, _ in found] == [step for step, _ in wanted]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in wanted], rel=1e-4)


def test_two_processes_have_the_losses_of_one(compressed, text, tmp_path):
    call = ["--data", str(text), *CALL]
    assert main(["finetune", str(compressed), str(tmp_path / "one"), *call]) == 0
    launch(*TORCHRUN, "-m", "molae.cli", "finetune", str(compressed), str(tmp_path / "two"), *call)
    assert_same_losses(losses_of(tmp_path / "two"), losses_of(tmp_path / "one"))


def test_rows_that_processes_cannot_share_are_refused(text, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ArgumentError, match="batch_size: 2 rows .* by 4 processes"):
        finetune(DEMO, tmp_path / "dst", text, settings())
