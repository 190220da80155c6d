"""Converted checkpoints whose layers are trained to answer as the original's do."""

from __future__ import annotations

import errno
import json
import shutil
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import numpy as np
from checkpoints import FAMILIES, transformers_checkpoint
from converting import tree
from hf_models import SETTINGS, SIZES, load, tokens

import molae
import molae.demo
from molae.cli import main
from molae.convert import Report, Watcher, convert, heal, layer_state, plan_heal
from molae.convert.loss_plot import PICTURE, plot_losses
from molae.convert.report import HealRow
from molae.demo.corpus import builtin_text
from molae.errors import ArgumentError, CheckpointError, DestinationError, NumericalError
from molae.hf import hide_progress
from molae.hf.calibrate import Calibration
from molae.hf.evaluate import evaluate_path
from molae.io import open_checkpoint

hide_progress()
pytestmark = pytest.mark.usefixtures("one_thread")

IDS = np.random.default_rng(0).integers(3, 40, 1200)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    src = tmp_path_factory.mktemp("heal") / "src"
    transformers_checkpoint(src, "qwen2_moe", config=SETTINGS, **SIZES)
    return src


@pytest.fixture(scope="module")
def small(source, tmp_path_factory):
    dst = tmp_path_factory.mktemp("heal") / "small"
    convert(source, dst, molae.ConvertConfig(size=0.4))
    return dst


def calibration(src, ids=IDS):
    return Calibration(src, ids, length=40)


def healed(small, dst, source, watcher=None, overwrite=False, **settings):
    config = molae.HealConfig(**({"passes": 3} | settings))
    with calibration(source) as run:
        return heal(
            small, dst, source, config, calibration=run, watcher=watcher, overwrite=overwrite
        )


class Stop(Watcher):
    """Interrupts when this is said."""

    def __init__(self, what):
        self._what = what

    def advanced(self, done, total, what):
        if what.startswith(self._what):
            raise KeyboardInterrupt


def test_a_healed_model_is_nearer_to_the_original(tmp_path):
    """The trained one, on text that nobody has seen."""
    src, text = molae.demo.CHECKPOINT, builtin_text()[0]
    small, dst = tmp_path / "small", tmp_path / "healed"
    with Calibration(src, text[:30000], length=256) as run:
        convert(src, small, molae.ConvertConfig(size=0.3, group_size=4), calibration=run)
    with Calibration(src, text[:90000], length=256) as run:
        report = heal(small, dst, src, molae.HealConfig(passes=3), calibration=run)
    for row in report.healed:
        assert row.layer_error[1] < row.layer_error[0]
        assert min(loss for _, loss in row.losses) < row.losses[0][1]
    losses = [evaluate_path(path, text[160000:175000]).loss for path in (src, small, dst)]
    assert losses[0] < losses[2] < losses[1]
    assert losses[1] - losses[2] > 0.05 * (losses[1] - losses[0])
    assert Report.from_file(dst) == report
    assert (dst / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert json.loads((dst / "molae-report.source.json").read_text())["kind"] == "convert"


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def fails(fd):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", fails)
    row = HealRow(0, [0.5, 0.4], [[0, 0.5], [1, 0.4]], 1, 0.0)
    with pytest.raises(DestinationError, match=f"{PICTURE}: cannot be written"):
        plot_losses(tmp_path / PICTURE, [row])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "made",
    [
        {"size": 0.5, "dtype": "bfloat16"},
        {"size": 0.5, "dtype": "float16"},
        {"method": "molae", "size": 0.98},
        {"size": 0.8, "compressed_experts": 1, "light_module": "narrow:2"},
        {"size": 0.8, "compressed_experts": 1, "light_module": "vectors"},
    ],
)
def test_every_form_is_healed(tmp_path, family, made):
    dtype = made.pop("dtype", "float32") if "dtype" in made else "float32"
    src, small, dst = (tmp_path / name for name in ("src", "small", "dst"))
    transformers_checkpoint(src, family, dtype=dtype, config=SETTINGS, **SIZES)
    with calibration(src) as run:
        text = run if "compressed_experts" in made else None
        convert(src, small, molae.ConvertConfig(**made), calibration=text)
    report = healed(small, dst, src)
    assert all(after <= before for row in report.healed for before, after in [row.layer_error])
    assert any(after < before for row in report.healed for before, after in [row.layer_error])
    with open_checkpoint(small) as old, open_checkpoint(dst) as new:
        assert {n: (i.dtype, i.shape) for n, i in old.tensors.items()} == {
            n: (i.dtype, i.shape) for n, i in new.tensors.items()
        }
        changed = {n for n in old.tensors if bytes(old.raw(n)) != bytes(new.raw(n))}
        assert changed
        assert all(".experts." in n or ".block_sparse_moe." in n for n in changed)
        assert not any(n.endswith(".perm") or ".light." in n for n in changed)
        assert (old.path / "config.json").read_text() == (new.path / "config.json").read_text()
    load(dst)(tokens())


@pytest.mark.parametrize(("layer", "step"), [(0, 1), (0, 3), (-1, 0), (-1, 5)])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    source, small, tmp_path, layer, step, monkeypatch
):
    monkeypatch.setattr(layer_state, "EVERY", 0.0)
    monkeypatch.setattr(layer_state, "SHARE", 0.0)
    report = healed(small, tmp_path / "whole", source)
    dst, where = tmp_path / "dst", f"layer {report.healed[layer].layer}: step {step} "
    with pytest.raises(KeyboardInterrupt):
        healed(small, dst, source, Stop(where))
    assert (dst / layer_state.STATE).exists()
    said = []

    class Listen(Watcher):
        def advanced(self, done, total, what):
            said.append(what)

    healed(small, dst, source, Listen())
    steps = [what for what in said if "step" in what]
    assert steps[0].startswith(where)
    assert tree(dst) == tree(tmp_path / "whole")
    assert not (dst / layer_state.STATE).exists()


def test_a_conversion_that_heals_goes_on_within_a_layer(source, tmp_path, monkeypatch):
    monkeypatch.setattr(layer_state, "EVERY", 0.0)
    monkeypatch.setattr(layer_state, "SHARE", 0.0)
    config = molae.ConvertConfig(size=0.5, heal=3)
    with calibration(source) as run:
        report = convert(source, tmp_path / "whole", config, calibration=run)
    assert [row.layer for row in report.healed] == sorted({row.layer for row in report.rows})
    where = f"layer {report.healed[-1].layer}: step 5"
    with calibration(source) as run, pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "dst", config, calibration=run, watcher=Stop(where))
    said = []

    class Listen(Watcher):
        def advanced(self, done, total, what):
            said.append(what)

    with calibration(source) as run:
        convert(source, tmp_path / "dst", config, calibration=run, watcher=Listen())
    assert next(what for what in said if "step" in what).startswith(where)
    assert tree(tmp_path / "dst") == tree(tmp_path / "whole")


def test_a_state_that_is_none_of_this_layers_is_not_taken(tmp_path):
    path = tmp_path / layer_state.STATE
    one = layer_state.LayerState(path, 3)
    assert one.load() is None
    one.save({"a": np.arange(4.0)}, {"steps": 2})
    arrays, facts = layer_state.LayerState(path, 3).load()
    assert np.array_equal(arrays["a"], np.arange(4.0))
    assert facts == {"steps": 2}
    assert layer_state.LayerState(path, 4).load() is None
    path.write_bytes(path.read_bytes()[:-5])
    assert layer_state.LayerState(path, 3).load() is None


def test_a_large_state_is_kept_less_often(tmp_path, monkeypatch):
    times = iter([0.0, 59.0, 61.0, 70.0, 80.0, 279.0, 281.0])
    clock = SimpleNamespace(monotonic=lambda: next(times))
    monkeypatch.setattr(layer_state, "time", clock)
    own = layer_state.LayerState(tmp_path / "state", 0)
    assert [own.due(), own.due()] == [False, True]
    own.save({}, {})  # takes ten seconds: the next comes after 200
    assert [own.due(), own.due()] == [False, True]


def test_a_loss_that_runs_away_names_layer_and_step_and_keeps_what_is_done(source, small, tmp_path):
    dst = tmp_path / "dst"
    with pytest.raises(NumericalError, match=r"^layer \d: step \d+: .*smaller rate.*--overwrite"):
        healed(small, dst, source, rate=1e4)
    healed(small, dst, source, overwrite=True)


def test_another_teacher_is_refused(source, small, tmp_path):
    def refuses(teacher, text, kind=ArgumentError):
        with calibration(teacher) as run, pytest.raises(kind, match=text):
            plan_heal(small, teacher, calibration=run)

    other = tmp_path / "family"
    transformers_checkpoint(other, "mixtral", config=SETTINGS, **SIZES)
    refuses(other, "a mixtral model, and that is a qwen2_moe one")
    other = tmp_path / "shape"
    transformers_checkpoint(other, "qwen2_moe", config=SETTINGS, **(SIZES | {"F": 14}))
    refuses(other, "F is 14, there 12")
    other = tmp_path / "trained"
    transformers_checkpoint(other, "qwen2_moe", config=SETTINGS, seed=5, **SIZES)
    refuses(other, "differs; heal first")
    with calibration(source) as run, pytest.raises(CheckpointError, match="no factors"):
        plan_heal(source, source, calibration=run)


def test_another_tokenizer_is_refused(tmp_path):
    src, small, other = molae.demo.CHECKPOINT, tmp_path / "small", tmp_path / "other"
    convert(src, small, molae.ConvertConfig(size=0.4))
    shutil.copytree(small, other)
    entries = json.loads((small / "tokenizer.json").read_text())
    vocab = entries["model"]["vocab"]
    first, second = list(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(entries))
    with Calibration(src, IDS, length=40) as run:
        assert plan_heal(small, src, calibration=run).kind == "heal"
        with pytest.raises(ArgumentError, match="another tokenizer"):
            plan_heal(other, src, calibration=run)


def test_the_command(tmp_path, capsys):
    src, small, dst = str(molae.demo.CHECKPOINT), str(tmp_path / "small"), str(tmp_path / "dst")
    text = tmp_path / "text.txt"
    text.write_text(builtin_text()[0][:8000])
    assert main(["convert", src, small, "--size", "0.4", "--quiet"]) == 0
    given = ["heal", small, dst, "--teacher", src, "--calibration", str(text)]
    assert main([*given, "--rate", "-1"]) == 2
    assert "rate" in capsys.readouterr().err
    assert main(["heal", small, "--teacher", src, "--calibration", str(text)]) == 2
    assert "DST is missing" in capsys.readouterr().err
    assert main([*given, "--dry-run"]) == 0
    assert "trained, layer after layer" in capsys.readouterr().out
    assert main([*given, "--steps", "12"]) == 0
    out = capsys.readouterr().out
    assert "error before" in out
    assert "Written to" in out
    assert main(given) == 1
    assert "holds a finished result" in capsys.readouterr().err
    assert main([*given[:4], str(tmp_path / "nowhere"), "--overwrite"]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_routers_alone_are_trained_by_the_command(tmp_path, capsys):
    pytest.importorskip("accelerate")
    src, small, dst = str(molae.demo.CHECKPOINT), str(tmp_path / "small"), str(tmp_path / "dst")
    text = tmp_path / "text.txt"
    text.write_text(builtin_text()[0][:6000])
    assert main(["convert", src, small, "--size", "0.4", "--quiet"]) == 0
    given = ["heal", small, dst, "--teacher", src, "--calibration", str(text), "--router"]
    assert main([*given, "--passes", "3"]) == 2
    assert "--passes: not with --router" in capsys.readouterr().err
    assert main([*given[:-1], "--teacher-top-k", "4"]) == 2
    assert "--teacher-top-k: only with --router" in capsys.readouterr().err
    assert main([*given, "--steps", "3", "--rate", "1e-2", "--teacher-top-k", "64"]) == 0
    assert "Written to" in capsys.readouterr().out
    with open_checkpoint(small) as old, open_checkpoint(dst) as new:
        changed = {n for n in old.tensors if bytes(old.raw(n)) != bytes(new.raw(n))}
    assert changed == {f"model.layers.{n}.mlp.gate.weight" for n in range(3)}
    # A model that was trained since is no longer compared layer by layer.
    again = ["heal", dst, str(tmp_path / "again"), *given[3:-1]]
    assert main(again) == 1
    assert "heal first, then train routers" in capsys.readouterr().err
