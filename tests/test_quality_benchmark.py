"""The comparison of methods: each baseline does what its paper says, and the figures are right."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from benchmark_modules import load

layer_module = load("quality.layer")
errors = load("quality.errors")
d2_moe = load("quality.baselines.d2_moe")
hc_smoe = load("quality.baselines.hc_smoe")
reap = load("quality.baselines.reap")
svd_llm = load("quality.baselines.svd_llm")
tables = load("quality.tables")
OutOfReach = layer_module.OutOfReach

E, F, D, K, N = 6, 8, 12, 2, 300
KINDS = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture
def layer(rng):
    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    index = np.argsort(rng.random((N, E - 1)), axis=1)[:, :K]  # nobody chooses the last expert
    return layer_module.Layer(
        weights={"gate_proj": draw(E, F, D), "up_proj": draw(E, F, D), "down_proj": draw(E, D, F)},
        x=draw(N, D) * np.linspace(0.1, 2, D, dtype=np.float32),
        index=index,
        routing=rng.random((N, K)).astype(np.float32),
        fisher={kind: rng.random(E) for kind in KINDS},
    )


def lost(W, other, moment):
    gap = W.astype(np.float64) - other
    return np.trace(gap @ moment @ gap.T)


# ------------------------------------------------------------------------------ the layer


def test_moments_are_sums_over_the_routed_rows(layer):
    for e in range(E):
        rows = [(t, s) for t in range(N) for s in range(K) if layer.index[t, s] == e]
        x = sum((np.outer(layer.x[t], layer.x[t]) for t, _ in rows), np.zeros((D, D)))
        np.testing.assert_allclose(layer.moment("gate_proj", e), x, rtol=1e-5, atol=1e-4)
        h = np.zeros((F, F))
        for t, s in rows:
            gate, up = (
                layer.weights[kind][e].astype(np.float64) @ layer.x[t] for kind in KINDS[:2]
            )
            own = layer.routing[t, s] * gate / (1 + np.exp(-gate)) * up
            h += np.outer(own, own)
        found = layer.moment("down_proj", e, weighted=True)
        np.testing.assert_allclose(found, h, rtol=1e-3, atol=1e-3)
    assert layer.counts.sum() == N * K
    assert layer.counts[-1] == 0


# -------------------------------------------------------------------------- the baselines


@pytest.mark.parametrize("method", [svd_llm, d2_moe, reap, hc_smoe])
@pytest.mark.parametrize("size", [0.5, 0.7, 0.9])
def test_no_more_is_stored_than_the_size_allows(layer, method, size):
    found = method.compress(layer, size)
    assert 0 < found.stored <= size * layer.numbers
    assert {k: w.shape for k, w in found.weights.items()} == {
        k: w.shape for k, w in layer.weights.items()
    }


def test_svd_llm_is_the_nearest_of_its_rank(layer, rng):
    found = svd_llm.compress(layer, 0.7)
    (rank,) = (int(word) for word in found.note.split() if word.isdigit())
    assert found.stored == 3 * E * rank * (F + D)
    for kind in KINDS:
        for e in range(E - 1):
            W, other = layer.weights[kind][e], found.weights[kind][e]
            assert np.linalg.matrix_rank(other, tol=1e-4) == rank
            C = layer.moment(kind, e)
            least = lost(W, other, C)
            s = np.linalg.svd(W @ np.linalg.cholesky(C + 1e-9 * np.eye(len(C))), compute_uv=False)
            assert least == pytest.approx(np.square(s[rank:]).sum(), rel=1e-2)
            U, s, Vt = np.linalg.svd(W)
            assert least < lost(W, (U[:, :rank] * s[:rank]) @ Vt[:rank], C)
    assert np.isfinite(found.weights["gate_proj"][-1]).all()  # the expert that read nothing
    with pytest.raises(OutOfReach):
        svd_llm.compress(layer, 0.1)


def test_all_of_the_rank_is_the_matrix_again(layer):
    found = svd_llm.compress(layer, 3.0)
    for kind in KINDS:
        np.testing.assert_allclose(found.weights[kind], layer.weights[kind], atol=1e-4)


def test_d2_moe_keeps_what_all_have_in_common(layer, rng):
    same = {k: np.repeat(w[:1], E, axis=0) for k, w in layer.weights.items()}
    found = d2_moe.compress(dataclasses.replace(layer, weights=same), 0.5)
    for kind in KINDS:
        np.testing.assert_allclose(found.weights[kind], same[kind], atol=1e-5)
    found = d2_moe.compress(layer, 0.6)
    rank = int(found.note.split()[1])
    assert found.stored == 3 * (F * D + E * rank * (F + D))
    share = layer.fisher["up_proj"] / layer.fisher["up_proj"].sum()
    base = np.einsum("e,efd->fd", share, layer.weights["up_proj"])
    for e in range(E):
        gap = found.weights["up_proj"][e] - base
        assert np.linalg.matrix_rank(gap, tol=1e-4) == rank
    with pytest.raises(OutOfReach):
        d2_moe.compress(layer, 0.2)


def test_reap_prunes_whom_the_router_makes_least_of(layer):
    expected = np.zeros(E)
    for e in range(E - 1):
        norms = []
        for t, s in zip(*np.nonzero(layer.index == e), strict=True):
            gate, up = (layer.weights[kind][e] @ layer.x[t] for kind in KINDS[:2])
            y = layer.weights["down_proj"][e] @ (gate / (1 + np.exp(-gate)) * up)
            norms.append(layer.routing[t, s] * np.linalg.norm(y))
        expected[e] = np.mean(norms)
    np.testing.assert_allclose(reap.saliency(layer), expected, rtol=1e-4)
    found = reap.compress(layer, 0.5)
    assert set(np.flatnonzero(found.kept)) == set(np.argsort(-expected)[:3])
    with pytest.raises(OutOfReach, match="fewer than the 2"):
        reap.compress(layer, 0.3)


def test_hc_smoe_merges_twins(layer):
    twins = {k: w.copy() for k, w in layer.weights.items()}
    for w in twins.values():
        w[3] = w[1]
    layer = dataclasses.replace(layer, weights=twins)
    label = hc_smoe.clusters(layer, E - 1)
    assert label[1] == label[3]
    assert len(set(label)) == E - 1
    found = hc_smoe.compress(layer, (E - 1) / E)
    for kind in KINDS:
        np.testing.assert_allclose(found.weights[kind], twins[kind], atol=1e-6)


def test_hc_smoe_weighs_by_how_often_the_router_chose(layer):
    found = hc_smoe.compress(layer, 1 / E)
    share = layer.counts / layer.counts.sum()
    mean = np.einsum("e,efd->fd", share, layer.weights["gate_proj"])
    for e in range(E):
        np.testing.assert_allclose(found.weights["gate_proj"][e], mean, atol=1e-5)


def test_average_linkage():
    points = np.array([[0.0], [1.0], [2.4], [10.0], [10.5]])
    assert [list(hc_smoe.average_linkage(points, n)) for n in (3, 2)] == [
        [0, 0, 1, 2, 2],
        [0, 0, 0, 1, 1],
    ]


def test_mobe_gets_nearer_with_steps_and_with_bases(layer):
    pytest.importorskip("torch")
    mobe = load("quality.baselines.mobe")
    W = layer.weights["gate_proj"]

    def error(m, steps):
        return np.square(W - mobe.fit(W, m, steps=steps, seed=0)).sum() / np.square(W).sum()

    assert error(2, 200) < error(2, 20) < error(2, 0)
    assert error(5, 200) < error(1, 200) < 1
    found = mobe.compress(layer, 0.95, steps=1)
    m = int(found.note.split()[0])
    assert found.stored == E * F * D + 2 * (E * F * F + m * F * D + E * m)
    assert found.stored <= 0.95 * layer.numbers < found.stored + 2 * (F * D + E)
    np.testing.assert_array_equal(found.weights["down_proj"], layer.weights["down_proj"])
    with pytest.raises(OutOfReach):
        mobe.compress(layer, 0.5)


# ---------------------------------------------------------------------------- the figures


def test_errors_of_weights_and_outputs(layer):
    same = layer_module.Compressed.of(layer.weights, 1)
    none = layer_module.Compressed.of({k: 0 * w for k, w in layer.weights.items()}, 1)
    half = layer_module.Compressed.of({k: w / 2 for k, w in layer.weights.items()}, 1)
    for error in (errors.weight_error, errors.output_error):
        assert error([layer], [same]) == 0
        assert error([layer], [none]) == pytest.approx(1)
        assert error([layer, layer], [half, half]) == pytest.approx(0.5)
    idle = {k: w.copy() for k, w in layer.weights.items()}
    for w in idle.values():
        w[-1] = 7  # of the expert that nobody asks
    found = layer_module.Compressed.of(idle, 1)
    assert errors.weight_error([layer], [found]) > 1
    assert errors.output_error([layer], [found]) == 0


def row(name, size, rise, behind, se):
    return {
        "name": name, "size": size, "loss": 1.0, "rise": rise, "rise_se": 0.001, "note": "rank 3",
        "behind": behind, "behind_se": se, "reached": size, "weight_error": 0.4,
        "output_error": 0.2, "seconds": 3.0,
    }  # fmt: skip


def test_tables_mark_the_best_and_what_is_as_good():
    result = {
        "names": {"model": "one", "test": "a", "calibration": "b"},
        "model": {
            "kind": "olmoe", "parameters": 2e6, "layers": 1, "experts": 8,
            "num_experts_per_tok": 2, "tokens_per_expert": [[50, 100, 300]], "perplexity": 9.0,
            "perplexity_se": 0.1,
        },
        "test_tokens": 1000,
        "calibration_tokens": 2000,
        "rows": [
            row("blind", 0.5, 0.05, 0.03, 0.01),
            row("even", 0.5, 0.03, 0.001, 0.002),
            row("calibrated", 0.5, 0.02, 0.0, 0.0),
            {"name": "mobe", "size": 0.5, "out_of_reach": "no"},
        ],
        "noise": {"size": 0.5, "weight_error": {"blind": 0.6, "even": None, "calibrated": 0.7}},
    }  # fmt: skip
    text = tables.quality(result)
    assert "from 50% to 300%" in text
    lines = {
        line.split("|")[1].strip(): line for line in text.splitlines()[::-1] if line[:1] == "|"
    }
    assert "**" not in lines["molae, no data"]
    assert "**+2.00% ± 0.10%**" in lines["molae calibrated"]
    assert "**+3.00% ± 0.10%**" in lines[tables.TITLES["even"]]
    assert "MoBE" in text.split("Rise of")[0]
    assert "0.600" in text
    del result["noise"]
    assert "0.600" not in tables.quality(result)
    assert "rank 3" in tables.quality(result)
    for line in result["rows"]:
        line["size"] = 0.4
    assert "rank 3" not in tables.quality(result)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore::molae.errors.CalibrationWarning")
def test_a_small_run_and_the_same_again(tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    main = load("quality.__main__")
    out, text = tmp_path / "found.json", tmp_path / "text"
    text.write_text(
        "The router sends a token to the experts that its weights are nearest to. " * 99
    )
    command = [
        "--sizes", "0.6", "--rows", "blind", "mobe", "reap", "even", "--tokens", "1024",
        "--test-tokens", "1500", "--noise-size", "0", "--threads", "1",
        "--calibration", str(text), "--work", str(tmp_path / "work"), "--json", str(out),
    ]  # fmt: skip
    assert main.main(command) == 0
    first = json.loads(out.read_text())
    rows = {row["name"]: row for row in first["rows"]}
    assert rows["reap"]["reached"] == 19 / 32
    assert "out_of_reach" in rows["mobe"]
    best = min((r for r in rows.values() if "loss" in r), key=lambda r: r["loss"])
    assert best["behind"] == best["behind_se"] == 0
    for name in ("blind", "reap", "even"):
        found = rows[name]
        assert found["reached"] <= 0.6
        assert 0 < found["output_error"] < 1
        assert found["rise"] == pytest.approx(
            found["perplexity"] / first["model"]["perplexity"] - 1, abs=1e-6
        )
        assert math.log(found["perplexity"] / best["perplexity"]) == pytest.approx(
            found["behind"], abs=1e-6
        )
    assert "reap at 0.6" in capsys.readouterr().err
    assert main.main(command) == 0
    assert "reap at 0.6" not in capsys.readouterr().err
    assert json.loads(out.read_text())["rows"] == first["rows"]


@pytest.mark.usefixtures("one_thread")
def test_pruned_experts_are_not_chosen(layer):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from molae.demo import CHECKPOINT

    model_module = load("quality.model")
    model, tokenizer = model_module.load(CHECKPOINT)
    text = model_module.Text(tokenizer, "The router sends a token to experts. " * 90, 700, None)
    before = model_module.score(model, text)
    parts = model_module.moe_layers(model)
    own = [layer_module.Compressed.of(model_module.read_weights(e), 1) for _, e in parts]
    with model_module.replaced(model, own):
        np.testing.assert_array_equal(model_module.score(model, text).sums, before.sums)
    kept = np.arange(32) % 2 == 0
    half = []
    for part in own:  # were one of the others chosen, the losses would not be finite
        weights = {
            k: np.where(kept[:, None, None], w, np.nan).astype(np.float32)
            for k, w in part.weights.items()
        }
        half.append(layer_module.Compressed.of(weights, 1, kept=kept))
    with model_module.replaced(model, half), torch.no_grad():
        found = model_module.score(model, text)
    assert np.isfinite(found.sums).all()
    assert found.sums.sum() > before.sums.sum()
    np.testing.assert_array_equal(model_module.score(model, text).sums, before.sums)
