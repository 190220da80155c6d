"""gpt_oss with compressed experts: layers that have biases, and what acts in their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from converting import bits, tensors, tree
from encoded import oss_pair
from hf_models import load, matrices, train
from hf_models import tokens as some_tokens
from ref import compressed as ref
from ref import ops as ref_ops
from test_hf_gpt_oss import (
    CASES,
    TEXT,
    D,
    E,
    F,
    alone,  # noqa: F401 -- a fixture
    config,
    inputs,
    layer,
    logits,
    make_source,
)

import molae
from molae import ConvertConfig, HealConfig, heal
from molae.convert import Watcher, convert, materialize
from molae.errors import ArgumentError, CheckpointError
from molae.factored import VECTORS, LightModule
from molae.hf import LatentExperts, latent_model
from molae.hf import experts as experts_module
from molae.hf.calibrate import Calibration
from molae.hf.experts import NarrowExperts
from molae.train import select_parameters

#: Experts of a token, and how many of them do not run.
K, N = 3, 2
UNITS = 3
FORMS = {
    "vectors": VECTORS,
    "additive": LightModule(0),
    f"narrow:{UNITS}": LightModule(UNITS, True),
}
TENSORS = {
    "vectors": {"compressed"},
    "additive": {"light.bias"},
    f"narrow:{UNITS}": {
        "light.gate_proj", "light.up_proj", "light.down_proj", "light.bias", "light.gate_bias",
        "light.up_bias",
    },
}  # fmt: skip
NUMBERS = {
    "vectors": 2 * D + F, "additive": D, f"narrow:{UNITS}": (3 * UNITS + 1) * D + 2 * UNITS
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("gpt_oss"), num_experts_per_tok=K)


def run_on(src: Path, dst: Path, light: str, ids: Any = TEXT, **settings: Any) -> Any:
    asked = {"compressed_experts": N, "light_module": light, "uniform": True, **settings}
    watcher = asked.pop("watcher", None)
    with Calibration(src, ids, length=64) as calibration:
        return convert(src, dst, ConvertConfig(**asked), calibration=calibration, watcher=watcher)


def layers_of(model: Any) -> list[LatentExperts]:
    return [
        m for m in model.modules() if isinstance(m, LatentExperts)
        and not isinstance(m, NarrowExperts)
    ]  # fmt: skip


@torch.no_grad()
def by_definition(experts: LatentExperts, x: Any, index: Any, weights: Any) -> torch.Tensor:
    """A token at a time in NumPy and float64, by docs/compressed.md and the names of the format."""
    own = {name: p.double().numpy() for name, p in experts.named_parameters()}
    act = "swiglu_clamped", experts.act_fn.alpha, experts.act_fn.limit
    biases = own["gate_up_proj_bias"][:, ::2], own["gate_up_proj_bias"][:, 1::2]
    wide = [m.numpy() for m in matrices(experts).values()]
    x, index, weights = x.double().numpy(), index.numpy(), weights.double().numpy()
    vectors = own.get("compressed", np.ones((E, 2 * D + F)))
    e, n = np.split(vectors, [D, D + F], axis=1), experts.num_compressed
    y = ref.forward(x, index, weights, *wide, (*biases, own["down_proj_bias"]), act, e, n)
    for t in range(len(x) if experts.light is not None else 0):
        for k in ref.split(weights[t], index[t], n)[1]:
            if (i := index[t, k]) == E:
                continue
            answer = own["light.bias"][i]
            if "light.gate_proj" in own:
                gate = own["light.gate_proj"][i] @ x[t] + own["light.gate_bias"][i]
                up = own["light.up_proj"][i] @ x[t] + own["light.up_bias"][i]
                h = ref_ops.activate(act[0], gate, up, *act[1:])
                answer = answer + own["light.down_proj"][i] @ h
            y[t] += weights[t, k] * answer
    return torch.from_numpy(y)


# --------------------------------------------------------------------- a layer


def made(case: str, form: str, dtype: torch.dtype) -> LatentExperts:
    experts = layer(CASES[case], dtype, num_compressed=N, light=FORMS[form])
    with torch.no_grad():
        for name, p in experts.named_parameters():
            if name == "compressed":
                p.normal_(1, 0.3)
            elif name.startswith("light."):
                p.normal_(std=0.4)
    return experts


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("case", ["latent", "mixed", "dense"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("native", [True, False])
def test_a_layer(case, form, dtype, native, monkeypatch):
    if not native:
        monkeypatch.setattr(experts_module, "forward_native", lambda *call: None)
    experts = made(case, form, dtype)
    names = {name for name, _ in experts.named_parameters()}
    assert TENSORS[form] <= names
    call = inputs(dtype, K=K)
    wanted = by_definition(experts, *call)
    tolerance = 60 * torch.finfo(dtype).eps * float(wanted.abs().max())
    with torch.no_grad():
        assert float((experts(*call).double() - wanted).abs().max()) < tolerance


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("case", ["latent", "dense"])
@pytest.mark.parametrize("native", [True, False])
def test_gradients(case, form, native, monkeypatch):
    if not native:
        monkeypatch.setattr(experts_module, "forward_native", lambda *call: None)
    experts = made(case, form, torch.float64)
    x, index, weights = inputs(torch.float64, T=4, K=K)
    names, values = zip(*((n, p) for n, p in experts.named_parameters() if p.numel()), strict=True)

    def run(x, weights, *values):
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(experts, given, (x, index, weights))

    values = [p.detach().clone().requires_grad_() for p in values]
    call = x.requires_grad_(), weights.requires_grad_()
    assert torch.autograd.gradcheck(run, (*call, *values), fast_mode=True)


def test_vectors_of_one_change_nothing():
    """The biases of compressed experts go with them; those of what runs are not scaled."""
    full, some = (
        layer(CASES["latent"], torch.float64, num_compressed=n, light=VECTORS) for n in (0, N)
    )
    x, index, weights = inputs(torch.float64, K=K)
    few = index.clone()
    for t in range(len(x)):
        few[t, ref.split(weights[t].tolist(), index[t].tolist(), N)[1]] = E
    with torch.no_grad():
        some.load_state_dict(full.state_dict(), strict=False)
        torch.testing.assert_close(some(x, index, weights), full(x, few, weights))


# ----------------------------------------------------------------- conversions


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("size", [1.0, 0.8])
def test_a_conversion(source, tmp_path, form, size, monkeypatch):
    before, src = source
    dst = tmp_path / "dst"
    report = run_on(src, dst, form, size=size)
    found, ids = molae.inspect(dst), some_tokens()
    layers = found.moe_layers
    assert (found.factored.compressed, found.factored.light) == (
        dict.fromkeys(layers, N), FORMS[form]
    )  # fmt: skip
    for row in report.compressed:
        start, _, end = row.layer_error
        assert end <= start if form == "vectors" else end < start
    # What is stored, and what a token meets of it: biases of experts that do not run are none.
    original, own = tensors(src), tensors(dst)
    prefixes = [f"model.layers.{layer}.mlp.experts." for layer in layers]
    light = {prefix + name for prefix in prefixes for name in TENSORS[form]}
    assert light <= set(own)
    assert sum(own[name].size for name in light) == len(layers) * E * NUMBERS[form]
    if size < 1:
        assert report.plan["size_reached"] <= size
    else:
        assert set(own) - set(original) == light
        assert report.plan["size_reached"] == pytest.approx(1 + NUMBERS[form] / (3 * F * D))
        whole = molae.inspect(src, compressed_experts=N, light_module=form)
        saved = len(layers) * N * (3 * F * D + 2 * F + D - NUMBERS[form])
        assert whole.active_parameters - found.active_parameters == saved
        assert whole.active_compressed == found.active_parameters
    for name, array in original.items():
        if name in own:
            assert bits(own[name]) == bits(array), name
    # The model that is loaded is the definition's, and generates, and is saved as it was.
    model = load(dst)
    assert all(m.num_compressed == N for m in layers_of(model))
    wanted = logits(model, ids)
    again = model.generate(ids[:, :8], max_new_tokens=4, do_sample=False)
    assert again.shape[1] == 12
    model.save_pretrained(tmp_path / "saved")
    saved = tensors(tmp_path / "saved")
    assert {n: bits(a) for n, a in saved.items()} == {n: bits(a) for n, a in own.items()}
    with monkeypatch.context() as patch:
        patch.setattr(
            LatentExperts, "forward", lambda self, *call: by_definition(self, *call).to(call[0])
        )
        torch.testing.assert_close(logits(model, ids), wanted, rtol=1e-3, atol=1e-3)
    with pytest.raises(CheckpointError, match="compressed experts"):
        materialize(dst, tmp_path / "ordinary")
    # Without compressed experts it is the original.
    for experts in layers_of(model):
        experts.num_compressed, experts.compressed, experts.light = 0, None, None
    gap = float((logits(model, ids) - logits(before, ids)).abs().max())
    scale = float(wanted.abs().max())
    assert gap < 1e-4 * scale if size == 1 else gap > 1e-2 * scale
    assert float((logits(before, ids) - wanted).abs().max()) > 1e-2 * scale


@pytest.mark.parametrize("form", list(FORMS))
def test_the_next_layer_reads_what_the_loaded_model_makes(source, tmp_path, form):
    run_on(source[1], tmp_path / "dst", form, size=1.0)
    model, own = load(tmp_path / "dst"), tensors(tmp_path / "dst")
    with Calibration(source[1], TEXT, length=64) as run:
        for layer in range(2):
            at = f"model.layers.{layer}.mlp.experts."
            if form == "vectors":
                light = own[at + "compressed"]
            else:
                roles = {name: name.split(".")[1].removesuffix("_proj") for name in TENSORS[form]}
                light = molae.ops.NarrowExperts.of({r: own[at + n] for n, r in roles.items()})
            run.advance(layer, None, (light, N))
        run._walk.up_to(len(run._stream), run._tell)
        with torch.no_grad():
            ids = torch.from_numpy(run.sequences)
            last = model.model(ids, output_hidden_states=True).hidden_states[-1]
            mine = model.model.norm(torch.from_numpy(np.array(run._walk.states)))
    torch.testing.assert_close(mine, last, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", list(FORMS))
def test_an_interrupted_run_goes_on_to_the_same_bytes(source, tmp_path, form):
    class Stop(Watcher):
        def advanced(self, done, total, what):
            if what.startswith("layer 1"):
                raise KeyboardInterrupt

    settings = {"light": form, "size": 0.8, "heal": 2}
    run_on(source[1], tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run_on(source[1], tmp_path / "dst", **settings, watcher=Stop())
    run_on(source[1], tmp_path / "dst", **settings)
    assert tree(tmp_path / "dst") == tree(tmp_path / "whole")


@pytest.mark.parametrize("form", list(FORMS))
def test_layers_are_healed(source, tmp_path, form):
    small, dst = tmp_path / "small", tmp_path / "dst"
    run_on(source[1], small, form, size=0.8, refit=False)
    with Calibration(source[1], TEXT, length=64) as run:
        report = heal(small, dst, source[1], HealConfig(passes=4, rate=0.03), calibration=run)
    gains = [before - after for row in report.healed for before, after in [row.layer_error]]
    assert min(gains) >= 0 < max(gains)
    old, new = tensors(small), tensors(dst)
    changed = {name for name in old if bits(old[name]) != bits(new[name])}
    assert changed
    assert all(name.endswith((".private", ".shared")) for name in changed)
    logits(load(dst), some_tokens())


def test_narrow_experts_come_nearest(source, tmp_path):
    """On a text that none was fitted to, by the next-token distributions."""
    rng = np.random.default_rng(1)
    text, ids = rng.integers(3, 40, 4096), torch.from_numpy(rng.integers(3, 40, (8, 64)))
    wanted = torch.log_softmax(logits(source[0], ids).double(), -1)
    lost = {}
    for form in ("additive", f"narrow:{F // 2}"):
        run_on(source[1], tmp_path / "dst" / form.split(":")[0], form, text, size=1.0)
        model = load(tmp_path / "dst" / form.split(":")[0])
        found = torch.log_softmax(logits(model, ids).double(), -1)
        lost[form] = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    for experts in layers_of(model):  # the experts that run alone
        for p in experts.light.parameters():
            p.data.zero_()
    found = torch.log_softmax(logits(model, ids).double(), -1)
    nothing = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert lost[f"narrow:{F // 2}"] < 0.9 * lost["additive"] < 0.9 * nothing


def test_an_mxfp4_release_as_the_decoded_one(tmp_path):
    ids = np.random.default_rng(0).integers(3, 30, 256)
    for src in oss_pair(tmp_path):
        out = tmp_path / f"{src.name}-dst"
        run_on(src, out, "narrow:2", ids, size=1.0, compressed_experts=1)
    one, other = tensors(tmp_path / "mxfp4-dst"), tensors(tmp_path / "bf16-dst")
    assert any(name.endswith("light.gate_bias") for name in one)
    assert {n: bits(a) for n, a in one.items()} == {n: bits(a) for n, a in other.items()}
    assert logits(load(tmp_path / "mxfp4-dst"), some_tokens()).isfinite().all()


@pytest.mark.parametrize("form", list(FORMS))
def test_from_scratch_and_trained(tmp_path, form):
    torch.manual_seed(0)
    model = latent_model(
        config(num_experts_per_tok=K), group_size=3, rank=5, num_compressed=N, light_module=form
    )
    assert select_parameters(model, "light") == 2 * E * NUMBERS[form]
    assert not any(p.any() for n, p in model.named_parameters() if n.endswith("light.gate_bias"))
    ids = some_tokens(4, 16)
    losses = train(model, ids, steps=10, lr=0.03)
    assert losses[-1] < losses[0]
    learned = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert {n.split("experts.")[1] for n, _ in learned} == TENSORS[form]
    assert all(float(p.grad.abs().max()) > 0 for _, p in learned)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path), ids), logits(model, ids))
    assert molae.inspect(tmp_path).factored.light == FORMS[form]


def test_what_makes_no_sense_is_refused(source, tmp_path):
    for settings, text in (
        ({"compressed_experts": K}, f"compressed_experts: expected 0 to K - 1 = {K - 1}"),
        ({"light": f"narrow:{F + 1}"}, f"light_module: .*{F + 1} units, the experts have {F}"),
    ):
        with pytest.raises(ArgumentError, match=text):
            run_on(source[1], tmp_path / "dst", **{"light": "vectors", "size": 1.0, **settings})
