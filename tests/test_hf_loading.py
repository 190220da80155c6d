"""Converted checkpoints as models of Transformers: loaded, saved, cast, refused."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
import torch
import transformers
from checkpoints import FAMILIES, make_checkpoint
from converting import bits, tensors
from hf_models import (
    MIXED,
    convert_fixed,
    convert_tiny,
    load,
    materialized,
    rounding_effect,
    tokens,
)
from safetensors.numpy import load_file, save_file

import molae
from molae.convert.jsontext import json_text
from molae.errors import ArgumentError, CheckpointError, UnknownFamilyError
from molae.factored import FORMAT_VERSION, Split, index_groups
from molae.hf import LatentExperts, MolaeConfig, hide_progress

hide_progress()
pytestmark = pytest.mark.usefixtures("one_thread")

LATENT = molae.ConvertConfig(size=0.6)
PAPER = molae.ConvertConfig(method="molae", size=0.9, group_size=6)


def assert_same_model(dst, ids=None):
    """The factored model has the logits of its materialized twin, and generates the same."""
    ids = tokens() if ids is None else ids
    factored = load(dst, dtype="float64", experts_implementation="eager")
    ordinary = load(materialized(dst), dtype="float64", experts_implementation="eager")
    with torch.no_grad():
        one, other = factored(ids).logits, ordinary(ids).logits
    # In float64 the two differ by what materializing rounded: an element of a product of rank
    # R <= 16 in float32 is off by at most 17 roundings of its terms, where `rounding_effect`
    # is what one of the elements themselves does to the logits.
    effect = rounding_effect(ordinary, ids)
    assert effect > 0
    assert (one - other).abs().max() <= 17 * effect


def assert_saved_alike(model, dst, out, **options):
    """What is saved has the names and bits of what was loaded, and is loaded the same."""
    model.save_pretrained(out, **options)
    before, after = tensors(dst), tensors(out)
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert bits(after[name]) == bits(array), name
    quant = json.loads((dst / "config.json").read_text())["quantization_config"]
    assert json.loads((out / "config.json").read_text())["quantization_config"] == quant
    assert molae.inspect(out).factored == molae.inspect(dst).factored
    state = load(out).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("original", [True, False], ids=["per_expert", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_in_gauge_form(family, original, tmp_path):
    dst = convert_tiny(tmp_path, family, original=original, config=LATENT)
    assert molae.inspect(dst).factored.form == "gauge"
    assert_same_model(dst)
    assert_saved_alike(load(dst), dst, tmp_path / "saved", max_shard_size="8KB")


@pytest.mark.parametrize("original", [True, False], ids=["per_expert", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_in_plain_form_with_down_untouched(family, original, tmp_path):
    dst = convert_tiny(tmp_path, family, original=original, config=PAPER)
    assert molae.inspect(dst).factored.form == "plain"
    assert_same_model(dst)
    assert_saved_alike(load(dst), dst, tmp_path / "saved")


@pytest.mark.parametrize("original", [True, False], ids=["per_expert", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_groups_and_layers_left_alone(family, original, tmp_path, monkeypatch):
    dst = convert_fixed(tmp_path, monkeypatch, family, MIXED, layers=(1,), original=original)
    assert_same_model(dst)
    assert_saved_alike(load(dst), dst, tmp_path / "saved")


@pytest.mark.parametrize("kind", ["gate_proj", "up_proj", "down_proj"])
def test_one_type_alone(kind, tmp_path, monkeypatch):
    splits = {kind: Split(index_groups(6, 3), (5, 5))}
    dst = convert_fixed(tmp_path, monkeypatch, "mixtral", splits, layers=(0, 2))
    assert_same_model(dst)
    assert_saved_alike(load(dst), dst, tmp_path / "saved")


@pytest.mark.parametrize("family", FAMILIES)
def test_generating_with_and_without_a_cache(family, tmp_path):
    dst = convert_tiny(tmp_path, family, config=LATENT)
    ids = tokens(1, 12)
    ask = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    model = load(dst)
    said = model.generate(ids, pad_token_id=0, **ask)
    assert said.shape == (1, 17)
    assert torch.equal(said, model.generate(ids, pad_token_id=0, use_cache=False, **ask))
    assert torch.equal(said, load(materialized(dst)).generate(ids, pad_token_id=0, **ask))


def test_a_materialized_saved_model_is_that_of_the_original(tmp_path):
    dst = convert_tiny(tmp_path, "mixtral", config=LATENT)
    load(dst).save_pretrained(tmp_path / "saved")
    molae.materialize(tmp_path / "saved", tmp_path / "out")
    ours, theirs = tensors(tmp_path / "out"), tensors(materialized(dst))
    assert {n: bits(a) for n, a in ours.items()} == {n: bits(a) for n, a in theirs.items()}


def test_some_layers_have_no_experts(tmp_path):
    path = make_checkpoint(
        tmp_path / "src", "qwen3_moe", L=4, E=6, D=16, F=12,
        config={"decoder_sparse_step": 2, "mlp_only_layers": [3]},
    )  # fmt: skip
    molae.convert(path, tmp_path / "dst", molae.ConvertConfig(size=0.6))
    model = load(tmp_path / "dst")
    found = [isinstance(layer.mlp, torch.nn.Module) and hasattr(layer.mlp, "experts")
             for layer in model.model.layers]  # fmt: skip
    assert found == [False, True, False, False]
    assert_same_model(tmp_path / "dst")


# ------------------------------------------------------------------ how it is loaded


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    return convert_tiny(tmp_path_factory.mktemp("olmoe"), "olmoe", config=LATENT)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Stored in bfloat16."""
    return convert_tiny(tmp_path_factory.mktemp("half"), "olmoe", dtype="bfloat16", config=LATENT)


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        ("auto", torch.bfloat16),
        (None, torch.bfloat16),
        ("float32", torch.float32),
        (torch.float16, torch.float16),
    ],
)
def test_types(half, dtype, wanted):
    model = load(half, **({} if dtype is None else {"dtype": dtype}))
    experts = model.model.layers[0].mlp.experts
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert experts.gate_proj[0].perm.dtype == torch.int32
    with torch.no_grad():
        logits = model(tokens()).logits
    assert logits.dtype == wanted
    exact = load(half, dtype="float64")(tokens()).logits
    # A model of three layers is some ten roundings deep; the effect of one is about eps.
    assert (logits - exact).abs().max() <= 40 * torch.finfo(wanted).eps * exact.abs().max()


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(olmoe, device_map):
    pytest.importorskip("accelerate")
    with torch.no_grad():
        assert torch.equal(load(olmoe, device_map=device_map)(tokens()).logits,
                           load(olmoe)(tokens()).logits)  # fmt: skip


def test_weights_kept_on_the_disk(olmoe, tmp_path):
    pytest.importorskip("accelerate")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu",
              "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
              "model.layers.2": "disk"}  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(
        olmoe, device_map=places, offload_folder=tmp_path / "offload"
    )
    assert model.model.layers[1].mlp.experts.gate_proj[0].private.is_meta
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, load(olmoe)(tokens()).logits)


def test_a_model_without_a_head(olmoe, tmp_path):
    model, info = transformers.AutoModel.from_pretrained(olmoe, output_loading_info=True)
    assert not info["missing_keys"]
    assert info["unexpected_keys"] == {"lm_head.weight"}
    assert isinstance(model.layers[0].mlp.experts, LatentExperts)
    model.save_pretrained(tmp_path / "body")
    again, info = transformers.AutoModel.from_pretrained(
        tmp_path / "body", output_loading_info=True
    )
    assert not any(info.values())
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(model(ids).last_hidden_state, again(ids).last_hidden_state)


def test_it_may_be_cast_like_any_model(olmoe):
    model = load(olmoe)
    assert not getattr(model, "is_quantized", False)
    for cast, dtype in (
        (model.half, torch.float16), (model.float, torch.float32),
        (lambda: model.to(torch.bfloat16), torch.bfloat16), (model.double, torch.float64),
    ):  # fmt: skip
        assert {p.dtype for p in cast().parameters()} == {dtype}
        assert model.model.layers[0].mlp.experts.down_proj[0].perm.dtype == torch.int32


def test_a_cast_model_is_saved_and_loaded(olmoe, tmp_path):
    cast = tmp_path / "cast"
    load(olmoe).to(torch.bfloat16).save_pretrained(cast)
    assert molae.inspect(cast).dtype == "BF16"
    assert {p.dtype for p in load(cast).parameters()} == {torch.bfloat16}
    molae.materialize(cast, tmp_path / "out")


def test_output_router_logits_and_the_load_balancing_loss(olmoe):
    out = load(olmoe)(tokens(), labels=tokens(), output_router_logits=True)
    assert len(out.router_logits) == 3
    assert out.aux_loss > 0


def test_a_state_dict_instead_of_files(olmoe):
    config = transformers.AutoConfig.from_pretrained(olmoe)
    state = {n: torch.from_numpy(a) for n, a in tensors(olmoe).items()}
    load_state = transformers.OlmoeForCausalLM.from_pretrained
    model = load_state(None, config=config, state_dict=dict(state))
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, load(olmoe)(tokens()).logits)
    name = "model.layers.1.mlp.experts.up_proj.0.private"
    del state[name]
    with pytest.raises(CheckpointError, match=name):
        load_state(None, config=config, state_dict=state)


def test_compiled_models(olmoe):
    model = load(olmoe)
    del model.model.layers[1:]  # one is enough, and soon compiled
    model.config.num_hidden_layers = 1
    with torch.no_grad():
        wanted = model(tokens()).logits
        torch.testing.assert_close(torch.compile(model, backend="eager")(tokens()).logits, wanted)


# ------------------------------------------------------------------ what is refused


def refused(dst, *named, error=CheckpointError):
    with pytest.raises(error) as caught:
        transformers.AutoModelForCausalLM.from_pretrained(dst)
    for text in named:
        assert text in str(caught.value), str(caught.value)


@pytest.fixture
def broken(tmp_path):
    """A converted checkpoint to spoil, and how: edit its config or its tensors."""
    dst = convert_tiny(tmp_path, "olmoe", config=LATENT)

    def change(config=None, tensors=None):
        if config is not None:
            data = json.loads((dst / "config.json").read_text())
            config(data["quantization_config"])
            (dst / "config.json").write_text(json_text(data))
        if tensors is not None:
            for file in dst.glob("*.safetensors"):
                own = load_file(file)
                if tensors(own):
                    save_file(own, file, {"format": "pt"})
                    index = dst / "model.safetensors.index.json"
                    data = json.loads(index.read_text())
                    data["weight_map"] = {
                        n: f for n, f in data["weight_map"].items() if f != file.name
                    } | dict.fromkeys(own, file.name)
                    index.write_text(json.dumps(data))
        return dst

    return change


NAME = "model.layers.1.mlp.experts.gate_proj.0.private"
GATE = "layers.1.gate_proj"


def test_a_missing_factor(broken):
    refused(
        broken(tensors=lambda own: own.pop(NAME, None) is not None),
        NAME,
        "absent",
        "convert the original",
    )


def test_a_factor_that_nobody_promised(broken):
    def add(own):
        if NAME in own:
            own[NAME.replace(".0.", ".99.")] = np.zeros(3, np.float32)
            return True

    refused(broken(tensors=add), NAME.replace(".0.", ".99."), "does not know it")


def test_a_factor_of_another_shape(broken):
    def cut(own):
        if NAME in own:
            own[NAME] = np.ascontiguousarray(own[NAME][..., :-1])
            return True

    refused(broken(tensors=cut), NAME, "expected F32 of shape")


def test_a_permutation_of_another_type(broken):
    name = NAME.replace("private", "perm")

    def cast(own):
        if name in own:
            own[name] = own[name].astype(np.int64)
            return True

    refused(broken(tensors=cast), name, "expected I32")


def test_a_permutation_that_is_none(broken):
    name = NAME.replace("private", "perm")

    def repeat(own):
        if name in own:
            own[name] = np.zeros_like(own[name])
            return True

    refused(broken(tensors=repeat), name, "not a permutation of 0 to 15")


def gate(quant):
    return quant["layers"]["1"]["gate_proj"]


def wrong_rank(quant):
    gate(quant)["ranks"][0] += 1


def half_the_ranks(quant):
    gate(quant)["ranks"].pop()


def twice(quant):
    gate(quant)["groups"][0][0] = gate(quant)["groups"][-1][-1]


def newer(quant):
    quant["format_version"] = FORMAT_VERSION + 1


def no_such_layer(quant):
    quant["layers"]["7"] = quant["layers"].pop("1")


def other_layout(quant):
    quant["layout"] = "striped"


def forgotten_layer(quant):
    del quant["layers"]["1"]


def other_form(quant):
    quant["form"] = "plain"


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (wrong_rank, ("gate_proj.0.", "expected F32 of shape")),
        (half_the_ranks, (f"{GATE}.ranks", "expected one for each")),
        (twice, (f"{GATE}.groups", "each of the E=6 experts once")),
        (newer, ("format_version", "install a newer molae")),
        (no_such_layer, ("layer 1",)),
        (other_layout, ("layout", "'striped'", "per_expert")),
        (forgotten_layer, ("layer 1",)),
        (other_form, ("expected F32 of shape",)),
    ],
)
def test_a_config_edited_by_hand(edit, named, broken):
    refused(broken(config=edit), *named, error=(CheckpointError, UnknownFamilyError))


def test_no_conversion_while_loading(tmp_path):
    make_checkpoint(tmp_path)
    with pytest.raises(ArgumentError, match="molae convert SRC DST"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=MolaeConfig(format_version=1)
        )


@pytest.mark.parametrize(
    "plan", [{"tp_size": 2}, {"ep_size": 2, "tp_size": 2}, {"tp_plan": "auto"}]
)
def test_no_parallel_plans(plan, olmoe):
    from transformers.distributed import DistributedConfig

    config = transformers.AutoConfig.from_pretrained(olmoe)
    config.distributed_config = DistributedConfig(**plan)
    with pytest.raises(ArgumentError, match="not supported for converted checkpoints"):
        transformers.AutoModelForCausalLM.from_pretrained(olmoe, config=config)


def test_without_the_import_transformers_says_so(olmoe, python):
    """What docs/transformers.md warns of."""
    said = python(
        f"""
        import sys, io
        sys.stderr = io.StringIO()
        from transformers import AutoModelForCausalLM
        AutoModelForCausalLM.from_pretrained({str(olmoe)!r})
        print(sys.stderr.getvalue())
    """.replace("\n        ", "\n")
    )
    assert "Unknown quantization type, got molae" in said
