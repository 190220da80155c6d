"""Helpers for tests of molae.hf: tiny converted models, and a layer by its definition."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from checkpoints import transformers_checkpoint
from converting import fixed_method
from ref import compressed as ref_compressed

from molae.arch import describe
from molae.convert import convert, materialize
from molae.convert.methods import METHODS
from molae.factored import Split
from molae.hf.streaming import LayerStream
from molae.io import open_checkpoint

#: Large enough that the experts matter for the logits.
SETTINGS = {"initializer_range": 0.3}
SIZES = {"L": 3, "E": 6, "K": 2, "D": 16, "F": 12}

#: A dense group, one of rank 0, uneven groups out of order, down grouped in its own way.
MIXED = {
    "gate_proj": Split(((0, 1, 2), (3,), (5, 4)), (5, None, 3)),
    "up_proj": Split(((0, 2, 4), (1, 3, 5)), (6, 4)),
    "down_proj": Split(((1, 0), (5, 3), (2, 4)), (7, None, 0)),
}


def convert_tiny(
    folder: Path,
    family: str,
    *,
    original: bool = True,
    dtype: str = "float32",
    **convert_options: Any,
) -> Path:
    """A tiny random model made by Transformers, converted; `original` as in checkpoints.py."""
    transformers_checkpoint(
        folder / "src", family, original=original, dtype=dtype, config=SETTINGS, **SIZES
    )
    convert(folder / "src", folder / "dst", **convert_options)
    return folder / "dst"


def convert_fixed(
    folder: Path,
    monkeypatch: Any,
    family: str,
    splits: Mapping[str, Split],
    *,
    layers: tuple[int, ...] | None = None,
    original: bool = True,
) -> Path:
    """The same with given groups and ranks."""
    from molae import ConvertConfig

    monkeypatch.setitem(METHODS, "fixed", fixed_method(dict(splits), layers=layers))
    return convert_tiny(folder, family, original=original, config=ConvertConfig(method="fixed"))


def materialized(dst: Path) -> Path:
    out = dst.with_name(dst.name + "-ordinary")
    materialize(dst, out)
    return out


def load(path: Path, **options: Any) -> Any:
    """A model, and the assurance that every weight of it came from the files."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def tokens(rows: int = 2, length: int = 16, seed: int = 0, vocabulary: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (rows, length), generator=generator)


def train(model: Any, ids: torch.Tensor, steps: int = 15, lr: float = 1e-2) -> list[float]:
    """Steps of AdamW on all that learns; the loss before each."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def rounding_effect(model: Any, ids: torch.Tensor, seed: int = 0) -> float:
    """How far the logits move when every expert weight is off by one rounding of float32.

    `model` is an ordinary one in float64, where the arithmetic itself adds nothing.
    """
    before = model(ids).logits
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if ".experts." in name:
            noise = torch.rand(weight.shape, generator=generator, dtype=weight.dtype) * 2 - 1
            weight.mul_(1 + torch.finfo(torch.float32).eps * noise)
    return float((model(ids).logits - before).abs().max())


def matrices(experts: Any) -> dict[str, torch.Tensor]:
    """(E, F, D) or (E, D, F) of each type, multiplied out in float64 by docs/formats.md."""
    found = {}
    E, D, F = experts.num_experts, experts.hidden_dim, experts.intermediate_dim
    for kind, groups in experts.factors().items():
        shape = (E, D, F) if kind == "down_proj" else (E, F, D)
        stack = torch.zeros(shape, dtype=torch.float64)
        for group in groups:
            for at, expert in enumerate(group.experts):
                if group.dense is not None:
                    stack[expert] = group.dense[at]
                elif group.private is not None:
                    B = group.shared.double()
                    if group.perm is not None:
                        placed = torch.zeros(group.rank, D, dtype=torch.float64)
                        eye = torch.eye(group.rank, dtype=torch.float64)
                        placed[:, group.perm.long()] = torch.hstack([eye, B])
                        B = placed
                    A = group.private[at].double()
                    stack[expert] = B.T @ A if kind == "down_proj" else A @ B
        found[kind] = stack
    return found


@torch.no_grad()
def by_definition(experts: Any, x: Any, index: Any, weights: Any) -> torch.Tensor:
    """The layer token by token, in float64."""
    own = matrices(experts)
    x, weights = x.double(), weights.double()
    y = torch.zeros_like(x)
    one, two, three = (torch.ones(n, dtype=x.dtype) for n in _widths(experts))
    for t in range(len(x)):
        slots = range(index.shape[1])
        if experts.light is not None:
            call = weights[t].tolist(), index[t].tolist(), experts.num_compressed
            slots, aux = ref_compressed.split(*call)
            y[t] += _narrow(experts.light, x[t], index[t], weights[t], aux)
        elif experts.num_compressed:
            call = weights[t].tolist(), index[t].tolist(), experts.num_compressed
            vectors = experts.compressed.detach().double().split(_widths(experts), 1)
            parts = ref_compressed.theta(*call, [v.numpy() for v in vectors], experts.num_experts)
            one, two, three = map(torch.from_numpy, parts)
            slots, _ = ref_compressed.split(*call)
        for k in slots:
            e = int(index[t, k])
            if e < experts.num_experts:
                gate = own["gate_proj"][e] @ (x[t] * one)
                hidden = experts.act_fn(gate) * (own["up_proj"][e] @ (x[t] * three)) * two
                y[t] += weights[t, k] * (own["down_proj"][e] @ hidden)
    return y


def _narrow(light: Any, x: Any, index: Any, weights: Any, aux: Any) -> Any:
    """What narrow experts give for the slots `aux` of one token."""
    own = {name: p.detach().double() for name, p in light.named_parameters()}
    y = torch.zeros_like(x)
    for k in aux:
        e = int(index[k])
        if e < light.num_experts:
            y += weights[k] * own["bias"][e]
            if light.intermediate_dim:
                hidden = light.act_fn(own["gate_proj"][e] @ x) * (own["up_proj"][e] @ x)
                y += weights[k] * (own["down_proj"][e] @ hidden)
    return y


def _widths(experts: Any) -> list[int]:
    return [experts.hidden_dim, experts.intermediate_dim, experts.hidden_dim]


def absolute(experts: Any, x: Any, index: Any, weights: Any) -> torch.Tensor:
    """The layer with every number replaced by its absolute value, and no activation.

    n roundings on the way change the true layer by at most about n eps times this: silu(a) is
    at most |a|, with a slope of at most 1.1.
    """
    twin = copy.deepcopy(experts).double()
    twin.act_fn = torch.nn.Identity()
    if twin.light is not None:
        twin.light.act_fn = twin.act_fn
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.abs_()
    return by_definition(twin, x.abs(), index, weights.abs())


def layer_by_layer(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the next tokens, with one decoder layer in memory at a time."""
    with open_checkpoint(path) as checkpoint:
        stream = LayerStream(checkpoint, describe(checkpoint))
        (hidden,) = stream.embed(iter([ids]))
        for number in range(len(stream)):
            with stream.layer(number) as run:
                hidden = run(hidden)
        with stream._loaded(stream._net, ""), torch.inference_mode():
            return stream._log_probabilities(ids, hidden, torch.arange(ids.shape[1]))
