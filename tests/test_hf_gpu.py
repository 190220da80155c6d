"""The plain torch form on a GPU: what the C kernels compute, in a layer and in a model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf_models
import torch
from converting import bits, tensors

import molae
import molae.hf.forward
from molae.factored import Split, index_groups
from molae.hf import LatentExperts, hide_progress
from molae.hf.evaluate import evaluate_path, peak_memory

hide_progress()
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

#: Expert count, hidden size, width, ranks: odd numbers, and those that a grouped product takes.
SHAPES = {"odd": (6, 17, 13, (5, 9)), "aligned": (8, 64, 32, (16, 48))}


def layer(shape, form, dtype):
    """A layer on the CPU, and its inputs; some pairs are not here (number E)."""
    E, D, F, ranks = SHAPES[shape]
    split = Split(index_groups(E, E // 2), ranks)
    torch.manual_seed(0)
    experts = LatentExperts(E, D, F, gate=split, up=split, down=split, form=form, dtype=dtype)
    experts.reset_parameters(0.4)
    x = torch.randn(23, D).to(dtype)
    index = torch.stack([torch.randperm(E + 1)[:3] for _ in range(23)])
    return experts, (x, index, torch.rand(23, 3).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["gauge", "plain"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_computes_what_its_factors_say(shape, form, dtype):
    experts, (x, index, weights) = layer(shape, form, dtype)
    exact = hf_models.by_definition(experts, x, index, weights)
    bound = hf_models.absolute(experts, x, index, weights)
    there = copy.deepcopy(experts).cuda()
    y = there(x.cuda(), index.cuda(), weights.cuda())
    assert y.device.type == "cuda"
    assert y.dtype == dtype
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    loose = 8 * torch.finfo(dtype).eps + 4 * x.shape[1] * wide
    assert ((y.cpu().double() - exact).abs() <= loose * bound + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("form", ["gauge", "plain"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_kernels(shape, form):
    experts, given = layer(shape, form, torch.float32)
    found = []
    for device in ("cpu", "cuda"):
        module = copy.deepcopy(experts).to(device)
        x, index, weights = (t.detach().clone().to(device) for t in given)
        leaves = [x.requires_grad_(), weights.requires_grad_()]
        (module(x, index, weights) ** 2).sum().backward()
        grads = {n: p.grad.cpu() for n, p in module.named_parameters()}
        found.append([*(leaf.grad.cpu() for leaf in leaves), *grads.values()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(
            theirs, ours, rtol=2e-5, atol=2e-5 * max(1e-3, ours.abs().max().item())
        )


def test_the_grouped_product_is_used_where_it_can_be(monkeypatch):
    calls = []
    takes = molae.hf.forward._grouped_takes
    monkeypatch.setattr(
        molae.hf.forward, "_grouped_takes", lambda *a: calls.append(takes(*a)) or calls[-1]
    )
    experts, given = layer("aligned", "plain", torch.bfloat16)
    experts.cuda()(*(t.cuda() for t in given))
    assert calls
    assert all(calls) == molae.hf.forward._HAS_GROUPED


def test_a_converted_model_gives_the_same_on_both(tmp_path):
    dst = hf_models.convert_tiny(tmp_path, "olmoe", config=molae.ConvertConfig(size=0.6))
    here, there = hf_models.load(dst), hf_models.load(dst, device_map="cuda")
    assert {p.device.type for p in there.parameters()} == {"cuda"}
    ids = hf_models.tokens()
    with torch.no_grad():
        ours, theirs = here(ids).logits, there(ids.cuda()).logits.cpu()
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4 * ours.abs().max().item())
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(here.generate(ids, **options), there.generate(ids.cuda(), **options).cpu())
    there.save_pretrained(tmp_path / "again")
    again, before = tensors(tmp_path / "again"), tensors(dst)
    assert {n: bits(t) for n, t in again.items()} == {n: bits(t) for n, t in before.items()}


def test_training_on_a_gpu_lowers_the_loss_as_on_the_cpu(tmp_path):
    dst = hf_models.convert_tiny(tmp_path, "qwen3_moe", config=molae.ConvertConfig(size=0.6))
    curves = []
    for device in ("cpu", "cuda"):
        model = hf_models.load(dst).to(device).train()
        ids = hf_models.tokens().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for _ in range(5):
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)


def test_compile_takes_the_layer_as_it_is():
    experts, given = layer("aligned", "gauge", torch.float32)
    experts.cuda()
    x, index, weights = (t.cuda() for t in given)
    compiled = torch.compile(lambda x: experts(x * 2, index, weights).square().sum())
    plain = experts(x * 2, index, weights).square().sum()
    torch.testing.assert_close(compiled(x), plain)


def test_the_demonstration_checkpoint_scores_the_same():
    demo = Path(molae.__file__).parent / "demo"
    text = (demo / "heldout.txt").read_text("utf-8")[:20000]
    here, there = (
        evaluate_path(demo / "checkpoint", text, device=device) for device in ("cpu", "cuda")
    )
    assert there.perplexity == pytest.approx(here.perplexity, rel=1e-4)
    assert peak_memory()["gpu"] > 0
