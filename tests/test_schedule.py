"""How long a shared conversion would take: the simulation, and what it is fed with."""

import json
import math

import pytest
from benchmark_modules import load
from checkpoints import make_checkpoint, make_config
from hypothesis import given
from hypothesis import strategies as st

import molae
from molae.arch.registry import find_family
from molae.convert.estimate import group_bytes, group_flops
from molae.errors import ArgumentError

schedule = load("schedule")
Layer, Pool, Rates = schedule.Layer, schedule.Pool, schedule.Rates
estimate, layers_of, makespan = schedule.estimate, schedule.layers_of, schedule.makespan

SECONDS = st.lists(st.floats(0.01, 100), min_size=1, max_size=40)


@pytest.mark.parametrize(
    ("seconds", "workers", "wanted"),
    [
        ([3, 1, 2], 1, 6),
        ([3, 1, 2], 2, 3),
        ([3, 3, 2, 2, 2], 2, 7),  # in the order given, as they are handed out
        ([5], 4, 5),
        ([1] * 60, 7, 9),
        ([], 3, 0),
    ],
)
def test_known_schedules(seconds, workers, wanted):
    assert makespan(seconds, workers) == wanted


@given(SECONDS, st.integers(1, 50))
def test_bounds_of_every_schedule(seconds, workers):
    found = makespan(seconds, workers)
    least = max(max(seconds), sum(seconds) / workers)
    assert found >= least * (1 - 1e-12)
    assert found <= sum(seconds) / workers + max(seconds) * (1 + 1e-12)  # of taking what comes next
    assert makespan(seconds, 1) == pytest.approx(sum(seconds))


def test_what_a_layer_takes_by_hand():
    layer = Layer(groups=5, group_flops=2e9, read=6_000_000_000, written=3_000_000_000)
    rates = Rates(gflops=1.0, read_gbs=2.0, write_gbs=1.0)
    found = layer.seconds(rates, Pool(1, 1, 2), layers=4)
    # 3 types of 5 groups on 2 threads: 9 rounds of 2 s; the first read and the last write beside.
    assert found == {"compute": 18, "read": 3, "write": 3, "whole": 18 + 2}
    # 4 workers at once share 2 GB/s.
    slow = Rates(gflops=1.0, read_gbs=2.0, write_gbs=1.0, shared_gbs=2.0)
    found = layer.seconds(slow, Pool(4, 2, 2), layers=4)
    assert found == {"compute": 18, "read": 12, "write": 6, "whole": 18 + 6}


def test_one_machine_takes_the_sum_and_many_no_less_than_a_layer():
    layer = Layer(groups=4, group_flops=1e9, read=10**9, written=10**9)
    letters = {"E": 8, "F": 4, "D": 4}
    rates = Rates(1.0, 1.0, 1.0)
    alone = estimate([layer] * 6, letters, rates, Pool(1, 1, 2), choice=False)
    assert alone["wall_s"] == pytest.approx(6 * alone["layer_s"])
    assert alone["efficiency"] == pytest.approx(1)
    assert alone["machine_hours"] == pytest.approx(alone["wall_s"] / 3600)
    four = estimate([layer] * 6, letters, rates, Pool(4, 1, 2), choice=False)
    assert four["wall_s"] == pytest.approx(2 * four["layer_s"])
    assert four["efficiency"] == pytest.approx(6 / 8)
    many = estimate([layer] * 6, letters, rates, Pool(50, 2, 2), choice=False)
    assert many["wall_s"] == pytest.approx(many["layer_s"])
    first = estimate([layer] * 6, letters, rates, Pool(50, 2, 2), choice=True)
    assert first["wall_s"] > many["wall_s"]
    assert first["choice_s"] == pytest.approx(schedule.choice_flops(letters) / 2e9)


def test_sizes_are_those_of_a_plan(tmp_path):
    """By the config alone the same bytes and operations as by the checkpoint."""
    sizes = {"L": 3, "E": 8, "D": 32, "F": 16}
    src = make_checkpoint(tmp_path / "src", dtype="BF16", **sizes)
    plan = molae.plan(src, molae.ConvertConfig(size=0.5, group_size=4))
    config = make_config("olmoe", **sizes) | {"torch_dtype": "bfloat16"}
    layers, facts = layers_of(config, find_family(config), size=0.5, k=4)
    assert len(layers) == facts["moe_layers"] == 3
    assert facts["read_bytes"] == plan.before.expert_bytes
    indices = sum(roles["perm"] for roles in plan.after.numbers.values())
    assert facts["written_bytes"] == plan.after.expert_bytes - 4 * indices
    assert (facts["rank"],) == plan.types["gate_proj"].ranks
    assert layers[0].groups == 2
    assert layers[0].group_flops == group_flops(4, facts["rank"], F=16, D=32)
    assert facts["workspace_bytes"] == group_bytes(4, facts["rank"], F=16, D=32)


def test_fp8_is_read_at_a_byte_a_number():
    config = make_config("olmoe") | {"torch_dtype": "bfloat16"}
    plain, _ = layers_of(config, find_family(config), size=0.5, k=2)
    config["quantization_config"] = {"quant_method": "fp8"}
    eight, _ = layers_of(config, find_family(config), size=0.5, k=2)
    assert (2 * eight[0].read, eight[0].written) == (plain[0].read, plain[0].written)


def test_an_encoding_without_an_estimate_is_refused():
    config = make_config("olmoe") | {"quantization_config": {"quant_method": "awq"}}
    with pytest.raises(ArgumentError, match="'awq'; estimates are for fp8, mxfp4"):
        layers_of(config, find_family(config), size=0.5, k=2)


def test_the_estimate_is_checked_by_a_conversion(monkeypatch):
    monkeypatch.setattr(schedule, "WRITTEN", 1_000_000)
    monkeypatch.setattr(schedule, "CHECKED", {"layers": 2, "E": 8, "F": 192, "D": 384, "V": 64})
    found = schedule.check()
    # Small matrices have more to do beside the factorization; a wrong count is off by more.
    assert 0.3 < found["foreseen_s"] / found["taken_s"] < 1.5


def test_the_measurement_measures(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "WRITTEN", 1_000_000)
    rates = schedule.measure({"F": 32, "D": 64}, 4, 0.5, tmp_path)
    assert all(0 < rate < math.inf for rate in (rates.gflops, rates.read_gbs, rates.write_gbs))
    assert rates.shared_gbs is None
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(schedule, "measure", None)  # all rates are given
    config = tmp_path / "model.json"
    config.write_text(json.dumps(make_config("olmoe", L=6)))
    given = [
        "--config", str(config), "--size", "0.5", "--group-size", "2", "--machines", "1", "3",
        "--threads", "2", "--gflops", "1e-6", "--read-gbs", "1", "--write-gbs", "1",
        "--shared-gbs", "1", "--keep", "--results", str(tmp_path),
    ]  # fmt: skip
    assert schedule.main(given) == 0
    out = capsys.readouterr().out
    kept = json.loads((tmp_path / "schedule.json").read_text())
    assert out.strip() == schedule.table(kept)
    one, three = kept["estimates"]
    assert one["wall_s"] == pytest.approx(3 * three["wall_s"], rel=1e-3)
    assert "writes at 1.00 GB/s (given); the file system gives 1 GB/s" in out
    assert "| 3 |" in out
