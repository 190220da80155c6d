"""From a converted checkpoint back to an ordinary one."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from checkpoints import (
    FAMILIES,
    LAYOUTS,
    add_companions,
    make_checkpoint,
    transformers_checkpoint,
    write_checkpoint,
)
from converting import (
    TYPES,
    bits,
    factored_matrices,
    fixed_method,
    read_json,
    source_matrices,
    tensors,
    tree,
)

import molae
from molae import ConvertConfig, convert, fit, materialize
from molae.convert import METHODS, Report, inspect, plan_materialize
from molae.errors import CheckpointError, DestinationError, NonFiniteError
from molae.factored import FORMAT_VERSION, Split
from molae.io import open_checkpoint

CONFIG = ConvertConfig(size=0.5, group_size=2)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_names_layout_and_type_are_the_originals(tmp_path, family, layout, dtype):
    src = make_checkpoint(tmp_path / "src", family, layout, dtype=dtype, shards=2)
    convert(src, tmp_path / "dst", CONFIG)
    report = materialize(tmp_path / "dst", tmp_path / "back")
    original, back = tensors(src), tensors(tmp_path / "back")
    assert back.keys() == original.keys()
    for name, array in original.items():
        if ".experts." in name:
            assert (back[name].shape, back[name].dtype) == (array.shape, array.dtype)
        else:
            assert bits(back[name]) == bits(array)
    for layer in range(2):
        for kind in TYPES:
            found = source_matrices(tmp_path / "back", layer, kind)
            wanted = factored_matrices(tmp_path / "dst", layer, kind)
            eps = {"F32": 2.0**-22, "F16": 2.0**-10, "BF16": 2.0**-7}[dtype]
            for a, b in zip(found, wanted, strict=True):
                assert np.abs(a.astype(np.float64) - b).max() <= eps * np.abs(b).max()
    config = read_json(tmp_path / "back" / "config.json")
    assert config == read_json(src / "config.json")
    assert inspect(tmp_path / "back").factored is None
    assert report.kind == "materialize"
    assert report.plan["after"]["total_bytes"] == sum(a.nbytes for a in original.values())


def test_it_is_what_the_factorization_reconstructs(tmp_path):
    """The bits of `SharedFactors.reconstruct`, rounded to the checkpoint's type."""
    src = make_checkpoint(tmp_path / "src", dtype="BF16")
    report = convert(src, tmp_path / "dst", CONFIG)
    materialize(tmp_path / "dst", tmp_path / "back")
    for row in report.rows:
        W = source_matrices(src, row.layer, row.kind)
        side = "output" if row.kind == "down_proj" else "input"
        factors = fit.factor_shared(W, row.ranks, groups=row.groups, side=side)
        found = source_matrices(tmp_path / "back", row.layer, row.kind)
        for e, matrix in enumerate(found):
            assert np.array_equal(matrix, factors.reconstruct(e).astype(matrix.dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rank_zero_becomes_zeros_and_dense_groups_keep_their_bits(tmp_path, monkeypatch, layout):
    split = Split(((2,), (3, 0), (1,)), (None, 0, 4))
    monkeypatch.setitem(METHODS, "fixed", fixed_method(dict.fromkeys(TYPES, split)))
    src = make_checkpoint(tmp_path / "src", "qwen2_moe", layout, dtype="BF16")
    convert(src, tmp_path / "dst", ConvertConfig(method="fixed"))
    materialize(tmp_path / "dst", tmp_path / "back")
    for kind in TYPES:
        W = source_matrices(src, 1, kind)
        back = source_matrices(tmp_path / "back", 1, kind)
        assert bits(back[2]) == bits(W[2])
        assert not back[0].any()
        assert not back[3].any()
        assert back[1].any()


def test_a_second_conversion_of_the_result_loses_little_more(tmp_path):
    """Idempotent up to rounding: the result already has the ranks that are asked for."""
    src = make_checkpoint(tmp_path / "src")
    convert(src, tmp_path / "dst", CONFIG)
    materialize(tmp_path / "dst", tmp_path / "back")
    report = convert(tmp_path / "back", tmp_path / "again", CONFIG)
    assert report.error() < 1e-5


def test_the_plan_says_that_it_has_full_size(tmp_path):
    src = make_checkpoint(tmp_path / "src")
    convert(src, tmp_path / "dst", CONFIG)
    plan = plan_materialize(tmp_path / "dst")
    original = sum(array.nbytes for array in tensors(src).values())
    assert plan.after.total_bytes == original
    assert plan.before.total_bytes == sum(a.nbytes for a in tensors(tmp_path / "dst").values())
    assert plan.size_reached <= 0.5
    materialize(tmp_path / "dst", tmp_path / "back")
    text = (tmp_path / "back" / "README.md").read_text()
    assert "full size" in text
    assert plan.disk_bytes == sum(
        path.stat().st_size for path in (tmp_path / "back").glob("*.safetensors")
    )


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_with_it_as_with_replaced_weights(tmp_path, family, original):
    """Logits of the materialized folder against the live model with its weights set by hand."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers_checkpoint(tmp_path / "src", family, original=original, E=8)
    convert(tmp_path / "src", tmp_path / "dst", CONFIG)
    materialize(tmp_path / "dst", tmp_path / "back")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", dtype=torch.float32, local_files_only=True
    ).eval()
    tokens = torch.arange(1, 33).reshape(2, 16)
    with torch.inference_mode():
        untouched = model(tokens).logits
        for layer, block in enumerate(model.model.layers):
            gate, up, down = (
                torch.from_numpy(np.stack(factored_matrices(tmp_path / "dst", layer, kind)))
                for kind in TYPES
            )
            block.mlp.experts.gate_up_proj.copy_(torch.cat([gate, up], dim=1).float())
            block.mlp.experts.down_proj.copy_(down.float())
        wanted = model(tokens).logits
        found = loaded(tokens).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    # The comparison tells models apart: the original is far from both.
    assert (untouched - wanted).abs().max() > 100 * (found - wanted).abs().max()


# ------------------------------------------------------------------------ interruption


def test_kill_9_and_go_on(tmp_path):
    src = make_checkpoint(tmp_path / "src", L=3, layout="fused")
    add_companions(src)
    convert(src, tmp_path / "dst", CONFIG)
    materialize(tmp_path / "dst", tmp_path / "wanted")
    program = (
        "import os, signal, sys, molae\n"
        "from molae.convert import journal\n"
        "real = journal.Journal.add\n"
        "def add(self, entry):\n"
        "    real(self, entry)\n"
        "    if len(self.shards) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "journal.Journal.add = add\n"
        "molae.materialize(sys.argv[1], sys.argv[2])\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "dst", tmp_path / "back"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        timeout=180,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    materialize(tmp_path / "dst", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(tmp_path / "wanted")
    with pytest.raises(DestinationError, match="finished result"):
        materialize(tmp_path / "dst", tmp_path / "back")
    assert Report.from_file(tmp_path / "back").kind == "materialize"


def test_threads_do_not_change_the_bytes(tmp_path):
    src = make_checkpoint(tmp_path / "src")
    convert(src, tmp_path / "dst", CONFIG)
    for count in (1, 2):
        with molae.num_threads(count):
            materialize(tmp_path / "dst", tmp_path / str(count))
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


# --------------------------------------------------------------------------- bad input


@pytest.fixture
def converted(tmp_path):
    src = make_checkpoint(tmp_path / "src", L=1)
    convert(src, tmp_path / "dst", CONFIG)
    return tmp_path / "dst"


def rewrite(converted, change=None, **arrays):
    """The converted checkpoint with other tensors; None leaves one out."""
    config = read_json(converted / "config.json")
    if change is not None:
        change(config["quantization_config"])
    found = tensors(converted)
    for key, array in arrays.items():
        name = "model.layers.0.mlp.experts." + key.replace("__", ".")
        if array is None:
            del found[name]
        else:
            found[name] = array(found.get(name)) if callable(array) else array
    return write_checkpoint(converted.parent / "harmed", config, found)


GATE = "model.layers.0.mlp.experts.gate_proj"


def test_an_ordinary_checkpoint_is_refused(tmp_path):
    src = make_checkpoint(tmp_path / "src")
    with pytest.raises(CheckpointError, match="an ordinary checkpoint"):
        materialize(src, tmp_path / "back")


@pytest.mark.parametrize(
    ("arrays", "texts"),
    [
        ({"gate_proj__0__shared": None}, (f"{GATE}.0.shared", "absent")),
        ({"gate_proj__1__perm": None}, (f"{GATE}.1.perm", "absent")),
        (
            {"gate_proj__0__private": lambda a: a[:, :, :-1].copy()},
            (f"{GATE}.0.private", "expected F32 of shape (2, 8,"),
        ),
        (
            {"gate_proj__0__perm": lambda a: a.astype(np.int64)},
            (f"{GATE}.0.perm", "expected I32", "got I64"),
        ),
        ({"gate_proj__0__perm": lambda a: np.zeros_like(a)}, (f"{GATE}.0.perm", "permutation")),
        ({"gate_proj__7__shared": np.ones(3, np.float32)}, (f"{GATE}.7.shared", "does not know")),
    ],
)
def test_bad_factors_are_refused_by_name(converted, tmp_path, arrays, texts):
    with pytest.raises(CheckpointError) as caught:
        materialize(rewrite(converted, **arrays), tmp_path / "back")
    for text in texts:
        assert text in str(caught.value)
    assert "convert the original again" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda q: q["layers"]["0"]["gate_proj"]["ranks"].pop(), "layers.0.gate_proj.ranks"),
        (lambda q: q["layers"]["0"]["gate_proj"]["ranks"].__setitem__(0, 99), "at most D=16"),
        (lambda q: q.update(format_version=FORMAT_VERSION + 1), "install a newer molae"),
        (lambda q: q.update(layout="unheard"), "'unheard' is unknown"),
        (lambda q: q.update(form="plain"), "expected F32 of shape"),
    ],
)
def test_a_bad_description_is_refused(converted, tmp_path, change, text):
    with pytest.raises(CheckpointError) as caught:
        materialize(rewrite(converted, change), tmp_path / "back")
    assert text in str(caught.value)


def test_a_factor_that_is_not_finite_is_named(converted, tmp_path):
    def harm(a):
        a[1, 0, 0] = np.nan
        return a

    harmed = rewrite(converted, gate_proj__1__private=harm)
    with pytest.raises(NonFiniteError) as caught:
        materialize(harmed, tmp_path / "back")
    assert f"{GATE}.1.private: expert 3" in str(caught.value)


def test_half_of_a_fused_pair_is_refused(tmp_path):
    src = make_checkpoint(tmp_path / "src", L=1, layout="fused")
    convert(src, tmp_path / "dst", CONFIG)
    up = {f"up_proj__{g}__{role}": None for g in range(2) for role in ("perm", "shared", "private")}
    harmed = rewrite(tmp_path / "dst", lambda q: q["layers"]["0"].pop("up_proj"), **up)
    with pytest.raises(CheckpointError, match="gate_proj but not up_proj"):
        materialize(harmed, tmp_path / "back")


def test_a_converted_checkpoint_is_not_converted_again(converted, tmp_path):
    with pytest.raises(CheckpointError, match="already converted"):
        convert(converted, tmp_path / "again", CONFIG)


def test_the_folder_stays_readable_by_the_checkpoint_reader(converted):
    with open_checkpoint(converted) as checkpoint:
        names = {name.rsplit(".", 1)[1] for name in checkpoint.tensors if ".experts." in name}
    assert names == {"shared", "perm", "private"}
    json.loads((converted / "molae-report.json").read_text())
