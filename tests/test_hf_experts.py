"""One layer of latent experts against its definition, token by token."""

from __future__ import annotations

import contextlib
import copy
import doctest
import gc
import importlib

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf_models
import torch

import molae.hf.activation
import molae.hf.experts
import molae.hf.forward
import molae.hf.native
from molae.errors import ArgumentError
from molae.factored import LightModule, Split, index_groups
from molae.hf import LatentExperts

pytestmark = pytest.mark.usefixtures("one_thread", "unset_is_nan")

E, D, F, K = 6, 16, 12, 3
SAME = Split(index_groups(E, 3), (5, 8))
SPLITS = {
    "one grouping": {"gate": SAME, "up": SAME, "down": SAME},
    "mixed": {
        kind.removesuffix("_proj"): split for kind, split in hf_models.MIXED.items()
    },
    "down alone, fused": {"gate": None, "up": None, "down": SAME, "fused": True},
    "gate alone": {"gate": SAME, "up": None, "down": None},
    "nothing": {"gate": None, "up": None, "down": None},
    "full rank": dict.fromkeys(("gate", "up", "down"), Split(index_groups(E, 2), (D, D, D))),
    "alone": dict.fromkeys(("gate", "up", "down"), Split(index_groups(E, 1), (4,) * E)),
    "compressed": {"gate": SAME, "up": SAME, "down": SAME, "num_compressed": 1},
    "narrow": {"gate": SAME, "up": SAME, "down": SAME, "num_compressed": 1,
               "light": LightModule(3)},
    "additive": {"gate": None, "up": None, "down": None, "num_compressed": 1,
                 "light": LightModule(0)},
    "compressed, dense": {"gate": None, "up": None, "down": None, "num_compressed": 2},
    "empty gate": {"gate": Split(index_groups(E, E), (0,)), "up": SAME, "down": SAME},
}  # fmt: skip


@pytest.fixture(params=["kernels", "plain torch"])
def way(request, monkeypatch):
    """Both ways that a layer is computed on the CPU."""
    if request.param == "plain torch":
        monkeypatch.setattr(molae.hf.experts, "forward_native", lambda *a: None)
    return request.param


def make(name, form="gauge", dtype=torch.float32, std=0.4):
    torch.manual_seed(0)
    experts = LatentExperts(E, D, F, form=form, dtype=dtype, **SPLITS[name])
    experts.reset_parameters(std)
    if experts.compressed is not None:
        torch.nn.init.normal_(experts.compressed, 1, 0.2)
    if experts.light is not None:
        torch.nn.init.normal_(experts.light.bias, 0, std)
    return experts


def inputs(T=11, dtype=torch.float32, K=K):
    """Some pairs are not here (number E)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, D, generator=generator).to(dtype)
    index = torch.stack([torch.randperm(E + 1, generator=generator)[:K] for _ in range(T)])
    return x, index, torch.rand(T, K, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["gauge", "plain"])
@pytest.mark.parametrize("name", SPLITS)
def test_a_layer_computes_what_its_factors_say(name, form, dtype, way):
    experts, (x, index, weights) = make(name, form, dtype), inputs(dtype=dtype)
    y = experts(x, index, weights)
    exact = hf_models.by_definition(experts, x, index, weights)
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert exact.abs().max() > 0 or name == "empty gate"
    # On its way a value is rounded to the type a handful of times (z, gate and up, h, the latent
    # and its sum, y); sums of at most D products are taken in float32 or better.
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    bound = hf_models.absolute(experts, x, index, weights)
    tiny = torch.finfo(dtype).tiny  # below it float16 has no relative accuracy
    assert (
        (y.double() - exact).abs() <= (8 * torch.finfo(dtype).eps + 4 * D * wide) * bound + tiny
    ).all()


def test_compressed_experts_begin_at_one(way):
    """There they are the experts that run; more of them than a token has are refused."""
    experts, (x, index, weights) = make("one grouping"), inputs()
    torch.manual_seed(0)
    other = LatentExperts(E, D, F, **SPLITS["one grouping"], num_compressed=2)
    assert torch.equal(other.compressed, torch.ones(E, 2 * D + F))
    other.load_state_dict(experts.state_dict(), strict=False)
    top = weights.argmax(1, keepdim=True)
    kept = torch.full_like(index, E).scatter(1, top, index.gather(1, top))
    assert torch.allclose(other(x, index, weights), experts(x, kept, weights), atol=1e-6)
    with pytest.raises(ArgumentError, match="num_compressed: expected 0 to K - 1 = 1, got 2"):
        other(x, index[:, :2], weights[:, :2])
    with pytest.raises(ArgumentError, match="num_compressed: expected 0 or more"):
        LatentExperts(E, D, F, **SPLITS["nothing"], num_compressed=-1)


def test_inputs_are_left_alone_and_nobody_here_gives_zero(way):
    experts, given = make("mixed"), inputs()
    copies = [tensor.clone() for tensor in given]
    x, index, weights = given
    assert torch.equal(experts(x, torch.full_like(index, E), weights), torch.zeros_like(x))
    experts(*given)
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))
    assert experts(x[:0], index[:0], weights[:0]).shape == (0, D)


@pytest.mark.parametrize("K", [1, 2, E])
def test_one_choice_a_token_and_all(K, way):
    experts, (x, index, weights) = (
        make("mixed", dtype=torch.float64),
        inputs(dtype=torch.float64, K=K),
    )
    exact = hf_models.by_definition(experts, x, index, weights)
    bound = hf_models.absolute(experts, x, index, weights)
    assert ((experts(x, index, weights) - exact).abs() <= 4 * D * 2.3e-16 * bound).all()


@pytest.mark.parametrize("form", ["gauge", "plain"])
@pytest.mark.parametrize(
    "name", ["one grouping", "mixed", "down alone, fused", "full rank", "compressed"]
)
def test_gradients_against_differences(name, form, way):
    experts, (x, index, weights) = make(name, form, torch.float64), inputs(4, torch.float64)
    names = [n for n, _ in experts.named_parameters()]
    values = [p.detach().requires_grad_() for p in experts.parameters()]

    def layer(x, weights, *values):
        return torch.func.functional_call(
            experts, dict(zip(names, values, strict=True)), (x, index, weights)
        )

    args = (x.requires_grad_(), weights.requires_grad_(), *values)
    assert torch.autograd.gradcheck(layer, args, fast_mode=True)


def test_an_idle_expert_has_a_gradient_of_zero(way):
    experts, (x, index, weights) = make("mixed"), inputs()
    experts(x, torch.zeros_like(index), weights).sum().backward()
    grads = {n: p.grad for n, p in experts.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    assert grads["gate_proj.0.private"][0].abs().max() > 0
    assert not grads["gate_proj.0.private"][1:].any()
    assert not grads["gate_proj.1.dense"].any()
    assert not grads["down_proj.1.dense"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_product_and_the_loop_agree(dtype, monkeypatch):
    monkeypatch.setattr(molae.hf.experts, "forward_native", lambda *a: None)
    rank = Split(index_groups(8, 4), (8, 16))
    torch.manual_seed(3)
    experts = LatentExperts(8, 32, 16, gate=rank, up=rank, down=None, dtype=dtype)
    x, weights = torch.randn(9, 32, dtype=dtype), torch.rand(9, 2, dtype=dtype)
    index = torch.stack([torch.randperm(8)[:2] for _ in range(9)])
    calls = []
    takes = molae.hf.forward._grouped_takes
    monkeypatch.setattr(
        molae.hf.forward, "_grouped_takes", lambda *a: calls.append(takes(*a)) or calls[-1]
    )
    grouped = experts(x, index, weights)
    grouped.sum().backward()
    gradients = [p.grad.clone() for p in experts.parameters()]
    assert all(calls) == molae.hf.forward._HAS_GROUPED
    assert calls
    experts.zero_grad()
    monkeypatch.setattr(molae.hf.forward, "_grouped_takes", lambda *a: False)
    loop = experts(x, index, weights)
    loop.sum().backward()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grouped, loop, rtol=8 * eps, atol=8 * eps * loop.abs().max().item())
    for one, parameter in zip(gradients, experts.parameters(), strict=True):
        other = parameter.grad
        torch.testing.assert_close(
            one, other, rtol=32 * eps, atol=32 * eps * other.abs().max().item()
        )


def test_names_are_those_of_the_format():
    assert set(make("mixed").state_dict()) == {
        *(f"gate_proj.{g}.{role}" for g in (0, 2) for role in ("shared", "perm", "private")),
        "gate_proj.1.dense",
        *(f"up_proj.{g}.{role}" for g in (0, 1) for role in ("shared", "perm", "private")),
        *(f"down_proj.0.{role}" for role in ("shared", "perm", "private")),
        "down_proj.1.dense",
    }
    assert set(make("gate alone", "plain").state_dict()) == {
        *(f"gate_proj.{g}.{role}" for g in (0, 1) for role in ("shared", "private")),
        "up_proj", "down_proj",
    }  # fmt: skip
    assert set(make("down alone, fused", "plain").state_dict()) == {
        "gate_up_proj",
        *(f"down_proj.{g}.{role}" for g in (0, 1) for role in ("shared", "private")),
    }  # fmt: skip


def test_the_permutation_is_never_cast():
    experts = make("one grouping")
    for cast in (experts.half(), experts.to(torch.bfloat16), experts.double(), experts.float()):
        assert cast.gate_proj[0].perm.dtype == torch.int32
    assert sorted(experts.gate_proj[0].perm.tolist()) == list(range(D))


@pytest.mark.parametrize("form", ["gauge", "plain"])
def test_new_factors_are_as_large_as_dense_experts(form):
    torch.manual_seed(0)
    half = Split(index_groups(8, 4), (16, 48))
    experts = LatentExperts(8, 64, 96, gate=half, up=half, down=half, form=form)
    experts.reset_parameters(0.05)
    for kind, stack in hf_models.matrices(experts).items():
        norms = stack.square().sum((1, 2))
        # The relative spread of such a norm is below sqrt(2 / (F R)) + sqrt(2 / (R D)) < 0.09.
        assert ((norms / (64 * 96 * 0.05**2) - 1).abs() < 0.36).all(), kind


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": Split(((0, 1), (2, 3)), (1, 1))}, "gate_proj: expected each of the E=6"),
        ({"up": Split(((0, 1, 2), (2, 3, 4, 5)), (1, 1))}, "up_proj: expected each"),
        ({"down": Split(index_groups(E, 3), (1,))}, "down_proj: expected a rank for each of 2"),
        ({"down": Split(index_groups(E, 3), (1, 17))}, "down_proj: expected ranks from 0 to D=16"),
        ({"form": "round"}, "form: expected one of"),
        ({"fused": True}, "fused"),
    ],
)
def test_what_makes_no_sense_is_refused(change, message):
    with pytest.raises(ArgumentError, match=message):
        LatentExperts(E, D, F, **{"gate": SAME, "up": SAME, "down": SAME} | change)


# Dynamo looks at tensors between its graphs, and torch warns about that.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compile_takes_the_layer_as_it_is():
    experts, (x, index, weights) = make("mixed"), inputs()

    def around(x):
        return (experts(x * 2, index, weights) + 1).square().sum()

    values = []
    for function in (around, torch.compile(around, backend="eager")):
        experts.zero_grad()
        leaf = x.clone().requires_grad_()
        function(leaf).backward()
        values.append([leaf.grad, *(p.grad for p in experts.parameters())])
    for one, other in zip(*values, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["molae.hf", "molae.hf.experts", "molae.hf.build"])
def test_examples(name):
    module = importlib.import_module(name)
    failed, tried = doctest.testmod(module)
    assert failed == 0
    assert tried > 0


# ------------------------------------------------------------------------- the C kernels


def gradients(experts, given, wanted):
    """Output and gradients of inputs and of the parameters that `wanted` holds."""
    x, index, weights = (t.clone() for t in given)
    x.requires_grad_()
    weights.requires_grad_()
    for name, parameter in experts.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(name in wanted)
    y = experts(x, index, weights)
    (y.double() ** 2).sum().backward()
    grads = {n: p.grad for n, p in experts.named_parameters() if p.grad is not None}
    assert set(grads) == set(wanted)
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad, **grads}


@pytest.mark.parametrize("form", ["gauge", "plain"])
@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("some", [False, True])
def test_kernels_and_torch_agree(name, form, some, monkeypatch):
    experts = make(name, form, torch.float64)
    names = [n for n, p in experts.named_parameters() if p.numel()]
    wanted = names[::2] if some else names
    for parameter in experts.parameters():  # nothing to differentiate at R = D
        parameter.requires_grad_(parameter.numel() > 0)
    ours = gradients(experts, inputs(dtype=torch.float64), wanted)
    monkeypatch.setattr(molae.hf.experts, "forward_native", lambda *a: None)
    theirs = gradients(experts, inputs(dtype=torch.float64), wanted)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-13 * value.abs().max().item())


@pytest.mark.parametrize("activation", sorted(molae.hf.activation.NAMES))
def test_every_activation_of_the_kernels(activation, monkeypatch):
    torch.manual_seed(0)
    experts = LatentExperts(
        E, D, F, gate=SAME, up=SAME, down=SAME, activation=activation, dtype=torch.float64
    )
    given = inputs(dtype=torch.float64)
    ours = molae.hf.native.forward_native(experts, *given)
    theirs = molae.hf.forward.forward_torch(experts, *given, experts.factors())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13 * theirs.abs().max().item())


@pytest.mark.parametrize("grad", [True, False])
def test_what_the_kernels_do_not_take_goes_to_torch(grad):
    experts, (x, index, weights) = make("mixed"), inputs()
    native = molae.hf.native.forward_native
    with torch.set_grad_enabled(grad):
        for _ in range(2):  # also once it is ready
            assert native(experts, x, index, weights) is not None
            assert native(experts, x.half(), index, weights) is None
            assert native(experts, x.bfloat16(), index, weights) is None  # weights of another type
            assert native(experts, x.to("meta"), index, weights) is None
        assert native(experts, x, index, weights) is not None
        experts.act_fn = torch.nn.Tanh()
        assert native(experts, x, index, weights) is None


def changed_in_place(experts):
    experts.gate_proj[0].private.data.mul_(2)


def given_other_memory(experts):
    experts.gate_proj[0].private.data = experts.gate_proj[0].private.data * 2


def given_another_parameter(experts):
    experts.gate_proj[0].private = torch.nn.Parameter(experts.gate_proj[0].private.detach() * 2)


def given_another_permutation(experts):
    experts.gate_proj[0].perm = experts.gate_proj[0].perm.flip(0)


def given_another_group(experts):
    experts.gate_proj[0] = copy.deepcopy(experts.gate_proj[0])
    changed_in_place(experts)


def hooked(experts):
    experts.gate_proj[0].register_forward_hook(
        lambda module, args, made: made._replace(private=made.private * 2)
    )


def dense_changed(experts):
    experts.down_proj.data = experts.down_proj.data * 2


@pytest.mark.parametrize(
    "change",
    [changed_in_place, given_other_memory, given_another_parameter, given_another_permutation,
     given_another_group, hooked, dense_changed],
)  # fmt: skip
def test_what_is_ready_follows_the_module(change, monkeypatch):
    experts = make("gate alone", dtype=torch.float64)
    given = inputs(dtype=torch.float64)
    with torch.no_grad():
        before = experts(*given)
        assert torch.equal(experts(*given), before)
        change(experts)
        after = experts(*given)
        exact = molae.hf.forward.forward_torch(experts, *given, experts.factors())
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, exact, rtol=0, atol=1e-13 * exact.abs().max().item())


def test_what_is_ready_goes_with_its_module():
    experts = make("mixed")
    with torch.no_grad():
        experts(*inputs())
        assert experts in molae.hf.native._ready
        experts.half()
        with contextlib.suppress(RuntimeError):
            experts(*inputs(dtype=torch.float16))
    assert experts not in molae.hf.native._ready
    experts.float()
    with torch.no_grad():
        experts(*inputs())
    kept = len(molae.hf.native._ready)
    del experts
    gc.collect()
    assert len(molae.hf.native._ready) == kept - 1


def test_results_do_not_depend_on_threads():
    experts, given = make("mixed"), inputs(40)
    found = []
    for count in (1, 2, 3):
        with molae.num_threads(count):
            torch.set_num_threads(count)
            found.append(gradients(experts, given, [n for n, _ in experts.named_parameters()]))
    torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(found[0][key], value) for key, value in other.items())


def test_checkpointing_recomputes_what_backward_needs():
    from torch.utils.checkpoint import checkpoint

    experts, (x, index, weights) = make("mixed"), inputs()
    x.requires_grad_()
    y = checkpoint(experts, x, index, weights, use_reentrant=False)
    y.sum().backward()
    again = x.grad.clone()
    x.grad = None
    experts(x, index, weights).sum().backward()
    assert torch.equal(again, x.grad)


def test_kernels_run_on_the_threads_of_torch(python):
    """Where they may use as many; the same bits as on molae's own."""
    code = """
import torch, molae
from molae import _core
from molae.factored import Split, index_groups
from molae.hf import LatentExperts
split = Split(index_groups(8, 4), (20, 30))
torch.manual_seed(0)
layer = LatentExperts(8, 64, 32, gate=split, up=split, down=split)
x = torch.randn(200, 64)
index = torch.stack([torch.randperm(8)[:2] for _ in x])
found = []
for ours, theirs in ((2, 2), (2, 3), (1, 1)):
    molae.set_num_threads(ours)
    torch.set_num_threads(theirs)
    y = layer(x, index, torch.ones(200, 2))
    y.sum().backward()
    found.append((y, [p.grad for p in layer.parameters()]))
    layer.zero_grad()
    print(_core.build_info()["pool_threads"])
for y, grads in found[1:]:
    print(torch.equal(y, found[0][0]), all(map(torch.equal, grads, found[0][1])))
"""
    assert python(code).split() == ["0", "1", "1", "True", "True", "True", "True"]


def test_weights_stay_torchs_own():
    """Who gathers weights for a layer only, as FSDP does, lets go of their memory after it."""
    split = Split(index_groups(4, 2), (3, 3))
    experts = LatentExperts(4, 8, 6, gate=split, up=split, down=None, num_compressed=1)
    x = torch.ones(5, 8)
    experts(x, torch.tensor([[0, 2]] * 5), torch.full((5, 2), 0.5)).sum().backward()
    for parameter in experts.parameters():
        parameter.untyped_storage().resize_(0)
