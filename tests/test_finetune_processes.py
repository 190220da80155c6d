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

import sharded_runs
import torch
from finetuning import DEMO, compressed_demo, factored_demo, settings, write_text

import molae
from molae.cli import main
from molae.errors import ArgumentError
from molae.hf import hide_progress
from molae.hf.opening import open_model
from molae.train import finetune

hide_progress()
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def factored(tmp_path_factory):
    return factored_demo(tmp_path_factory.mktemp("factored"))


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


def example_of_the_docs():
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    return page.partition("```yaml\n")[2].partition("```")[0]


def assert_same_weights(found, wanted):
    # Stored in bfloat16, where neighbours are up to 0.8 % apart.
    one, other = open_model(found)[0].state_dict(), open_model(wanted)[0].state_dict()
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-2, atol=1e-4, msg=name)


def test_processes_with_shares_of_the_model(factored, text, tmp_path):
    pytest.importorskip("peft")
    example = tmp_path / "fsdp.yaml"
    example.write_text(example_of_the_docs() + "use_cpu: true\n")
    out = launch(
        "-m", "accelerate.commands.launch", "--config_file", str(example),
        str(Path(sharded_runs.__file__)), str(factored), str(text), str(DEMO), str(tmp_path),
    )  # fmt: skip
    assert out.count("stopped") == 2
    for name, options in (("whole", sharded_runs.WHOLE), ("adapted", sharded_runs.ADAPTED)):
        one = tmp_path / f"{name}-of-one"
        wanted = finetune(factored, one, text, settings(**options), teacher=DEMO)
        assert_same_losses(losses_of(tmp_path / name), wanted.losses)
        assert_same_weights(tmp_path / name, one)
        assert molae.inspect(tmp_path / name).factored == molae.inspect(factored).factored
    assert_same_losses(losses_of(tmp_path / "resumed"), losses_of(tmp_path / "whole"))
    assert_same_weights(tmp_path / "resumed", tmp_path / "whole")


def test_the_older_way_to_share_a_model_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ArgumentError, match="fsdp_version: only 2 is supported"):
        finetune(DEMO, tmp_path / "dst", text, settings())


def test_rows_that_processes_cannot_share_are_refused(text, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ArgumentError, match="batch_size: 2 rows .* by 4 processes"):
        finetune(DEMO, tmp_path / "dst", text, settings())
