"""molae.ops against the experts of Transformers, forward and through autograd."""

from __future__ import annotations

import numpy as np
import pytest

from molae import ops

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

N, K, E, D, F = 50, 2, 6, 24, 16


def tensors(rng, *shapes):
    return [torch.tensor(rng.standard_normal(s) * 0.3, requires_grad=True) for s in shapes]


def routing(rng):
    index = np.argsort(rng.random((N, E)), axis=1)[:, :K]
    return index, torch.tensor(rng.random((N, K)), requires_grad=True)


def array(tensor):
    return tensor.detach().numpy()


def agree(found, tensor):
    np.testing.assert_allclose(found, array(tensor), rtol=1e-11, atol=1e-12)


def test_olmoe():
    from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeExperts

    rng = np.random.default_rng(0)
    config = OlmoeConfig(
        hidden_size=D, intermediate_size=F, num_experts=E, num_experts_per_tok=K, hidden_act="silu"
    )
    module = OlmoeExperts(config).double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.tensor(rng.standard_normal(p.shape) * 0.3))
    (x,) = tensors(rng, (N, D))
    index, weights = routing(rng)
    index[::7, 1] = E  # the module's own sentinel
    dy = torch.tensor(rng.standard_normal((N, D)))
    y = module(x, torch.tensor(index), weights)
    y.backward(dy)

    gate_up, down = array(module.gate_up_proj), array(module.down_proj)
    args = array(x), index, array(weights), gate_up[:, :F], gate_up[:, F:], down
    found, saved = ops.experts_forward(*args, save=True)
    agree(found, y)
    d = ops.experts_backward(dy.numpy(), saved, *args)
    agree(d.x, x.grad)
    agree(d.top_k_weights, weights.grad)
    agree(np.concatenate([d.gate, d.up], axis=1), module.gate_up_proj.grad)
    agree(d.down, module.down_proj.grad)


def test_gpt_oss():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

    rng = np.random.default_rng(1)
    config = GptOssConfig(hidden_size=D, intermediate_size=F, num_local_experts=E)
    module = GptOssExperts(config).double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.tensor(rng.standard_normal(p.shape) * 2))
    (x,) = tensors(rng, (N, D))
    index, weights = routing(rng)
    dy = torch.tensor(rng.standard_normal((N, D)))
    y = module(x, torch.tensor(index), weights)
    y.backward(dy)

    def split(tensor):  # (E, D, 2F) with gate and up in turn -> two (E, F, D)
        both = array(tensor).swapaxes(1, -1)
        return np.ascontiguousarray(both[:, ::2]), np.ascontiguousarray(both[:, 1::2])

    args = array(x), index, array(weights), *split(module.gate_up_proj)
    args = (*args, np.ascontiguousarray(array(module.down_proj).swapaxes(1, 2)))
    bias = array(module.gate_up_proj_bias)
    options = {
        "gate_bias": np.ascontiguousarray(bias[:, ::2]),
        "up_bias": np.ascontiguousarray(bias[:, 1::2]),
        "down_bias": array(module.down_proj_bias),
        "activation": "swiglu_clamped",
        "alpha": module.alpha,
        "limit": module.limit,
    }
    found, saved = ops.experts_forward(*args, **options, save=True)
    agree(found, y)
    assert (saved.gate > module.limit).any()  # the clamp is met
    d = ops.experts_backward(dy.numpy(), saved, *args, **options)
    agree(d.x, x.grad)
    agree(d.top_k_weights, weights.grad)
    for found, grad in zip((d.gate, d.up), split(module.gate_up_proj.grad), strict=True):
        np.testing.assert_allclose(found, grad, rtol=1e-11, atol=1e-11)
    agree(d.down, module.down_proj.grad.transpose(1, 2))
    agree(d.gate_bias, module.gate_up_proj_bias.grad[:, ::2])
    agree(d.up_bias, module.gate_up_proj_bias.grad[:, 1::2])
    agree(d.down_bias, module.down_proj_bias.grad)
