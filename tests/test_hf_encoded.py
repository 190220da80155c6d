"""Sources in FP8 and Transformers: results load, and a calibration text goes through them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from converting import bits, tensors
from encoded import fp8_pair
from hf_models import load
from hf_models import tokens as some_tokens

from molae import ConvertConfig
from molae.convert import convert, materialize
from molae.hf.calibrate import Calibration
from molae.threads import num_threads


@pytest.fixture(autouse=True)
def alone(one_thread: None) -> Iterator[None]:
    """Nothing here is large enough for threads."""
    with num_threads(1):
        yield


SIZES = {"L": 2, "E": 4, "K": 2, "D": 16, "F": 8}


def test_a_result_loads(tmp_path):
    fp8, bf16 = fp8_pair(tmp_path, "qwen3_moe", **SIZES)
    convert(fp8, tmp_path / "small", ConvertConfig(size=0.8))
    materialize(tmp_path / "small", tmp_path / "whole")
    ids = some_tokens()
    with torch.no_grad():
        small = load(tmp_path / "small", dtype=torch.float32)(ids).logits
        whole = load(tmp_path / "whole", dtype=torch.float32)(ids).logits
        original = load(bf16, dtype=torch.float32)(ids).logits
    assert small.isfinite().all()
    # Factors multiplied out and rounded to bfloat16 against factors as they are.
    assert (small - whole).abs().max() < (small - original).abs().max()


def test_a_calibration_text(tmp_path):
    fp8, bf16 = fp8_pair(tmp_path, "qwen3_moe", **SIZES)
    tokens = np.random.default_rng(0).integers(3, 40, 256)
    found = []
    for name, src in (("a", fp8), ("b", bf16)):
        with Calibration(src, tokens, sequences=4, length=64) as calibration:
            convert(src, tmp_path / name, ConvertConfig(size=0.7), calibration=calibration)
        found.append(tensors(tmp_path / name))
    assert list(found[0]) == list(found[1])
    for name, array in found[0].items():
        assert bits(array) == bits(found[1][name]), name
