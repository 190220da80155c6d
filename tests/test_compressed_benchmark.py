"""The comparisons of layers and models with fewer active experts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from benchmark_modules import load

pytest.importorskip("torch")
pytest.importorskip("transformers")

from molae import ops

settings = load("settings")
active = load("active")
tables = load("tables")

TINY = settings.Settings(
    repeats=2, pause=0.0, stream_bytes=2**20, tokens=(1, 40), many=40, D=64,
    shapes=(settings.Shape("tiny", E=8, K=4, D=64, F=32),),
)  # fmt: skip


def test_layers_are_checked_and_counted():
    found = active.active(TINY, 10.0)
    assert [(row["dtype"], row["N"]) for row in found["rows"]] == [
        ("float32", 1), ("float32", 40), ("bfloat16", 1), ("bfloat16", 40),
    ]  # fmt: skip
    for row in found["rows"]:
        assert row["n"] == 2
        assert row["left"] == 0.5
        work = row["work"]
        assert work["vectors"]["flops"] == work["plain"]["flops"]
        assert work["narrow"]["flops"] == work["plain"]["flops"] * (1 + 1 / 8)
        assert row["bound"] == ("bytes" if row["N"] == 1 else "flops")
    one = found["rows"][0]["work"]
    assert one["all K"]["bytes"] == 4 * 3 * 32 * 64 * 4
    assert one["vectors"]["bytes"] == 2 * (3 * 32 * 64 + 2 * 64 + 32) * 4
    assert "within 1.05 of plain" in tables.benchmarks(
        {"header": load("header").header(1), "peaks": {"gflops": {}, "copy_gbs": 1.0},
         "quick": True, "active": found}
    )  # fmt: skip


@pytest.mark.parametrize("name", ["compressed_experts_forward", "narrow_experts_forward"])
def test_a_wrong_layer_is_refused(monkeypatch, name):
    right = getattr(ops, name)
    monkeypatch.setattr(active.ops, name, lambda *a, **k: right(*a, **k) * np.float32(1.01))
    with pytest.raises(ArithmeticError, match="off by"):
        active.active(TINY, 10.0)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore::molae.errors.CalibrationWarning")
def test_a_small_run_and_the_same_again(tmp_path, capsys):
    pytest.importorskip("accelerate")
    main, plot = load("compressed.__main__"), load("compressed.plot")
    out, text = tmp_path / "found.json", tmp_path / "text"
    text.write_text(
        "The router sends a token to the experts that its weights are nearest to. " * 99
    )
    command = [
        "--model-sizes", "1.0", "--forms", "stock", "plain", "additive", "narrow-8",
        "--tokens", "1024", "--test-tokens", "1500", "--steps", "1", "--threads", "1", "--length",
        "64", "--calibration", str(text), "--work", str(tmp_path / "work"), "--json", str(out),
    ]  # fmt: skip
    assert main.main(command) == 0
    first = json.loads(out.read_text())
    rows = {(r["form"], r["stage"], r["n"]): r for r in first["rows"]}
    # The demonstration's router does not make its weights add up to 1: both are the same.
    assert rows["stock", "", 2]["loss"] == pytest.approx(rows["plain", "", 2]["loss"], rel=1e-6)
    assert rows["stock", "", 2]["active_parameters"] == rows["plain", "", 2]["active_parameters"]
    whole = rows["full", "", 0]
    assert whole["rise"] == 0
    for n in (1, 2, 3):
        row = rows["narrow-8", "fitted", n]
        plain = rows["plain", "", n]
        gap = plain["loss"] - whole["loss"]
        assert row["closed"] == pytest.approx((plain["loss"] - row["loss"]) / gap, rel=1e-6)
        assert plain["active_parameters"] < row["active_parameters"] < whole["active_parameters"]
    assert ("narrow-8", "distilled", 2) in rows
    assert rows["full", "tuned", 0]["active_parameters"] == whole["active_parameters"]
    assert "additive vectors" in capsys.readouterr().out
    assert main.main(command) == 0
    assert "narrow" not in capsys.readouterr().err
    assert json.loads(out.read_text())["rows"] == first["rows"]
    pytest.importorskip("matplotlib")
    plot.draw(first).savefig(tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 5000
