"""Training converted checkpoints and new models: plain torch, Trainer, PEFT."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf_models
import torch
import transformers
from checkpoints import _CLASSES, FAMILIES, make_config
from converting import bits, tensors

import molae
from molae.errors import ArgumentError, CheckpointError, UnknownFamilyError
from molae.factored import Split, index_groups
from molae.hf import LatentExperts, hide_progress, latent_model

hide_progress()
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    return hf_models.convert_tiny(folder, "olmoe", config=molae.ConvertConfig(size=0.6))


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """In plain form, down as it was."""
    return hf_models.convert_tiny(
        tmp_path_factory.mktemp("paper"), "qwen3_moe",
        config=molae.ConvertConfig(method="molae", size=0.9, group_size=6),
    )  # fmt: skip


def expert_parameters(model):
    return {n: p for n, p in model.named_parameters() if ".experts." in n}


@pytest.mark.parametrize("which", ["converted", "paper"])
def test_a_few_steps(which, request):
    model = hf_models.load(request.getfixturevalue(which)).train()
    ids = hf_models.tokens()
    model(ids, labels=ids).loss.backward()
    own = expert_parameters(model)
    assert own
    for name, parameter in own.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    before = {n: p.detach().clone() for n, p in own.items()}
    losses = hf_models.train(model, ids)
    assert losses[-1] < 0.8 * losses[0]
    assert all(not torch.equal(before[n], p) for n, p in own.items())


def test_gradients_are_those_of_the_ordinary_model(converted):
    """By the chain rule through W = A B, on the materialized twin in float64."""
    model = hf_models.load(converted, dtype="float64")
    ordinary = hf_models.load(
        hf_models.materialized(converted), dtype="float64", experts_implementation="eager"
    )
    # Exact products in place of those rounded to float32.
    for layer, other in zip(model.model.layers, ordinary.model.layers, strict=True):
        own = hf_models.matrices(layer.mlp.experts)
        gate_up = torch.cat([own["gate_proj"], own["up_proj"]], 1)
        other.mlp.experts.gate_up_proj = torch.nn.Parameter(gate_up.detach())
        other.mlp.experts.down_proj = torch.nn.Parameter(own["down_proj"].detach())
    ids = hf_models.tokens()
    for one in (model, ordinary):
        one(ids, labels=ids).loss.backward()
    for layer, other in zip(model.model.layers, ordinary.model.layers, strict=True):
        experts = layer.mlp.experts
        F = experts.intermediate_dim
        d_up = other.mlp.experts.gate_up_proj.grad[:, F:]
        for group in experts.up_proj:
            R, D = group.rank, experts.hidden_dim
            B = torch.zeros(R, D, dtype=torch.float64)
            eye = torch.eye(R, dtype=torch.float64)
            B[:, group.perm.long()] = torch.hstack([eye, group.shared.detach()])
            wanted = d_up[list(group.experts)] @ B.T
            torch.testing.assert_close(group.private.grad, wanted, rtol=1e-9, atol=1e-12)
            dB = sum(group.private[at].T @ d_up[e] for at, e in enumerate(group.experts))
            M = dB[:, group.perm.long()][:, R:]
            torch.testing.assert_close(group.shared.grad, M.detach(), rtol=1e-9, atol=1e-12)
    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            torch.testing.assert_close(
                parameter.grad, ordinary.get_parameter(name).grad, rtol=1e-9, atol=1e-12
            )


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(converted, reentrant):
    ids = hf_models.tokens()
    gradients = []
    for checkpointing in (False, True):
        model = hf_models.load(converted).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, one in gradients[0].items():
        torch.testing.assert_close(one, gradients[1][name])


def test_autocast(converted):
    model, ids = hf_models.load(converted).train(), hf_models.tokens()
    exact = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert abs(loss - exact) < 0.05 * exact
    assert all(p.grad.dtype == torch.float32 for p in expert_parameters(model).values())


class Rows(torch.utils.data.Dataset):
    def __init__(self, count=16):
        self.rows = hf_models.tokens(count, 12)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def trainer(model, folder, steps):
    settings = transformers.TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=4, learning_rate=5e-3, save_steps=4,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=1,
    )  # fmt: skip
    return transformers.Trainer(model, settings, train_dataset=Rows())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_trainer_trains_all_weights_and_goes_on(converted, tmp_path):
    pytest.importorskip("accelerate")
    whole = trainer(hf_models.load(converted), tmp_path / "run", 8)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    saved = tmp_path / "run" / "checkpoint-8"
    assert molae.inspect(saved).factored == molae.inspect(converted).factored
    own = hf_models.load(saved).state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(own[name], value), name
    # Interrupted after four steps, and resumed.
    again = trainer(hf_models.load(converted), tmp_path / "run", 8)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    for name, value in again.model.state_dict().items():
        torch.testing.assert_close(value, own[name])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("which", "targets", "owner"),
    [
        ("converted", ["private"], "Group"),
        ("converted", ["private", "shared"], "Group"),
        ("converted", ["up_proj.1.private", "down_proj.0.shared"], "Group"),
        ("paper", ["experts.down_proj"], "LatentExperts"),
    ],
)
def test_lora_on_the_factors(which, targets, owner, request, tmp_path):
    peft = pytest.importorskip("peft")
    path, ids = request.getfixturevalue(which), hf_models.tokens()
    base = hf_models.load(path)
    before = base(ids).logits.detach()
    config = peft.LoraConfig(
        r=2, target_modules=[], target_parameters=targets, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    wrapped = [m for m in model.modules() if type(m).__name__ == "ParamWrapper"]
    assert owner in {type(m.get_base_layer()).__name__ for m in wrapped}
    assert torch.equal(model(ids).logits, before)
    losses = hf_models.train(model.train(), ids, lr=3e-2)
    assert losses[-1] < losses[0]
    after = model.eval()(ids).logits.detach()
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = peft.PeftModel.from_pretrained(hf_models.load(path), tmp_path / "adapter").eval()
    assert torch.equal(again(ids).logits, after)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    molae.inspect(tmp_path / "merged")
    # The merged factors are the same sums, made once.
    logits = hf_models.load(tmp_path / "merged")(ids).logits
    torch.testing.assert_close(logits, after, rtol=1e-4, atol=1e-4 * after.abs().max().item())


# ------------------------------------------------------------------ from scratch


def config_of(family, **more):
    settings = make_config(family, **hf_models.SIZES)
    for key in ("model_type", "architectures"):
        settings.pop(key)
    settings |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | more
    return getattr(transformers, _CLASSES[family][1])(**settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_model_is_trained_saved_and_loaded(family, tmp_path):
    torch.manual_seed(0)
    config = config_of(family, initializer_range=0.05)
    model = latent_model(config, group_size=3, rank=5)
    assert getattr(config, "quantization_config", None) is None
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, LatentExperts)
    assert model.training
    losses = hf_models.train(model, hf_models.tokens())
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "new")
    assert set(tensors(tmp_path / "new")) == set(model.state_dict())
    found = molae.inspect(tmp_path / "new")
    assert found.factored.layers[2]["up_proj"] == Split(index_groups(6, 3), (5, 5))
    again = hf_models.load(tmp_path / "new")
    ids = hf_models.tokens()
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    again.save_pretrained(tmp_path / "again")
    one, other = tensors(tmp_path / "new"), tensors(tmp_path / "again")
    assert {n: bits(a) for n, a in one.items()} == {n: bits(a) for n, a in other.items()}
    molae.materialize(tmp_path / "new", tmp_path / "ordinary")
    hf_models.load(tmp_path / "ordinary")


@pytest.mark.parametrize("light", ["vectors", "additive", "narrow:4"])
@pytest.mark.parametrize("latent", [{"group_size": 3, "rank": 5}, {}])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_compressed_experts_is_trained_saved_and_loaded(
    family, latent, light, tmp_path
):
    torch.manual_seed(0)
    config = config_of(family, initializer_range=0.05)
    model = latent_model(config, num_compressed=1, light_module=light, **latent)
    experts = model.model.layers[0].mlp.experts
    assert experts.num_compressed == 1
    own = experts.compressed if light == "vectors" else experts.light.bias
    begun = own.detach().clone()
    losses = hf_models.train(model, hf_models.tokens())
    assert losses[-1] < 0.8 * losses[0]
    assert not torch.equal(own, begun)
    model.save_pretrained(tmp_path / "new")
    again = hf_models.load(tmp_path / "new")
    ids = hf_models.tokens()
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    found = molae.inspect(tmp_path / "new")
    F, D = found.letters["F"], found.letters["D"]
    assert found.factored.compressed == dict.fromkeys(found.moe_layers, 1)
    torch.manual_seed(0)
    if latent:
        latent_model(config, **latent).save_pretrained(tmp_path / "plain")
    else:
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")
    plain = molae.inspect(tmp_path / "plain")
    layers = len(found.moe_layers)
    numbers = {"vectors": 2 * D + F, "additive": D, "narrow:4": 13 * D}[light]
    added = layers * found.letters["E"] * numbers
    assert found.expert_parameters - plain.expert_parameters == added
    if not latent:
        saved = layers * (3 * F * D - numbers)
        assert plain.active_parameters - found.active_parameters == saved
    with pytest.raises(CheckpointError, match="compressed experts"):
        molae.materialize(tmp_path / "new", tmp_path / "ordinary")


@pytest.mark.parametrize("family", FAMILIES)
def test_all_but_the_experts_is_as_transformers_makes_it(family):
    config = config_of(family, tie_word_embeddings=True, hidden_size=64)
    torch.manual_seed(0)
    new = latent_model(config, group_size=3, rank=5)
    ordinary = transformers.AutoModelForCausalLM.from_config(config)
    assert new.lm_head.weight is new.model.embed_tokens.weight
    buffers = dict(new.named_buffers())
    for name, buffer in ordinary.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    for name, parameter in ordinary.named_parameters():
        if ".experts." not in name:
            mine = new.get_parameter(name)
            assert mine.shape == parameter.shape
            assert mine.requires_grad
            # Ones, zeros, or normal numbers, of which there are at least 64.
            spread = parameter.std().item()
            assert abs(mine.mean() - parameter.mean()) <= spread, name
            assert abs(mine.std().item() - spread) <= 0.5 * spread, name


def test_types_left_dense_in_a_new_model(tmp_path):
    config = config_of("olmoe")
    model = latent_model(config, group_size={"gate_proj": 2}, rank={"gate_proj": 4}, form="plain")
    names = {n.split("experts.")[1] for n in expert_parameters(model)}
    assert {"gate_proj.0.shared", "up_proj.2.dense", "down_proj"} <= names
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert molae.inspect(tmp_path).layout == "fused"
    hf_models.load(tmp_path)


def test_a_new_model_with_the_groups_of_a_converted_one(converted):
    config = transformers.AutoConfig.from_pretrained(converted)
    torch.manual_seed(0)
    new, old = latent_model(config), hf_models.load(converted)
    shapes = {n: p.shape for n, p in old.named_parameters()}
    assert {n: p.shape for n, p in new.named_parameters()} == shapes
    name = "model.layers.0.mlp.experts.up_proj.0.private"
    assert not torch.equal(new.get_parameter(name), old.get_parameter(name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "group_size and rank: needed"),
        ({"group_size": 3}, "rank: expected whole numbers"),
        ({"group_size": 7, "rank": 3}, "group_size: expected 1 to E=6"),
        ({"group_size": 3, "rank": 17}, "rank: expected 1 to D=16"),
        ({"group_size": {"gate": 3}, "rank": 3}, "group_size: expected keys among"),
        ({"group_size": {"gate_proj": 3}, "rank": 3}, "expected the same types"),
        ({"group_size": 3, "rank": 3, "form": "round"}, "form: expected one of"),
        ({"num_compressed": 9}, "num_compressed: expected 0 to K - 1"),
    ],
)
def test_new_models_that_make_no_sense(options, message):
    with pytest.raises(ArgumentError, match=message):
        latent_model(config_of("olmoe"), **options)


def test_a_new_model_of_another_family():
    with pytest.raises(UnknownFamilyError, match="llama"):
        latent_model(transformers.LlamaConfig(), group_size=2, rank=2)
