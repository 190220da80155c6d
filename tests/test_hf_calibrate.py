"""A text run through a checkpoint layer by layer, and conversions that know it."""

from __future__ import annotations

import io
import json
import os
import shutil
import time

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
import torch
from checkpoints import FAMILIES, transformers_checkpoint
from converting import tree
from hf_models import SETTINGS, SIZES, load, tokens
from rich.console import Console

import molae
import molae.demo
from molae.arch import describe
from molae.convert import Report, Watcher, convert
from molae.convert.footprint import Footprint
from molae.convert.measuring import TRIAL_SIZES
from molae.demo.corpus import builtin_text
from molae.errors import (
    ArgumentError,
    CalibrationWarning,
    CheckpointError,
    DestinationError,
    NonFiniteError,
)
from molae.hf import calibrate, hide_progress
from molae.hf.calibrate import Calibration, read_calibration_text
from molae.hf.evaluate import evaluate_path
from molae.hf.opening import open_tokenizer
from molae.hf.streaming import LayerStream
from molae.io import open_checkpoint
from molae.ops import NarrowExperts
from molae.report.tables import plan_view

hide_progress()
pytestmark = pytest.mark.usefixtures("one_thread")

IDS = np.random.default_rng(0).integers(3, 40, 400)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    src = tmp_path_factory.mktemp("calibrate") / "src"
    transformers_checkpoint(src, "qwen2_moe", config=SETTINGS, **SIZES)
    return src


def calibration(src, ids=IDS, **options):
    return Calibration(src, ids, **({"length": 40} | options))


def moments(run, layer):
    own = run.experts(layer)
    return molae.fit.layer_moments(
        run.reading(layer), *(own[kind] for kind in ("gate_proj", "up_proj", "down_proj"))
    )


def experts_of(model):
    """Each MoE layer's experts by number, whatever the family calls them."""
    return {
        int(name.split(".")[2]): module
        for name, module in model.named_modules()
        if name.endswith(".experts")
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_is_the_model(tmp_path, family, original, dtype):
    transformers_checkpoint(
        tmp_path, family, original=original, dtype=dtype, config=SETTINGS, **SIZES
    )
    ids = tokens()
    with open_checkpoint(tmp_path) as checkpoint:
        stream = LayerStream(checkpoint, describe(checkpoint))
        (hidden,) = stream.embed(iter([ids]))
        for number in range(len(stream)):
            with stream.layer(number) as run:
                hidden = run(hidden)
        own = stream._loaded(stream._net, "")
        with own, torch.inference_mode():
            found = stream._log_probabilities(ids, hidden, torch.arange(ids.shape[1]))
        # Against a distribution that is not the model's the divergence is not 0.
        same, other = stream.divergences(ids, hidden, [hidden, hidden.flip(-1)])
    with torch.no_grad():
        wanted = torch.log_softmax(load(tmp_path, dtype="float32")(ids).logits, -1)
    assert (found - wanted).abs().max() < 1e-4
    assert same == 0.0 < other


def test_moments_are_those_of_what_the_experts_read(source):
    """Against hooks on the whole model, in float64 NumPy."""
    model = load(source, dtype="float32", experts_implementation="eager")
    layer = max(experts_of(model))
    seen = []
    experts_of(model)[layer].register_forward_hook(lambda m, args, out: seen.append(args))
    ids = torch.from_numpy(IDS[:400].reshape(10, 40))
    with torch.no_grad():
        model(ids)
    x, index, g = (t.double().numpy() for t in seen[0])
    E, D, F = SIZES["E"], SIZES["D"], SIZES["F"]
    with calibration(source) as run:
        found = moments(run, layer)
    both, down = (
        getattr(experts_of(model)[layer], name).detach().double().numpy()
        for name in ("gate_up_proj", "down_proj")
    )
    for e in range(E):
        t, k = np.nonzero(index == e)
        w, rows = g[t, k][:, None], x[t]
        gate, up = rows @ both[e, :F].T, rows @ both[e, F:].T
        s = 1 / (1 + np.exp(-gate))
        value, slope = gate * s, s * (1 + gate * (1 - s))
        C = (w * rows).T @ (w * rows)
        H = (w * value * up).T @ (w * value * up)
        assert found.x.count[e] == len(t)
        assert np.allclose(found.x.moment[e], C, rtol=1e-3, atol=1e-4 * np.abs(C).max())
        assert np.allclose(found.hidden.moment[e], H, rtol=1e-3, atol=1e-4 * np.abs(H).max())
        for kind, felt in (("gate_proj", slope * up), ("up_proj", value)):
            S = (w * felt).T @ (w * felt) / np.square(w).sum() * (down[e].T @ down[e])
            assert np.allclose(found.row_metric[kind][e], S, rtol=1e-3, atol=1e-4 * np.abs(S).max())
    assert found.x.moment.shape == (E, D, D)


def test_the_answers_are_those_of_the_layers_own_experts(source):
    with calibration(source) as run:
        for layer in run.moe_layers:
            given, own = run.reading(layer), run.experts(layer)
            want = molae.ops.latent_experts_forward(
                given.x, given.index, given.weights, *own.values(), activation=given.activation
            )
            assert np.allclose(given.answers, want, rtol=1e-4, atol=1e-6)
            assert np.abs(want).max() > 1e-3


def test_what_is_changed_before_a_layer_is_what_it_reads(source):
    """`advance` with other experts; the same moments in any order of calls."""
    with calibration(source) as run:
        layers = [n for n in range(3) if n in run._model.moe_layers]
        first, last = layers[0], layers[-1]
        plain = moments(run, last).x.moment.copy()
        own = run._stream.experts(first)
        halved = {"down_proj": molae.ops.Projection(
            groups=own["down_proj"].groups,
            ranks=own["down_proj"].ranks,
            private=tuple(0.5 * p for p in own["down_proj"].private),
            shared=own["down_proj"].shared,
        )}  # fmt: skip
        run.advance(first, halved)
        changed = moments(run, last).x.moment.copy()
        run.advance(first)
        again = moments(run, last).x.moment
        assert np.array_equal(plain, again)
        assert np.abs(changed - plain).max() > 1e-3 * np.abs(plain).max()


def test_what_the_layers_before_have_lost(source):
    """Added to a layer's answer it gives what the original hands on."""
    with calibration(source) as run:
        layers = [n for n in range(3) if n in run._model.moe_layers]
        first, last = layers[0], layers[-1]
        assert run.reading(last, anchored=True).lost is None
        run.advance(last)
        original = run._walk.states.copy()
        own = run.experts(first)["down_proj"]
        halved = molae.ops.Projection(
            own.groups, own.ranks, tuple(0.5 * p for p in own.private), own.shared
        )
        run.advance(first, {"down_proj": halved})
        given = run.reading(last, anchored=True)
        assert given.lost is not None
        lost = given.lost.reshape(original.shape).copy()
        run.advance(last)
        assert np.abs(lost).max() > 1e-3 * np.abs(original).max()
        assert np.allclose(run._walk.states + lost, original, atol=1e-5 * np.abs(original).max())


def test_a_trial_of_the_same_experts_moves_nothing(source):
    def trials(layer, given, own):
        lost = molae.ops.Projection(
            groups=own["down_proj"].groups,
            ranks=(0,) * SIZES["E"],
            private=(None,) * SIZES["E"],
            shared=(None,) * SIZES["E"],
        )
        none = NarrowExperts.of({"bias": np.zeros((SIZES["E"], SIZES["D"]), np.float32)})
        yield "same", own, None
        yield "lost", {"down_proj": lost}, None
        yield "fewer", {}, (none, 1)

    with calibration(source) as run:
        moved = run.measure(trials)
        layers = run._model.moe_layers
        for layer in layers:  # the same, one layer at a time
            given, own = run.reading(layer), run.experts(layer)
            _, lost, fewer = ((other, light) for _, other, light in trials(layer, given, own))
            again = run.compare(layer, [lost, fewer])
            assert again == pytest.approx([moved[layer, n] for n in ("lost", "fewer")], rel=1e-5)
    assert {layer for layer, _ in moved} == set(layers)
    for layer in layers:
        assert moved[layer, "same"] == pytest.approx(0, abs=1e-9)
        assert moved[layer, "lost"] > 1e-4
        assert moved[layer, "fewer"] > 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"uniform": True}, {"one_shot": True}, {"heal": 2}])
def test_every_family_is_converted(tmp_path, family, settings):
    transformers_checkpoint(tmp_path / "src", family, config=SETTINGS, **SIZES)
    config = molae.ConvertConfig(size=0.6, **settings)
    with calibration(tmp_path / "src") as run:
        report = convert(tmp_path / "src", tmp_path / "dst", config, calibration=run)
    assert report.plan["size_reached"] <= 0.6
    assert report.settings["calibration"]["length"] == 40
    assert all(0 <= row.output_error < 1 for row in report.rows)
    with torch.no_grad():
        assert torch.isfinite(load(tmp_path / "dst")(tokens()).logits).all()
    ranks = {row.kind: row.ranks for row in report.rows}
    assert all(rank >= 1 for own in ranks.values() for rank in own)


@pytest.mark.parametrize("settings", [{}, {"one_shot": True}, {"heal": 2}])
@pytest.mark.parametrize("finished", [1, 2])
def test_a_run_that_was_interrupted_goes_on_to_the_same_bytes(source, tmp_path, finished, settings):
    config = molae.ConvertConfig(size=0.5, **settings)
    with calibration(source) as run:
        convert(source, tmp_path / "whole", config, calibration=run)

    def written():
        return sorted((tmp_path / "dst").glob("model-*.safetensors"))

    class Stop(Watcher):
        def advanced(self, done, total, what):
            if what.startswith(f"layer {finished}"):
                while len(written()) < finished:  # the file before is on its way
                    time.sleep(0.01)
                raise KeyboardInterrupt

    with calibration(source) as run, pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "dst", config, calibration=run, watcher=Stop())
    assert len(written()) == finished
    with calibration(source) as run:
        convert(source, tmp_path / "dst", config, calibration=run)
    assert tree(tmp_path / "dst") == tree(tmp_path / "whole")


def test_another_text_is_another_run(source, tmp_path):
    class Stop(Watcher):
        def advanced(self, done, total, what):
            if what.startswith("layer 2"):
                raise KeyboardInterrupt

    config = molae.ConvertConfig(size=0.5, uniform=True)
    with calibration(source) as run, pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "dst", config, calibration=run, watcher=Stop())
    with calibration(source, IDS[::-1]) as run, pytest.raises(DestinationError, match="tokens_sha"):
        convert(source, tmp_path / "dst", config, calibration=run)


def test_threads_change_nothing(source, tmp_path, one_thread):
    """molae's own; torch's are fixed by the calibration."""
    config = molae.ConvertConfig(size=0.5)
    for threads in (1, 3):
        with calibration(source) as run:
            run._threads = 1
            run.facts["torch_threads"] = 1
            with molae.threads.num_threads(threads):
                convert(source, tmp_path / str(threads), config, calibration=run)
    assert tree(tmp_path / "1") == tree(tmp_path / "3")


def test_on_a_trained_model_it_is_better_than_without_data(tmp_path):
    """Perplexity of the demonstration model on text that no fit has seen."""
    text = _english()
    half = len(text) // 2
    config = molae.ConvertConfig(size=0.5)
    convert(molae.demo.CHECKPOINT, tmp_path / "blind", config)
    with Calibration(molae.demo.CHECKPOINT, text[:half], length=256) as run:
        convert(molae.demo.CHECKPOINT, tmp_path / "calibrated", config, calibration=run)
    blind, known, original = (
        evaluate_path(path, text[half:], window=256).loss
        for path in (tmp_path / "blind", tmp_path / "calibrated", molae.demo.CHECKPOINT)
    )
    assert original < known
    assert known - original < 0.7 * (blind - original)


def _english():
    """Docstrings of the running Python, of the kind that the model has learnt."""
    from molae.demo.corpus import gather

    return "\n\n".join(gather().documentation)[:200_000]


# ------------------------------------------------------------------------ bad input


def test_texts(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("Some words.")
    assert read_calibration_text(text) == "Some words."
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"question": "How many?", "n": 3, "answer": "Three."}\n\n{"text": "More."}\n')
    assert read_calibration_text(lines) == "How many?\nThree.\n\nMore."
    lines.write_text('{"a": "b"}\nno json\n')
    with pytest.raises(ArgumentError, match="line 2"):
        read_calibration_text(lines)
    lines.write_text("[1]\n")
    with pytest.raises(ArgumentError, match="line 1"):
        read_calibration_text(lines)
    text.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArgumentError, match="UTF-8"):
        read_calibration_text(text)
    text.write_text(" \n")
    with pytest.raises(ArgumentError, match="empty"):
        read_calibration_text(text)
    with pytest.raises(ArgumentError, match="cannot be read"):
        read_calibration_text(tmp_path / "absent.txt")


def test_too_short_a_text(source):
    with pytest.raises(ArgumentError, match="too short: 20 tokens"):
        calibration(source, IDS[:20])


def test_no_tokenizer(source):
    with pytest.raises(CheckpointError, match="tokenizer"):
        Calibration(source, "A text.")


def test_a_tokenizer_that_cannot_be_read(tmp_path, monkeypatch):
    """The tokenizers library says so by a plain Exception."""

    def fails(*args, **options):
        raise Exception("Input/output error (os error 5)")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fails)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"{tmp_path}: .*Input/output error"):
        open_tokenizer(tmp_path)


def test_tokens_that_the_model_does_not_have(source):
    with pytest.raises(CheckpointError, match="token 1000000"):
        calibration(source, [*IDS, 1_000_000])


def test_no_room_for_hidden_states(source, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(ArgumentError, match="No space left"):
        calibration(source)


def test_activations_that_are_not_finite_name_the_layer(tmp_path):
    transformers_checkpoint(tmp_path, "olmoe", config=SETTINGS, **SIZES)
    from safetensors.torch import load_file, save_file

    name = "model.layers.1.self_attn.o_proj.weight"
    file = next(f for f in tmp_path.glob("*.safetensors") if name in load_file(f))
    own = load_file(file)
    own[name][0, 0] = float("inf")
    save_file(own, file, {"format": "pt"})
    with calibration(tmp_path) as run, pytest.raises(NonFiniteError, match="layer 1"):
        run.reading(2)


def _footprint(src, **settings):
    with open_checkpoint(src) as checkpoint:
        return Footprint.of(checkpoint, describe(checkpoint), molae.ConvertConfig(**settings))


def _models(dst):
    return {p.name: p.read_bytes() for p in dst.glob("*.safetensors")}


@pytest.mark.parametrize("group_size", [1, 2])
def test_less_memory_takes_more_passes_to_the_same_bytes(source, tmp_path, group_size):
    settings = {"size": 0.5, "group_size": group_size, "refit": False}
    whole = _footprint(source, **settings)
    assert (whole.passes, whole.experts_at_once) == (1, SIZES["E"])
    with calibration(source) as run:
        plain = convert(
            source, tmp_path / "plain", molae.ConvertConfig(**settings), calibration=run
        )
    limit = whole.fixed + group_size * whole.expert
    config = molae.ConvertConfig(**settings, max_memory=limit)
    with calibration(source) as run:
        plan = molae.plan(source, config, calibration=run)
        report = convert(source, tmp_path / "little", config, calibration=run)
    assert plan.passes == report.plan["passes"] == -(-SIZES["E"] // group_size) + 1
    assert plan.seconds > 0
    assert plan.memory_bytes < plain.plan["memory_bytes"]
    console = Console(file=io.StringIO(), width=120)
    console.print(plan_view(plan))
    assert f"{plan.passes} over each layer" in console.file.getvalue()
    assert "passes" not in plain.plan or plain.plan["passes"] == 1
    assert _models(tmp_path / "plain") == _models(tmp_path / "little") != {}


@pytest.mark.parametrize(
    "settings", [{}, {"one_shot": True}, {"refit": False}, {"one_shot": True, "refit": False}]
)
def test_the_plan_knows_the_temporary_files(source, tmp_path, monkeypatch, settings):
    config = molae.ConvertConfig(size=0.5, group_size=2, **settings)
    most = 0

    def written(path, shape, made_by=calibrate.scratch_array):
        nonlocal most
        made = made_by(path, shape)
        most = max(most, sum(f.stat().st_size for f in path.parent.iterdir()))
        return made

    monkeypatch.setattr(calibrate, "scratch_array", written)
    with calibration(source, folder=tmp_path) as run:
        plan = molae.plan(source, config, calibration=run)
        convert(source, tmp_path / "out", config, calibration=run)
        (place,) = tmp_path.glob("molae-calibration-*")
        assert not list(place.glob("trial*"))
    assert 0.9 * plan.scratch_bytes < most <= plan.scratch_bytes
    console = Console(file=io.StringIO(), width=120)
    console.print(plan_view(plan))
    assert "temporary files" in console.file.getvalue()


def test_group_sizes_for_which_there_is_no_room_are_not_tried(source):
    whole = _footprint(source, size=0.6, refit=False)
    limit = whole.fixed + 2 * whole.expert
    config = molae.ConvertConfig(size=0.6, refit=False, max_memory=limit)
    with calibration(source) as run:
        tried = molae.plan(source, config, calibration=run).candidates
    assert {entry.group_size for entry in tried} == {1, 2}


def test_too_little_memory_is_refused(source):
    whole = _footprint(source, size=0.5)
    for limit, settings, message in (
        (1000, {}, "max_memory: 1e-06 GB; moments of 1 experts"),
        (whole.fixed + whole.expert, {"group_size": 4}, "moments of 4 experts.*smaller groups"),
        (whole.fixed + whole.expert, {}, "the refit takes about .*--no-refit"),
    ):
        config = molae.ConvertConfig(size=0.5, max_memory=limit, **settings)
        with calibration(source) as run, pytest.raises(ArgumentError, match=message):
            molae.plan(source, config, calibration=run)


def test_float16_is_converted(tmp_path):
    transformers_checkpoint(
        tmp_path / "src", "qwen2_moe", config=SETTINGS, dtype="float16", **SIZES
    )
    config = molae.ConvertConfig(size=0.6)
    with calibration(tmp_path / "src") as run:
        report = convert(tmp_path / "src", tmp_path / "dst", config, calibration=run)
    assert report.plan["dtype"] == "F16"
    assert all(row.layer_error[-1] <= row.layer_error[0] for row in report.rows if row.layer_error)
    with torch.no_grad():
        assert torch.isfinite(load(tmp_path / "dst")(tokens()).logits).all()


def test_options_that_need_a_text(source, tmp_path):
    for options in ({"uniform": True}, {"one_shot": True}, {"refit": False}, {"max_memory": 10**9}):
        with pytest.raises(ArgumentError, match="calibration text"):
            convert(source, tmp_path / "dst", molae.ConvertConfig(**options))
    with calibration(source) as run, pytest.raises(ArgumentError, match="method"):
        convert(source, tmp_path / "dst", molae.ConvertConfig(method="molae"), calibration=run)


def test_the_command(tmp_path, capsys):
    from molae.cli import main

    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "The router sends a token to its experts. " * 60}))
    src, dst = str(molae.demo.CHECKPOINT), str(tmp_path / "dst")
    options = ["--calibration", str(text), "--calibration-length", "128", "--size", "0.5"]
    assert main(["convert", src, dst, *options]) == 0
    shown = capsys.readouterr()
    assert "On the calibration text" in shown.out
    assert "measuring layer 0" in shown.err
    report = Report.from_file(dst)
    counts = {row.layer: row.tokens for row in report.rows}
    few = sum(count < 128 for own in counts.values() for count in own)
    assert all(sum(own) % 4 == 0 for own in counts.values())
    assert report.little_read() == (few, 96)
    assert 0 < few <= 96
    assert f"{few} of 96 experts read fewer tokens" in shown.out
    page = (tmp_path / "dst" / "molae-report.html").read_text()
    assert f"{few} of 96 experts read fewer tokens" in page
    foreseen = sum(row.foreseen for row in report.rows)
    assert f"About {foreseen:.3g} nats a token were foreseen" in page
    assert all(row.energy_curve[16] < 0.5 for row in report.rows)
    for option in (
        ["--flops", "0.5"],
        ["--drop-idle"],
        ["--uniform"],
        ["--one-shot"],
        ["--no-refit"],
        ["--heal", "3"],
        ["--stats", "FILE"],
    ):
        assert main(["convert", src, dst, "--overwrite", *option]) == 2
        assert f"{option[0]}: only with --calibration FILE" in capsys.readouterr().err
    assert main(["convert", src, dst, "--calibration", str(tmp_path / "none")]) == 1
    assert "cannot be read" in capsys.readouterr().err


# ------------------------------------------------------------------- kept measurements


class _Unmeasured(Calibration):
    def measure(self, trials):
        raise AssertionError("measured again")


def test_measurements_are_kept_and_change_nothing(source, tmp_path):
    """With them, or without: the same bytes, for the same size and for others."""
    stats = tmp_path / "stats"
    for number, size in enumerate((0.5, 0.3)):
        config = molae.ConvertConfig(size=size, group_size=2)
        with calibration(source) as run:
            convert(source, tmp_path / f"alone{size}", config, calibration=run)
        kind = _Unmeasured if number else Calibration
        with kind(source, IDS, length=40) as run:
            convert(source, tmp_path / f"kept{size}", config, calibration=run, stats=stats)
        assert tree(tmp_path / f"alone{size}") == tree(tmp_path / f"kept{size}")


def test_what_was_tried_is_what_is_foreseen(source, tmp_path):
    """At the very ranks of a trial, that trial's own effect."""
    size = TRIAL_SIZES[1]
    config = molae.ConvertConfig(size=size, group_size=2, uniform=True, one_shot=True, refit=False)
    with calibration(source) as run:
        report = convert(source, tmp_path / "dst", config, calibration=run)
    usual = np.median([row.effects[1][1] for row in report.rows])
    seen = 0
    for row in report.rows:
        sizes, effects = zip(*row.effects, strict=True)
        assert sizes == TRIAL_SIZES
        if sorted(effects) == list(effects) and min(effects) > 0.02 * usual:
            assert row.foreseen == pytest.approx(effects[1], rel=1e-3)
            seen += 1
    assert seen


def test_measurements_of_another_group_size_are_added(source, tmp_path):
    stats = tmp_path / "stats"
    for k in (2, 4):
        with calibration(source) as run:
            molae.plan(
                source, molae.ConvertConfig(size=0.5, group_size=k), calibration=run, stats=stats
            )
    for k in (2, 4):
        with _Unmeasured(source, IDS, length=40) as run:
            molae.plan(
                source, molae.ConvertConfig(size=0.4, group_size=k), calibration=run, stats=stats
            )
    with _Unmeasured(source, IDS, length=40) as run, pytest.raises(AssertionError, match="again"):
        molae.plan(
            source, molae.ConvertConfig(size=0.4, group_size=1), calibration=run, stats=stats
        )


def test_measurements_of_something_else_are_refused(source, tmp_path):
    stats = tmp_path / "stats"
    config = molae.ConvertConfig(size=0.5, group_size=2)
    with calibration(source) as run:
        molae.plan(source, config, calibration=run, stats=stats)
    before = stats.read_bytes()
    with calibration(source, IDS[::-1]) as run, pytest.raises(ArgumentError, match="tokens_sha256"):
        molae.plan(source, config, calibration=run, stats=stats)
    other = tmp_path / "other"
    shutil.copytree(source, other)
    os.utime(next(other.glob("*.safetensors")), (1, 1))
    with calibration(other) as run, pytest.raises(ArgumentError, match="another checkpoint"):
        molae.plan(other, config, calibration=run, stats=stats)
    assert stats.read_bytes() == before
    stats.write_bytes(before[:-9])
    with calibration(source) as run, pytest.raises(ArgumentError, match="holds no measurements"):
        molae.plan(source, config, calibration=run, stats=stats)
    with calibration(source) as run, pytest.raises(DestinationError, match="cannot be written"):
        molae.plan(source, config, calibration=run, stats=tmp_path / "none" / "stats")


# ------------------------------------------------------------------------- what is said


def test_experts_that_read_too_little_are_named_once(source, tmp_path):
    config = molae.ConvertConfig(size=0.5, group_size=2)
    with (
        calibration(source, length=16, sequences=1) as run,
        pytest.warns(CalibrationWarning, match=r"layer 0: \d of 6 experts") as seen,
    ):
        report = convert(source, tmp_path / "dst", config, calibration=run)
    assert len([w for w in seen if w.category is CalibrationWarning]) == 1
    few, total = report.little_read()
    assert 0 < few <= total == 18
    assert convert(source, tmp_path / "blind", config).little_read() is None


def test_the_plan_shows_where_the_numbers_go(source):
    with calibration(source) as run:
        plan = molae.plan(source, molae.ConvertConfig(size=0.5, group_size=2), calibration=run)
    shares = [own.share for kinds in plan.spread.values() for own in kinds.values()]
    assert len(shares) == 9
    assert sum(shares) / 9 == pytest.approx(plan.size_reached)
    assert max(shares) > min(shares)
    assert molae.plan(source, molae.ConvertConfig(size=0.5, group_size=2)).spread == {}


def test_a_budget_of_operations(source):
    """Alone, and beside a size."""
    for size, flops in ((None, 0.5), (0.9, 0.5), (0.4, 0.9)):
        config = molae.ConvertConfig(size=size, flops=flops, group_size=2)
        with calibration(source) as run:
            plan = molae.plan(source, config, calibration=run)
        assert plan.flops_ratio <= flops
        assert plan.size_reached <= (size or 1.0)
        assert plan.flops_ratio > 0.9 * flops or plan.size_reached > 0.9 * size
    with pytest.raises(ArgumentError, match="flops, uniform"):
        molae.plan(source, molae.ConvertConfig(flops=0.5))
    with pytest.raises(ArgumentError, match="uniform"):
        molae.ConvertConfig(flops=0.5, uniform=True)


@pytest.mark.parametrize("uniform", [False, True])
def test_idle_experts_keep_nothing_where_that_is_asked(source, tmp_path, uniform):
    """And what they had goes to the others; without it all keep something."""
    text = np.full(80, 7)  # the router sends one token's repetitions to a few experts
    for drop in (False, True):
        config = molae.ConvertConfig(size=0.5, group_size=2, drop_idle=drop, uniform=uniform)
        with (
            calibration(source, text) as run,
            pytest.warns(CalibrationWarning),
        ):
            report = convert(source, tmp_path / f"{drop}", config, calibration=run)
        none = [
            (row.layer, row.kind, i)
            for row in report.rows
            for group, rank in zip(row.groups, row.ranks, strict=True)
            for i in group
            if rank == 0
        ]
        idle = [
            (row.layer, row.kind, i)
            for row in report.rows
            for i, count in enumerate(row.tokens)
            if count == 0
        ]
        assert idle
        if drop:
            first = [place for place in idle if place[0] == 0]  # later layers may read other rows
            assert [place for place in sorted(none) if place[0] == 0] == sorted(first)
        else:
            assert none == []
        assert report.plan["size_reached"] <= 0.5
    model = load(tmp_path / "True")
    with torch.no_grad():
        assert torch.isfinite(model(tokens()).logits).all()


def test_the_built_in_text():
    text, name = builtin_text()
    assert name.startswith("documentation of CPython 3.")
    assert len(text) > 1_000_000
    assert builtin_text() == (text, name)


# -------------------------------------------------------------------------------- healing


def test_a_healed_layer_answers_better_on_text_that_nobody_saw(tmp_path):
    """On the trained model: nearer to the original's answers than without, and said so."""
    text, losses = builtin_text()[0], {}
    for heal in (0, 8):
        dst = tmp_path / str(heal)
        config = molae.ConvertConfig(size=0.4, heal=heal, one_shot=True, group_size=4)
        with Calibration(molae.demo.CHECKPOINT, text[:160000], length=256) as run:
            report = convert(molae.demo.CHECKPOINT, dst, config, calibration=run)
        for row in report.rows:
            steps = row.layer_error or []
            assert len(steps) == {"gate_proj": 0, "up_proj": 2, "down_proj": 3}[row.kind]
        assert len(report.healed) == (3 if heal else 0)
        for row in report.healed:
            assert row.layer_error[1] < 0.95 * row.layer_error[0]
        losses[heal] = evaluate_path(dst, text[160000:190000]).loss
    assert losses[8] < losses[0]
