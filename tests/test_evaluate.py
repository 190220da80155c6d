"""Perplexity by windows, against a plain loop over the tokens."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from molae.demo import CHECKPOINT, HELDOUT
from molae.errors import ArgumentError, CheckpointError, NonFiniteError
from molae.hf.evaluate import evaluate, evaluate_path


@pytest.fixture(scope="module")
def loaded():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype="float32")
    return model, AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def text():
    return HELDOUT.read_text("utf-8")


def plain(model, tokens, window, stride):
    """Loss of each token but the first, one window at a time, by the definition."""
    losses = {}
    start = 0
    while len(losses) < len(tokens) - 1:
        begin = min(start, len(tokens) - window)
        with torch.no_grad():
            logits = model(input_ids=tokens[None, begin : begin + window]).logits[0]
        for place in range(1, window):
            if begin + place not in losses:
                chances = torch.log_softmax(logits[place - 1].double(), dim=-1)
                losses[begin + place] = -chances[tokens[begin + place]].item()
        start += stride
    return losses


@pytest.mark.parametrize(("window", "stride"), [(32, 16), (32, 31), (40, 7), (64, None)])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_equals_a_plain_loop(loaded, text, window, stride, batch_size):
    model, tokenizer = loaded
    text = text[:900]
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][0]
    losses = plain(model, tokens, window, stride or window // 2)
    found = evaluate(model, tokenizer, text, window=window, stride=stride, batch_size=batch_size)
    assert found.tokens == len(tokens) - 1 == len(losses)
    assert found.loss == pytest.approx(sum(losses.values()) / len(losses), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.perplexity_se == pytest.approx(found.perplexity * found.loss_se)
    assert found.threads == torch.get_num_threads()
    assert found.seconds > 0


@pytest.mark.parametrize("extra", range(1, 6))
def test_every_length_is_scored_once(loaded, text, extra):
    model, tokenizer = loaded
    window, stride = 8, 4
    tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0][: window + extra]
    found = evaluate(model, Given(tokens), "any", window=window, stride=stride)
    losses = plain(model, tokens, window, stride)
    assert found.tokens == window + extra - 1
    assert found.windows == 1 + math.ceil(extra / stride)
    assert found.loss == pytest.approx(sum(losses.values()) / len(losses), rel=1e-5)


class Given:
    """A tokenizer that always finds the same tokens."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, text, **options):
        return {"input_ids": self.tokens[None]}


def test_standard_error_is_that_of_equal_windows(loaded, text):
    model, tokenizer = loaded
    # After the first window all score `stride` tokens: with a stride of window - 1 all are equal.
    window, count = 33, 10
    tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0][: 32 * count + 1]
    found = evaluate(model, Given(tokens), "any", window=window, stride=32)
    assert found.windows == count
    losses = plain(model, tokens, window, 32)
    means = torch.tensor([losses[place] for place in sorted(losses)]).view(count, 32).mean(1)
    assert found.loss_se == pytest.approx(means.std().item() / math.sqrt(count), rel=1e-4)


def test_standard_error_shrinks_with_text(loaded, text):
    model, tokenizer = loaded
    some = evaluate(model, tokenizer, text[:3000], window=64)
    more = evaluate(model, tokenizer, text[:30000], window=64)
    assert 0 < more.loss_se < some.loss_se


def test_progress_and_mode(loaded, text):
    model, tokenizer = loaded
    seen = []
    model.train()
    try:
        found = evaluate(
            model,
            tokenizer,
            text[:1500],
            window=32,
            batch_size=4,
            progress=lambda done, total: seen.append((done, total)),
        )
        assert model.training
    finally:
        model.eval()
    assert seen[-1] == (found.windows, found.windows)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_path_file_and_bytes_agree(loaded, text, tmp_path):
    model, tokenizer = loaded
    text = text[:6000]
    file = tmp_path / "text.txt"
    file.write_bytes(text.encode())
    found = evaluate(model, tokenizer, text)
    for given in (file, text, text.encode()):
        assert evaluate_path(CHECKPOINT, given).loss == pytest.approx(found.loss, rel=1e-6)
    half = evaluate_path(CHECKPOINT, file, dtype="bfloat16")
    assert half.loss == pytest.approx(found.loss, rel=0.02)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "empty"),
        (" \n", "empty"),
        (b"", "empty"),
        (b"\xff\xfe a", "UTF-8"),
        ("too short", "short"),
    ],
)
def test_refuses_texts(loaded, given, message):
    with pytest.raises(ArgumentError, match=message):
        evaluate(*loaded, given)
    with pytest.raises(ArgumentError, match=message):
        evaluate_path(CHECKPOINT, given)


def test_refuses_what_is_no_text(loaded):
    with pytest.raises(ArgumentError, match="str or bytes"):
        evaluate(*loaded, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 10**6},
        {"stride": 0},
        {"window": 32, "stride": 32},
        {"batch_size": 0},
    ],
)
def test_refuses_sizes(loaded, text, options):
    with pytest.raises(ArgumentError):
        evaluate(*loaded, text[:3000], **options)


def test_refuses_files(tmp_path):
    with pytest.raises(ArgumentError, match="cannot be read"):
        evaluate_path(CHECKPOINT, tmp_path / "missing.txt")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ArgumentError, match="UTF-8"):
        evaluate_path(CHECKPOINT, tmp_path / "latin.txt")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        evaluate_path(tmp_path, "a text")


def test_refuses_losses_that_are_not_finite(text):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype="float32")
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(NonFiniteError):
        evaluate(model, AutoTokenizer.from_pretrained(CHECKPOINT), text[:3000], window=64)
