"""The shipped demonstration checkpoint: its size, its form and what it scores."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from molae.demo import CHECKPOINT, HELDOUT

RECORD = HELDOUT.with_name("training.json")


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text("utf-8"))


@pytest.fixture(scope="module")
def config():
    return json.loads((CHECKPOINT / "config.json").read_text("utf-8"))


def test_names_do_not_need_torch():
    code = "import sys, molae.demo; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_size(record):
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    assert size <= 6_000_000
    assert size == record["bytes"]["checkpoint"]
    assert len(HELDOUT.read_bytes()) == record["text"]["heldout_bytes"]


def test_config(config):
    assert config["model_type"] == "olmoe"
    assert config["dtype"] == "bfloat16"
    assert config["norm_topk_prob"] is False
    assert config["num_experts"] >= 16
    assert config["num_experts_per_tok"] == 4
    assert config["num_hidden_layers"] >= 3
    assert config["intermediate_size"] < config["hidden_size"]
    assert 2000 <= config["vocab_size"] <= 4000


def test_weights_are_one_tensor_per_matrix(config):
    with open(CHECKPOINT / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    hidden, width = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "gate_proj": [width, hidden],
        "up_proj": [width, hidden],
        "down_proj": [hidden, width],
    }
    expected = {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight": shape
        for layer in range(config["num_hidden_layers"])
        for expert in range(config["num_experts"])
        for name, shape in shapes.items()
    }
    assert expected.items() <= {name: entry["shape"] for name, entry in header.items()}.items()
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert not any("gate_up_proj" in name for name in header)


def test_every_expert_is_used(record, config):
    counts = record["tokens_per_expert"]
    assert len(counts) == config["num_hidden_layers"]
    for layer in counts:
        assert len(layer) == config["num_experts"]
        assert min(layer) > 0.1 * sum(layer) / len(layer)


def test_readme_is_written_from_the_record(record):
    from molae.demo.train import readme

    assert HELDOUT.with_name("README.md").read_text("utf-8") == readme(record)


def test_training_says_what_is_missing():
    # None in sys.modules is how Python says that a module cannot be imported.
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from molae.demo.train import main\n"
        "raise SystemExit(main(['--steps', '1']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'molae[hf]'" in done.stderr


def test_corpus_is_split_by_whole_documents():
    from molae.demo.corpus import _words, gather

    corpus = gather()
    assert corpus == gather()
    assert 100_000 < len(corpus.heldout.encode()) < 400_000
    known = _words("\n".join(corpus.documentation + corpus.source + corpus.validation))
    paragraphs = [part for part in corpus.heldout.split("\n\n") if _words(part).strip()]
    assert len(paragraphs) > 100
    assert not [part for part in paragraphs if _words(part) in known]


def test_loads_without_loss_of_keys():
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    _, info = transformers.AutoModelForCausalLM.from_pretrained(
        CHECKPOINT, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


def test_tokenizer_gives_the_text_back(config):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerFast)
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert tokenizer.pad_token_id == config["pad_token_id"]
    text = HELDOUT.read_text("utf-8")
    for given in (text, "äöü ∑ 漢字 🙂\t\r\n  x"):
        assert tokenizer.decode(tokenizer(given, verbose=False)["input_ids"]) == given


def test_perplexity_is_the_recorded_one(record):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from molae.hf.evaluate import evaluate_path

    found = evaluate_path(CHECKPOINT, HELDOUT)
    recorded = record["mixture"]["heldout"]
    assert found.tokens == recorded["tokens"]
    assert found.perplexity == pytest.approx(recorded["perplexity"], rel=0.005)
    assert found.perplexity_se == pytest.approx(recorded["perplexity_se"], rel=0.05)
