"""Teachers: their answers kept in files, and which of them are refused."""

from __future__ import annotations

import importlib
import json
import shutil
import weakref

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from finetuning import DEMO, bytes_of, compressed_demo, settings, write_text
from torch.nn import functional

from molae.errors import ArgumentError, DestinationError, NonFiniteError
from molae.hf import hide_progress
from molae.hf.opening import open_model, open_tokenizer
from molae.train import check_same_model, finetune, pack, read_examples, teachers
from molae.train.examples import IGNORED
from molae.train.loss import Target, TeacherBeside, divergence

hide_progress()
pytestmark = pytest.mark.usefixtures("one_thread")

running = importlib.import_module("molae.train.finetune")  # its name is the function's, too


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    return compressed_demo(tmp_path_factory.mktemp("compressed"))


def distributions(seed, n=9, V=40):
    noise = torch.randn(n, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return functional.log_softmax(4 * noise, -1)


def kept(theirs, N):
    """Of whole distributions the N likeliest tokens and the mass of the rest."""
    values, tokens = theirs.topk(N, 1)
    rest = (-values.exp().sum(1)).log1p() if theirs.shape[1] > N else None
    return Target(values, tokens, rest)


def test_the_divergence_of_the_likeliest_tokens_is_a_lower_bound():
    theirs, mine = distributions(0), distributions(1)
    whole = divergence(Target(theirs), mine).item()
    assert whole == pytest.approx((theirs.exp() * (theirs - mine)).sum().item())
    found = [divergence(kept(theirs, N), mine).item() for N in (1, 3, 10, 39, 40)]
    assert found == sorted(found)
    assert 0 < found[0] < 0.9 * whole
    assert found[-2:] == pytest.approx([whole, whole])
    same = distributions(0)
    assert divergence(kept(theirs, 3), same).item() == pytest.approx(0, abs=1e-9)


def test_its_gradient():
    theirs, logits = distributions(0), distributions(1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: divergence(kept(theirs, 3), functional.log_softmax(z, -1)), logits
    )


def test_a_rest_of_no_mass_adds_nothing():
    low = torch.finfo(torch.float32).min
    sure = Target(torch.zeros(1, 1), torch.tensor([[2]]), torch.tensor([low]))
    mine = functional.log_softmax(torch.randn(1, 5), -1).requires_grad_()
    found = divergence(sure, mine)
    found.backward()
    assert found.item() == pytest.approx(-mine[0, 2].item())
    assert mine.grad.isfinite().all()


def test_answers_in_files_are_as_good_as_a_teacher_in_memory(compressed, text, tmp_path):
    found = {}
    for N in (None, 10_000, 5):
        found[N] = finetune(
            compressed, tmp_path / str(N), text, settings(teacher_top_k=N, distill=0.7),
            teacher=DEMO,
        ).losses  # fmt: skip
    beside, whole, some = ([loss for _, loss in found[N]] for N in (None, 10_000, 5))
    assert whole == pytest.approx(beside, rel=1e-5)
    assert len(some) == len(beside)
    assert some[0] < beside[0]


def test_the_teacher_is_gone_before_the_model_comes(compressed, text, tmp_path, monkeypatch):
    alive, order = [], []

    def opening(path, **options):
        order.append((str(path), [ref() is not None for ref in alive]))
        model, tokenizer = open_model(path, **options)
        alive.append(weakref.ref(model))
        return model, tokenizer

    for module in (teachers, running):
        monkeypatch.setattr(module, "open_model", opening)
    finetune(compressed, tmp_path / "dst", text, settings(steps=1, teacher_top_k=3), teacher=DEMO)
    assert order == [(str(DEMO), []), (str(compressed), [False])]


class Killed(BaseException):
    pass


def kill(*args, **options):
    raise Killed


@pytest.fixture
def passes(monkeypatch):
    """How often a teacher was asked."""
    seen = []
    write = teachers._write_answers
    monkeypatch.setattr(teachers, "_write_answers", lambda *a: (seen.append(1), write(*a))[1])
    return seen


def test_answers_outlive_an_interruption(compressed, text, tmp_path, monkeypatch, passes):
    def run(name, **options):
        return finetune(
            compressed, tmp_path / name, text, settings(teacher_top_k=4), teacher=DEMO, **options
        )

    folder = tmp_path / "dst.training" / "teacher"

    def kill_there(file, fsync=teachers.os.fsync):
        if folder.exists():
            kill()
        fsync(file)

    run("whole")
    with monkeypatch.context() as patch:  # in the middle of the answers
        patch.setattr(teachers.os, "fsync", kill_there)
        with pytest.raises(Killed):
            run("dst")
    assert (folder / teachers.VALUES).exists()
    (folder / teachers.VALUES).write_bytes(b"half")
    with monkeypatch.context() as patch:  # between the answers and the training
        patch.setattr(running, "make_trainer", kill)
        with pytest.raises(Killed):
            run("dst")
    assert len(passes) == 3

    def stop(done, total, loss):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("dst", progress=stop)
    run("dst")
    assert len(passes) == 3
    assert bytes_of(tmp_path / "dst") == bytes_of(tmp_path / "whole")
    assert not folder.exists()


def test_answers_are_those_of_the_teacher_and_the_rows(compressed, text, tmp_path, passes):
    model, tokenizer = open_model(DEMO)
    other = tmp_path / "teacher"
    tokenizer.save_pretrained(other)

    def save(scale):
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        model.save_pretrained(other)

    def begin(source=text, **options):
        def stop(done, total, loss):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            finetune(
                compressed, tmp_path / "dst", source,
                settings(**{"teacher_top_k": 4, **options}),
                teacher=other, overwrite=True, progress=stop,
            )  # fmt: skip
        return len(passes)

    save(1)
    assert begin() == 1
    assert begin(learning_rate=1e-3) == 1  # another run that the same answers serve
    assert begin(teacher_top_k=5) == 2
    assert begin(length=32) == 3
    save(1.5)
    with pytest.raises(DestinationError, match="other settings or data"):
        finetune(
            compressed, tmp_path / "dst", text, settings(teacher_top_k=4, length=32), teacher=other
        )
    assert begin(length=32) == 4


def test_one_process_asks_the_teacher_and_the_others_wait(text, tmp_path, monkeypatch, passes):
    tokenizer = open_tokenizer(DEMO)
    rows = pack(read_examples(text, tokenizer), 64)

    def keep(writer):
        return teachers.keep_answers(
            tmp_path / "answers", rows, DEMO, 3, "digest", batch_size=4, device="cpu", writer=writer
        )

    monkeypatch.setattr(teachers.time, "sleep", lambda seconds: keep(True))
    found = keep(False)
    assert len(passes) == 1
    row = teachers.Numbered(rows)[1]
    batch = {name: value[None] for name, value in row.items()}
    whole = slice(0, 64)
    kept, wanted = found.targets(batch), TeacherBeside(teachers.open_teacher(DEMO, "cpu"))
    theirs = wanted.targets(batch)(whole).log_probabilities
    assert len(theirs) == (rows[1]["labels"][1:] != IGNORED).sum()
    values, tokens = theirs.topk(3, 1)
    torch.testing.assert_close(kept(whole).log_probabilities, values, rtol=1e-4, atol=1e-4)
    assert torch.equal(kept(whole).tokens, tokens)
    rest = (-values.exp().sum(1)).log1p()
    torch.testing.assert_close(kept(whole).rest, rest, rtol=1e-3, atol=1e-3)


@pytest.fixture
def relative(tmp_path):
    """Makes the demonstration's model look otherwise."""

    def make(**facts):
        shutil.copytree(DEMO, tmp_path / "relative")
        config = tmp_path / "relative" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | facts))
        return tmp_path / "relative"

    return make


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral' instead of 'olmoe'"),
        ({"hidden_size": 64}, "hidden_size 64 instead of 128"),
        ({"num_hidden_layers": 4, "vocab_size": 9}, "num_hidden_layers 4 .* 3, vocab_size 9"),
        ({"num_experts": 8}, "num_experts 8 instead of 32"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok 2 instead of 4"),
    ],
)
def test_another_model_is_told_from_the_same(facts, said, relative):
    with pytest.raises(ArgumentError, match=f"teacher: .* {said}.*give the original"):
        check_same_model(DEMO, relative(**facts))


def test_a_converted_model_is_still_the_same(compressed, relative):
    check_same_model(compressed, DEMO)
    tokenizer = open_tokenizer(DEMO)
    tokenizer.add_tokens(["<other>"])
    other = relative()
    tokenizer.save_pretrained(other)
    with pytest.raises(ArgumentError, match="it has another tokenizer"):
        check_same_model(compressed, other)


def test_a_teacher_that_answers_nan_is_refused(compressed, text, tmp_path):
    model, tokenizer = open_model(DEMO)
    with torch.no_grad():
        model.lm_head.weight[7, 3] = torch.nan
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    with pytest.raises(NonFiniteError, match="teacher: its distributions have NaN"):
        finetune(
            compressed, tmp_path / "dst", text, settings(teacher_top_k=4),
            teacher=tmp_path / "teacher",
        )  # fmt: skip
