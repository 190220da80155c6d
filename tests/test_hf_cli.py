"""`molae eval`, `molae generate`, the comparison behind them, and the launcher."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf_models
import torch
from memory import peak_memory

import molae
from molae.cli import main
from molae.demo import CHECKPOINT, HELDOUT
from molae.errors import ArgumentError, CheckpointError
from molae.hf import hide_progress
from molae.hf.compare import compare, compare_paths
from molae.hf.evaluate import evaluate
from molae.hf.generate import generate_path
from molae.hf.opening import open_model

hide_progress()
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo checkpoint at half its experts' numbers, and that multiplied out again."""
    folder = tmp_path_factory.mktemp("demo") / "half"
    molae.convert(CHECKPOINT, folder, molae.ConvertConfig(size=0.5))
    hf_models.materialized(folder)
    return folder


@pytest.fixture(scope="module")
def ordinary(demo):
    return demo.with_name("half-ordinary")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(HELDOUT.read_text("utf-8")[:12000], "utf-8")
    return file


def run(capsys, *arguments):
    """Exit code, standard output, standard error."""
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys, *arguments):
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    return json.loads(out)


# ------------------------------------------------------------------ factored and multiplied out


def test_the_demo_scores_the_same_factored_and_multiplied_out(demo, ordinary, text):
    model, tokenizer = open_model(demo)
    twin, _ = open_model(ordinary)
    # First with the products as they are: only the order of float32 sums differs. A logit is a
    # sum of some hundred terms through three layers, so each is off by some hundred roundings,
    # and the mean of thousands of losses by less.
    for layer, other in zip(model.model.layers, twin.model.layers, strict=True):
        own = {k: v.float().detach() for k, v in hf_models.matrices(layer.mlp.experts).items()}
        rounded = other.mlp.experts.gate_up_proj.detach()
        other.mlp.experts.gate_up_proj = torch.nn.Parameter(
            torch.cat([own["gate_proj"], own["up_proj"]], 1)
        )
        torch.testing.assert_close(
            rounded, other.mlp.experts.gate_up_proj.detach(), rtol=2**-8, atol=1e-7
        )
        other.mlp.experts.down_proj = torch.nn.Parameter(own["down_proj"])
    found = compare(model, twin, tokenizer, text.read_text("utf-8"))
    assert abs(found.loss_difference) < 100 * torch.finfo(torch.float32).eps
    assert found.kl < (100 * torch.finfo(torch.float32).eps) ** 2 * 100
    assert found.agreement > 0.999
    # Then as materialize wrote them, rounded to bfloat16: a relative error of about 2^-9/sqrt(3)
    # in place of the 0.35 or so that the compression makes. To leading order the divergence is
    # quadratic in it.
    whole = compare_paths(demo, CHECKPOINT, text)
    rounded = compare_paths(demo, ordinary, text)
    assert whole.kl > 0.05
    assert rounded.kl < 10 * whole.kl * (2**-9 / math.sqrt(3) / 0.35) ** 2
    assert abs(rounded.model.perplexity / rounded.against.perplexity - 1) < 1e-3


def test_a_comparison_against_its_definition(demo, text):
    model, tokenizer = open_model(demo, dtype="float64")
    reference, _ = open_model(CHECKPOINT, dtype="float64")
    reference.set_experts_implementation("eager")
    some = text.read_text("utf-8")[:2500]
    found = compare(model, reference, tokenizer, some, window=48, stride=16, batch_size=3)
    ids = tokenizer(some, return_tensors="pt")["input_ids"][0]
    starts = [*range(0, len(ids) - 48, 16), len(ids) - 48]
    done, rows = 1, []
    for start in starts:
        with torch.no_grad():
            part = ids[None, start : start + 48]
            q, p = (m(part).logits[0].log_softmax(-1) for m in (model, reference))
        for place in range(done, start + 48):
            a, b = q[place - start - 1], p[place - start - 1]
            rows.append([
                (b.exp() * (b - a)).sum(), (a.exp() * (a - b)).sum(),
                float(a.argmax() == b.argmax()), b[ids[place]] - a[ids[place]],
            ])  # fmt: skip
        done = start + 48
    assert found.model.tokens == len(rows) == len(ids) - 1
    means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    mine = [found.kl, found.kl_reverse, found.agreement, found.loss_difference]
    assert mine == pytest.approx(means, rel=1e-9)
    alone = evaluate(model, tokenizer, some, window=48, stride=16)
    assert found.model.loss == pytest.approx(alone.loss, rel=1e-6)
    assert found.model.loss_se == pytest.approx(alone.loss_se, rel=1e-4)
    assert 0 < found.loss_difference_se < found.model.loss_se
    assert found.kl_se > 0
    assert found.agreement_se > 0


def test_a_model_is_no_way_from_itself(demo, text):
    found = compare_paths(demo, demo, text, window=128)
    assert (found.kl, found.kl_reverse, found.loss_difference) == (0, 0, 0)
    assert found.agreement == 1


# ------------------------------------------------------------------ the commands


def test_eval(capsys, demo, ordinary, text):
    one = run_json(capsys, "eval", demo, "--text", text, "--window", 128)
    assert one["perplexity"] == pytest.approx(math.exp(one["loss"]))
    assert one["perplexity_se"] > 0
    assert one["tokens_per_second"] > 0
    assert one["peak_memory"]["resident"] > 2**20
    assert (one["path"], one["against_path"]) == (str(demo), None)
    other = run_json(capsys, "eval", ordinary, "--text", text, "--window", 128, "--threads", 1)
    assert other["perplexity"] == pytest.approx(one["perplexity"], rel=1e-3)
    code, out, _ = run(capsys, "eval", demo, "--text", text, "--window", 128)
    assert code == 0
    assert f"{one['perplexity']:.3f} ± {one['perplexity_se']:.3f}" in out
    assert "peak memory" in out


def test_eval_against(capsys, demo, text):
    ask = ("eval", demo, "--against", CHECKPOINT, "--text", text, "--window", 128, "--stride", 64)
    found = run_json(capsys, *ask)
    assert found["model"]["perplexity"] > found["against"]["perplexity"]
    assert found["kl"] > found["kl_se"] > 0
    assert 0 < found["agreement"] < 1
    code, out, _ = run(capsys, *ask, "--quiet", "--dtype", "auto", "--batch-size", 2)
    assert code == 0
    assert "KL(PATH2 || PATH)" in out
    assert "same most likely token" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "{demo}", "--text", "{tmp}/none.txt"], "none.txt: cannot be read"),
        (["eval", "{demo}", "--text", "{tmp}/empty.txt"], "the text is empty"),
        (["eval", "{tmp}/none", "--text", "{text}"], "no checkpoint here"),
        (["eval", "{demo}", "--text", "{text}", "--against", "{tmp}"], "no checkpoint here"),
        (["eval", "{demo}", "--text", "{text}", "--window", "4096"], "window must be"),
        (["eval", "{demo}", "--text", "{text}", "--dtype", "int8"], "dtype: expected 'auto'"),
        (["eval", "{demo}", "--text", "{text}", "--device", "tape"], "device: "),
        (["generate", "{demo}", ""], "prompt: it is empty"),
        (["generate", "{demo}", "a", "--temperature", "-1"], "temperature: expected 0 or more"),
        (["generate", "{demo}", "a " * 2000], "the model takes 1 to 511"),
        (["generate", "{tmp}", "a"], "no checkpoint here"),
    ],
)
def test_what_cannot_be_run(capsys, arguments, message, demo, text, tmp_path):
    (tmp_path / "empty.txt").touch()
    places = {"demo": demo, "text": text, "tmp": tmp_path}
    code, out, err = run(capsys, *(a.format(**places) for a in arguments))
    assert code == 1
    assert message in err
    assert err.startswith("molae: ")
    assert out == ""


def test_other_vocabularies(capsys, demo, text, tmp_path):
    # The same tokenizer, so that only the models differ; then the other way round.
    hf_models.transformers_checkpoint(tmp_path / "small", "olmoe", V=1000)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "small" / file).write_text((CHECKPOINT / file).read_text())
    ask = ("eval", demo, "--text", text, "--against")
    code, _, err = run(capsys, *ask, tmp_path / "small")
    assert code == 1
    assert "different vocabularies: the models give 2048 and 1000 logits" in err
    twin = tmp_path / "twin"
    molae.materialize(demo, twin)
    data = json.loads((twin / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    data["model"]["merges"] = data["model"]["merges"][:200]
    (twin / "tokenizer.json").write_text(json.dumps(data))
    code, _, err = run(capsys, *ask, twin)
    assert code == 1
    assert "split the text differently" in err


def test_no_tokenizer_and_missing_weights(demo, text, tmp_path):
    hf_models.transformers_checkpoint(tmp_path / "bare", "olmoe")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        open_model(tmp_path / "bare")
    from safetensors.torch import load_file, save_file

    for file in CHECKPOINT.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    own = load_file(tmp_path / "model.safetensors")
    del own["model.norm.weight"]
    save_file(own, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights .* model\.norm\.weight"):
        open_model(tmp_path)


def test_without_the_extra(capsys, demo, text, monkeypatch):
    for name in [n for n in sys.modules if n == "molae.hf" or n.startswith("molae.hf.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for arguments in (("eval", demo, "--text", text), ("generate", demo, "a")):
        code, _, err = run(capsys, *arguments)
        assert code == 1
        assert "molae.hf needs torch and transformers; run: pip install 'molae[hf]'" in err
        assert "Error" not in err


def test_generate(capsys, demo):
    ask = ("generate", demo, "The function returns", "--max-new-tokens", 6)
    code, out, err = run(capsys, *ask)
    assert code == 0
    assert out.startswith("The function returns")
    assert "6 tokens" in err
    found = run_json(capsys, *ask)
    assert out == found["prompt"] + found["text"] + "\n"
    drawn = [run_json(capsys, *ask, "--temperature", 1.5, "--seed", s)["text"] for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    cold = run_json(capsys, *ask, "--temperature", 1e-3, "--seed", 5)
    assert cold["text"] == found["text"]


def test_generating_leaves_the_generator_alone_and_ends_with_the_context(demo):
    state = torch.get_rng_state()
    prompt = "a " * 200
    found = generate_path(demo, prompt, max_new_tokens=4000, temperature=1.0)
    assert torch.equal(state, torch.get_rng_state())
    assert 0 < found.tokens < 512
    with pytest.raises(ArgumentError, match="max_new_tokens"):
        generate_path(demo, "a", max_new_tokens=0)


# ------------------------------------------------------------------ programs that know nothing

STUB = """
    import sys
    from transformers import AutoModelForCausalLM

    def main():
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        print(type(model.model.layers[0].mlp.experts).__name__, sys.argv[1:], __name__)
        return 3

    if __name__ == "__main__":
        sys.exit(main())
"""


@pytest.fixture
def stub(tmp_path):
    """An installed command, a module and a file, each of which loads a checkpoint."""
    (tmp_path / "stubmodule.py").write_text(textwrap.dedent(STUB))
    info = tmp_path / "stub-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stub\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[console_scripts]\nstub-command = stubmodule:main\n")
    return tmp_path


@pytest.mark.parametrize(
    ("program", "name"),
    [("stub-command", "stubmodule"), ("stubmodule", "__main__"), ("file", "__main__")],
)
def test_the_launcher(program, name, stub, demo, monkeypatch, capsys):
    import molae.hf.__main__ as launcher

    program = str(stub / "stubmodule.py") if program == "file" else program
    monkeypatch.syspath_prepend(str(stub))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "stubmodule", raising=False)
    try:
        code = launcher.main([program, str(demo), "--option"])
    except SystemExit as error:
        code = error.code
    assert code == 3
    out = capsys.readouterr().out.strip()
    assert out == f"LatentExperts {[str(demo), '--option']} {name}"


def test_the_launcher_as_a_process(stub, demo):
    command = [sys.executable, "-P", "-m", "molae.hf", str(stub / "stubmodule.py"), str(demo)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 3, done.stderr
    assert "LatentExperts" in done.stdout


def test_the_launcher_says_what_it_does_not_find(capsys):
    import molae.hf.__main__ as launcher

    assert launcher.main(["no_such_program"]) == 2
    assert "neither an installed command nor a module" in capsys.readouterr().err
    assert launcher.main(["no.such.module"]) == 2
    capsys.readouterr()
    assert launcher.main([]) == 2
    assert "PROGRAM" in capsys.readouterr().err
    assert launcher.main(["--help"]) == 0
    assert "PROGRAM" in capsys.readouterr().out


TASK = """
task: molae_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


def test_the_launcher_with_lm_eval(demo, tmp_path, monkeypatch):
    """Its number for a text is the model's own; with random experts it would be far off."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    pytest.importorskip("datasets", reason="datasets is not installed")
    documents = HELDOUT.read_text("utf-8")[:4000].split("\n\n")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "text.yaml").write_text(TASK.format(file=tmp_path / "text.jsonl"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-P", "-m", "molae.hf", "lm_eval", "--model", "hf"]
    command += ["--device", "cpu", "--model_args", f"pretrained={demo},dtype=float32"]
    command += ["--tasks", "molae_text"]
    command += ["--include_path", str(tmp_path / "task"), "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(written.read_text())["results"]["molae_text"]["bits_per_byte,none"]

    model, tokenizer = open_model(demo)
    total = 0.0
    for text in documents:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
        assert ids.shape[1] <= 512  # one window, or the two would cut it differently
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    own = total / math.log(2) / sum(len(text.encode()) for text in documents)
    assert found == pytest.approx(own, rel=1e-4)


# ------------------------------------------------------------------ memory


def test_loading_takes_the_model_and_no_more_than_a_layer(tmp_path):
    from transformers import OlmoeConfig

    config = OlmoeConfig(
        hidden_size=512, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4,
        num_experts=32, num_experts_per_tok=4, vocab_size=100, pad_token_id=0,
    )  # fmt: skip
    model = molae.hf.latent_model(config, group_size=8, rank=200, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="20MB")
    size = 4 * model.num_parameters()  # in float32, to which it is cast on the way
    layer = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    code = textwrap.dedent(f"""
        import sys, torch, molae.hf
        from transformers import AutoModelForCausalLM
        def anonymous():
            with open("/proc/self/status") as file:
                return [line.split()[1] for line in file if line.startswith("RssAnon")][0]
        before = anonymous()
        AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, dtype="float32")
        open({str(tmp_path / "before")!r}, "w").write(before)
    """)
    peak = peak_memory([sys.executable, "-P", "-c", code])
    assert peak.returncode == 0
    before = 1024 * int((tmp_path / "before").read_text())
    # 64 MB for what the libraries import only when they load something.
    assert peak.anonymous - before < size + layer + 64e6 < 1.6 * size
