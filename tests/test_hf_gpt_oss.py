"""gpt_oss: biases and the clamped activation, from Transformers to molae's form and back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from converting import bits, fixed_method, tensors
from encoded import oss_pair
from hf_models import layer_by_layer, load, matrices, train
from hf_models import tokens as some_tokens

from molae import ConvertConfig
from molae.convert import convert, materialize
from molae.convert.methods import METHODS
from molae.errors import CheckpointError
from molae.factored import Split, index_groups
from molae.hf import LatentExperts, latent_model
from molae.hf.activation import ClampedSwiglu, activation_of
from molae.hf.calibrate import Calibration
from molae.hf.forward import forward_torch
from molae.hf.native import forward_native
from molae.threads import num_threads


@pytest.fixture(autouse=True)
def alone(one_thread: None) -> Iterator[None]:
    """Nothing here is large enough for threads."""
    with num_threads(1):
        yield


KINDS = ("gate_proj", "up_proj", "down_proj")
E, D, F, K = 6, 16, 12, 2
FULL = Split(index_groups(E, 2), (D,) * 3)
LATENT = Split(index_groups(E, 3), (7, 5))
MIXED = {
    "gate_proj": Split(((0, 1, 2), (3,), (5, 4)), (5, None, 3)),
    "up_proj": Split(((0, 2, 4), (1, 3, 5)), (6, 4)),
    "down_proj": Split(((1, 0), (5, 3), (2, 4)), (7, None, 0)),
}


def config(num_experts_per_tok: int = K) -> Any:
    return transformers.GptOssConfig(
        hidden_size=D, intermediate_size=F, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_local_experts=E,
        num_experts_per_tok=num_experts_per_tok,
        vocab_size=40, max_position_embeddings=64, sliding_window=8, initializer_range=0.5,
        swiglu_limit=1.5, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip


def make_source(path: Path, **sizes: int) -> tuple[Any, Path]:
    """A tiny model of Transformers' own with biases that matter, and its folder."""
    torch.manual_seed(0)
    made = config(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.5)
    model.save_pretrained(path)
    return model, path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("gpt_oss"))


def converted(
    source: Any, tmp_path: Path, monkeypatch: Any, splits: dict[str, Split], **how: Any
) -> Path:
    monkeypatch.setitem(METHODS, "fixed", fixed_method(splits, **how))
    convert(source[1], tmp_path / "dst", ConvertConfig(method="fixed"))
    return tmp_path / "dst"


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


# --------------------------------------------------------------------- models


@pytest.mark.parametrize("kinds", [KINDS, ("gate_proj", "up_proj"), ("down_proj",)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_at_full_rank(source, tmp_path, monkeypatch, kinds, dtype):
    dst = converted(source, tmp_path, monkeypatch, dict.fromkeys(kinds, FULL), layers=None)
    model = load(dst, dtype=dtype)
    assert isinstance(model.model.layers[1].mlp.experts, LatentExperts)
    ids = some_tokens()
    twin = copy.deepcopy(source[0]).to(dtype)
    twin.set_experts_implementation("eager")  # the other takes no float64
    wanted = logits(twin, ids)
    found = logits(model, ids)
    # Both are of the same numbers; what differs is the order of sums.
    scale = float(wanted.abs().max())
    assert float((found - wanted).abs().max()) < 2000 * torch.finfo(dtype).eps * scale
    # And biases and clamps do something here.
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.down_proj_bias.zero_()
    assert float((logits(model, ids) - wanted).abs().max()) > 1e-3 * scale


def test_one_layer_alone(source, tmp_path, monkeypatch):
    dst = converted(source, tmp_path, monkeypatch, dict.fromkeys(KINDS, FULL), layers=(1,))
    model = load(dst)
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape == (E, D, 2 * F)
    ids = some_tokens()
    wanted = logits(source[0], ids)
    torch.testing.assert_close(logits(model, ids), wanted, rtol=1e-3, atol=1e-3)


def test_generates_saves_and_goes_back(source, tmp_path):
    convert(source[1], tmp_path / "dst", ConvertConfig(size=0.7))
    model = load(tmp_path / "dst")
    ids = some_tokens(1, 8)
    out = model.generate(ids, max_new_tokens=6, do_sample=False)
    again = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert out.tolist() == again.tolist()
    model.save_pretrained(tmp_path / "saved")
    own, saved = tensors(tmp_path / "dst"), tensors(tmp_path / "saved")
    assert set(own) == set(saved)
    for name, array in own.items():
        assert bits(array) == bits(saved[name]), name
    materialize(tmp_path / "dst", tmp_path / "whole")
    whole = load(tmp_path / "whole")
    assert type(whole.model.layers[0].mlp.experts).__name__ == "GptOssExperts"
    torch.testing.assert_close(logits(whole, ids), logits(model, ids), rtol=2e-3, atol=2e-3)
    original = tensors(source[1])
    for name, array in tensors(tmp_path / "whole").items():
        if name.endswith(("_bias", "router.weight")):
            assert bits(array) == bits(original[name])


def test_an_mxfp4_release(tmp_path):
    mxfp4, _ = oss_pair(tmp_path)
    convert(mxfp4, tmp_path / "dst", ConvertConfig(size=0.6))
    assert logits(load(tmp_path / "dst", dtype=torch.float32), some_tokens()).isfinite().all()


def test_training_lowers_the_loss(source, tmp_path):
    convert(source[1], tmp_path / "dst", ConvertConfig(size=0.7))
    model = load(tmp_path / "dst").train()
    ids = some_tokens(4, 16)
    losses = train(model, ids, steps=8, lr=3e-3)
    experts = model.model.layers[0].mlp.experts
    for name, p in experts.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    assert float(experts.gate_up_proj_bias.grad.abs().max()) > 0
    assert float(experts.down_proj_bias.grad.abs().max()) > 0
    assert losses[-1] < 0.9 * losses[0]


def test_from_scratch():
    model = latent_model(config(), group_size=3, rank=5)
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj_bias.shape == (E, 2 * F)
    assert not experts.gate_up_proj_bias.any()
    assert logits(model, some_tokens()).isfinite().all()


# --------------------------------------------------------------------- a layer


def layer(splits: dict[str, Split | None], dtype: torch.dtype, **how: Any) -> LatentExperts:
    torch.manual_seed(1)
    gate, up, down = (splits.get(kind) for kind in KINDS)
    how = {"transposed": True, "interleaved": True, "fused": gate is None and up is None} | how
    experts = LatentExperts(
        E, D, F, gate=gate, up=up, down=down, activation=ClampedSwiglu(1.7, 0.8), bias=True,
        dtype=dtype, **how,
    )  # fmt: skip
    experts.reset_parameters(0.4)
    with torch.no_grad():
        experts.gate_up_proj_bias.normal_(std=0.5)
        experts.down_proj_bias.normal_(std=0.5)
    return experts


def inputs(
    dtype: torch.dtype, T: int = 9, K: int = K
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(T, D, generator=generator, dtype=torch.float64).to(dtype)
    index = torch.stack([torch.randperm(E + 1, generator=generator)[:K] for _ in range(T)])
    weights = torch.rand(T, K, generator=generator, dtype=torch.float64).to(dtype)
    return x, index, weights  # E among the numbers: not here


@torch.no_grad()
def by_definition(experts: LatentExperts, x: Any, index: Any, weights: Any) -> torch.Tensor:
    """Token by token in float64, biases found by the names of the format."""
    own = matrices(experts)
    both = experts.gate_up_proj_bias.double()
    down = experts.down_proj_bias.double()
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(len(x)):
        for k in range(K):
            e = int(index[t, k])
            if e == E:
                continue
            gate = own["gate_proj"][e] @ x[t].double() + both[e, 0::2]
            up = own["up_proj"][e] @ x[t].double() + both[e, 1::2]
            gate, up = gate.clamp(max=0.8), up.clamp(-0.8, 0.8)
            hidden = (up + 1) * gate / (1 + torch.exp(-1.7 * gate))
            y[t] += float(weights[t, k]) * (own["down_proj"][e] @ hidden + down[e])
    return y


CASES = {
    "latent": dict.fromkeys(KINDS, LATENT),
    "mixed": MIXED,
    "dense": {},
    "gate and up": {"gate_proj": LATENT, "up_proj": LATENT},
    "down": {"down_proj": LATENT},
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_layer(case, dtype):
    experts = layer(CASES[case], dtype)
    x, index, weights = inputs(dtype)
    wanted = by_definition(experts, x, index, weights)
    tolerance = 40 * torch.finfo(dtype).eps * float(wanted.abs().max())
    with torch.no_grad():
        plain = forward_torch(experts, x, index, weights, experts.factors())
        native = forward_native(experts, x, index, weights)
        again = forward_native(experts, x, index, weights)
    assert plain.dtype == dtype
    assert float((plain.double() - wanted).abs().max()) < tolerance
    whole = all(kind in CASES[case] for kind in KINDS)
    assert (native is not None) == whole  # transposed matrices are torch's
    if native is not None:
        assert float((native.double() - wanted).abs().max()) < tolerance
        assert torch.equal(native, again)


@pytest.mark.parametrize("fused", [False, True])
def test_other_orders(fused):
    """Untransposed, gate in the first half: also of the biases."""
    experts = layer({}, torch.float64, transposed=False, interleaved=False, fused=fused)
    assert experts.down_proj.shape == (E, D, F)
    x, index, weights = inputs(torch.float64)
    twin = layer({}, torch.float64)
    with torch.no_grad():
        own = matrices(experts)
        both = torch.stack([own["gate_proj"], own["up_proj"]], 2).reshape(E, 2 * F, D)
        twin.gate_up_proj.copy_(both.transpose(1, 2))
        twin.down_proj.copy_(own["down_proj"].transpose(1, 2))
        halves = experts.gate_up_proj_bias.split(F, 1)
        twin.gate_up_proj_bias.copy_(torch.stack(halves, 2).reshape(E, 2 * F))
        twin.down_proj_bias.copy_(experts.down_proj_bias)
        native = forward_native(experts, x, index, weights)
        assert native is not None
        torch.testing.assert_close(native, by_definition(twin, x, index, weights))


@pytest.mark.parametrize("case", ["latent", "mixed", "dense"])
@pytest.mark.parametrize("native", [True, False])
def test_gradients(case, native):
    experts = layer(CASES[case], torch.float64)
    if native and case == "dense":
        experts = layer({}, torch.float64, transposed=False, interleaved=False)
    x, index, weights = inputs(torch.float64, T=4)
    names = [name for name, p in experts.named_parameters() if p.numel()]
    values = [
        p.detach().clone().requires_grad_() for _, p in experts.named_parameters() if p.numel()
    ]
    x, weights = x.requires_grad_(), weights.requires_grad_()

    def run(x, weights, *values):
        def forward(module, *args):
            if native:
                y = forward_native(module, *args)
                assert y is not None
                return y
            return forward_torch(module, *args, module.factors())

        held = Held(experts, forward)
        given = {f"experts.{name}": v for name, v in zip(names, values, strict=True)}
        return torch.func.functional_call(held, given, (x, index, weights))

    assert torch.autograd.gradcheck(run, (x, weights, *values), fast_mode=True)


class Held(torch.nn.Module):
    def __init__(self, experts: LatentExperts, run: Any) -> None:
        super().__init__()
        self.experts, self.run = experts, run

    def forward(self, *args: Any) -> torch.Tensor:
        return self.run(self.experts, *args)


# ------------------------------------------------------------------ refusals


def test_an_activation_that_is_another(source):
    experts = copy.deepcopy(source[0].model.layers[0].mlp.experts)
    found = activation_of(experts)
    assert (found.alpha, found.limit) == (1.702, 1.5)
    experts._apply_gate = lambda both: both[..., ::2] * both[..., 1::2]
    with pytest.raises(CheckpointError, match="GptOssExperts: .* activation"):
        activation_of(experts)


# ---------------------------------------------------------- a calibration text

TEXT = np.random.default_rng(0).integers(3, 40, 512)


def test_layer_by_layer_is_the_model(source):
    ids = some_tokens()
    found = layer_by_layer(source[1], ids)
    wanted = torch.log_softmax(logits(source[0], ids), -1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def distance(path: Path, source: Any) -> float:
    """From the original's next-token distributions, on the text."""
    ids = torch.from_numpy(TEXT).reshape(8, 64)
    p = torch.log_softmax(logits(source[0], ids).double(), -1)
    q = torch.log_softmax(logits(load(path), ids).double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_fit_to_a_text(source, tmp_path):
    convert(source[1], tmp_path / "plain", ConvertConfig(size=0.6))
    with Calibration(source[1], TEXT, length=64) as calibration:
        report = convert(
            source[1], tmp_path / "fitted", ConvertConfig(size=0.6), calibration=calibration
        )
        config = ConvertConfig(size=0.6, heal=4)
        healed = convert(source[1], tmp_path / "healed", config, calibration=calibration)
    plain, fitted, trained = (
        distance(tmp_path / name, source) for name in ("plain", "fitted", "healed")
    )
    assert fitted < 0.5 * plain
    assert trained < plain
    down = [row.layer_error for row in report.rows if row.kind == "down_proj"]
    assert all(errors[-1] < errors[0] for errors in down)
    # Up is left as it was fitted first: no answer is linear in it here.
    assert all(not row.layer_error for row in report.rows if row.kind == "up_proj")
    gains = [row.layer_error[0] - row.layer_error[1] for row in healed.healed]
    assert min(gains) >= 0 < max(gains)  # where a training gains nothing its start is kept
