"""Names of models that Transformers builds under another name: Kimi-K2 is DeepSeek-V3."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from molae.arch import families

__all__ = ["register_aliases"]


def register_aliases() -> None:
    """Let Transformers know the model types that families say it knows under another name.

    Those that the installed version has itself, or that somebody has registered, stay as they are.
    """
    for name, family in families().items():
        known = family.transformers
        if known is None or family.unsupported:
            continue
        if known in CONFIG_MAPPING and name not in CONFIG_MAPPING:
            _register(name, known)


def _register(name: str, known: str) -> None:
    theirs = CONFIG_MAPPING[known]
    # Transformers tells config classes by their names.
    own = f"{name.title().replace('_', '')}Config"
    config = type(own, (theirs,), {"model_type": name, "__module__": __name__})
    base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[theirs]
    model = type(base.__name__, (base,), {"config_class": config, "__module__": __name__})
    AutoConfig.register(name, config)
    AutoModelForCausalLM.register(config, model)
    mapping = get_checkpoint_conversion_mapping(known)
    if mapping is not None:
        register_checkpoint_conversion_mapping(name, mapping)
