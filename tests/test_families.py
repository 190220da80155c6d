"""Each family: a tiny model of its released config converted, run, and made ordinary again."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from checkpoints import make_config, make_tensors, write_checkpoint
from converting import bits, fixed_method, tensors
from family_cases import CASES, NAMED, D, E, F, K, make_model, named_tensors
from hf_models import layer_by_layer, tokens
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

import molae
from molae import ConvertConfig
from molae.arch import describe, families
from molae.convert import convert, materialize
from molae.convert.methods import METHODS
from molae.errors import CheckpointError
from molae.factored import Split
from molae.hf import LatentExperts, hide_progress, latent_model
from molae.hf.activation import NAMES_BY_TYPE, activation_of
from molae.hf.aliases import register_aliases
from molae.hf.calibrate import Calibration
from molae.hf.streaming import LayerStream
from molae.io import open_checkpoint

hide_progress()
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

#: Of logits of a few units in float32. A conversion to 0.7 moves them by more than a hundred times.
CLOSE = 1e-4

#: As many ranks as the matrices of a group have: products are the matrices again.
FULL = {
    "gate_proj": Split(((0,), (3,), (1, 2)), (F, F, D)),
    "up_proj": Split(((0, 2), (1,), (3,)), (D, F, F)),
    "down_proj": Split(((1,), (0, 2), (3,)), (F, D, F)),
}

#: Not of the text model, which `AutoModelForCausalLM` builds alone.
OTHER_PARTS = "model.visual."


@pytest.fixture(scope="module", params=CASES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def made(family, tmp_path_factory):
    """The model as Transformers saves it by itself, and with fused experts."""
    folder = tmp_path_factory.mktemp(family)
    model = make_model(family)
    model.save_pretrained(folder / "original")
    model.save_pretrained(folder / "fused", save_original_format=False)
    return folder


def load(path, cls=AutoModelForCausalLM):
    """A model, and the assurance that every weight of it came from the files."""
    model, info = cls.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits(path):
    return load(path)(tokens()).logits


def saved_alike(path, out):
    """What is saved after a load has the names and bits of what was loaded."""
    load(path).save_pretrained(out)
    before, after = tensors(path), tensors(out)
    before = {name: a for name, a in before.items() if not name.startswith(OTHER_PARTS)}
    assert before.keys() == after.keys()
    assert all(bits(after[name]) == bits(array) for name, array in before.items())


@pytest.mark.parametrize("original", [True, False], ids=["original", "fused"])
def test_full_rank(made, original, tmp_path, monkeypatch):
    src = made / ("original" if original else "fused")
    with open_checkpoint(src) as checkpoint:
        model = describe(checkpoint)
        last = model.moe_layers[-1]
        assert {model.letters[x] for x in "EKDF"} == {E, K, D, F}
    wanted = logits(src)
    monkeypatch.setitem(METHODS, "fixed", fixed_method(FULL))
    convert(src, tmp_path / "dst", ConvertConfig(method="fixed"))
    assert (logits(tmp_path / "dst") - wanted).abs().max() < CLOSE
    materialize(tmp_path / "dst", tmp_path / "ordinary")
    before, after = tensors(src), tensors(tmp_path / "ordinary")
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, atol=1e-5)
    # A layer of the source's form beside one of factors.
    splits = {"down_proj": FULL["down_proj"]}
    monkeypatch.setitem(METHODS, "fixed", fixed_method(splits, layers=(last,)))
    convert(src, tmp_path / "mixed", ConvertConfig(method="fixed"))
    assert (logits(tmp_path / "mixed") - wanted).abs().max() < CLOSE
    saved_alike(tmp_path / "mixed", tmp_path / "saved")


def test_smaller(made, tmp_path):
    dst = tmp_path / "dst"
    convert(made / "original", dst, ConvertConfig(size=0.7))
    model = load(dst)
    own = [module for module in model.modules() if isinstance(module, LatentExperts)]
    assert own
    assert all(type(module.act_fn) in NAMES_BY_TYPE for module in own)  # the kernels compute them
    out = model.generate(tokens(), max_new_tokens=3, do_sample=False)
    assert out.shape == (2, 19)
    materialize(dst, tmp_path / "ordinary")
    assert "quantization_config" not in json.loads((tmp_path / "ordinary/config.json").read_text())
    found, ordinary = logits(dst), logits(tmp_path / "ordinary")
    assert (found - ordinary).abs().max() < CLOSE
    assert (found - logits(made / "original")).abs().max() > 100 * CLOSE


def test_layer_by_layer_is_the_model(made):
    ids = tokens()
    found = layer_by_layer(made / "original", ids)
    wanted = torch.log_softmax(logits(made / "original"), -1)
    assert (found - wanted).abs().max() < CLOSE


@torch.no_grad()
def test_new_models_with_compressed_experts(family, tmp_path):
    model = latent_model(make_model(family).config, group_size=2, rank=6, num_compressed=1).eval()
    wanted = model(tokens()).logits
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert (again(tokens()).logits - wanted).abs().max() < CLOSE
    again.generate(tokens(), max_new_tokens=2, do_sample=False)
    for module in again.modules():
        if isinstance(module, LatentExperts):
            module.num_compressed = 0
            module.compressed = None
    assert (again(tokens()).logits - wanted).abs().max() > 10 * CLOSE


@pytest.mark.parametrize(
    "family",
    ["deepseek_v3", "ernie4_5_moe", "gemma4", "glm4_moe", "granitemoe", "phimoe"],
    indirect=True,
)
def test_compressed_experts_fitted_to_a_text(made, tmp_path):
    ids = np.random.default_rng(0).integers(3, 40, 80)
    config = ConvertConfig(size=1.0, compressed_experts=1, light_module="vectors", uniform=True)
    with Calibration(made / "original", ids, length=40) as calibration:
        convert(made / "original", tmp_path / "dst", config, calibration=calibration)
    model = load(tmp_path / "dst")
    layers = [m for m in model.modules() if isinstance(m, LatentExperts)]
    assert layers
    assert all(m.num_compressed == 1 and m.compressed is not None for m in layers)
    with torch.no_grad():
        moved = (model(tokens()).logits - logits(made / "original")).abs().max()
    assert moved > 10 * CLOSE


def test_both_models_of_a_checkpoint_with_pictures(tmp_path):
    """The text model alone, and the whole one."""
    model = make_model("qwen3_5_moe")
    model.save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", ConvertConfig(size=0.7))
    whole = load(tmp_path / "dst", AutoModelForImageTextToText)
    with torch.no_grad():
        assert torch.equal(whole(tokens()).logits, logits(tmp_path / "dst"))
    whole.save_pretrained(tmp_path / "saved")
    before, after = tensors(tmp_path / "dst"), tensors(tmp_path / "saved")
    assert before.keys() == after.keys()


def test_types_of_a_router(tmp_path):
    """Routers that stay float32 in a bfloat16 model do so."""
    model = make_model("deepseek_v3").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", ConvertConfig(size=0.7))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "dst", dtype="auto")
    types = {name: p.dtype for name, p in found.named_parameters()}
    assert types["model.layers.1.mlp.gate.weight"] == torch.float32
    assert types["model.layers.1.mlp.experts.up_proj.0.private"] == torch.bfloat16
    found.generate(tokens(), max_new_tokens=2, do_sample=False)


# ------------------------------------------------------------- names alone


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", NAMED)
def test_names(family, fused, tmp_path, monkeypatch):
    own = named_tensors(family)
    if fused:
        own = fuse(own)
    write_checkpoint(tmp_path / "src", NAMED[family], own)
    monkeypatch.setitem(METHODS, "fixed", fixed_method(FULL))
    convert(tmp_path / "src", tmp_path / "dst", ConvertConfig(method="fixed"))
    assert molae.inspect(tmp_path / "dst").layout == ("fused" if fused else "per_expert")
    materialize(tmp_path / "dst", tmp_path / "ordinary")
    found, between = tensors(tmp_path / "ordinary"), tensors(tmp_path / "dst")
    layers = families()[family].read_moe_layers(NAMED[family])
    touched = [f"model.layers.{n}.mlp.experts." for n in layers]
    assert found.keys() == own.keys()
    for name, array in own.items():
        if name.startswith(tuple(touched)):
            np.testing.assert_allclose(found[name], array, atol=1e-5)
            assert name not in between
        else:
            assert bits(found[name]) == bits(array) == bits(between[name])


def fuse(own):
    """The same experts in tensors of all."""
    made = {}
    for name in own:
        at, _, tail = name.partition(".experts.")
        if not tail:
            made[name] = own[name]
        elif tail.startswith("0.gate_proj"):
            parts = {
                kind: np.stack([own[f"{at}.experts.{e}.{kind}_proj.weight"] for e in range(E)])
                for kind in ("gate", "up", "down")
            }
            both = np.concatenate([parts["gate"], parts["up"]], axis=1)
            made |= {f"{at}.experts.gate_up_proj": both, f"{at}.experts.down_proj": parts["down"]}
    return made


def test_every_family_is_tried():
    """Here or, of old, in the other tests; but those that are inspected only."""
    elsewhere = {"mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "gpt_oss", "qwen3_vl_moe"}
    tried = {families()[name].model_type for name in (*CASES, *NAMED, *elsewhere)}
    converted = {f.model_type for f in families().values() if f.unsupported is None}
    assert tried == converted


def test_kimi_k2_is_deepseek_v3(tmp_path):
    """Transformers lacks the name, not the model, and needs none of a release's own code."""
    make_model("kimi_k2").save_pretrained(tmp_path / "src")
    config = tmp_path / "src" / "config.json"
    auto_map = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    released = json.loads(config.read_text()) | {"auto_map": auto_map}
    assert released["model_type"] == "kimi_k2"
    assert released["architectures"] == ["DeepseekV3ForCausalLM"]
    config.write_text(json.dumps(released))
    convert(tmp_path / "src", tmp_path / "dst", ConvertConfig(size=0.7))
    found = logits(tmp_path / "dst")
    config = tmp_path / "dst" / "config.json"
    config.write_text(config.read_text().replace('"kimi_k2"', '"deepseek_v3"'))
    assert torch.equal(logits(tmp_path / "dst"), found)


def test_names_are_registered_once():
    register_aliases()
    assert transformers.AutoConfig.for_model("kimi_k2").model_type == "kimi_k2"
    assert transformers.AutoConfig.for_model("deepseek_v3").model_type == "deepseek_v3"


# ------------------------------------------------------------------- refused


def test_experts_that_clamp_beside_their_activation():
    """They would be run without it in silence."""
    config = transformers.AutoConfig.for_model("deepseek_v3", **CASES["deepseek_v3"])
    assert NAMES_BY_TYPE[type(activation_of(Step3p7Experts(config)))] == "silu"
    with pytest.raises(CheckpointError, match="Step3p7Experts: .* activation that molae does not"):
        activation_of(Step3p7Experts(config, swiglu_limit=7.0))


def test_a_model_that_transformers_does_not_build(tmp_path):
    write_checkpoint(tmp_path, NAMED["bailing_moe"], named_tensors("bailing_moe"))
    with pytest.raises(CheckpointError, match="Transformers cannot build this model"):
        Calibration(tmp_path, np.arange(80) % 40, length=40)


def test_layers_that_hand_indices_on(tmp_path, monkeypatch):
    monkeypatch.setitem(CASES["glm_moe_dsa"], "indexer_types", ["full", "shared"])
    make_model("glm_moe_dsa").save_pretrained(tmp_path)
    with (
        open_checkpoint(tmp_path) as checkpoint,
        pytest.raises(CheckpointError, match=r"hand prev_topk_indices .* convert without a text"),
    ):
        LayerStream(checkpoint, describe(checkpoint))


def test_layers_that_depend_on_the_tokens(tmp_path, monkeypatch):
    monkeypatch.setitem(CASES["gemma4"]["text_config"], "hidden_size_per_layer_input", 4)
    make_model("gemma4").save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        stream = LayerStream(checkpoint, describe(checkpoint))
        with pytest.raises(CheckpointError, match="given what depends on the tokens"):
            list(stream.embed(iter([tokens(), tokens(seed=1)])))


def test_a_renamed_model_that_transformers_builds_otherwise(tmp_path):
    """Factors under names that the model has not are refused while it is loaded."""
    config = make_config("olmoe")
    write_checkpoint(tmp_path / "src", config, make_tensors(config))
    convert(tmp_path / "src", tmp_path / "dst", ConvertConfig(size=0.7))
    path = tmp_path / "dst" / "config.json"
    path.write_text(path.read_text().replace('"olmoe"', '"granitemoe"'))
    with pytest.raises(molae.errors.MolaeError):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
