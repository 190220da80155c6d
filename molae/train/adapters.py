"""Low-rank adapters (LoRA, arXiv 2106.09685) through PEFT, merged into the weights in the end."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from molae.errors import ArgumentError, MissingExtraError
from molae.hf.experts import Group, LatentExperts, NarrowExperts
from molae.train.settings import Part

__all__ = ["add_adapters", "need_peft"]

#: Parameters of experts that are stacks of matrices.
MATRICES = {"private", "shared", "dense", "gate_proj", "up_proj", "down_proj", "gate_up_proj"}


def need_peft() -> None:
    """Refuse to go on without PEFT.

    Raises
    ------
    molae.errors.MissingExtraError
    """
    if find_spec("peft") is None:
        raise MissingExtraError("low-rank adapters need PEFT; run: pip install 'molae[train]'")


def add_adapters(model: Any, part: Part, rank: int, alpha: float, seed: int) -> Any:
    """The model with adapters, which alone learn.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    part : {'all', 'experts'}
        The routed experts' factors and dense matrices; with all also every linear layer but the
        head.
    rank : int
    alpha : float
        What an adapter adds is scaled by alpha/rank.
    seed : int
        Of what they begin with.

    Returns
    -------
    peft.PeftModel
        Whose ``merge_and_unload()`` gives the model back.

    Raises
    ------
    molae.errors.ArgumentError
        The model has none of these.
    """
    from peft import LoraConfig, get_peft_model

    modules, parameters = _targets(model, part)
    if not modules and not parameters:
        raise ArgumentError(f"lora: the model has no {part} that adapters could go on")
    scale: Any = alpha  # said to be whole, though nothing asks for that
    config = LoraConfig(
        r=rank,
        lora_alpha=scale,
        target_modules=modules,
        target_parameters=parameters,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT asks for a name that Transformers is about to give up.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def _targets(model: Any, part: Part) -> tuple[list[str], list[str]]:
    """Names of the modules and of the parameters that get adapters."""
    head = model.get_output_embeddings()
    modules, parameters = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if part != "all" or module is head or min(module.weight.shape) == 1:
                continue
            if name.rpartition(".")[2] in MATRICES:
                # PEFT takes modules of these names for the experts of older files.
                parameters.append(f"{name}.weight")
            else:
                modules.append(name)
        elif _holds_experts(module):
            parameters += [
                f"{name}.{leaf}"
                for leaf, own in module.named_parameters(recurse=False)
                if leaf in MATRICES and own.numel()
            ]
    return modules, parameters


def _holds_experts(module: nn.Module) -> bool:
    if isinstance(module, (Group, LatentExperts)):
        return not isinstance(module, NarrowExperts)
    return isinstance(getattr(module, "down_proj", None), nn.Parameter)
