"""Low-rank adapters: where they go, that merging them loses nothing, and that runs go on."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import hf_models
import torch
from checkpoints import FAMILIES
from finetuning import DEMO, bytes_of, factored_demo, settings, write_text
from safetensors.torch import load_file
from torch import nn

import molae
from molae.cli import main
from molae.errors import ArgumentError, MissingExtraError
from molae.hf import hide_progress
from molae.hf.experts import Group, LatentExperts
from molae.hf.opening import open_model
from molae.train import FinetuneConfig, adapters, finetune
from molae.train.adapters import add_adapters

hide_progress()
pytestmark = pytest.mark.usefixtures("one_thread")


def needs_peft():
    return pytest.importorskip("peft")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def factored(tmp_path_factory):
    return factored_demo(tmp_path_factory.mktemp("factored"))


def adapted(model):
    """Names of the weights under adapters, as the model without these calls them."""
    found = set()
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            leaf = getattr(module, "parameter_name", "weight")
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found.add(f"{name}.{leaf}")
    return found


def stir(model):
    """Adapters that change something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.1 * noise)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_adapters_go_and_that_merging_loses_nothing(family, tmp_path):
    needs_peft()
    path, ids = hf_models.convert_tiny(tmp_path, family), hf_models.tokens()
    stacks = {
        f"{name}.{leaf}"
        for name, module in hf_models.load(path).named_modules()
        if isinstance(module, (Group, LatentExperts))
        for leaf, _ in module.named_parameters(recurse=False)
    }
    assert any(name.endswith("shared") for name in stacks)
    linear = {
        f"{name}.weight"
        for name, module in hf_models.load(path).named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head" and len(module.weight) > 1
    }
    assert len(linear) >= 4 * 3
    for part, want in (("experts", stacks), ("all", stacks | linear)):
        plain = hf_models.load(path)
        before = {name: p.detach().clone() for name, p in plain.named_parameters()}
        logits = plain(ids).logits
        model = add_adapters(plain, part, 2, 4.0, 0)
        assert adapted(model) == want
        assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
        torch.testing.assert_close(model(ids).logits, logits)
        stir(model)
        with torch.no_grad():
            wanted = model.eval()(ids).logits
        assert (wanted - logits).abs().max() > 0.01 * logits.abs().max()
        merged = model.merge_and_unload()
        after = dict(merged.named_parameters())
        assert after.keys() == before.keys()
        assert {name for name in after if not torch.equal(after[name], before[name])} == want
        scale = wanted.abs().max().item()
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-5, atol=1e-5 * scale)


def test_the_same_seed_gives_the_same_adapters(factored):
    needs_peft()
    first, second, other = (
        {
            name: p
            for name, p in add_adapters(
                open_model(factored)[0], "experts", 2, 4.0, seed
            ).named_parameters()
            if p.requires_grad
        }
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("source", ["factored", "ordinary"])
def test_a_run_with_adapters(source, factored, text, tmp_path):
    needs_peft()
    src = factored if source == "factored" else DEMO
    short = tmp_path / "short.txt"  # two rows, which every step sees
    short.write_text(text.read_text()[:400])
    config = settings(lora=2, train="experts", steps=10, learning_rate=3e-3)
    found = finetune(src, tmp_path / "dst", short, config)
    assert found.losses[-1][1] < found.losses[0][1]
    whole = sum(p.numel() for p in open_model(src)[0].parameters())
    assert found.parameters == whole
    assert 0 < found.trained_parameters < whole / 4
    before = open_model(src)[0].state_dict()
    model, _ = open_model(tmp_path / "dst")
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed
    assert all(".experts." in name for name in changed)
    assert all(".experts." in n for n in before if n not in model.state_dict())
    assert molae.inspect(tmp_path / "dst").factored == molae.inspect(src).factored
    if source == "factored":
        assert changed == {n for n in before if ".experts." in n and not n.endswith("perm")}
        molae.materialize(tmp_path / "dst", tmp_path / "ordinary")
        ids = hf_models.tokens(2, 32, vocabulary=2000)
        with torch.no_grad():
            wanted, got, untrained = (
                m(ids).logits
                for m in (model, open_model(tmp_path / "ordinary")[0], open_model(src)[0])
            )
        # Products are rounded to the bfloat16 of the files, and where two experts are close a token
        # may go to the other one. A model that has not learned is much farther away.
        apart, far = ((m - wanted).norm().item() / wanted.norm().item() for m in (got, untrained))
        assert apart < 0.01
        assert far > 0.05
        off = (got - wanted).abs() > 0.02 * wanted.abs().max()
        assert off.any(-1).sum() <= 1


def test_a_run_with_adapters_goes_on_to_the_same_bytes(factored, text, tmp_path):
    needs_peft()
    config = settings(lora=2, steps=5)

    def stop(done, total, loss):
        if done == 3:
            raise KeyboardInterrupt

    finetune(factored, tmp_path / "whole", text, config)
    with pytest.raises(KeyboardInterrupt):
        finetune(factored, tmp_path / "dst", text, config, progress=stop)
    (kept,) = (tmp_path / "dst.training").glob("checkpoint-*/parameters.safetensors")
    assert all("lora_" in name for name in load_file(kept))
    seen = []
    finetune(factored, tmp_path / "dst", text, config, progress=lambda *a: seen.append(a[0]))
    assert seen == [3, 4, 5]
    assert bytes_of(tmp_path / "dst") == bytes_of(tmp_path / "whole")


def test_adapters_without_peft_are_refused(text, tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'molae\[train\]'"):
        finetune(DEMO, tmp_path / "dst", text, settings(lora=2))
    assert not (tmp_path / "dst.training").exists()


@pytest.mark.parametrize("part", ["router", "light"])
def test_adapters_on_what_is_small_are_refused(part):
    with pytest.raises(ArgumentError, match=f"lora: adapters go on all or experts, not on {part}"):
        FinetuneConfig(train=part, lora=4)


def test_the_command_with_adapters(factored, text, tmp_path, capsys):
    needs_peft()
    options = ["--data", str(text), "--steps", "1", "--batch-size", "1", "--length", "32"]
    call = ["finetune", str(factored), str(tmp_path / "dst"), *options]
    assert main([*call, "--lora", "2", "--lora-alpha", "4", "--json"]) == 0
    assert '"steps": 1' in capsys.readouterr().out
    assert main([*call, "--overwrite", "--lora-alpha", "4"]) == 2
    assert "--lora-alpha: only with --lora" in capsys.readouterr().err
