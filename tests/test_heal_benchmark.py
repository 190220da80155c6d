"""The comparison of what training brings back: its steps, its figures, and their check."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
from benchmark_modules import load

pytest.importorskip("torch")
pytest.importorskip("transformers")

import molae
import molae.demo

figures = load("heal.figures")
tables = load("heal.tables")
rows_module = load("heal.rows")
making = load("heal.making")
model_module = load("quality.model")

SIZE = 0.4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run: the command, the folder, and what it found."""
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("heal")
    out, text = folder / "found.json", folder / "text"
    text.write_text(molae.demo.HELDOUT.read_text("utf-8")[:8000], "utf-8")
    command = [
        "--model-sizes", str(SIZE), "--tokens", "1024", "--test-tokens", "1500", "--length", "64",
        "--heal-tokens", "1280", "--heal-passes", "2", "--heal-rate", "0.003",
        "--router-steps", "2", "--tune-steps", "2", "--batch", "2", "--threads", "1",
        "--calibration", str(text),
        "--work", str(folder / "work"), "--json", str(out),
    ]  # fmt: skip
    import torch

    before = molae.get_num_threads(), torch.get_num_threads()
    try:
        assert load("heal.__main__").main(command) == 0
        yield command, folder, json.loads(out.read_text())
    finally:
        molae.set_num_threads(before[0])
        torch.set_num_threads(before[1])


def by_name(result):
    return {row["name"]: row for row in result["rows"]}


def test_every_row_is_made_by_its_steps(run):
    rows = by_name(run[2])
    assert list(rows) == ["original", "original-tuned", *list(rows_module.ROWS)[2:]]
    assert rows["original"]["rise"] == 0
    for name, row in rows.items():
        if "loss" not in row:
            continue
        assert tuple(step["step"] for step in row["steps"]) == rows_module.ROWS[name].steps
        for step in row["steps"]:
            assert step["seconds"] > 0
            assert step["cpu_seconds"] > 0
            assert step["peak_bytes"] >= step["start_bytes"] > 10**7
    # Steps that rows begin with alike were done once.
    assert rows["both"]["steps"][:2] == rows["layers"]["steps"]
    assert rows["anchored"]["steps"][1] != rows["layers"]["steps"][1]
    assert rows["reap"]["experts"] == rows["reap-tuned"]["experts"] == int(SIZE * 32)
    loss = {name: row["loss"] for name, row in rows.items() if "loss" in row}
    for name, before in (
        ("original-tuned", "original"), ("reap", "original"), ("reap-routers", "reap"),
        ("reap-tuned", "reap-routers"), ("calibrated", "original"), ("routers", "calibrated"),
        ("both", "layers"), ("tuned", "both"),
    ):  # fmt: skip
        assert loss[name] != loss[before], name
    # A text so short is known to the layers by heart already: trained, they may stay as they are.
    healed = [molae.Report.from_file(path) for path in run[1].glob("work/*/layers-*/")]
    assert sorted(report.settings["anchored"] for report in healed) == [False, False, True]
    assert all(row.steps > 0 for report in healed for row in report.healed)
    # 20 sequences of 64, two rows a step.
    assert run[2]["training"]["more_steps"] == 10


def test_the_shares_are_those_of_the_perplexities(run):
    rows = by_name(run[2])
    base = rows["original"]["perplexity"]
    for name, before in (("layers", "calibrated"), ("tuned", "calibrated"), ("reap-tuned", "reap")):
        lost, left = (rows[n]["perplexity"] / base - 1 for n in (before, name))
        assert rows[name]["rise"] == pytest.approx(left, rel=1e-6)
        assert rows[name]["taken_back"] == pytest.approx(1 - left / lost, rel=1e-6)
    over = rows["tuned"]["perplexity"] / rows["original-tuned"]["perplexity"] - 1
    assert rows["tuned"]["rise_tuned"] == pytest.approx(over, rel=1e-6)
    assert "rise_tuned" not in rows["both"]


def test_the_same_command_goes_on(run, capsys):
    command, folder, found = run
    records = {p: p.stat().st_mtime_ns for p in (folder / "work").rglob("*-*.json")}
    assert load("heal.__main__").main(command) == 0
    said = capsys.readouterr()
    assert "perplexity" not in said.err
    assert "molae + layer by layer + routers + fine-tuning" in said.out
    assert json.loads((folder / "found.json").read_text())["rows"] == found["rows"]
    assert records == {p: p.stat().st_mtime_ns for p in (folder / "work").rglob("*-*.json")}


def test_other_settings_make_only_their_own_rows_anew(run, capsys):
    command, folder, found = run
    other = [*command, "--tune-rate", "1e-3", "--json", str(folder / "other.json")]
    assert load("heal.__main__").main(other) == 0
    again = by_name(json.loads((folder / "other.json").read_text()))
    for name, row in by_name(found).items():
        if "loss" in row:
            same = again[name]["loss"] == row["loss"]
            assert same == (not rows_module.ROWS[name].tuned), name


def test_it_is_drawn(run, tmp_path):
    pytest.importorskip("matplotlib")
    load("heal.plot").draw(run[2]).savefig(tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 5000


# ----------------------------------------------------------------- the check of the figures


def made(loss, name, size=1.0, **more):
    cost = {"seconds": 2.0, "cpu_seconds": 1.0, "start_bytes": 10**8, "peak_bytes": 2 * 10**8}
    steps = [{"step": step, **cost} for step in rows_module.ROWS[name].steps]
    return {"name": name, "size": size, "steps": steps, "experts": 4, "loss": loss,
            "perplexity": math.exp(loss), "rise": math.expm1(loss - 3.0), "rise_se": 0.01,
            **more}  # fmt: skip


@pytest.fixture
def result():
    lost, left = math.expm1(0.2), math.expm1(0.05)
    tuned = {"rise_tuned": math.expm1(-0.05), "rise_tuned_se": 0.01}
    return {
        "header": {"threads": 1, "busy": False, "cpu": {"model": "a processor"}},
        "names": {"model": "small", "test": "held out", "calibration": "text"},
        "model": {"kind": "olmoe", "parameters": 10**6, "experts": 8, "num_experts_per_tok": 2},
        "calibration_tokens": 1000, "test_tokens": 100,
        "training": {"layers": {"passes": 8, "rate": 0.01, "sequences": 9}, "router_steps": 3,
                     "router_rate": 5e-5, "tune_steps": 3, "more_steps": 1, "tune_rate": 1e-4,
                     "distill": 1.0, "batch": 8, "length": 512},
        "rows": [
            made(3.0, "original"),
            made(3.1, "original-tuned", rise_tuned=0.0, rise_tuned_se=0.0),
            made(3.2, "calibrated", 0.5),
            made(3.05, "tuned", 0.5, taken_back=(lost - left) / lost, **tuned),
        ],
    }  # fmt: skip


def test_right_figures_pass_and_are_shown(result):
    figures.check(result)
    text = tables.heal(result)
    assert "+5.13%" in text
    assert "| 77% |" in text.replace("  ", " ")
    assert "-4.88%" in text
    assert "1.0 (2) s, 100 MB" in text


@pytest.mark.parametrize(
    ("row", "entry", "value"),
    [
        (3, "taken_back", 0.9),
        (3, "taken_back", None),
        (3, "rise", 0.04),
        (3, "rise_tuned", 0.0),
        (2, "perplexity", 24.0),
        (1, "loss", 3.2),
        (0, "perplexity", 21.0),
    ],
)
def test_a_wrong_figure_is_refused(result, row, entry, value):
    wrong = copy.deepcopy(result)
    wrong["rows"][row][entry] = value
    for shown in (figures.check, tables.heal):
        with pytest.raises(ArithmeticError, match=r" at (0\.5|1): "):
            shown(wrong)


def test_rows_must_share_the_steps_that_they_begin_with(result):
    result["rows"][3]["steps"][0]["seconds"] = 3.0
    with pytest.raises(ArithmeticError, match="another than in other rows"):
        figures.check(result)
    result["rows"][3]["steps"].pop(0)
    with pytest.raises(ArithmeticError, match="other steps than its name says"):
        figures.check(result)


def test_a_share_of_nothing_is_none():
    assert figures.taken_back(0.0, -0.1) is None
    assert figures.taken_back(0.2, 0.05) == pytest.approx(0.75)
    assert figures.taken_back(0.2, -0.1) == pytest.approx(1.5)


# ------------------------------------------------------------------------ single steps


@pytest.fixture
def bench(tmp_path):
    _, tokenizer = model_module.load(molae.demo.CHECKPOINT)
    text = molae.demo.HELDOUT.read_text("utf-8")[:20_000]
    tokens = np.array(tokenizer(text)["input_ids"])
    (tmp_path / "text.txt").write_text(text)
    with making.Processes() as processes:
        yield making.Bench(
            molae.demo.CHECKPOINT, tokens, 16, 64, text=tmp_path / "text.txt", work=tmp_path,
            threads=1, processes=processes,
        )  # fmt: skip


def test_a_pruned_checkpoint_answers_as_the_pruned_model(bench, one_thread):
    """It is loaded by Transformers, with fewer experts, and answers what the comparison of methods
    scores."""
    import torch

    folder, (cost,) = bench.make([making.Step("pruned", "prune", {"size": 0.3})])
    assert cost["step"] == "pruned"
    pruned, _ = model_module.load(folder)
    assert pruned.config.num_experts == 9
    model, _ = model_module.load(bench.path)
    with bench.calibration() as calibration:
        layers = model_module.layers_of(model, calibration)
    reap = load("quality.baselines.reap")
    rows = torch.from_numpy(bench.tokens[:128].reshape(2, 64))
    with torch.no_grad(), model_module.replaced(model, [reap.compress(x, 0.3) for x in layers]):
        expected = model(input_ids=rows).logits
        found = pruned(input_ids=rows).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_half_a_step_is_done_again_and_a_whole_one_is_not(bench):
    step = making.Step("published", "convert", {"method": "molae", "size": 0.8, "group_size": 4})
    folder, first = bench.make([step])
    assert bench.make([step]) == (folder, first)
    folder.with_suffix(".json").unlink()  # as a run leaves it that was cut off
    again, second = bench.make([step])
    assert again == folder
    assert second != first


def test_a_step_that_fails_is_named(bench):
    step = making.Step("layers", "heal", {"passes": 1, "sequences": 2})
    with pytest.raises(RuntimeError, match="layers: failed with exit code 1"):
        bench.make([step])  # the original has no factors
    assert not list(bench.work.glob("layers-*.json"))
