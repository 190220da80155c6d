"""A tiny model of each family: the released config's keys and values, scaled down."""

from __future__ import annotations

from typing import Any

import numpy as np

D, F, E, K, V, LAYERS = 16, 12, 4, 2, 40, 2

_COMMON: dict[str, Any] = {
    "vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "hidden_act": "silu", "max_position_embeddings": 64, "initializer_range": 0.3,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_MLA: dict[str, Any] = {
    "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4, "v_head_dim": 8, "attention_bias": False,
}  # fmt: skip
_DEEPSEEK: dict[str, Any] = {
    **_COMMON, "intermediate_size": 24, "moe_intermediate_size": F, "n_routed_experts": E,
    "num_experts_per_tok": K, "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 2,
    "topk_group": 1, "n_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 1,
}  # fmt: skip
_DSA: dict[str, Any] = {"index_head_dim": 8, "index_n_heads": 2, "index_topk": 8}
_QWEN: dict[str, Any] = {
    **_COMMON, "num_key_value_heads": 2, "head_dim": 8, "num_experts": E,
    "num_experts_per_tok": K, "moe_intermediate_size": F, "shared_expert_intermediate_size": 20,
    "mlp_only_layers": [], "linear_conv_kernel_dim": 4, "linear_key_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_PLAIN: dict[str, Any] = {
    **_COMMON, "intermediate_size": F, "num_key_value_heads": 2, "num_local_experts": E,
    "num_experts_per_tok": K,
}  # fmt: skip

#: By model type, what its config class is given.
CASES: dict[str, dict[str, Any]] = {
    "afmoe": {
        **_COMMON, "intermediate_size": 24, "moe_intermediate_size": F, "num_key_value_heads": 2,
        "head_dim": 8, "num_experts": E, "num_experts_per_tok": K, "num_shared_experts": 1,
        "num_dense_layers": 1, "global_attn_every_n_layers": 2, "sliding_window": 8,
        "route_scale": 2.448, "mup_enabled": True,
    },
    "deepseek_v2": {
        **_DEEPSEEK, **_MLA, "q_lora_rank": None, "n_shared_experts": 2, "scoring_func": "softmax",
        "topk_method": "group_limited_greedy", "norm_topk_prob": False,
    },
    "deepseek_v3": {**_DEEPSEEK, **_MLA},
    "deepseek_v32": {**_DEEPSEEK, **_MLA, **_DSA},
    "dots1": {**_DEEPSEEK, "num_key_value_heads": 2, "head_dim": 8, "attention_bias": False},
    "ernie4_5_moe": {
        **_COMMON, "intermediate_size": 24, "moe_intermediate_size": F, "num_key_value_heads": 2,
        "moe_num_experts": E, "moe_k": K, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
        "moe_layer_end_index": -1, "moe_layer_interval": 1, "moe_norm_min": 1e-12,
        "use_bias": False, "tie_word_embeddings": True,
    },
    "exaone_moe": {
        **_DEEPSEEK, "num_key_value_heads": 2, "head_dim": 8, "num_experts": E,
        "num_shared_experts": 1, "sliding_window": 8, "sliding_window_pattern": 2,
    },
    "flex_olmo": {**_PLAIN, "num_experts": E, "norm_topk_prob": False},
    "gemma4": {
        "text_config": {
            **_COMMON, "hidden_activation": "gelu_pytorch_tanh", "intermediate_size": 20,
            "num_key_value_heads": 2, "num_global_key_value_heads": 2, "head_dim": 8,
            "global_head_dim": 8, "num_experts": E, "top_k_experts": K,
            "moe_intermediate_size": F, "enable_moe_block": True, "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": V,
            "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8,
            "final_logit_softcapping": 30.0, "tie_word_embeddings": True,
        },
        "vision_config": {
            "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4,
            "position_embedding_size": 16,
        },
        "audio_config": None, "tie_word_embeddings": True,
    },
    "glm4_moe": {
        **_DEEPSEEK, "num_key_value_heads": 2, "head_dim": 8, "attention_bias": True,
        "use_qk_norm": True, "partial_rotary_factor": 0.5, "n_group": 1,
    },
    "glm_moe_dsa": {**_DEEPSEEK, **_MLA, **_DSA, "n_group": 1},
    "granitemoe": {
        **_PLAIN, "embedding_multiplier": 12.0, "logits_scaling": 6.0,
        "residual_multiplier": 0.22, "attention_multiplier": 0.3, "tie_word_embeddings": True,
    },
    "hunyuan_v1_moe": {
        **_COMMON, "intermediate_size": F, "moe_intermediate_size": [F] * LAYERS,
        "num_key_value_heads": 2, "head_dim": 8, "num_experts": E, "moe_topk": [K] * LAYERS,
        "num_shared_expert": [1] * LAYERS, "use_mixed_mlp_moe": True, "tie_word_embeddings": True,
    },
    "glm4_moe_lite": {**_DEEPSEEK, **_MLA, "n_group": 1},
    "granitemoeshared": {**_PLAIN, "shared_intermediate_size": 20},
    "granitemoehybrid": {
        **_PLAIN, "shared_intermediate_size": 20, "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_expand": 2,
        "mamba_chunk_size": 8, "position_embedding_type": "nope",
    },
    "hy_v3": {
        **_COMMON, "intermediate_size": 24, "moe_intermediate_size": F, "num_key_value_heads": 2,
        "head_dim": 8, "num_experts": E, "num_experts_per_tok": K, "num_shared_experts": 1,
        "first_k_dense_replace": 1, "router_scaling_factor": 2.826,
    },
    "jamba": {
        **_PLAIN, "num_experts": E, "expert_layer_period": 2, "expert_layer_offset": 1,
        "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False,
        "mamba_d_state": 4, "mamba_dt_rank": 4,
    },
    "kimi_k2": {**_DEEPSEEK, **_MLA, "n_group": 1},
    "lfm2_moe": {
        **_COMMON, "intermediate_size": 24, "moe_intermediate_size": F, "num_key_value_heads": 2,
        "num_experts": E, "num_experts_per_tok": K, "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "conv_bias": False,
        "use_expert_bias": True, "norm_topk_prob": True, "tie_word_embeddings": True,
    },
    "mimo_v2_flash": {
        **_DEEPSEEK, "num_key_value_heads": 1, "head_dim": 8, "v_head_dim": 8,
        "n_shared_experts": None, "moe_layer_freq": [0, 1], "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"], "n_group": 1,
    },
    "minimax": {
        **_PLAIN, "head_dim": 8, "layer_types": ["full_attention", "linear_attention"],
        "block_size": 8,
    },
    "minimax_m2": {
        **_PLAIN, "head_dim": 8, "rotary_dim": 4, "use_qk_norm": True, "use_routing_bias": True,
        "scoring_func": "sigmoid",
    },
    "phimoe": {
        **_PLAIN, "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.01,
        "input_jitter_noise": 0.01,
    },
    "solar_open": {
        **_DEEPSEEK, "num_key_value_heads": 2, "head_dim": 8, "first_k_dense_replace": 0,
    },
    "qwen3_5_moe": {
        "text_config": _QWEN,
        "vision_config": {
            "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "patch_size": 2,
            "out_hidden_size": D, "num_position_embeddings": 16,
        },
        "tie_word_embeddings": False,
    },
    "qwen3_next": {**_QWEN, "intermediate_size": 24, "decoder_sparse_step": 1,
                   "norm_topk_prob": True},
}  # fmt: skip


def make_model(model_type: str) -> Any:
    """A random model of a family, as Transformers builds it; nothing of it is zero."""
    import torch
    import transformers

    import molae.hf  # noqa: F401 - Kimi-K2 is a name that it brings

    config = transformers.AutoConfig.for_model(model_type, **CASES[model_type])
    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM
    if "vision_config" in CASES[model_type]:  # the whole model, of which the text is a part
        auto = transformers.AutoModelForImageTextToText
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("e_score_correction_bias") or ".bias" in name:
                tensor.copy_(torch.rand(tensor.shape))
            elif tensor.is_floating_point() and not tensor.any():
                tensor.copy_(0.3 * torch.randn(tensor.shape))
    return model


#: Configs of families that Transformers does not build, or not under this name.
NAMED: dict[str, dict[str, Any]] = {
    "kimi_k2": {**_DEEPSEEK, "model_type": "kimi_k2", "n_group": 1},
    "bailing_moe": {
        "model_type": "bailing_moe", "hidden_size": D, "num_hidden_layers": LAYERS,
        "intermediate_size": 24, "moe_intermediate_size": F, "num_experts": E,
        "num_shared_experts": 2, "num_experts_per_tok": K, "norm_topk_prob": True,
        "first_k_dense_replace": 0, "vocab_size": V, "norm_head": True,
    },
    "bailing_moe_v2": {
        "model_type": "bailing_moe_v2", "hidden_size": D, "num_hidden_layers": LAYERS,
        "intermediate_size": 24, "moe_intermediate_size": F, "num_experts": E,
        "num_shared_experts": 1, "num_experts_per_tok": K, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "vocab_size": V,
    },
    "hunyuan": {
        **CASES["hunyuan_v1_moe"], "model_type": "hunyuan", "moe_layer_num_skipped": 0,
        "norm_topk_prob": True, "use_qk_norm": True,
    },
}  # fmt: skip


def named_tensors(model_type: str) -> dict[str, np.ndarray]:
    """Random weights under the documented names of a family in `NAMED`."""
    rng = np.random.default_rng(0)
    config = NAMED[model_type]
    tensors: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int) -> None:
        tensors[name] = rng.standard_normal(shape).astype(np.float32)

    def mlp(prefix: str, width: int) -> None:
        add(f"{prefix}.gate_proj.weight", width, D)
        add(f"{prefix}.up_proj.weight", width, D)
        add(f"{prefix}.down_proj.weight", D, width)

    bailing = model_type.startswith("bailing")
    add("model.word_embeddings.weight" if bailing else "model.embed_tokens.weight", V, D)
    attention = ("attention.query_key_value", "attention.dense")
    extra = config.get("num_nextn_predict_layers", 0)  # next-token heads have experts too
    for layer in range(LAYERS + extra):
        at = f"model.layers.{layer}"
        for name in attention if bailing else ("self_attn.q_proj", "self_attn.o_proj"):
            add(f"{at}.{name}.weight", D, D)
        if layer < config.get("first_k_dense_replace", 0):
            mlp(f"{at}.mlp", config["intermediate_size"])
            continue
        for e in range(E):
            mlp(f"{at}.mlp.experts.{e}", F)
        if model_type == "hunyuan":
            add(f"{at}.mlp.gate.wg.weight", E, D)
            mlp(f"{at}.mlp.shared_mlp", F)
        else:
            add(f"{at}.mlp.gate.weight", E, D)
            shared = config.get("n_shared_experts", config.get("num_shared_experts"))
            mlp(f"{at}.mlp.shared_experts", F * shared)
        bias = {"kimi_k2": "e_score_correction_bias", "bailing_moe_v2": "expert_bias"}
        if model_type in bias:
            add(f"{at}.mlp.gate.{bias[model_type]}", E)
        if layer >= LAYERS:
            add(f"{at}.eh_proj.weight", D, 2 * D)
    if not config.get("tie_word_embeddings"):
        add("lm_head.weight", V, D)
    return tensors
