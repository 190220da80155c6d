"""The benchmarks of layers and models refuse wrong answers and say what they measured."""

from __future__ import annotations

import dataclasses
import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf_models
import torch
from benchmark_modules import load

import molae.hf.experts

check = load("check")
layer_check = load("layer_check")
layer_forms = load("layer_forms")
layer_tables = load("layer_tables")
layers = load("layers")
models = load("models")
peak = load("peak")
settings = load("settings")
tables = load("tables")

SHAPE = settings.Shape("tiny", E=16, K=3, D=64, F=48)
FEW = settings.Shape("few", E=4, K=2, D=64, F=48, dtypes=("bfloat16",), most_tokens=4)
TINY = settings.Settings(
    E=16, F=48, D=64, V=512, layers=2, repeats=2, threads=1, pause=0.0, shapes=(SHAPE, FEW),
    tokens=(1, 4, 20, 24), few=4, many=20, stream_bytes=2**16, prompt=20, new_tokens=3,
)  # fmt: skip
TYPES = ("float32", "bfloat16")


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    """The same code as it stands, on one thread: a compilation takes a quarter of a minute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_forms, "compiled", lambda function: function)
        patch.setattr(layers, "_hindrance", lambda: "")
        yield
    torch.set_num_threads(before)


def subjects(dtype, shape=SHAPE):
    pool = layer_forms.Pool()
    dtype = getattr(torch, dtype)
    found = layers._subjects(shape, dtype, pool)
    return found, layers._inputs(shape, 20, dtype, pool)


# ------------------------------------------------------------------- the contestants


@pytest.mark.parametrize("dtype", TYPES)
def test_every_form_of_a_layer_is_that_layer(dtype):
    found, given = subjects(dtype)
    tol = layer_check.tolerance(given[0].dtype, SHAPE.D)
    sample = torch.arange(20)
    for subject in found:
        with torch.no_grad():
            truth = layer_check.reference(subject.layer, *given)
            for form in (subject.ours, *subject.others):
                layer_check.check_forward(form.name, form.call(*given), truth, sample, None, tol)
    assert [s.size for s in found] == [0.6, 0.75, 1.0]
    assert [f.name for f in found[0].others] == ["molae.hf.forward", "grouped_mm", "torch.compile"]
    assert [f.name for f in found[2].others] == ["eager", "grouped_mm", "batched_mm"]


@pytest.mark.parametrize("dtype", TYPES)
def test_the_reference_is_the_definition(dtype):
    found, (x, index, weights) = subjects(dtype)
    for subject in found:
        exact = hf_models.by_definition(subject.layer, x, index, weights)
        with torch.no_grad():
            reference = layer_check.reference(subject.layer, x, index, weights)
        assert torch.allclose(reference, exact, rtol=1e-12, atol=1e-12)


def test_ranks_with_and_without_room_for_zeros():
    assert layer_forms.padded_rank(1427, torch.float32) == 1428
    assert layer_forms.padded_rank(1427, torch.bfloat16) == 1432
    assert layer_forms.padded_rank(1424, torch.bfloat16) == 1424
    pool = layer_forms.Pool()
    with pytest.raises(ValueError, match="no room"):
        layer_forms.latent(dataclasses.replace(SHAPE, D=63), 1.0, torch.float32, pool, rank=62)


def test_bytes_and_operations_of_a_layer():
    latent, _, dense = subjects("bfloat16")[0]
    index = torch.tensor([[0, 1, 9], [0, 2, 3]])  # groups 0 to 7 and 8 to 15
    F, D, R = SHAPE.F, SHAPE.D, latent.rank
    assert dense.work(index) == (3 * 5 * F * D * 2, 2 * 3 * 6 * F * D)
    M = R * (D - R)
    assert latent.work(index) == (3 * 2 * (5 * F * R + 2 * M), 2 * 3 * (6 * F * R + 3 * M))


def test_a_pool_gives_other_numbers_each_time():
    pool = layer_forms.Pool()
    a, b = (pool.draw((8, 1000), 2.0, torch.float32) for _ in range(2))
    assert not torch.equal(a, b)
    assert torch.equal(a, layer_forms.Pool().draw((8, 1000), 2.0, torch.float32))
    assert float(a.std()) == pytest.approx(2.0, rel=0.05)
    large = pool.draw((5_000_000,), 1.0, torch.float32)
    assert torch.equal(large[pool.LENGTH :], large[: 5_000_000 - pool.LENGTH])


# ------------------------------------------------------------------ wrong answers


@pytest.mark.parametrize("dtype", TYPES)
def test_one_wrong_token_is_refused(dtype):
    found, given = subjects(dtype)
    subject, tol = found[0], layer_check.tolerance(given[0].dtype, SHAPE.D)
    with torch.no_grad():
        y = subject.ours.call(*given)
        truth = layer_check.reference(subject.layer, *given)
    sample = torch.tensor([0, 7])
    for token, against in ((7, None), (5, y)):  # with a truth, and without
        wrong = y.clone()
        wrong[token] *= 1 + 4 * tol
        with pytest.raises(check.WrongAnswer, match="name of it"):
            layer_check.check_forward("name of it", wrong, truth[sample], sample, against, tol)
        wrong[token] = torch.nan
        with pytest.raises(check.WrongAnswer):
            layer_check.check_forward("x", wrong, truth[sample], sample, against, tol)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_case_refuses_one_wrong_expert(monkeypatch, dtype):
    right = molae.hf.experts.forward_native

    def off(module, x, index, weights):
        return right(module, x, (index + (index == 2)) % module.num_experts, weights)

    monkeypatch.setattr(molae.hf.experts, "forward_native", off)
    shape = dataclasses.replace(SHAPE, dtypes=(dtype,), E=8)
    with pytest.raises(check.WrongAnswer, match=r"0\.6 molae"):
        layers.layers(dataclasses.replace(TINY, shapes=(shape,)), 10.0)


@pytest.mark.parametrize(
    ("which", "expected"), [(0, "dx"), (1, "dweights"), (-1, "ddown_proj.1.private")]
)
def test_a_case_refuses_wrong_gradients(monkeypatch, which, expected):
    right = torch.autograd.grad
    calls = []

    def off(y, inputs, *args, **options):
        grads = list(right(y, inputs, *args, **options))
        if y.dtype == torch.float32 and not calls:  # molae's; the truth is in float64
            calls.append(len(grads))
            grads[which] = 1.01 * grads[which]
        return tuple(grads)

    monkeypatch.setattr(torch.autograd, "grad", off)
    shape = dataclasses.replace(SHAPE, dtypes=("float32",))
    with pytest.raises(check.WrongAnswer, match=expected):
        layers.layers(dataclasses.replace(TINY, shapes=(shape,)), 10.0)


def test_gradients_of_other_parameters_are_refused():
    with pytest.raises(check.WrongAnswer, match="gradients of"):
        layer_check.agree("x", {"a": torch.ones(2)}, {"b": torch.ones(2)}, 1.0)


# ------------------------------------------------------------------------- the cases


@pytest.fixture(scope="module")
def found():
    return json.loads(json.dumps(layers.layers(TINY, 10.0)))


def test_rows_of_layers(found):
    rows = found["rows"]
    forward = [r for r in rows if r["direction"] == "forward"]
    assert {(r["shape"], r["dtype"], r["N"]) for r in forward} == {
        *(("tiny", dtype, N) for dtype in TYPES for N in TINY.tokens),
        *(("few", "bfloat16", N) for N in (1, 4)),
    }
    backward = [r for r in rows if r["direction"] == "backward"]
    assert {(r["dtype"], r["N"]) for r in backward} == {("float32", 20), ("float32", 24)}
    for row in rows:
        assert row["size"] in (0.6, 0.75, 1.0)
        assert row["best"] in row["times"]
        assert row["best"] != "molae"
        assert ("read_share" in row) == (row["N"] <= 4)
        assert ("peak_share" in row) == (row["N"] >= 20)
        median = row["times"]["molae"]["median_s"]
        assert row["gflops"] == pytest.approx(row["flops"] / median / 1e9)
        assert bool(row["goals"]) == (row["size"] < 1)
        # Of many tokens, only the form that was best with fewer goes on.
        assert (len(row["times"]) == 2) == (row["N"] == 24)
        if row["direction"] == "forward":
            assert row["error"] <= row["tolerance"]
    pair = [r for r in rows if (r["shape"], r["N"], r["size"]) == ("tiny", 20, 0.6)]
    flops = {r["direction"]: r["flops"] for r in pair}
    assert flops["backward"] == 2 * flops["forward"]
    assert ["against_float32" in r for r in pair] == [False, False, True]


def test_models_are_measured_and_checked():
    found = json.loads(json.dumps(models.models(TINY)))
    assert [(r["model"][:5], r["dtype"], r["size"], r["phase"]) for r in found["rows"]] == [
        (model, dtype, size, phase)
        for model in ("demo", "OLMoE")
        for dtype in TYPES
        for size in settings.SIZES
        for phase in ("prefill", "decode")
    ]
    for row in found["rows"]:
        median = row["times"]["molae"]["median_s"]
        assert row["tokens_per_s"]["molae"] == pytest.approx(row["tokens"] / median)
        assert row["tokens"] == {"prefill": 20, "decode": 3}[row["phase"]]
    text = "\n".join(layer_tables.models(found, tables.table))
    assert "OLMoE, 2 layers, bfloat16, 0.75" in text


def test_a_model_with_a_wrong_layer_is_refused(monkeypatch):
    right = molae.hf.experts.forward_native
    monkeypatch.setattr(molae.hf.experts, "forward_native", lambda *given: 1.05 * right(*given))
    with pytest.raises(check.WrongAnswer, match="demo"):
        models.models(TINY)


def test_a_model_not_run_by_the_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(molae.hf.experts, "forward_native", lambda *given: None)
    with pytest.raises(RuntimeError, match="not by the kernels"):
        models.models(TINY)


def test_tables_say_which_goals_are_reached(found):
    for n, row in enumerate(r for r in found["rows"] if "read_share" in r and r["goals"]):
        row["goals"]["few tokens: faster than torch"] = [2.5 + n, 2.0]
        row["goals"]["few tokens: of read bandwidth"] = [0.5 + 0.4 * (n == 0), 0.8]
    text = "\n\n".join(layer_tables.layers(found, tables.table))
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    assert "reached" in rows["few tokens: faster than torch"]
    assert "missed" in rows["few tokens: of read bandwidth"]
    assert "1 of 12" in rows["few tokens: of read bandwidth"]
    assert "tiny, float32, 0.6" in text
    assert "torch.compile did not work" not in text
    without = found | {"not_compiled": "no compiler"}
    assert "no compiler" in "\n".join(layer_tables.layers(without, tables.table))


def test_a_stream_reads_everything():
    stream = peak.Stream(2, 2**20, repeats=1)
    assert stream.gbs > 0
    assert stream.name in stream.found
    stream.read()
