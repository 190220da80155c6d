"""Fine-tuning: what is read, how it is packed, what is learned, and that nothing is lost."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from finetuning import DEMO, bytes_of, compressed_demo, settings, write_text
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch.nn import functional

from molae.cli import main
from molae.errors import ArgumentError, DestinationError, NonFiniteError
from molae.hf import LatentExperts, hide_progress
from molae.hf.opening import open_model
from molae.train import (
    Example,
    FinetuneConfig,
    finetune,
    pack,
    read_examples,
    select_parameters,
)
from molae.train import loss as losses
from molae.train.examples import IGNORED
from molae.train.loss import TeacherBeside, distilling_loss
from molae.train.results import named_troubles

hide_progress()
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def demo():
    return open_model(DEMO)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    return compressed_demo(tmp_path_factory.mktemp("compressed"))


# ------------------------------------------------------------------------------- data


def jsonl(tmp_path, *entries):
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n".join(map(json.dumps, entries)))
    return path


def test_only_completions_are_learned(tmp_path, demo):
    tokenizer = demo[1]
    path = jsonl(tmp_path, {"prompt": "One plus one?", "completion": " Two."}, {"text": "An end."})
    first, second = read_examples(path, tokenizer)
    prompt = tokenizer("One plus one?")["input_ids"]
    rest = [*tokenizer(" Two.")["input_ids"], tokenizer.eos_token_id]
    assert list(first.tokens) == [*prompt, *rest]
    assert list(first.learned) == [False] * len(prompt) + [True] * len(rest)
    assert list(second.tokens) == [*tokenizer("An end.")["input_ids"], tokenizer.eos_token_id]
    assert all(second.learned)


def test_what_the_assistant_says_is_learned(tmp_path, demo):
    tokenizer = open_model(DEMO)[1]
    path = jsonl(tmp_path, {"messages": [
        {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"},
    ]})  # fmt: skip
    with pytest.raises(ArgumentError, match="line 1: messages need a tokenizer with a chat"):
        read_examples(path, tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (found,) = read_examples(path, tokenizer)
    assert (
        tokenizer.decode(found.tokens)
        == "[user]one\n[assistant]two\n[user]three\n[assistant]four\n"
    )
    own = [t for t, learned in zip(found.tokens, found.learned, strict=True) if learned]
    assert tokenizer.decode(own) == "two\nfour\n"
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ArgumentError, match="chat template renders message 2 in another way"):
        read_examples(path, tokenizer)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{", "line 1 is no JSON"),
        ("[1]", "line 1: expected prompt and completion, messages, or text"),
        ('{"prompt": "x"}', "line 1: expected prompt and completion"),
        ('{"messages": [{"content": "x"}]}', "line 1: messages need"),
        (" ", "empty"),
    ],
)
def test_data_that_make_no_sense_are_refused(tmp_path, demo, written, said):
    path = tmp_path / "data.jsonl"
    path.write_text(written)
    with pytest.raises(ArgumentError, match=said):
        read_examples(path, demo[1])
    with pytest.raises(ArgumentError, match="cannot be read"):
        read_examples(tmp_path / "nothing.jsonl", demo[1])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(2, 20))
def test_rows_hold_every_example_once(lengths, length):
    some = [Example(tuple(range(100 * i, 100 * i + n)), (True,) * n) for i, n in enumerate(lengths)]
    rows = pack(some, length)
    found = []
    for i in range(len(rows)):
        row = {name: t.tolist() for name, t in rows[i].items()}
        assert all(len(t) == length for t in row.values())
        starts = [k for k, position in enumerate(row["position_ids"]) if position == 0]
        assert all(row["labels"][k] == IGNORED for k in starts)
        found += [
            (t, label) for t, label in zip(row["input_ids"], row["labels"], strict=True)
            if label != IGNORED
        ]  # fmt: skip
    assert all(t == label for t, label in found)
    want = [
        t for e in some for at in range(0, len(e.tokens), length)
        for t in e.tokens[at + 1 : at + length]
    ]  # fmt: skip
    assert sorted(t for t, _ in found) == sorted(want)
    assert rows.learned == len(want)
    # Best fit, longest first, is never worse than half as full again as the least possible.
    pieces = sum(min(length, n - at) for n in lengths for at in range(0, n, length) if n - at > 1)
    assert len(rows) <= max(1, math.ceil(2 * pieces / length))


def test_packed_examples_do_not_see_each_other(demo):
    model = demo[0].eval()
    generator = torch.Generator().manual_seed(0)
    some = [
        Example(tuple(torch.randint(5, 500, (n,), generator=generator).tolist()), (True,) * n)
        for n in (7, 12, 9)
    ]
    row = pack(some, 40, filler=3)[0]
    call = {name: row[name][None] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        together = model(**call, use_cache=False).logits[0]
        at = 0
        for example in sorted(some, key=lambda e: -len(e.tokens)):
            alone = model(torch.tensor(example.tokens)[None], use_cache=False).logits[0]
            torch.testing.assert_close(together[at : at + len(alone)], alone, rtol=1e-4, atol=1e-4)
            at += len(alone)


# ------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("distill", [0.0, 0.3, 1.0])
def test_the_loss_and_its_gradient(demo, compressed, distill, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS", 7)  # many pieces
    teacher = demo[0].eval()
    model = open_model(compressed)[0].eval()
    tokens = torch.randint(5, 500, (2, 30), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, :11] = IGNORED
    inputs = {
        "input_ids": tokens, "labels": labels,
        "position_ids": torch.arange(30).expand(2, 30),
    }  # fmt: skip
    total, count = distilling_loss(model, TeacherBeside(teacher), inputs, distill)
    total.backward()
    mine = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    learned = labels[:, 1:] != IGNORED
    own = functional.log_softmax(model(tokens).logits[:, :-1][learned], -1)
    with torch.no_grad():
        theirs = functional.softmax(teacher(tokens).logits[:, :-1][learned], -1)
    divergence = (theirs * (theirs.log() - own)).sum()
    likelihood = -own.gather(1, labels[:, 1:][learned][:, None]).sum()
    want = distill * divergence + (1 - distill) * likelihood
    want.backward()
    assert count == learned.sum()
    assert total.item() == pytest.approx(want.item(), rel=1e-4, abs=1e-5)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(mine[name], p.grad, rtol=2e-3, atol=2e-4)


def test_parts_of_a_model(compressed):
    model = open_model(compressed)[0]
    names = {
        part: (select_parameters(model, part), [n for n, p in model.named_parameters()
                                                if p.requires_grad])[1]
        for part in ("all", "experts", "router", "light")
    }  # fmt: skip
    assert len(names["all"]) == len(list(model.parameters()))
    assert all(name.endswith("mlp.experts.compressed") for name in names["light"])
    assert len(names["light"]) == len(model.model.layers)
    assert all(name.endswith("mlp.gate.weight") for name in names["router"])
    assert len(names["router"]) == len(model.model.layers)
    assert set(names["light"]) < set(names["experts"])
    assert all(".experts." in name for name in names["experts"])
    ordinary = open_model(DEMO)[0]
    assert select_parameters(ordinary, "experts") > 0
    with pytest.raises(ArgumentError, match="train: the model has no compressed experts"):
        select_parameters(ordinary, "light")


# ------------------------------------------------------------------------------- runs


def test_vectors_learn_what_the_original_answers(compressed, text, tmp_path):
    seen = []
    found = finetune(
        compressed, tmp_path / "dst", text, settings(train="light", steps=12, batch_size=4),
        teacher=DEMO, progress=lambda *a: seen.append(a),
    )  # fmt: skip
    assert found.losses[-1][1] < found.losses[0][1]
    assert seen[-1][:2] == (12, 12)
    assert found.trained_parameters == 3 * 32 * (2 * 128 + 64)
    before, after = open_model(compressed)[0], open_model(tmp_path / "dst")[0]
    for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b) == (not name.endswith("compressed")), name
    assert any(isinstance(m, LatentExperts) for m in after.modules())
    kept = json.loads((tmp_path / "dst" / "finetune.json").read_text())
    assert kept["losses"] == found.losses
    assert (tmp_path / "dst" / "finetune.png").stat().st_size > 1000
    assert not (tmp_path / "dst.training").exists()


def test_a_result_that_could_not_be_written_is_written_by_the_same_call(
    text, tmp_path, monkeypatch
):
    """All steps are done then; and nothing is gone on from that was not whole."""
    wanted = finetune(DEMO, tmp_path / "whole", text, settings(learning_rate=1.0))
    real, rmdir = Path.replace, os.rmdir

    def fails(self, target):
        if target == tmp_path / "dst":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, target)

    def keeps_the_folder(path, **options):
        if Path(path) == tmp_path / "dst.training":
            raise PermissionError(errno.EACCES, "Permission denied")
        rmdir(path, **options)

    def go():
        return finetune(DEMO, tmp_path / "dst", text, settings(learning_rate=1.0))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fails)
        with pytest.raises(DestinationError, match=r"dst\.training: cannot be written: .*full"):
            go()
    with monkeypatch.context() as patch:
        patch.setattr("os.rmdir", keeps_the_folder)
        assert go() == wanted
    assert bytes_of(tmp_path / "dst") == bytes_of(tmp_path / "whole")
    assert not (tmp_path / "dst.training" / "run.txt").exists()


def test_a_run_whose_note_could_not_be_written_begins_anew(text, tmp_path, monkeypatch):
    def fails(fd):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fails)
        with pytest.raises(DestinationError, match=r"run\.txt: cannot be written"):
            finetune(DEMO, tmp_path / "dst", text, settings(steps=1))
    assert finetune(DEMO, tmp_path / "dst", text, settings(steps=1)).steps == 1


@pytest.mark.parametrize(
    "error",
    [SafetensorError("I/O error"), RuntimeError("unable to mmap 8 bytes from file <x>"),
     RuntimeError("basic_ios::clear: iostream error"),
     Exception("Permission denied (os error 13)"), OSError(errno.EIO, "Input/output error")],
)  # fmt: skip
def test_what_libraries_say_of_a_disk_names_the_folder(error):
    work = Path("x.training")
    with pytest.raises(DestinationError, match=r"^x\.training: cannot be"), named_troubles(work):
        raise error
    with pytest.raises(RuntimeError, match="^another$"), named_troubles(work):
        raise RuntimeError("another")


def test_an_interrupted_run_goes_on_to_the_same_bytes(text, tmp_path):
    finetune(DEMO, tmp_path / "whole", text, settings())

    def stop(done, total, loss):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(DEMO, tmp_path / "dst", text, settings(), progress=stop)
    assert not (tmp_path / "dst").exists()
    with pytest.raises(DestinationError, match="other settings"):
        finetune(DEMO, tmp_path / "dst", text, settings(learning_rate=1e-3))
    with pytest.raises(DestinationError, match="other settings"):
        finetune(DEMO, tmp_path / "dst", text, settings(), dtype="bfloat16")
    seen = []
    finetune(DEMO, tmp_path / "dst", text, settings(), progress=lambda *a: seen.append(a[0]))
    assert seen == [5, 6]  # from the checkpoint after step 4
    assert bytes_of(tmp_path / "dst") == bytes_of(tmp_path / "whole")
    with pytest.raises(DestinationError, match="something already"):
        finetune(DEMO, tmp_path / "dst", text, settings())


def test_a_loss_that_is_no_number_stops_it(text, tmp_path):
    with pytest.raises(NonFiniteError, match="step [2-6]: the loss is nan"):
        finetune(DEMO, tmp_path / "dst", text, settings(learning_rate=1e30))
    assert not (tmp_path / "dst").exists()


def test_a_teacher_of_another_tokenizer_is_refused(text, tmp_path):
    model, tokenizer = open_model(DEMO)
    tokenizer.add_tokens(["<other>"])
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ArgumentError, match="another tokenizer"):
        finetune(DEMO, tmp_path / "dst", text, settings(), teacher=tmp_path / "teacher")


@pytest.mark.parametrize(
    "wrong",
    [{"train": "heads"}, {"steps": 0}, {"epochs": 0}, {"learning_rate": 0}, {"warmup": 1},
     {"batch_size": 0}, {"length": 1}, {"distill": 1.5}, {"weight_decay": -1}, {"save_every": 0},
     {"teacher_top_k": 0}, {"lora": 0}, {"lora_alpha": 0}],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        FinetuneConfig(**wrong)


def test_the_command(compressed, text, tmp_path, capsys):
    options = ["--data", str(text), "--steps", "3", "--batch-size", "2", "--length", "64"]
    call = ["finetune", str(compressed), str(tmp_path / "dst"), *options]
    assert main([*call, "--train", "light", "--teacher", str(DEMO)]) == 0
    out = capsys.readouterr().out
    assert "3 steps on" in out
    assert "Written to" in out
    assert main([*call, "--quiet"]) == 1
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert main([*call, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3
    assert main([*call, "--distill", "0.5"]) == 2
    assert "--distill: only with --teacher" in capsys.readouterr().err
    assert main([*call, "--teacher-top-k", "5"]) == 2
    assert "--teacher-top-k: only with --teacher" in capsys.readouterr().err
    assert main([*call, "--warmup", "2"]) == 2
    assert main(["finetune", str(tmp_path / "no"), str(tmp_path / "x"), *options]) == 1
    assert "no checkpoint here" in capsys.readouterr().err
