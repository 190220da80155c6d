"""Families: every layout read from real and made checkpoints, everything else refused."""

from __future__ import annotations

import copy
import importlib.util
import json
from importlib import resources
from pathlib import Path

import jsonschema
import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    FAMILIES,
    LAYOUTS,
    NUMPY,
    make_checkpoint,
    make_config,
    make_tensors,
    moe_layers,
    transformers_checkpoint,
    write_checkpoint,
)

from molae.arch import describe, families, find_family, load_family
from molae.arch.family import MoeLayers
from molae.config import TYPES
from molae.errors import ArgumentError, CheckpointError, UnknownFamilyError
from molae.factored import Factored, Split, group_tensors
from molae.io import TensorInfo, open_checkpoint

SCHEMA = json.loads(resources.files("molae.arch").joinpath("family.schema.json").read_text())
OLMOE = json.loads(resources.files("molae.arch").joinpath("olmoe.json").read_text())


def opened(path, **kwargs):
    checkpoint = open_checkpoint(path)
    return checkpoint, describe(checkpoint, **kwargs)


def wanted_matrices(config, tensors, layer, kind, block):
    """The experts' matrices by the plain reading of the names, for both layouts."""
    F = config.get("moe_intermediate_size", config["intermediate_size"])
    E = config.get("num_experts", config.get("num_local_experts"))
    at = f"model.layers.{layer}.{block}.experts"
    if f"{at}.down_proj" in tensors:
        if kind == "down_proj":
            return list(tensors[f"{at}.down_proj"])
        both = tensors[f"{at}.gate_up_proj"]
        return list(both[:, :F] if kind == "gate_proj" else both[:, F:])
    part = kind
    if config["model_type"] == "mixtral":
        part = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[kind]
    return [tensors[f"{at}.{e}.{part}.weight"] for e in range(E)]


# ------------------------------------------------------------ every layout


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", NUMPY)
def test_made_checkpoints(tmp_path, family, layout, dtype):
    sizes = {"L": 12, "E": 11, "K": 3, "D": 6, "F": 4}  # more than ten: order by number
    make_checkpoint(tmp_path, family, layout, dtype=dtype, shards=3, **sizes)
    config = make_config(family, **sizes)
    tensors = make_tensors(config, layout, dtype=dtype)
    checkpoint, model = opened(tmp_path)
    assert {k: model.letters[k] for k in "LEKDF"} == sizes
    assert model.family.model_type == family
    assert model.moe_layers == tuple(range(12))
    assert (model.layout, model.dtype, model.factored) == (layout, dtype, None)
    block = "block_sparse_moe" if family == "mixtral" and layout == "per_expert" else "mlp"
    for layer in (0, 2, 10, 11):
        prefix = f"model.layers.{layer}.{block}"
        assert model.experts_prefix(layer) == f"{prefix}.experts"
        assert model.roles(layer)["router"] == f"{prefix}.gate.weight"
        for kind in TYPES:
            names = model.expert_tensors(layer, kind)
            assert len(names) == (11 if layout == "per_expert" else 1)
            got = model.matrices(checkpoint, layer, kind)
            wanted = wanted_matrices(config, tensors, layer, kind, block)
            assert len(got) == len(wanted) == 11
            for a, b in zip(got, wanted, strict=True):
                assert a.shape == model.shape(kind)
                assert a.dtype == NUMPY[dtype]
                assert a.flags.c_contiguous
                assert not a.flags.writeable
                assert not a.flags.owndata
                assert a.tobytes() == b.tobytes()
    fused = layout == "fused"
    assert model.stored_together("up_proj") == (("gate_proj", "up_proj") if fused else ("up_proj",))
    assert (model.expert_tensors(0, "gate_proj") == model.expert_tensors(0, "up_proj")) == fused
    assert model.shape("gate_proj") == model.shape("up_proj") == (4, 6)
    assert model.shape("down_proj") == (6, 4)
    assert [model.side(k) for k in TYPES] == ["input", "input", "output"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("original", [True, False])
def test_checkpoints_that_transformers_saves(tmp_path, family, original):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = transformers_checkpoint(
        tmp_path, family, original=original, dtype="bfloat16", max_shard_size="1KB"
    )
    checkpoint, found = opened(tmp_path)
    assert found.layout == ("per_expert" if original else "fused")
    assert found.dtype == "BF16"
    if original:  # the small shards tear experts apart
        parts = [found.expert_tensors(0, k)[0] for k in TYPES]
        assert len({checkpoint.tensors[n].file for n in parts}) > 1
    for layer in found.moe_layers:
        experts = model.model.layers[layer].mlp.experts
        gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
        for kind, want in zip(TYPES, (gate, up, experts.down_proj.detach()), strict=True):
            for got, w in zip(found.matrices(checkpoint, layer, kind), want, strict=True):
                assert torch.equal(torch.from_numpy(got.astype(np.float32)), w.float())
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".mlp.experts." in n)
    counts = found.counts()
    assert counts.total_parameters == total
    assert counts.expert_parameters == experts
    assert counts.active_parameters == total - experts + experts * 2 // 4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", ["mlp", "block_sparse_moe"])
def test_mixtral_under_both_module_names(tmp_path, layout, block):
    make_checkpoint(tmp_path, "mixtral", layout, block=block)
    _, model = opened(tmp_path)
    assert model.layout == layout
    assert model.experts_prefix(1) == f"model.layers.1.{block}.experts"
    assert model.roles(1) == {"router": f"model.layers.1.{block}.gate.weight"}


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(
    ("step", "dense", "wanted"),
    [(1, [], (0, 1, 2, 3, 4)), (2, [], (1, 3)), (1, [0, 4], (1, 2, 3)), (2, [3], (1,)),
     (None, None, (0, 1, 2, 3, 4)), (3, [0], (2,))],
)  # fmt: skip
def test_layers_with_experts(tmp_path, family, step, dense, wanted):
    rule = {"decoder_sparse_step": step, "mlp_only_layers": dense}
    config = make_config(family, L=5) | rule
    config = {k: v for k, v in config.items() if v is not None}
    assert tuple(moe_layers(config)) == wanted
    write_checkpoint(tmp_path, config, make_tensors(config))
    _, model = opened(tmp_path)
    assert model.moe_layers == wanted
    assert find_family(config).read_moe_layers(config) == wanted
    with pytest.raises(ArgumentError, match="layer: 7 has no experts"):
        model.expert_tensors(7, "up_proj")


def test_layers_by_name(tmp_path):
    make_checkpoint(tmp_path)
    checkpoint, model = opened(tmp_path)
    assert model.layer_of("model.layers.1.self_attn.q_proj.weight") == 1
    assert model.layer_of("model.layers.61.eh_proj.weight") == 61
    assert model.layer_of("model.norm.weight") is None
    assert model.layer_of("x.model.layers.1.y") is None
    assert model.layer_of("model.layers.1") is None
    outside = {n for n in checkpoint.tensors if model.layer_of(n) is None}
    assert outside == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_layers_past_the_last_are_left_alone(tmp_path):
    extra = np.zeros((8, 16), np.float32)
    name = "model.layers.2.mlp.experts.0.gate_proj.weight"
    make_checkpoint(tmp_path, replace={name: extra})
    _, model = opened(tmp_path)
    assert model.moe_layers == (0, 1)
    assert model.layer_of(name) == 2


@pytest.mark.parametrize("E", ["num_experts", "num_local_experts"])
def test_the_config_key_may_differ(tmp_path, E):
    keys = {"num_experts": None, E: 4}
    make_checkpoint(tmp_path, "qwen3_moe", config=keys)
    assert opened(tmp_path)[1].letters["E"] == 4


def test_a_size_repeated_for_each_layer(tmp_path):
    make_checkpoint(tmp_path, "qwen3_moe", config={"num_experts_per_tok": [2, 2]})
    assert opened(tmp_path)[1].letters["K"] == 2


def test_a_config_and_a_table_are_enough():
    config = make_config("qwen2_moe")
    model = describe(config, infos(make_tensors(config)))
    assert model.dtype == "F32"
    with pytest.raises(ArgumentError, match="tensors: needed"):
        describe(config)


def infos(tensors):
    """What a checkpoint would say of arrays."""
    names = {np.dtype(v): k for k, v in NUMPY.items()}
    return {n: TensorInfo(n, names[a.dtype], a.shape, "x", 0, a.nbytes) for n, a in tensors.items()}


# -------------------------------------------------------------------- counts


def table(shapes):
    return {
        n: TensorInfo(n, "BF16", s, "x", 0, 2 * int(np.prod(s, dtype=np.int64)))
        for n, s in shapes.items()
    }


def olmoe_1b_7b():
    """Config values and tensor shapes of the released OLMoE-1B-7B."""
    config = {
        "model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "tie_word_embeddings": False,
    }  # fmt: skip
    D, F = 2048, 1024
    shapes = {"model.embed_tokens.weight": (50304, D), "lm_head.weight": (50304, D)}
    shapes["model.norm.weight"] = (D,)
    for n in range(16):
        at = f"model.layers.{n}."
        shapes |= {f"{at}self_attn.{x}_proj.weight": (D, D) for x in "qkvo"}
        shapes |= {f"{at}self_attn.{x}_norm.weight": (D,) for x in "qk"}
        shapes |= {f"{at}{x}_layernorm.weight": (D,) for x in ("input", "post_attention")}
        shapes[f"{at}mlp.gate.weight"] = (64, D)
        for e in range(64):
            for x in ("gate", "up"):
                shapes[f"{at}mlp.experts.{e}.{x}_proj.weight"] = (F, D)
            shapes[f"{at}mlp.experts.{e}.down_proj.weight"] = (D, F)
    return config, table(shapes)


def test_counts_of_olmoe_1b_7b():
    counts = describe(*olmoe_1b_7b()).counts()
    # The release calls itself 6.9B with 1.3B active.
    assert counts.total_parameters == 6_919_161_856
    assert counts.expert_parameters == 16 * 64 * 3 * 2048 * 1024
    assert counts.active_parameters == 6_919_161_856 - 6_442_450_944 * 7 // 8


def test_tied_embeddings_count_once(tmp_path):
    config = make_config("olmoe")
    table = infos(make_tensors(config))
    plain = describe(config, table).counts()
    tied = describe(config | {"tie_word_embeddings": True}, table).counts()
    assert plain.total_parameters - tied.total_parameters == 40 * 16
    assert plain.active_parameters - tied.active_parameters == 40 * 16
    del table["lm_head.weight"]
    assert describe(config | {"tie_word_embeddings": True}, table).counts() == tied


def test_integers_are_no_parameters():
    config = make_config("olmoe")
    table = infos(make_tensors(config))
    plain = describe(config, table).counts()
    table["model.ids"] = TensorInfo("model.ids", "I64", (99,), "x", 0, 792)
    assert describe(config, table).counts() == plain


# --------------------------------------------------------- converted models


def converted(family="olmoe", layout="per_expert", form="gauge", kinds=("gate_proj",)):
    """Config and table of a converted checkpoint: layer 0 in part, layer 1 not at all."""
    config = make_config(family)
    table = infos(make_tensors(config, layout))
    model = describe(config, dict(table))
    split = Split(((0, 3), (1,), (2,)), (2, None, 0))
    for kind in kinds:
        for name in model.expert_tensors(0, kind):
            table.pop(name, None)
        for g, (experts, rank) in enumerate(zip(split.groups, split.ranks, strict=True)):
            for part in group_tensors(
                model.experts_prefix(0), kind, g, len(experts), rank, F=8, D=16, form=form
            ):
                dtype = "I32" if part.integer else "F32"
                table[part.name] = TensorInfo(
                    part.name, dtype, part.shape, "x", 0, 4 * part.numbers
                )
    factored = Factored("latent", form, layout, {0: dict.fromkeys(kinds, split)}, "0")
    return config | {"quantization_config": factored.to_dict()}, table, model


@pytest.mark.parametrize("form", ["gauge", "plain"])
@pytest.mark.parametrize("kinds", [("gate_proj",), ("down_proj",), TYPES])
def test_a_converted_model_is_described_on_request(form, kinds):
    config, table, source = converted(form=form, kinds=kinds)
    with pytest.raises(CheckpointError, match=r"already converted by molae; .*molae materialize"):
        describe(config, table)
    model = describe(config, table, converted=True)
    assert model.factored.layers[0].keys() == set(kinds)
    for layer in (0, 1):
        assert model.experts_prefix(layer) == source.experts_prefix(layer)
        for kind in TYPES:
            assert model.expert_tensors(layer, kind) == source.expert_tensors(layer, kind)
    stored = (2 * 14 if form == "gauge" else 2 * 16) + 2 * 8 * 2 + 8 * 16
    full = 4 * 8 * 16
    counts, before = model.counts(), source.counts()
    assert counts.expert_parameters == before.expert_parameters - len(kinds) * (full - stored)
    assert counts.total_parameters == before.total_parameters - len(kinds) * (full - stored)
    # K=2 of E=4: the group of two is hit with chance 1 - C(2,2)/C(4,2) = 5/6.
    shared = 2 * 14 if form == "gauge" else 2 * 16
    active = len(kinds) * (shared * 5 / 6 + 0.5 * (2 * 8 * 2) + 0.5 * 8 * 16)
    dense = (6 - len(kinds)) * 2 * 8 * 16
    others = counts.total_parameters - counts.expert_parameters
    assert counts.active_parameters == others + round(active + dense)


def test_a_converted_model_keeps_its_layout_and_block():
    config, table, _ = converted("mixtral", "fused", kinds=TYPES)
    model = describe(config, table, converted=True)
    assert (model.layout, model.experts_prefix(0)) == ("fused", "model.layers.0.mlp.experts")
    config["quantization_config"]["layout"] = "odd"
    with pytest.raises(CheckpointError, match="layout: 'odd' is unknown for family mixtral"):
        describe(config, table, converted=True)


def test_strange_tensors_in_a_converted_model():
    config, table, _ = converted()
    name = "model.layers.0.mlp.experts.down_proj.0.private"  # down was not converted
    table[name] = TensorInfo(name, "F32", (1,), "x", 0, 4)
    with pytest.raises(UnknownFamilyError, match=name):
        describe(config, table, converted=True)


def test_an_ordinary_model_is_described_on_request_too(tmp_path):
    make_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert describe(checkpoint, converted=True).factored is None


# ------------------------------------------------------------------- refused


def refused(path, *parts, error=CheckpointError):
    with pytest.raises(error) as caught:
        opened(path)
    text = str(caught.value)
    for part in parts:
        assert part in text, text


def test_an_unknown_family(tmp_path):
    make_checkpoint(tmp_path, config={"model_type": "dbrx"})
    refused(
        tmp_path, "'dbrx' is unknown", "mixtral, olmoe, phimoe, qwen2_moe",
        "model.layers.0.mlp.experts.0.down_proj.weight", "and 21 more", "docs/formats.md",
        error=UnknownFamilyError,
    )  # fmt: skip


@pytest.mark.parametrize("model_type", [None, 3, ["olmoe"]])
def test_no_family(tmp_path, model_type):
    make_checkpoint(tmp_path, config={"model_type": "x"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    refused(tmp_path, f"model_type {model_type!r} is unknown", error=UnknownFamilyError)


def test_a_dense_model(tmp_path):
    make_checkpoint(
        tmp_path, "qwen3_moe", config={"model_type": "llama", "mlp_only_layers": [0, 1]}
    )
    refused(tmp_path, "no tensor is named like an expert's", error=UnknownFamilyError)


def test_a_known_family_with_other_names(tmp_path):
    config = make_config("mixtral")
    renamed = {n.replace("mlp.experts", "mlp.pros"): a for n, a in make_tensors(
        config | {"model_type": "olmoe"}).items()}  # fmt: skip
    write_checkpoint(tmp_path, config, renamed)
    refused(
        tmp_path, "family mixtral", "model.layers.0.block_sparse_moe.experts.0.w1.weight",
        "the checkpoint has", "known families are ", "mixtral, olmoe", error=UnknownFamilyError,
    )  # fmt: skip


def test_names_under_the_experts_that_are_not_known(tmp_path):
    scale = "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv"
    make_checkpoint(tmp_path, replace={scale: np.ones((1, 1), np.float32)})
    refused(tmp_path, "1 tensors that it does not know", scale, error=UnknownFamilyError)


def test_more_experts_than_the_config_says(tmp_path):
    name = "model.layers.1.mlp.experts.4.up_proj.weight"
    make_checkpoint(tmp_path, replace={name: np.ones((8, 16), np.float32)})
    refused(tmp_path, name, "says E=4", error=UnknownFamilyError)


def test_experts_in_a_layer_that_the_config_calls_dense(tmp_path):
    make_checkpoint(tmp_path, "qwen3_moe")
    config = json.loads((tmp_path / "config.json").read_text()) | {"mlp_only_layers": [1]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(
        tmp_path, "model.layers.1.mlp.experts.0", "layer 1 has no experts",
        error=UnknownFamilyError,
    )  # fmt: skip


def test_an_absent_expert(tmp_path):
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    make_checkpoint(tmp_path, replace={name: None})
    refused(tmp_path, name, "expert 2 of layer 1", "1 of 24 expert tensors", "download it again")
    fused = tmp_path / "fused"
    name = "model.layers.1.mlp.experts.down_proj"
    make_checkpoint(fused, layout="fused", replace={name: None})
    refused(fused, name, "(layer 1)", "1 of 4 expert tensors")


def test_an_absent_router(tmp_path):
    name = "model.layers.1.mlp.gate.weight"
    make_checkpoint(tmp_path, replace={name: None})
    refused(tmp_path, name, "router of layer 1", "download it again")


@pytest.mark.parametrize(
    ("name", "shape", "layout", "parts"),
    [
        ("mlp.experts.3.gate_proj.weight", (16, 8), "per_expert",
         ("expected shape (F=8, D=16)", "got (16, 8)", "transposed?")),
        ("mlp.experts.0.down_proj.weight", (16, 9), "per_expert",
         ("expected shape (D=16, F=8)", "got (16, 9);")),
        ("mlp.experts.0.down_proj.weight", (128,), "per_expert", ("got (128,);",)),
        ("mlp.experts.gate_up_proj", (4, 16, 15), "fused", ("(E=4, 2F=16, D=16)",)),
        ("mlp.experts.down_proj", (4, 8, 16), "fused", ("(E=4, D=16, F=8)", "transposed?")),
        ("mlp.gate.weight", (5, 16), "per_expert", ("(E=4, D=16)", "got (5, 16)")),
        ("mlp.shared_expert_gate.weight", (2, 16), "per_expert", ("(1, D=16)",)),
    ],
)  # fmt: skip
def test_a_tensor_of_unexpected_shape(tmp_path, name, shape, layout, parts):
    family = "qwen2_moe"
    name = f"model.layers.1.{name}"
    make_checkpoint(tmp_path, family, layout, replace={name: np.zeros(shape, np.float32)})
    refused(tmp_path, name, *parts, "do not belong together")


def test_experts_of_other_types(tmp_path):
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    for dtype, parts in (
        (ml_dtypes.bfloat16, ("type BF16", "is F32", "cast all experts to one type")),
        (np.float64, ("type F64", "experts must be F32, F16, BF16", "cast")),
        (ml_dtypes.float8_e4m3fn, ("type F8_E4M3", "dequantize")),
    ):
        make_checkpoint(tmp_path, replace={name: np.zeros((8, 16), dtype)})
        refused(tmp_path, name, *parts)


@pytest.mark.parametrize("quant", [{"quant_method": "gptq"}, {"bits": 4}, "awq"])
def test_a_quantized_source(tmp_path, quant):
    make_checkpoint(tmp_path, config={"quantization_config": quant})
    method = quant.get("quant_method") if isinstance(quant, dict) else None
    refused(tmp_path, f"quantized (quant_method {method!r})", "dequantize it")
    with pytest.raises(CheckpointError, match="dequantize"):
        describe(open_checkpoint(tmp_path), converted=True)


def test_a_null_quantization_is_none(tmp_path):
    make_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert opened(tmp_path)[1].factored is None


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"num_experts": None}, ("E is missing", "'num_experts' and no 'num_local_experts'")),
        ({"hidden_size": None}, ("D is missing", "'hidden_size'")),
        ({"hidden_size": "16"}, ("D is '16'", "whole number of at least 1")),
        ({"hidden_size": True}, ("D is True",)),
        ({"num_experts": 0}, ("E is 0",)),
        ({"num_experts_per_tok": [1, 2]}, ("K is [1, 2]",)),
        ({"num_experts_per_tok": 5}, ("K=5", "E=4")),
        ({"mlp_only_layers": [0, 1]}, ("none of the L=2 layers has experts",)),
        ({"mlp_only_layers": 1}, ("'mlp_only_layers' is 1", "list of layers")),
        ({"decoder_sparse_step": 0}, ("'decoder_sparse_step' is 0", "at least 1")),
    ],
)
def test_a_config_that_makes_no_sense(tmp_path, config, parts):
    write_checkpoint(
        tmp_path,
        {k: v for k, v in (make_config("qwen3_moe") | config).items() if v is not None},
        make_tensors(make_config("qwen3_moe")),
    )
    refused(tmp_path, "config.json", *parts)


def test_an_unknown_type(tmp_path):
    make_checkpoint(tmp_path)
    _, model = opened(tmp_path)
    for call in (model.shape, model.side, model.stored_together):
        with pytest.raises(ArgumentError, match=r"kind: expected one of gate_proj.*got 'gate'"):
            call("gate")


# -------------------------------------------------------------- family files


def test_shipped_families_follow_the_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    files = [
        f for f in resources.files("molae.arch").iterdir()
        if f.name.endswith(".json") and f.name != "family.schema.json"
    ]  # fmt: skip
    assert {f.name.removesuffix(".json") for f in files} == {
        family.model_type for family in families().values()
    }
    for file in files:
        jsonschema.validate(json.loads(file.read_text()), SCHEMA)
    assert set(families()) >= set(FAMILIES)
    for name, family in families().items():
        assert name in family.model_types
        assert family.about["router"]
        assert family.about["released"]


def test_the_page_of_families_is_what_its_script_writes():
    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location("make_families", root / "docs/make_families.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text("utf-8") == script.page(), "run: make docs"
    assert all(script.tried(family) for family in families().values())


def spoiled():
    """Descriptions with one fault each: (what, the text of the message, seen by the schema)."""

    def case(name, text, edit, by_schema=True):
        data = copy.deepcopy(OLMOE)
        edit(data)
        return pytest.param(data, text, by_schema, id=name)

    def pop(key):
        return lambda d: d.pop(key)

    def put(value, *path):
        def edit(d):
            for step in path[:-1]:
                d = d[step]
            d[path[-1]] = value

        return edit

    tensor = ("layouts", 0, "tensors", 0)
    yield case("unknown key", "unknown key 'colour'", put(1, "colour"))
    yield case("unknown in tensor", "unknown key 'x'", put(1, *tensor, "x"))
    yield case("unknown in layout", "unknown key 'x'", put(1, "layouts", 0, "x"))
    yield case("unknown rule", "unknown key 'x'", put("k", "moe_layers", "x"))
    for key in SCHEMA["required"]:
        yield case(f"no {key}", f"key '{key}' is missing", pop(key))
    yield case("no letter", "letters: F missing", lambda d: d["letters"].pop("F"))
    yield case("odd letter", "not one capital letter", put("k", "letters", "f"))
    yield case(
        "default of E", "no default", put({"keys": "e", "default": 1}, "letters", "E"), False
    )
    yield case(
        "default less than 0", "0 or more", put({"keys": "s", "default": -1}, "letters", "S")
    )
    yield case("default without keys", "'keys' is missing", put({"default": 1}, "letters", "S"))
    yield case("unknown layout", "expected one of per_expert, fused", put("x", "layouts", 0))
    yield case("model types", "is there twice", put(["a", "a"], "model_type"), False)
    yield case("optional experts", "always there", put(True, *tensor, "optional"), False)
    yield case("optional text", "true or false", put("no", "tensors", 0, "optional"))
    yield case("beneath no text", "expected a text", put(1, "beneath"))
    yield case("unknown in about", "unknown key 'x'", put("y", "about", "x"))
    yield case("empty key list", "at least 1", put([], "letters", "F"))
    yield case("number as key", "expected a list", put(3, "letters", "F"))
    yield case("no blocks", "at least 1", put([], "blocks"))
    yield case("empty name", "expected a text", put("", *tensor, "name"))
    yield case("odd role", "role 'x'", put("x", *tensor, "role"))
    yield case("odd extent", "'F+1' in a shape", put(["F+1"], *tensor, "shape"))
    yield case("layouts no list", "expected a list", put({}, "layouts"))
    yield case("layout no object", "expected an object", put([1], "layouts"))
    yield case("head no text", "expected a text", put(None, "head"))
    yield case("two blocks alike", "is there twice", put(["a.${layer}", "a.${layer}"], "blocks"))
    later = {"by_schema": False}
    yield case("unknown letter", "'Q' in a shape", put(["Q", "D"], *tensor, "shape"), **later)
    yield case("other shape", "reads ['F', 'D'] only", put(["D", "F"], *tensor, "shape"), **later)
    yield case(
        "role twice", "once, holds ['down_proj', 'gate_proj', 'gate_proj']",
        put("gate_proj", "layouts", 0, "tensors", 1, "role"), **later,
    )  # fmt: skip
    yield case("type left out", "each of", lambda d: d["layouts"][0]["tensors"].pop(), **later)
    yield case(
        "name twice", "'${block}.experts.${expert}.up_proj.weight' is there twice",
        put("${experts}.${expert}.up_proj.weight", *tensor, "name"), **later,
    )  # fmt: skip
    yield case(
        "layout twice", "'fused' is there twice", put("fused", "layouts", 0, "name"), **later
    )
    yield case("no layer", "expected a name with ${layer}", put(["a.mlp"], "blocks"), **later)
    yield case("no block", "expected a name with ${block}", put("experts", "experts"), **later)
    yield case("typo", "expected a name with", put("${expert}.x", *tensor, "name"), **later)
    yield case(
        "unknown placeholder", "expected a name with",
        put("${experts}.${expert}.${x}", *tensor, "name"), **later,
    )  # fmt: skip
    yield case(
        "stray dollar", "expected a name", put("${experts}.$expert.x", *tensor, "name"), **later
    )


@pytest.mark.parametrize(("data", "text", "by_schema"), list(spoiled()))
def test_a_faulty_description(tmp_path, data, text, by_schema):
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"^odd\.json: ") as caught:
        load_family(path)
    assert text in str(caught.value)
    assert jsonschema.Draft202012Validator(SCHEMA).is_valid(data) != by_schema


@pytest.mark.parametrize("text", ["", "[]", "3", '{"model_type": "a", "model_type": "b"}', "\xff"])
def test_a_description_that_is_no_json_object(tmp_path, text):
    path = tmp_path / "odd.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"odd\.json"):
        load_family(path)
    with pytest.raises(CheckpointError, match=r"none\.json: cannot be read"):
        load_family(tmp_path / "none.json")


def test_a_new_family_is_one_file(tmp_path):
    """The example of the documentation: names like Granite's, under the block itself."""
    text = (Path(__file__).parents[1] / "docs" / "formats.md").read_text("utf-8")
    blocks = [part.partition("```")[0] for part in text.split("```json")[1:]]
    description = json.loads(next(block for block in blocks if "linear_moe" in block))
    (tmp_path / "granite.json").write_text(json.dumps(description))
    jsonschema.validate(description, SCHEMA)
    config = make_config("mixtral") | {"model_type": "linear_moe"}
    names = {
        "mlp.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
        "mlp.experts.down_proj": "block_sparse_moe.output_linear.weight",
        "mlp.gate.weight": "block_sparse_moe.router.layer.weight",
    }
    made = make_tensors(make_config("mixtral"), "fused")
    tensors = {}
    for name, array in made.items():
        head, _, tail = name.partition(".mlp.")
        tensors[f"{head}.{names['mlp.' + tail]}" if tail else name] = array
    write_checkpoint(tmp_path / "x", config, tensors)
    with pytest.raises(UnknownFamilyError, match="'linear_moe' is unknown"):
        opened(tmp_path / "x")
    checkpoint, model = opened(tmp_path / "x", family=load_family(tmp_path / "granite.json"))
    assert model.experts_prefix(1) == "model.layers.1.block_sparse_moe"
    wanted = made["model.layers.1.mlp.experts.gate_up_proj"][3, 8:]
    np.testing.assert_array_equal(model.matrices(checkpoint, 1, "up_proj")[3], wanted)
    assert model.counts().expert_parameters == 2 * 4 * 3 * 8 * 16


def test_a_family_whose_first_layers_are_dense(tmp_path):
    description = OLMOE | {"moe_layers": {"first": "first_k_dense_replace", "every": "freq"}}
    (tmp_path / "x.json").write_text(json.dumps(description))
    family = load_family(tmp_path / "x.json")
    config = make_config("olmoe", L=6)
    assert family.read_moe_layers(config) == tuple(range(6))
    assert family.read_moe_layers(config | {"first_k_dense_replace": 3}) == (3, 4, 5)
    assert family.read_moe_layers(config | {"first_k_dense_replace": 1, "freq": 2}) == (2, 4)


@pytest.mark.parametrize(
    ("keys", "config", "wanted"),
    [
        ({"first": "a", "last": "b", "step": "c"}, {"a": 1, "b": -1}, (1, 2, 3, 4, 5)),
        ({"first": "a", "last": "b", "step": "c"}, {"a": 1, "b": 3, "c": 2}, (1, 3)),
        ({"last": "b"}, {"b": None}, (0, 1, 2, 3, 4, 5)),
        ({"every": "a"}, {"a": [0, 1, 0, 0, 1, 1]}, (1, 4, 5)),
        ({"every": "a", "first": "b"}, {"a": [1] * 7, "b": 4}, (4, 5)),
        ({"every": "a", "offset": "b"}, {"a": 2, "b": 1}, (1, 3, 5)),
        ({"every": "a", "offset": "b"}, {"a": 3}, (0, 3)),
        ({"only": "a", "first": "b"}, {"a": "0,2,5,9", "b": 4}, (0, 2, 5)),
        ({"only": "a"}, {"a": [3]}, (3,)),
        ({"only": "a", "first": "b"}, {"b": 4}, (4, 5)),
        ({"types": "a", "first": "b"}, {"a": ["dense", *["sparse"] * 5], "b": 4}, (1, 2, 3, 4, 5)),
        ({"types": "a", "first": "b"}, {"b": 4}, (4, 5)),
        ({"enabled": "a"}, {"a": False}, ()),
        ({"enabled": "a"}, {"a": True}, (0, 1, 2, 3, 4, 5)),
    ],
)
def test_rules_for_layers_with_experts(keys, config, wanted):
    assert MoeLayers(**keys).indices(config, 6) == wanted


@pytest.mark.parametrize(
    ("keys", "config", "text"),
    [
        ({"every": "a"}, {"a": [0, 1]}, "'a' is [0, 1], expected one of 0, 1 for each of the L=6"),
        ({"every": "a"}, {"a": [0, 1, 2, 1, 1, 1]}, "expected one of 0, 1"),
        ({"types": "a"}, {"a": ["moe"] * 6}, "expected one of 'dense', 'sparse'"),
        ({"only": "a"}, {"a": "1;2"}, "expected a list of layers"),
        ({"only": "a"}, {"a": [1.5]}, "expected a list of layers"),
        ({"last": "a"}, {"a": -2}, "at least -1"),
    ],
)
def test_rules_that_a_config_breaks(keys, config, text):
    with pytest.raises(CheckpointError) as caught:
        MoeLayers(**keys).indices(config, 6)
    assert text in str(caught.value)


DEEPSEEK = {
    "model_type": "deepseek_v3", "hidden_size": 16, "moe_intermediate_size": 8,
    "num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_shared_experts": 2,
}  # fmt: skip


def deepseek_tensors(shared):
    names = {"mlp.gate.weight": (4, 16), "mlp.gate.e_score_correction_bias": (4,)}
    for e in range(4):
        names |= {f"mlp.experts.{e}.{k}_proj.weight": (8, 16) for k in ("gate", "up")}
        names[f"mlp.experts.{e}.down_proj.weight"] = (16, 8)
    if shared:
        names |= {f"mlp.shared_experts.{k}_proj.weight": (8 * shared, 16) for k in ("gate", "up")}
        names["mlp.shared_experts.down_proj.weight"] = (16, 8 * shared)
    return table({f"model.layers.1.{name}": shape for name, shape in names.items()})


def test_shared_experts_that_depend_on_the_config():
    model = describe(DEEPSEEK, deepseek_tensors(2))
    assert model.letters["S"] == 2
    assert model.moe_layers == (1,)
    assert model.roles(1)["shared_up_proj"] == "model.layers.1.mlp.shared_experts.up_proj.weight"
    for none in ({"n_shared_experts": None}, {"n_shared_experts": 0}):
        assert "shared_up_proj" not in describe(DEEPSEEK | none, deepseek_tensors(0)).roles(1)
    with pytest.raises(CheckpointError, match=r"shared_experts\.gate_proj\.weight: absent"):
        describe(DEEPSEEK, deepseek_tensors(0))
    with pytest.raises(CheckpointError, match=r"expected shape \(SF=16, D=16\)"):
        describe(DEEPSEEK, deepseek_tensors(3))
    with pytest.raises(CheckpointError, match="S is -1"):
        describe(DEEPSEEK | {"n_shared_experts": -1}, deepseek_tensors(0))


def test_tensors_that_may_be_absent():
    tensors = deepseek_tensors(2)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert describe(DEEPSEEK, tensors).roles(1)["router_bias"] == bias
    del tensors[bias]
    assert "router_bias" not in describe(DEEPSEEK, tensors).roles(1)
    tensors |= table({bias: (5,)})
    with pytest.raises(CheckpointError, match=r"expected shape \(E=4\) by config.json, got \(5,\)"):
        describe(DEEPSEEK, tensors)


def test_tensors_of_several_names():
    text = resources.files("molae.arch").joinpath("ernie4_5_moe.json").read_text()
    names = next(t["name"] for t in json.loads(text)["tensors"] if t["role"] == "router_bias")
    config = DEEPSEEK | {
        "model_type": "ernie4_5_moe", "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1,
    }  # fmt: skip
    for name in names:
        name = name.replace("${block}", "model.layers.1.mlp")
        found = describe(config, deepseek_tensors(0) | table({name: (1, 4)}))
        assert found.roles(1)["router_bias"] == name


def test_sizes_beneath_an_entry_of_the_config():
    part = make_config("qwen2_moe", L=3) | {"mlp_only_layers": [1]}
    part.pop("tie_word_embeddings")
    whole = {"model_type": "qwen3_5_moe", "text_config": part, "hidden_size": 99}
    family = find_family(whole)
    flat = part | {"model_type": "qwen3_5_moe_text"}
    assert find_family(flat) is family
    for config in (whole, flat):
        assert family.read_letters(config)["D"] == 16
        assert family.read_moe_layers(config) == (0, 2)
        assert not family.is_tied(config)
    part["tie_word_embeddings"] = True
    assert family.is_tied(whole)
    assert not family.is_tied(whole | {"tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match="'text_config' is 3, expected an object"):
        family.read_letters(whole | {"text_config": 3})


def test_a_size_that_differs_between_layers():
    with pytest.raises(CheckpointError, match="layers of different sizes are not supported"):
        find_family(DEEPSEEK).read_letters(DEEPSEEK | {"moe_intermediate_size": [8, 9]})


def test_a_bare_config_gives_sizes():
    config, _ = olmoe_1b_7b()
    family = find_family(config)
    assert family.read_letters(config) == {"L": 16, "E": 64, "K": 8, "D": 2048, "F": 1024}
    assert family.read_moe_layers(config) == tuple(range(16))
