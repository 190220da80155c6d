"""Conversion from end to end on tiny checkpoints: what is written, and how good it is."""

import hashlib
import json
import warnings
from importlib import resources

import ml_dtypes
import numpy as np
import pytest
from checkpoints import FAMILIES, LAYOUTS, NUMPY, add_companions, make_checkpoint
from converting import (
    REPORT,
    TYPES,
    bits,
    factored_matrices,
    fixed_method,
    metadata,
    read_json,
    relative_error,
    source_matrices,
    tensors,
    tree,
)

import molae
from molae import ConvertConfig, convert, materialize
from molae.arch import load_family
from molae.convert import METHODS, Report, inspect
from molae.convert.conversion import Conversion
from molae.convert.estimate import memory_bytes
from molae.errors import CheckpointError, NonFiniteError, UnknownFamilyError
from molae.factored import Split
from molae.io import open_checkpoint

EPS = {"F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}

# Sizes that each method reaches on the tiny model of these tests.
SIZE = {"latent": 0.5, "molae": 0.8}


def config_for(method, size=None):
    return ConvertConfig(method=method, size=size or SIZE[method])


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_layout(tmp_path, family, layout, dtype):
    src = make_checkpoint(tmp_path / "src", family, layout, dtype=dtype, shards=3, E=8)
    report = convert(src, tmp_path / "dst", config_for("latent"))
    original, result = tensors(src), tensors(tmp_path / "dst")
    experts = {name for name in original if ".experts." in name}

    # What is no expert's is there bit for bit, and nothing else but factors is.
    for name in original.keys() - experts:
        assert bits(result[name]) == bits(original[name])
    for name in result.keys() - original.keys():
        assert name.rsplit(".", 1)[1] in ("shared", "perm", "private")
    assert not experts & result.keys()

    # The factors, read by the documented format, have the errors that the report claims.
    rows = {(row.layer, row.kind): row for row in report.rows}
    assert set(rows) == {(layer, kind) for layer in range(2) for kind in TYPES}
    for (layer, kind), row in rows.items():
        W = np.stack(source_matrices(src, layer, kind)).astype(np.float64)
        found = np.stack(factored_matrices(tmp_path / "dst", layer, kind))
        assert relative_error(found, W) == pytest.approx(row.error, rel=1e-5)
        each = [relative_error(a, b) for a, b in zip(found, W, strict=True)]
        assert min(each) == pytest.approx(row.expert_error_min, rel=1e-3)
        assert max(each) == pytest.approx(row.expert_error_max, rel=1e-3)

    # Stored numbers: in the files, in the report, in the plan.
    stored = sum(a.size for n, a in result.items() if n.endswith((".shared", ".private")))
    assert stored == sum(row.stored_numbers for row in report.rows)
    assert stored == report.plan["after"]["expert_numbers"]
    dense = sum(original[name].size for name in experts)
    assert report.plan["size_reached"] == stored / dense <= 0.5
    assert report.plan["after"]["total_bytes"] == sum(a.nbytes for a in result.values())
    assert report.plan["before"]["total_bytes"] == sum(a.nbytes for a in original.values())


@pytest.mark.parametrize("kind", TYPES)
def test_the_error_is_the_optimum_of_eckart_and_young(tmp_path, kind):
    src = make_checkpoint(tmp_path / "src", E=6, D=24, F=16)
    report = convert(src, tmp_path / "dst", ConvertConfig(size=0.6, group_size=4))
    (row,) = (row for row in report.rows if (row.layer, row.kind) == (1, kind))
    assert [len(group) for group in row.groups] == [4, 2]
    W = source_matrices(src, 1, kind)
    lost = total = 0.0
    for group, rank, share in zip(row.groups, row.ranks, row.discarded_energy, strict=True):
        stack = np.vstack([W[e].T if kind == "down_proj" else W[e] for e in group])
        energy = np.linalg.svd(stack.astype(np.float64), compute_uv=False) ** 2
        assert share == pytest.approx(energy[rank:].sum() / energy.sum(), rel=1e-4)
        lost, total = lost + energy[rank:].sum(), total + energy.sum()
    assert row.error == pytest.approx((lost / total) ** 0.5, rel=1e-4)


def test_the_papers_method_reduces_each_expert_first(tmp_path):
    src = make_checkpoint(tmp_path / "src", E=4, D=24, F=16)
    rank = 6
    report = convert(src, tmp_path / "dst", ConvertConfig(method="molae", rank=rank, group_size=2))
    for kind in ("gate_proj", "up_proj"):
        W = [w.astype(np.float64) for w in source_matrices(src, 0, kind)]
        found = factored_matrices(tmp_path / "dst", 0, kind)
        (row,) = (row for row in report.rows if (row.layer, row.kind) == (0, kind))
        for group in ([0, 1], [2, 3]):
            lower = []
            for e in group:
                u, s, v = np.linalg.svd(W[e], full_matrices=False)
                lower.append((u[:, :rank] * s[:rank]) @ v[:rank])
            _, _, v = np.linalg.svd(np.vstack(lower), full_matrices=False)
            for at, e in enumerate(group):
                wanted = lower[at] @ v[:rank].T @ v[:rank]
                assert relative_error(found[e], wanted) < 1e-4
                # Without the first step the answer is another one.
                _, _, v1 = np.linalg.svd(np.vstack([W[i] for i in group]), full_matrices=False)
                assert relative_error(W[e] @ v1[:rank].T @ v1[:rank], wanted) > 1e-3
        assert relative_error(np.stack(found), np.stack(W)) == pytest.approx(row.error, rel=1e-5)
    assert factored_matrices(tmp_path / "dst", 0, "down_proj") is None


MIXED = {
    "gate_proj": Split(((3, 0), (1, 2, 5), (4,)), (5, 0, None)),
    "up_proj": Split(((0, 1, 2, 3, 4, 5),), (16,)),
    "down_proj": Split(((5, 1), (0,), (2, 3, 4)), (None, 3, 7)),
}


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_groups_and_ranks(tmp_path, monkeypatch, layout, dtype):
    """Unequal groups in any order, rank 0, groups left dense, layers left alone."""
    monkeypatch.setitem(METHODS, "fixed", fixed_method(MIXED, layers=(1,)))
    src = make_checkpoint(tmp_path / "src", "qwen3_moe", layout, dtype=dtype, E=6)
    report = convert(src, tmp_path / "dst", ConvertConfig(method="fixed"))
    assert inspect(tmp_path / "dst").factored.layers == {1: MIXED}
    original, result = tensors(src), tensors(tmp_path / "dst")
    for name in original:
        if ".layers.0." in name:
            assert bits(result[name]) == bits(original[name])
    for kind, split in MIXED.items():
        W = source_matrices(src, 1, kind)
        found = factored_matrices(tmp_path / "dst", 1, kind)
        (row,) = (row for row in report.rows if row.kind == kind)
        assert row.ranks == list(split.ranks)
        for g, (group, rank) in enumerate(zip(split.groups, split.ranks, strict=True)):
            for e in group:
                if rank is None:
                    assert np.array_equal(found[e], W[e].astype(np.float64))
                elif rank == 0:
                    assert not found[e].any()
                else:
                    assert relative_error(found[e], W[e]) < 1
            if rank is None:
                assert row.discarded_energy[g] == 0
                assert row.effective_rank[g] is row.kernel_dim[g] is None
    # rank 16 = D of all six experts together: nothing is lost but rounding
    full = np.stack(factored_matrices(tmp_path / "dst", 1, "up_proj"))
    assert relative_error(full, np.stack(source_matrices(src, 1, "up_proj"))) < 4 * EPS[dtype]


def test_gate_and_up_leave_a_fused_tensor_together(tmp_path, monkeypatch):
    only_up = {"up_proj": Split(((0, 1), (2, 3)), (3, 2))}
    monkeypatch.setitem(METHODS, "fixed", fixed_method(only_up))
    for layout in LAYOUTS:
        src = make_checkpoint(tmp_path / layout, "mixtral", layout)
        convert(src, tmp_path / f"{layout}-dst", ConvertConfig(method="fixed"))
        kinds = set(inspect(tmp_path / f"{layout}-dst").factored.layers[0])
        assert kinds == ({"gate_proj", "up_proj"} if layout == "fused" else {"up_proj"})
    found = factored_matrices(tmp_path / "fused-dst", 0, "gate_proj")
    W = source_matrices(tmp_path / "fused", 0, "gate_proj")
    assert all(np.array_equal(a, b) for a, b in zip(found, W, strict=True))
    materialize(tmp_path / "fused-dst", tmp_path / "back")
    back = source_matrices(tmp_path / "back", 0, "gate_proj")
    assert all(np.array_equal(a, b) for a, b in zip(back, W, strict=True))


def test_full_rank_gives_the_original_up_to_rounding(tmp_path, monkeypatch):
    full = {kind: Split(((0, 1, 2), (3,)), (16, 8)) for kind in TYPES}
    monkeypatch.setitem(METHODS, "fixed", fixed_method(full))
    for dtype in ("F32", "BF16"):
        src = make_checkpoint(tmp_path / f"src{dtype}", dtype=dtype)
        report = convert(src, tmp_path / f"dst{dtype}", ConvertConfig(method="fixed"))
        materialize(tmp_path / f"dst{dtype}", tmp_path / f"back{dtype}")
        for layer in range(2):
            for kind in TYPES:
                W = np.stack(source_matrices(src, layer, kind))
                back = np.stack(source_matrices(tmp_path / f"back{dtype}", layer, kind))
                assert relative_error(back, W) < 8 * EPS[dtype]
        assert report.error() < 8 * EPS[dtype]


# ------------------------------------------------------------- files beside the weights


def test_the_folder_is_a_checkpoint_of_one_shard_a_layer(tmp_path):
    src = make_checkpoint(tmp_path / "src", L=3, shards=2)
    convert(src, tmp_path / "dst", config_for("latent"))
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [name for name, _ in metadata(tmp_path / "dst")] == names
    assert all(meta == {"format": "pt"} for _, meta in metadata(tmp_path / "dst"))
    index = read_json(tmp_path / "dst" / "model.safetensors.index.json")
    for name, file in index["weight_map"].items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        assert file == names[layer]
    found = tensors(tmp_path / "dst")
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in found.values())


def test_layers_without_experts_are_copied(tmp_path):
    src = make_checkpoint(tmp_path / "src", "qwen2_moe", L=3, config={"mlp_only_layers": [1]})
    report = convert(src, tmp_path / "dst", config_for("latent"))
    assert {row.layer for row in report.rows} == {0, 2}
    original, result = tensors(src), tensors(tmp_path / "dst")
    dense = [name for name in original if ".layers.1." in name]
    assert dense
    assert all(bits(result[name]) == bits(original[name]) for name in dense)


def test_the_config_keeps_its_keys_and_their_order(tmp_path):
    extra = {"zz": [1, [2, 3]], "a": {"deep": {"er": None}}, "ü": "ß", "number": 1e-05}
    src = make_checkpoint(tmp_path / "src", config=extra)
    convert(src, tmp_path / "dst", ConvertConfig(size=0.5, group_size=2))
    before = read_json(src / "config.json")
    after = read_json(tmp_path / "dst" / "config.json")
    quant = after.pop("quantization_config")
    assert list(after.items()) == list(before.items())
    assert list(read_json(tmp_path / "dst" / "config.json"))[-1] == "quantization_config"
    assert quant["quant_method"] == "molae"
    assert quant["format_version"] == 1
    assert quant["molae_version"] == molae.__version__
    assert quant["layout"] == "per_expert"
    text = (tmp_path / "dst" / "config.json").read_text()
    assert '"groups": [[0, 1], [2, 3]]' in text  # lists of numbers stay on one line


def test_companions_go_along_and_the_models_own_card_is_kept(tmp_path):
    src = make_checkpoint(tmp_path / "src")
    add_companions(src, ("tokenizer.json", "LICENSE", "README.md", "molae-report.json"))
    (src / "additional_chat_templates").mkdir()
    add_companions(src, ("additional_chat_templates/tool.jinja", "pytorch_model.bin"))
    convert(src, tmp_path / "dst", config_for("latent"))
    dst = tmp_path / "dst"
    for name in ("tokenizer.json", "LICENSE", "additional_chat_templates/tool.jinja"):
        assert (dst / name).read_bytes() == (src / name).read_bytes()
    assert (dst / "README.source.md").read_bytes() == (src / "README.md").read_bytes()
    assert "the text of" in (dst / "molae-report.source.json").read_text()
    assert not (dst / "pytorch_model.bin").exists()
    card = (dst / "README.md").read_text()
    for text in ("`LICENSE`", "README.source.md", "molae materialize", "src", "`gate_proj`"):
        assert text in card
    # A second pass has both kinds of card to keep.
    materialize(dst, tmp_path / "back")
    assert (tmp_path / "back" / "README.source.source.md").read_text() == card
    assert (tmp_path / "back" / "README.source.md").read_bytes() == (src / "README.md").read_bytes()


def test_the_report_knows_its_inputs_and_files(tmp_path):
    src = make_checkpoint(tmp_path / "src", "mixtral", "fused", dtype="BF16")
    add_companions(src)
    report = convert(src, tmp_path / "dst", config_for("latent"))
    files = {path.name for path in (tmp_path / "dst").iterdir()}
    assert files == {*report.files, REPORT}
    for name, entry in report.files.items():
        data = (tmp_path / "dst" / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    hashes = report.inputs["sha256"]["model-00002-of-00002.safetensors"]
    stack = b"".join(w.tobytes() for w in source_matrices(src, 1, "up_proj"))
    assert hashes["layer 1 up_proj"] == hashlib.sha256(stack).hexdigest()
    original = tensors(src)
    copied = sorted(n for n in original if ".layers.1." in n and ".experts." not in n)
    data = b"".join(original[n].tobytes() for n in copied)
    assert hashes["copied"] == hashlib.sha256(data).hexdigest()
    assert report.inputs["fingerprint"]["files"].keys() == {"model.safetensors"}
    for key in ("molae", "python", "numpy", "blas", "isa"):
        assert report.versions[key]
    assert report.settings["size"] == 0.5
    assert all(row.seconds >= 0 for row in report.rows)
    assert Report.from_file(tmp_path / "dst") == report


def test_a_direct_svd_is_reported_and_no_warning(tmp_path, monkeypatch, rng):
    """Experts of rank 3 fitted at rank 5: the Gram matrix cannot see the last two."""
    names = [f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in range(4)]
    basis = rng.standard_normal((3, 16))
    planted = {n: (rng.standard_normal((8, 3)) @ basis).astype(np.float32) for n in names}
    src = make_checkpoint(tmp_path / "src", L=1, replace=planted)
    split = {"up_proj": Split(((0, 1, 2, 3),), (5,))}
    monkeypatch.setitem(METHODS, "fixed", fixed_method(split))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = convert(src, tmp_path / "dst", ConvertConfig(method="fixed"))
    (row,) = report.rows
    assert row.used_svd == [True]
    assert row.kernel_dim == [13]
    assert row.error < 1e-5


# -------------------------------------------------------------- methods x behaviours


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("methods") / "src", dtype="BF16", E=8)


def loads_as_an_ordinary_checkpoint(method, source, tmp_path):
    convert(source, tmp_path / "dst", config_for(method))
    materialize(tmp_path / "dst", tmp_path / "back")
    original, back = tensors(source), tensors(tmp_path / "back")
    assert {n: (a.shape, a.dtype) for n, a in back.items()} == {
        n: (a.shape, a.dtype) for n, a in original.items()
    }


def gives_the_same_bytes_again(method, source, tmp_path):
    for name in ("one", "two"):
        convert(source, tmp_path / name, config_for(method))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def does_not_depend_on_threads(method, source, tmp_path):
    for count in (1, 2, 3):
        with molae.num_threads(count):
            convert(source, tmp_path / str(count), config_for(method))
    assert tree(tmp_path / "1") == tree(tmp_path / "2") == tree(tmp_path / "3")


def leaves_all_at_size_one(method, source, tmp_path):
    report = convert(source, tmp_path / "dst", config_for(method, 1.0))
    original, result = tensors(source), tensors(tmp_path / "dst")
    assert {n: bits(a) for n, a in original.items()} == {n: bits(a) for n, a in result.items()}
    assert read_json(tmp_path / "dst" / "config.json") == read_json(source / "config.json")
    assert report.rows == ()
    assert report.error() == 0


def reaches_the_size(method, source, tmp_path):
    convert(source, tmp_path / "dst", config_for(method))
    found = tensors(tmp_path / "dst")
    stored = sum(
        array.size
        for name, array in found.items()
        if ".experts." in name and not name.endswith(".perm")
    )
    dense = sum(a.size for n, a in tensors(source).items() if ".experts." in n)
    assert stored <= SIZE[method] * dense


def never_gets_better_by_shrinking(method, source, tmp_path):
    errors = []
    for size in (0.95, 0.9, 0.8, 0.7):
        dst = tmp_path / str(size)
        convert(source, dst, ConvertConfig(method=method, size=size, group_size=8))
        materialize(dst, tmp_path / f"{size}-back")
        errors.append(
            sum(
                float(np.square(np.float64(a) - np.float64(b)).sum())
                for layer in range(2)
                for kind in TYPES
                for a, b in zip(
                    source_matrices(tmp_path / f"{size}-back", layer, kind),
                    source_matrices(source, layer, kind),
                    strict=True,
                )
            )
        )
    assert errors == sorted(errors)


def refuses_nan(method, source, tmp_path):
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    W = source_matrices(source, 1, "up_proj")[5].copy()
    W[3, 2] = np.nan
    broken = make_checkpoint(tmp_path / "src", dtype="BF16", E=8, replace={name: W})
    with pytest.raises(NonFiniteError) as caught:
        convert(broken, tmp_path / "dst", config_for(method))
    assert name in str(caught.value)
    assert "expert 5 of layer 1" in str(caught.value)
    assert caught.value.expert == 5


def keeps_its_settings_in_the_report(method, source, tmp_path):
    convert(source, tmp_path / "dst", config_for(method))
    report = Report.from_file(tmp_path / "dst")
    assert ConvertConfig.from_dict(report.settings) == config_for(method)


BEHAVIOURS = (
    loads_as_an_ordinary_checkpoint,
    gives_the_same_bytes_again,
    does_not_depend_on_threads,
    leaves_all_at_size_one,
    reaches_the_size,
    never_gets_better_by_shrinking,
    refuses_nan,
    keeps_its_settings_in_the_report,
)


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda b: b.__name__)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_each_method_has_each_behaviour(method, behaviour, source, tmp_path):
    behaviour(method, source, tmp_path)


# ------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_that_is_not_finite_is_named(tmp_path, layout, value):
    src = make_checkpoint(tmp_path / "src", "mixtral", layout, dtype="F16", E=8)
    name = {
        "fused": "model.layers.0.mlp.experts.down_proj",
        "per_expert": "model.layers.0.block_sparse_moe.experts.6.w2.weight",
    }[layout]
    W = tensors(src)[name].copy()
    W[(6, 2, 3) if layout == "fused" else (2, 3)] = value
    make_checkpoint(src, "mixtral", layout, dtype="F16", E=8, replace={name: W})
    with pytest.raises(NonFiniteError) as caught:
        convert(src, tmp_path / "dst", ConvertConfig(size=0.5, group_size=4))
    shown = f"{name}[6]" if layout == "fused" else name
    assert str(caught.value).startswith(f"{shown}: ")
    assert "expert 6 of layer 0, down_proj" in str(caught.value)


def test_an_expert_of_a_later_group_has_its_own_number(tmp_path):
    """With one thread the groups are fitted one by one; the number is still the layer's."""
    name = "model.layers.0.mlp.experts.6.up_proj.weight"
    src = make_checkpoint(tmp_path / "src", E=8, replace={name: np.full((8, 16), np.nan, "f4")})
    for config in (
        ConvertConfig(size=0.5, group_size=2),
        ConvertConfig(method="molae", rank=3, group_size=4),
    ):
        with molae.num_threads(1), pytest.raises(NonFiniteError, match="expert 6 of layer 0"):
            convert(src, tmp_path / "dst", config, overwrite=True)


def test_a_weight_of_a_group_left_dense_is_looked_at_too(tmp_path, monkeypatch):
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    W = np.ones((8, 16), np.float32)
    W[7, 15] = np.inf
    src = make_checkpoint(tmp_path / "src", L=1, replace={name: W})
    split = {"up_proj": Split(((2,), (3, 0, 1)), (None, 4))}
    monkeypatch.setitem(METHODS, "fixed", fixed_method(split))
    with pytest.raises(NonFiniteError, match="expert 2 of layer 0") as caught:
        convert(src, tmp_path / "dst", ConvertConfig(method="fixed"))
    assert str(caught.value).startswith(name)


def test_a_family_of_ones_own(tmp_path):
    """A model type that molae does not know is converted by its JSON description."""
    src = make_checkpoint(tmp_path / "src", "olmoe", config={"model_type": "mine"})
    with pytest.raises(UnknownFamilyError, match="known are"):
        convert(src, tmp_path / "dst", config_for("latent"))
    text = (resources.files("molae.arch") / "olmoe.json").read_text()
    own = tmp_path / "mine.json"
    own.write_text(text.replace('"olmoe"', '"mine"'))
    family = load_family(own)
    convert(src, tmp_path / "dst", config_for("latent"), family=family)
    assert inspect(tmp_path / "dst", family=family).family == "mine"
    materialize(tmp_path / "dst", tmp_path / "back", family=family)
    assert tensors(tmp_path / "back").keys() == tensors(src).keys()


def test_a_converted_checkpoint_describes_a_family_of_ones_own(tmp_path):
    """It is read again without the JSON file, and not with another one."""
    src = make_checkpoint(tmp_path / "src", "olmoe", config={"model_type": "mine"})
    text = (resources.files("molae.arch") / "olmoe.json").read_text()
    own, other = tmp_path / "mine.json", tmp_path / "other.json"
    own.write_text(text.replace('"olmoe"', '"mine"'))
    other.write_text(text.replace('"olmoe"', '"another"'))
    convert(src, tmp_path / "dst", config_for("latent"), family=load_family(own))
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    kept = config["quantization_config"]["arch"]
    assert kept == {k: v for k, v in json.loads(own.read_text()).items() if k != "$schema"}
    assert inspect(tmp_path / "dst").family == "mine"
    with pytest.raises(CheckpointError, match="leave --arch out"):
        inspect(tmp_path / "dst", family=load_family(other))
    materialize(tmp_path / "dst", tmp_path / "back")
    assert tensors(tmp_path / "back").keys() == tensors(src).keys()
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["model_type"] == "mine"
    assert "quantization_config" not in back
    del kept["letters"]["E"]
    (tmp_path / "dst" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantization_config.arch: letters: E missing"):
        inspect(tmp_path / "dst")


def test_types_of_the_format_are_those_of_the_source(tmp_path):
    for dtype, wanted in NUMPY.items():
        src = make_checkpoint(tmp_path / f"src{dtype}", dtype=dtype)
        convert(src, tmp_path / f"dst{dtype}", config_for("latent"))
        for name, array in tensors(tmp_path / f"dst{dtype}").items():
            assert array.dtype == (np.int32 if name.endswith(".perm") else wanted)
    assert NUMPY["BF16"] is ml_dtypes.bfloat16


def test_the_memory_estimate_counts_results_and_workspace(tmp_path):
    src = make_checkpoint(tmp_path / "src", E=8, D=64, F=32)
    with open_checkpoint(src) as checkpoint:
        small, large = (
            memory_bytes(Conversion(str(src), checkpoint, ConvertConfig(size=size, group_size=2)))
            for size in (0.3, 0.9)
        )
    assert small < large
