"""inspect on the configs of released models, against the numbers that were published of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import molae
from molae import ConvertConfig
from molae.arch import find_family
from molae.cli import main
from molae.convert.inspection import inspect_config
from molae.convert.sketch import plan_config
from molae.errors import CheckpointError, UnknownFamilyError
from molae.io import ENCODINGS, read_config

DATA = os.environ.get("MOLAE_TEST_DATA")
FOLDER = Path(DATA).parent / "configs" if DATA else None
released = pytest.mark.skipif(
    FOLDER is None or not FOLDER.is_dir(),
    reason="MOLAE_TEST_DATA is not set, or there is no folder of released configs beside it",
)

#: By file: total and active parameters in billions, and GB of the files, where they were published.
#: Totals and sizes of models that see images are without that part; where cards leave the input
#: embedding out of the active ones, it is in here.
PUBLISHED = {
    "MiniMaxAI--MiniMax-M2.5": (229, 10.6, None),
    "MiniMaxAI--MiniMax-M3": (427, 24.8, None),
    "Qwen--Qwen3-235B-A22B": (235, 22, 470),
    "Qwen--Qwen3-30B-A3B-FP8": (30.5, 3.3, 31.2),
    "Qwen--Qwen3-30B-A3B": (30.5, 3.3, 61.1),
    "Qwen--Qwen3-Coder-480B-A35B-Instruct": (480, 35, 960),
    "Qwen--Qwen3-VL-30B-A3B-Instruct": (30.5, 3.3, None),
    "Qwen--Qwen3.5-122B-A10B": (122, 10, None),
    "Qwen--Qwen3.5-35B-A3B": (34.7, 3.4, None),
    "XiaomiMiMo--MiMo-V2-Flash": (309, 15, None),
    "allenai--OLMoE-1B-7B": (6.92, 1.28, 13.8),
    "deepseek-ai--DeepSeek-R1": (671, 37, None),
    "deepseek-ai--DeepSeek-V3": (671, 37, None),
    "deepseek-ai--DeepSeek-V3.2": (671, 37.5, None),
    "deepseek-ai--DeepSeek-V4-Flash": (284, 13.4, None),
    "google--gemma-4-26B-A4B": (25.2, 3.8, None),
    "meta-llama--Llama-4-Scout-17B-16E-Instruct": (108, 17, None),
    "mistralai--Mixtral-8x22B-v0.1": (141, 39, 281),
    "mistralai--Mixtral-8x7B-v0.1": (46.7, 12.9, 93.4),
    "moonshotai--Kimi-K2-Instruct": (1026, 32.5, 1029),
    "moonshotai--Kimi-K2.5": (1026, 32.5, 595),
    "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": (31.6, 3.6, 63.2),
    "openai--gpt-oss-120b": (116.83, 5.13 + 0.58, 65.2),
    "openai--gpt-oss-20b": (20.91, 3.61 + 0.58, 13.8),
    "stepfun-ai--Step-3.7-Flash": (196, 11, None),
    "zai-org--GLM-5": (744, 41, 1488),
    "zai-org--GLM-5.2": (744, 41, 1488),
    "zai-org--GLM-5-FP8": (744, 41, None),
}

#: E, K, D, F, and layers with experts of all.
SIZES = {
    "MiniMaxAI--MiniMax-M2.5": (256, 8, 3072, 1536, 62, 62),
    "MiniMaxAI--MiniMax-M3": (128, 4, 6144, 3072, 57, 60),
    "XiaomiMiMo--MiMo-V2-Flash": (256, 8, 4096, 2048, 47, 48),
    "deepseek-ai--DeepSeek-V4-Flash": (256, 6, 4096, 2048, 43, 43),
    "google--gemma-4-26B-A4B": (128, 8, 2816, 704, 30, 30),
    "meta-llama--Llama-4-Scout-17B-16E-Instruct": (16, 1, 5120, 8192, 48, 48),
    "moonshotai--Kimi-K2.5": (384, 8, 7168, 2048, 60, 61),
    "moonshotai--Kimi-K3": (896, 16, 3584, 3072, 92, 93),
    "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": (128, 6, 2688, 1856, 23, 52),
    "stepfun-ai--Step-3.7-Flash": (288, 8, 4096, 1280, 42, 45),
    "zai-org--GLM-5.2": (256, 8, 6144, 2048, 75, 78),
}


def config_of(name):
    assert FOLDER is not None
    return read_config(FOLDER / f"{name}.json")


@released
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PUBLISHED)
def test_what_was_published(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from molae.hf import hide_progress
    from molae.hf.shapes import tensors_of

    hide_progress()
    config = config_of(name)
    tensors = tensors_of(config, known_as=find_family(config).transformers)
    found = inspect_config(name, config, tensors)
    total, active, size = PUBLISHED[name]
    assert found.total_parameters / 1e9 == pytest.approx(total, rel=0.005)
    assert found.active_parameters / 1e9 == pytest.approx(active, rel=0.05)
    if size is not None:
        assert found.bytes / 1e9 == pytest.approx(size, rel=0.003)
    if "quantization_config" not in config and "text_config" not in config:
        assert found.bytes == found.decoded_bytes == 2 * found.total_parameters


@released
@pytest.mark.parametrize("name", [*PUBLISHED, "moonshotai--Kimi-K3"])
def test_experts_without_transformers(name):
    """They are counted exactly, and nothing is said of the rest but that it is not known."""
    found = inspect_config(name, config_of(name), unknown="torch is not installed")
    assert found.total_parameters is found.active_parameters is found.shared_parameters is None
    assert found.notes[0] == "Only the experts are counted: torch is not installed."
    sizes = [found.letters[letter] for letter in "EKDF"]
    if name in SIZES:
        assert (*sizes, len(found.moe_layers), found.letters["L"]) == SIZES[name]
    E, K, D, F = sizes
    each = len(found.shapes) * D * F * len(found.moe_layers)
    assert found.expert_parameters == E * each
    assert found.active_experts == K * each
    assert found.decoded_bytes == 2 * found.expert_parameters
    assert (found.unsupported is None) == (find_family(config_of(name)).unsupported is None)


@released
@pytest.mark.parametrize(
    "name", ["Qwen--Qwen3-30B-A3B", "openai--gpt-oss-20b", "zai-org--GLM-5-FP8"]
)
def test_plans(name):
    plan = plan_config(name, config_of(name), None, ConvertConfig(size=0.6), unknown="no torch")
    assert plan.experts_only
    assert 0.595 < plan.size_reached <= 0.6
    assert plan.after.expert_numbers < plan.before.expert_numbers
    assert plan.encoding in (None, *ENCODINGS)
    assert {c.group_size for c in plan.candidates if c.chosen} == {8}
    assert all(c.error is None for c in plan.candidates)


@released
@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        (
            "meta-llama--Llama-4-Scout-17B-16E-Instruct",
            UnknownFamilyError,
            "and does not convert it",
        ),
        ("moonshotai--Kimi-K2.5", CheckpointError, "hold int4, which molae does not read"),
    ],
)
def test_no_plan(name, error, said):
    with pytest.raises(error, match=said):
        plan_config(name, config_of(name), None, ConvertConfig(size=0.6), unknown="no torch")


FP8 = {"quant_method": "fp8", "weight_block_size": [4, 8]}
NEMOTRON = {"model_type": "nemotron_h", "n_routed_experts": 4}
SMALL = {
    "model_type": "qwen3_moe", "hidden_size": 16, "num_hidden_layers": 2, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 8, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_experts": None}, "E is missing: no 'num_experts' and no 'num_local_experts'"),
        ({"num_experts": 0}, "E is 0"),
        ({"num_experts": -4}, "E is -4"),
        ({"num_experts": "many"}, "E is 'many'"),
        ({"num_experts_per_tok": 5}, "K=5 experts a token of only E=4"),
        ({"moe_intermediate_size": 1.5}, "F is 1.5"),
        ({"mlp_only_layers": [0, 1]}, "none of the L=2 layers has experts"),
        ({"mlp_only_layers": "all"}, "'mlp_only_layers' is 'all'"),
        ({"torch_dtype": "float7"}, "type 'float7' is unknown"),
        ({"torch_dtype": ["bfloat16"]}, "type ['bfloat16'] is unknown"),
        ({"model_type": "llama"}, "model_type 'llama' is unknown"),
        (NEMOTRON, "'hybrid_override_pattern' is None, expected a text with a letter for each"),
        (NEMOTRON | {"hybrid_override_pattern": "ME*"}, "is 'ME*', expected a text"),
        (NEMOTRON | {"hybrid_override_pattern": "M*"}, "none of the L=2 layers has experts"),
        ({"model_type": None}, "model_type None is unknown"),
    ],
)
def test_configs_that_make_no_sense(tmp_path, capsys, changed, said):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL | changed))
    assert main(["inspect", str(path)]) == 1
    assert said in capsys.readouterr().err


def test_a_family_of_ones_own_by_its_config(tmp_path, capsys):
    path, own = tmp_path / "config.json", tmp_path / "mine.json"
    path.write_text(json.dumps(SMALL | {"model_type": "mine", "n_mine": 4}))
    text = Path(molae.__file__).with_name("arch").joinpath("qwen3_moe.json").read_text()
    own.write_text(text.replace('"qwen3_moe"', '"mine"').replace('"num_experts"', '"n_mine"'))
    assert main(["inspect", str(path), "--arch", str(own), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["family"] == "mine"
    assert found["total_parameters"] is None
    assert found["expert_parameters"] == 2 * 4 * 3 * 16 * 8
    assert "Only the experts are counted" in found["notes"][0]


@pytest.mark.parametrize(
    ("quant", "nbytes"),
    [
        (FP8, 128 + 4 * 4),
        ({"quant_method": "mxfp4"}, {(8, 16): 8 * (8 + 1), (16, 8): 16 * (4 + 1)}),
        ({"quant_method": "awq"}, "quantized by 'awq'"),
        ({"quant_method": "fp8"}, "in blocks of None"),
        ({"quant_method": "fp8", "weight_block_size": [0, 4]}, "in blocks of [0, 4]"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": 3}},
            "by 'compressed-tensors'",
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": {}}},
            "by 'compressed-tensors'",
        ),
        ("fp8", "quantized by None"),
        ({**FP8, "modules_to_not_convert": [1]}, "leaves out [1], expected a list of names"),
        ({**FP8, "ignore": ["re:("]}, "leaves out '(', no pattern"),
    ],
)
def test_bytes_of_encoded_files(quant, nbytes):
    found = inspect_config("c", SMALL | {"quantization_config": quant}, unknown="no torch")
    assert found.decoded_bytes == 2 * found.expert_parameters
    if isinstance(nbytes, str):
        assert found.bytes is None
        assert any(nbytes in note for note in found.notes)
        return
    each = nbytes if isinstance(nbytes, dict) else dict.fromkeys([(8, 16), (16, 8)], nbytes)
    assert found.bytes == 2 * 4 * (2 * each[8, 16] + each[16, 8])
    assert found.encoding == quant["quant_method"]


def test_step_as_its_first_release_spells_it():
    text = {
        "hidden_size": 16, "num_hidden_layers": 5, "moe_num_experts": 4, "moe_top_k": 2,
        "moe_intermediate_size": 8, "moe_layers_enum": "2,3",
    }  # fmt: skip
    config = {"model_type": "step3p7", "dtype": "bfloat16", "text_config": text}
    found = inspect_config("c", config, unknown="no torch")
    assert found.moe_layers == (2, 3)
    assert found.expert_parameters == 2 * 4 * 3 * 16 * 8
