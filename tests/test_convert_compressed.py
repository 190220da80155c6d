"""Conversions with compressed experts, alone and on top of latent ones."""

from __future__ import annotations

import io
import itertools
import json
import time

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
import torch
from checkpoints import FAMILIES, transformers_checkpoint
from converting import tree
from hf_models import SETTINGS, SIZES, load, tokens
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import molae
import molae.demo
from molae.config import TYPES
from molae.convert import Report, Watcher, convert
from molae.convert.footprint import Footprint
from molae.convert.light import nothing, spread_counts
from molae.demo.corpus import builtin_text
from molae.errors import ArgumentError
from molae.hf import LatentExperts, hide_progress
from molae.hf.calibrate import Calibration
from molae.hf.experts import NarrowExperts as NarrowModule
from molae.io import open_checkpoint
from molae.ops import NarrowExperts
from molae.report.tables import plan_view, report_view

hide_progress()
pytestmark = pytest.mark.usefixtures("one_thread")

IDS = np.random.default_rng(0).integers(3, 40, 400)
K, F, D, E = (SIZES[letter] for letter in "KFDE")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    src = tmp_path_factory.mktemp("compressed") / "src"
    transformers_checkpoint(src, "qwen2_moe", config=SETTINGS, **SIZES)
    return src


def run_on(src, dst, ids=IDS, light_module="vectors", **settings):
    config = molae.ConvertConfig(compressed_experts=1, light_module=light_module, **settings)
    with Calibration(src, ids, length=40) as calibration:
        return convert(src, dst, config, calibration=calibration)


def experts_of(model):
    return [m for m in model.modules() if isinstance(m, LatentExperts)]


def light_in(folder):
    """By layer what acts in the place of compressed experts, vectors or narrow ones."""
    with open_checkpoint(folder) as found:
        model = molae.arch.describe(found, converted=True)
        made = {}
        for layer in model.factored.compressed:
            specs = molae.arch.light_specs(model, layer, model.factored.light)
            own = {role: np.array(found.array(spec.name)) for role, spec in specs.items()}
            made[layer] = own["compressed"] if "compressed" in own else NarrowExperts.of(own)
        return made


@pytest.mark.parametrize("size", [1.0, 0.6])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_converted(tmp_path, family, size):
    transformers_checkpoint(tmp_path / "src", family, config=SETTINGS, **SIZES)
    report = run_on(tmp_path / "src", tmp_path / "dst", size=size)
    found = molae.inspect(tmp_path / "dst")
    layers = found.moe_layers
    assert found.factored.compressed == dict.fromkeys(layers, 1)
    assert [row.layer for row in report.compressed] == list(layers)
    for row in report.compressed:
        assert (row.num_compressed, row.tokens) == (1, 200)
        start, linear, end = row.layer_error
        assert end <= linear <= start
    if size < 1:
        assert report.plan["size_reached"] <= size
    else:
        assert report.plan["size_reached"] == pytest.approx(1 + (2 * D + F) / (3 * F * D))
        with open_checkpoint(tmp_path / "src") as a, open_checkpoint(tmp_path / "dst") as b:
            assert set(b.tensors) - set(a.tensors) == {
                f"{prefix}.compressed" for prefix in (
                    molae.arch.describe(a).experts_prefix(layer) for layer in layers)
            }  # fmt: skip
            for name in a.tensors:
                assert bytes(a.raw(name)) == bytes(b.raw(name)), name
        saved = len(layers) * (3 * F * D - 2 * D - F)
        before = molae.inspect(tmp_path / "src").active_parameters
        assert before - found.active_parameters == saved
    model = load(tmp_path / "dst")
    assert all(m.num_compressed == 1 for m in experts_of(model))
    with torch.no_grad():
        assert torch.isfinite(model(tokens()).logits).all()
    assert Report.from_file(tmp_path / "dst") == report


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 1.0},
        {"size": 0.5},
        {"size": 0.5, "one_shot": True},
        {"size": 0.6, "light_module": "narrow:1/4"},
        {"size": 1.0, "light_module": "additive"},
    ],
)
def test_a_run_that_was_interrupted_goes_on_to_the_same_bytes(source, tmp_path, settings):
    run_on(source, tmp_path / "whole", **settings)

    def written():
        return sorted((tmp_path / "dst").glob("model-*.safetensors"))

    class Stop(Watcher):
        def advanced(self, done, total, what):
            if what.startswith("layer 1"):
                while len(written()) < 1:  # the file before is on its way
                    time.sleep(0.01)
                raise KeyboardInterrupt

    config = molae.ConvertConfig(compressed_experts=1, **{"light_module": "vectors", **settings})
    with Calibration(source, IDS, length=40) as calibration, pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "dst", config, calibration=calibration, watcher=Stop())
    assert len(written()) == 1
    run_on(source, tmp_path / "dst", **settings)
    assert tree(tmp_path / "dst") == tree(tmp_path / "whole")


@pytest.mark.parametrize(("light", "units"), [("additive", 0), ("narrow:3", 3), ("narrow:1/4", 3)])
@pytest.mark.parametrize("size", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_narrow_experts(tmp_path, family, size, light, units):
    transformers_checkpoint(tmp_path / "src", family, config=SETTINGS, **SIZES)
    report = run_on(tmp_path / "src", tmp_path / "dst", size=size, light_module=light)
    found = molae.inspect(tmp_path / "dst")
    layers = found.moe_layers
    assert (found.factored.compressed, found.factored.light.units) == (
        dict.fromkeys(layers, 1),
        units,
    )
    for row in report.compressed:
        start, linear, end = row.layer_error
        assert end < start
        assert linear < start
    own = (3 * units + 1) * D
    if size < 1:
        assert report.plan["size_reached"] <= size
    else:
        assert report.plan["size_reached"] == pytest.approx(1 + own / (3 * F * D))
        before = molae.inspect(tmp_path / "src").active_parameters
        assert before - found.active_parameters == len(layers) * (3 * F * D - own)
    model = load(tmp_path / "dst")
    assert all(m.num_compressed == 1 for m in experts_of(model) if not isinstance(m, NarrowModule))
    with torch.no_grad():
        assert torch.isfinite(model(tokens()).logits).all()
    assert Report.from_file(tmp_path / "dst") == report


@pytest.mark.parametrize("light", ["vectors", "narrow:3"])
def test_the_next_layer_reads_what_the_loaded_model_makes(source, tmp_path, light):
    """`advance` with what acts for compressed experts is the layer that Transformers runs."""
    run_on(source, tmp_path / "dst", size=1.0, light_module=light)
    model = load(tmp_path / "dst")
    with Calibration(source, IDS, length=40) as run:
        for layer, own in light_in(tmp_path / "dst").items():
            run.advance(layer, None, (own, 1))
        run._walk.up_to(len(run._stream), run._tell)
        ids = torch.from_numpy(run.sequences)
        with torch.no_grad():
            last = model.model(ids, output_hidden_states=True).hidden_states[-1]
            mine = model.model.norm(torch.from_numpy(np.array(run._walk.states)))
    torch.testing.assert_close(mine, last, rtol=1e-4, atol=1e-5)


DEMO_TEXT = builtin_text()[0][:8000]


def demo_run(dst, **settings):
    config = molae.ConvertConfig(size=1.0, **settings)
    with Calibration(molae.demo.CHECKPOINT, DEMO_TEXT, length=128) as run:
        return convert(molae.demo.CHECKPOINT, dst, config, calibration=run)


@pytest.mark.parametrize("light", ["vectors", "narrow:1/8"])
def test_layers_have_as_many_as_the_model_takes(tmp_path, light, monkeypatch):
    """So many on average; a layer may have none, and a run goes on behind it."""
    effects = {(0, 1): 9.0, (0, 2): 9.0, (0, 3): 9.0, (1, 1): 0.1, (1, 2): 0.3, (1, 3): 9.0,
               (2, 1): 0.2, (2, 2): 0.9, (2, 3): 9.0}  # fmt: skip
    monkeypatch.setattr(
        Calibration,
        "measure",
        lambda self, trials: {(i, str(n)): x for (i, n), x in effects.items()},
    )
    demo_run(tmp_path / "whole", compressed_experts=1, light_module=light)
    found = molae.inspect(tmp_path / "whole")
    assert found.factored.compressed == {1: 2, 2: 1}
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "The last 1 to 2 of a token's 4 experts do not run, by layer 0, 2, 1;" in card
    evened = demo_run(tmp_path / "even", compressed_experts=1, light_module=light, uniform=True)
    assert [row.num_compressed for row in evened.compressed] == [1, 1, 1]
    with open_checkpoint(tmp_path / "whole") as checkpoint:
        assert not any(".0.mlp.experts.light" in name for name in checkpoint.tensors)

    class Stop(Watcher):
        def advanced(self, done, total, what):
            if what.startswith("layer 2"):
                raise KeyboardInterrupt

    config = molae.ConvertConfig(size=1.0, compressed_experts=1, light_module=light)
    with (
        Calibration(molae.demo.CHECKPOINT, DEMO_TEXT, length=128) as run,
        pytest.raises(KeyboardInterrupt),
    ):
        convert(molae.demo.CHECKPOINT, tmp_path / "dst", config, calibration=run, watcher=Stop())
    demo_run(tmp_path / "dst", compressed_experts=1, light_module=light)
    assert tree(tmp_path / "dst") == tree(tmp_path / "whole")


def test_measured_counts_and_kept_ones(tmp_path):
    config = molae.ConvertConfig(size=1.0, compressed_experts=2)
    stats = tmp_path / "stats"
    with Calibration(molae.demo.CHECKPOINT, DEMO_TEXT, length=128) as run:
        first = molae.plan(molae.demo.CHECKPOINT, config, calibration=run, stats=stats)
    with Calibration(molae.demo.CHECKPOINT, DEMO_TEXT, length=128) as run:
        run.measure = None  # not needed again
        again = molae.plan(molae.demo.CHECKPOINT, config, calibration=run, stats=stats)
    assert first.after == again.after


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=4), st.data()
)
def test_counts_are_the_best_there_are(effects, data):
    total = data.draw(st.integers(0, 2 * len(effects)))
    counts = spread_counts(effects, total)
    assert sum(counts) == total
    best = min(
        sum(own[n] for own, n in zip(effects, some, strict=True))
        for some in itertools.product(range(3), repeat=len(effects)) if sum(some) == total
    )  # fmt: skip
    assert sum(own[n] for own, n in zip(effects, counts, strict=True)) == best


@pytest.mark.parametrize("better", ["fitted", "ones"])
def test_vectors_that_make_answers_worse_are_not_taken(source, tmp_path, monkeypatch, better):
    found = [0.5, 0.6] if better == "fitted" else [0.6, 0.5]
    monkeypatch.setattr(Calibration, "compare", lambda self, layer, variants: found)
    report = run_on(source, tmp_path / "dst", size=1.0)
    for vectors in light_in(tmp_path / "dst").values():
        assert (vectors == 1).all() == (better == "ones")
    for row in report.compressed:
        assert (row.layer_error[2] == row.layer_error[0]) == (better == "ones")


@pytest.mark.parametrize(("light", "least"), [("vectors", 0.995), ("narrow:1/8", 0.95)])
def test_on_a_trained_model_answers_come_closer(tmp_path, light, least, monkeypatch):
    """On text that the fit has not seen, a layer's answers are nearer to those of all experts."""
    text = builtin_text()[0]
    config = molae.ConvertConfig(
        size=1.0, compressed_experts=2, light_module=light, one_shot=True, uniform=True
    )
    monkeypatch.setattr(Calibration, "compare", lambda self, layer, variants: [0.0, 1.0])
    with Calibration(molae.demo.CHECKPOINT, text[:60000], length=256) as calibration:
        report = convert(molae.demo.CHECKPOINT, tmp_path / "dst", config, calibration=calibration)
    stored = light_in(tmp_path / "dst")
    assert len(report.compressed) == len(stored)
    with Calibration(molae.demo.CHECKPOINT, text[60000:90000], length=256) as run:
        for layer, vectors in stored.items():
            given, own = run.reading(layer), run.experts(layer)
            call = given.x, given.index, given.weights, *(own[kind] for kind in TYPES)
            own, forward = vectors, molae.ops.narrow_experts_forward
            none = nothing(*vectors.bias.shape) if light != "vectors" else np.ones_like(vectors)
            if light == "vectors":
                forward = molae.ops.compressed_experts_forward
            fitted, ones = (
                np.linalg.norm(given.answers - forward(*call, v, 2)) for v in (own, none)
            )
            assert fitted < least * ones


def test_what_makes_no_sense_is_refused(source, tmp_path):
    with Calibration(source, IDS, length=40) as calibration:
        config = molae.ConvertConfig(size=1.0, compressed_experts=K)
        with pytest.raises(
            ArgumentError, match=f"compressed_experts: expected 0 to K - 1 = {K - 1}"
        ):
            convert(source, tmp_path / "dst", config, calibration=calibration)
    with pytest.raises(ArgumentError, match="compressed_experts, .*only with a calibration"):
        convert(source, tmp_path / "dst", molae.ConvertConfig(compressed_experts=1))
    for wrong in (-1, 1.5, True, "1"):
        with pytest.raises(ArgumentError, match="compressed_experts: expected a whole number"):
            molae.ConvertConfig(compressed_experts=wrong)
    with Calibration(source, IDS, length=40) as calibration:
        for light, text in (
            ("narrow:99", "99 units, the experts have 12"),
            ("wide", "expected vectors"),
        ):
            config = molae.ConvertConfig(size=1.0, compressed_experts=1, light_module=light)
            with pytest.raises(ArgumentError, match=f"light_module: .*{text}"):
                convert(source, tmp_path / "dst", config, calibration=calibration)


def test_the_plan_the_report_and_the_command(source, tmp_path, capsys):
    from molae.cli import main

    with Calibration(source, IDS, length=40) as calibration:
        config = molae.ConvertConfig(size=1.0, compressed_experts=1, light_module="vectors")
        plan = molae.plan(source, config, calibration=calibration)
    assert plan.seconds > 0
    assert plan.flops_ratio == pytest.approx(
        ((K - 1) * 6 * F * D + 2 * (2 * D + F)) / (K * 6 * F * D)
    )
    console = Console(file=io.StringIO(), width=120)
    console.print(plan_view(plan))
    assert f"the last 1 of a token's {K} experts do not run" in console.file.getvalue()
    assert "what acts in the others' place is added" in console.file.getvalue()

    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "The router sends a token to its experts. " * 60}))
    src, dst = str(molae.demo.CHECKPOINT), str(tmp_path / "dst")
    options = [
        "--calibration",
        str(text),
        "--calibration-length",
        "128",
        "--size",
        "1.0",
        "--uniform",
    ]
    options += ["--compressed-experts", "2"]
    assert main(["convert", src, dst, *options, "--light-module", "vectors"]) == 0
    assert "The last 2 of a token's experts do not run." in capsys.readouterr().out
    card = (tmp_path / "dst" / "README.md").read_text()
    assert "The last 2 of a token's 4 experts do not run; vectors that scale" in card
    assert "molae materialize" not in card
    assert "fitted to a calibration text" in card
    assert main(["inspect", dst]) == 0
    assert "2 in layer 0" in capsys.readouterr().out
    assert main(["materialize", dst, str(tmp_path / "ordinary")]) == 1
    assert "compressed experts" in capsys.readouterr().err
    assert main(["convert", src, dst, "--overwrite", "--compressed-experts", "2"]) == 2
    assert "--compressed-experts: only with --calibration FILE" in capsys.readouterr().err
    console.print(report_view(Report.from_file(dst)))
    assert "Without them the layers' answers" in console.file.getvalue()


def test_memory_of_the_fit_is_planned():
    letters = {"E": 64, "K": 8, "D": 2048, "F": 1024}

    def plan(**settings):
        return Footprint.of_sizes(letters, "BF16", molae.ConvertConfig(size=1.0, **settings))

    narrow = plan(compressed_experts=4, light_module="narrow:1/2", refit=False)
    assert plan().light == 0
    assert narrow.light == 64 * 64 * 513 * 2048
    assert narrow.nbytes >= narrow.fixed + narrow.light
    little = narrow.fixed + narrow.light - 1
    with pytest.raises(ArgumentError, match="max_memory: .*64 light modules .*narrower"):
        narrow._within(little, molae.ConvertConfig(compressed_experts=4))
    assert (
        narrow._within(little + 1, molae.ConvertConfig(compressed_experts=4)).light == narrow.light
    )


def test_what_acts_where_nothing_is_asked_for(source, tmp_path):
    for size, units in ((1.0, 1), (0.5, 0)):  # an eighth of 12 units
        run_on(source, tmp_path / str(size), light_module="auto", size=size)
        assert molae.inspect(tmp_path / str(size)).factored.light.units == units
    assert molae.ConvertConfig(size=0.7).light_form == "narrow:1/8"
    assert molae.ConvertConfig().light_form == "narrow:1/8"
    assert molae.ConvertConfig(size=0.69).light_form == "additive"
    assert molae.ConvertConfig(light_module="vectors").light_form == "vectors"
