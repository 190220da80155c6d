"""The benchmarks measure right answers, say what they ran on, and the README agrees with them."""

from __future__ import annotations

import getpass
import json
import mmap
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from benchmark_modules import ROOT, load

from molae.convert import allocation
from molae.fit import factor_shared, reduce_rank

cases = load("cases")
check = load("check")
contestants = load("contestants")
header = load("header")
main = load("__main__")
memory = load("memory")
readme = load("readme")
tables = load("tables")
timing = load("timing")
weights = load("weights")

EPS = float(np.finfo(np.float32).eps)
TINY = cases.Settings(
    E=8, F=24, D=32, V=40, timed_groups=2, layers=2, repeats=2, threads=1, pause=0.0
)


@pytest.fixture
def stack(rng):
    return rng.standard_normal((96, 40)).astype(np.float32)


# ------------------------------------------------------------------- the checkers


def _svd(X, rank):
    U, s, V = np.linalg.svd(X.astype(np.float64), full_matrices=False)
    return U[:, :rank] * s[:rank], V[:rank]


def test_truth_on_a_known_matrix():
    truth = check.Truth.of(np.diag([3.0, 2.0, 1.0]))
    assert np.allclose(truth.eigenvalues, [9, 4, 1])
    assert truth.discarded(1) == pytest.approx(5 / 14)
    assert truth.top_share == pytest.approx(9 / 14)


def test_factors_within_rounding_pass(stack):
    truth = check.Truth.of(stack)
    for A, B in (
        _svd(stack, 9),
        *(svd(stack, 9, turned) for svd in contestants.SVDS.values() for turned in (False, True)),
        contestants.gram_numpy(stack, 9),
    ):
        assert (A.shape, B.shape) == ((96, 9), (9, 40))
        error = check.check_factors("x", stack, A, B, truth, eps=EPS)
        assert error == pytest.approx(truth.discarded(9), rel=1e-4)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_factors_off_by_ten_tolerances_are_refused(stack, factor):
    truth = check.Truth.of(stack)
    A, B = _svd(stack, 9)
    # An error of A adds |dA B|^2; one of B, at right angles to its rows, adds |A dB|^2 and a
    # cross term that only lowers or raises it: take the sign that raises it.
    step = np.sqrt(10 * check.factors_slack(A, B, truth, eps=EPS) * truth.energy)
    if factor == "A":
        A[5, 3] += step / np.linalg.norm(B[3])
    else:
        slope = A.T @ (A @ B - stack)
        B[3, 5] += np.copysign(step / np.linalg.norm(A[:, 3]), slope[3, 5])
    with pytest.raises(check.WrongAnswer, match="name of it"):
        check.check_factors("name of it", stack, A, B, truth, eps=EPS)


def test_an_error_below_the_least_is_refused(stack):
    A, B = _svd(stack, 9)
    other = check.Truth.of(stack + np.float32(0.1) * stack[::-1])
    worse = other if other.discarded(9) > check.Truth.of(stack).discarded(9) else None
    truth = worse or check.Truth(check.Truth.of(stack).eigenvalues + 1.0)
    with pytest.raises(check.WrongAnswer):
        check.check_factors("x", stack, A, B, truth, eps=EPS)


def test_approximations(stack):
    truth = check.Truth.of(stack)
    for approximation in (reduce_rank(stack[None], 9)[0], np.matmul(*_svd(stack, 9))):
        check.check_approximation("x", stack, approximation, truth, 9, eps=EPS)
    slack = check.approximation_slack(truth, 9, eps=EPS) + 2 * 9 * EPS * truth.top_share
    residual = approximation - stack
    at = np.unravel_index(np.abs(residual).argmax(), stack.shape)
    for sign in (1, -1):  # 2 r d / energy = 10 slack
        wrong = approximation.copy()
        wrong[at] += sign * 10 * slack * truth.energy / (2 * residual[at])
        with pytest.raises(check.WrongAnswer):
            check.check_approximation("x", stack, wrong, truth, 9, eps=EPS)


def test_bfloat16_factors_pass_only_with_their_own_unit(rng):
    W = weights.experts("decaying", 4, 24, 32).astype("bfloat16")
    found = factor_shared(W, 20)
    A, B = found.private[0].reshape(-1, 20), found.basis(0)
    X = W.reshape(-1, 32).astype(np.float32)
    truth = check.Truth.of(X)
    check.check_factors("x", X, A, B, truth, eps=EPS, unit=cases.UNIT["bfloat16"])
    with pytest.raises(check.WrongAnswer):
        check.check_factors("x", X, A, B, truth, eps=EPS)


# ------------------------------------------------------------------- the instruments


def test_contestants_take_turns():
    calls = []
    times = timing.alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, pause=0
    )
    assert calls == ["a", "b"] * 3
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}


def test_ratio_of_medians_and_its_range():
    assert timing.ratio([4.0, 9.0, 5.0], [1.0, 3.0, 2.0]) == {
        "ratio": 2.5,
        "ratio_low": 2.5,
        "ratio_high": 4.0,
    }


def test_memory_peak_is_seen_after_it_is_gone():
    size, until = 40_000_000, time.monotonic() + 30
    with memory.Peak() as peak:
        # Straight from the system: the heap may have as much to spare.
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.write(bytes([1]) * size)
        while peak.rise < 0.9 * size and time.monotonic() < until:
            time.sleep(0.01)  # for the one that looks to have its turn
        block.close()
    assert 0.9 * size < peak.rise < 2.5 * size
    assert memory.anonymous_bytes(2**22 + 1) == 0  # no such process


def test_header_names_versions_but_no_machine():
    found = header.header(2)
    assert found["versions"]["NumPy"] == np.__version__
    assert found["threads"] == 2
    assert set(found["blas"]) >= {"molae", "NumPy"}
    text = json.dumps(found)
    for private in (str(ROOT), str(Path.home()), platform.node(), f"/{getpass.getuser()}/"):
        assert len(private) < 2 or private not in text


def test_load_is_what_others_take(monkeypatch):
    """user, nice, system, idle, iowait, irq, softirq, steal."""
    counts = iter([[5, 0, 5, 100, 0, 0, 0, 0], [15, 0, 10, 170, 10, 0, 0, 5]])
    monkeypatch.setattr(header, "_cpu_times", lambda: next(counts))
    assert header._load(0) == pytest.approx(0.2)
    monkeypatch.undo()
    assert 0 <= header._load(0.1) <= 1


def test_what_comes_before_a_run_is_not_timed():
    calls = []
    times = timing.alternate(
        {"a": lambda: calls.append("a")},
        2,
        pause=0,
        before=lambda name: (calls.append(f"before {name}"), time.sleep(0.02)),
    )
    assert calls == ["before a", "a"] * 2
    assert max(times["a"]) < 0.02


def test_ranks_are_those_of_a_conversion():
    for k, F, D in ((8, 24, 32), (4, 24, 32), (1, 64, 128)):
        expected = allocation.largest_rank(
            0.75 * k * F * D, k=k, F=F, D=D, form="gauge", limit=min(k * F, D)
        )
        assert cases.largest_rank(k, F, D) == expected


def test_weights_are_seeded_and_differ_in_kind():
    for kind in weights.KINDS:
        W = weights.experts(kind, 6, 40, 32)
        assert np.array_equal(W, weights.experts(kind, 6, 40, 32))
        assert W.std() == pytest.approx(32**-0.5, rel=0.1)
    flat, steep = (
        check.Truth.of(weights.experts(kind, 6, 40, 32).reshape(-1, 32)) for kind in weights.KINDS
    )
    assert steep.discarded(16) < flat.discarded(16) / 2


# ------------------------------------------------------------------------- the cases


@pytest.fixture(scope="module")
def measured():
    """The cases of benchmarks.json on tiny shapes, as one result."""
    result = {
        "molae_benchmarks": 1,
        "quick": True,
        "header": header.header(1),
        "peaks": {"gflops": {"molae": 10.0}, "best_gflops": 10.0, "copy_gbs": 1.0},
    }
    for name in cases.FILES["benchmarks.json"]:
        result[name] = cases.CASES[name](TINY, 10.0)
    return json.loads(json.dumps(result))


def test_every_row_says_what_and_how_fast(measured):
    rows = measured["factor"]["rows"]
    assert [(r["k"], r["weights"], r["form"]) for r in rows] == [
        (k, kind, form)
        for k in (8, 4)
        for kind in ("gaussian", "decaying")
        for form in ("gauge", "plain")
    ]
    for row in rows + measured["bf16"]["rows"]:
        assert set(row["against"]) == set(row["times"]) - {"molae"}
        assert row["better_svd"].endswith("SVD")
        assert row["goal"] == {8: 4.0, 4: 3.0}[row["k"]]
        assert row["error"] == pytest.approx(row["svd_error"], rel=1e-2)
        assert 0 < row["times"]["molae"]["min_s"] <= row["times"]["molae"]["median_s"]
        assert row["peak_share"] == pytest.approx(row["gflops"] / 10.0)
    assert [r["side"] for r in measured["bf16"]["rows"]] == ["input", "output"]
    assert {p["phase"] for p in measured["factor"]["phases"]} >= {"Gram matrix", "gauge form"}


def test_a_conversion_is_measured_in_its_own_process(measured):
    (row,) = measured["convert"]["rows"]
    experts = 3 * TINY.layers * TINY.E * TINY.F * TINY.D
    assert row["checkpoint_bytes"] > 2 * experts
    assert 0.5 < row["size"] <= 0.75
    assert 0 < row["factor_s"] < row["run_s"] < row["wall_s"]
    assert 1e6 < row["peak_rss_anon_bytes"] < row["bound_bytes"]


@pytest.mark.parametrize("wrong", [np.float32(1.01), np.float32(0.99)])
def test_a_case_refuses_a_wrong_answer(monkeypatch, wrong):
    def off(W, rank, **options):
        found = factor_shared(W, rank, **options)
        found.private[0][0] *= wrong
        return found

    monkeypatch.setattr(cases, "factor_shared", off)
    with pytest.raises(check.WrongAnswer, match="molae"):
        cases.factor(TINY, 10.0)


def test_the_command(tmp_path):
    out = tmp_path / "out.json"
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--cases", "reduce", "--json", str(out)],
        cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["quick"] is True
    assert tables.benchmarks(result) == done.stdout.rstrip("\n")


def _kept(tmp_path, monkeypatch, *words):
    """Files that a run of the command keeps, with the cases in each."""
    monkeypatch.setattr(main, "RESULTS", tmp_path / "results")
    args = main._parser().parse_args(words)
    chosen = args.cases or list(cases.CASES)
    main._keep(args, chosen, {"header": {}, **{name: {"rows": []} for name in chosen}})
    return {
        path.name: [key for key in json.loads(path.read_text()) if key != "header"]
        for path in tmp_path.rglob("*.json")
    }


def test_whole_runs_go_to_the_file_of_their_cases(tmp_path, monkeypatch):
    some = {
        "benchmarks.json": ["factor", "bf16", "reduce", "convert"],
        "models.json": ["models"],
        "calibration.json": ["calibration"],
        "active.json": ["active"],
        "distill.json": ["distill"],
    }
    layers = {"layers.json": ["layers"]}
    assert _kept(tmp_path / "a", monkeypatch, "--cases", "layers") == layers
    assert _kept(tmp_path / "b", monkeypatch) == some | layers
    assert _kept(tmp_path / "c", monkeypatch, "--cases", "factor", "convert") == {}
    assert _kept(tmp_path / "d", monkeypatch, "--quick") == {}
    assert _kept(tmp_path / "e", monkeypatch, "--shapes", "OLMoE-1B-7B") == some
    out = str(tmp_path / "f" / "x.json")
    assert _kept(tmp_path / "f", monkeypatch, "--cases", "reduce", "--json", out) == {
        "x.json": ["reduce"]
    }


# ------------------------------------------------------------------------ the README

DEMO = {
    "rows": [
        {"title": "original", "size": 1.0, "bytes": 5_000_000, "flops_ratio": 1.0, "errors": {},
         "perplexity": 40.0, "perplexity_se": 0.5},
        {"title": "latent 0.5", "size": 0.4991, "bytes": 3_000_000, "flops_ratio": 0.7,
         "errors": {"gate_proj": 0.51, "up_proj": 0.52, "down_proj": 0.53},
         "perplexity": 50.0, "perplexity_se": 0.6},
    ],
    "refused": ["size 0.1 cannot be reached"],
    "tokens": 12345,
    "out": None,
}  # fmt: skip
PAGE = """# Title

<!-- demo:start -->
<!-- demo:end -->

between

<!-- benchmarks:start -->
old
<!-- benchmarks:end -->

<!-- layers:start -->
<!-- layers:end -->
<!-- models:start -->
<!-- models:end -->
<!-- quality:start -->
<!-- quality:end -->
"""


@pytest.fixture
def page(tmp_path, measured):
    """A README and results, and the arguments that name them."""
    path = tmp_path / "README.md"
    path.write_text(PAGE)
    results = tmp_path / "results"
    results.mkdir()
    (results / "demo.json").write_text(json.dumps(DEMO))
    (results / "benchmarks.json").write_text(json.dumps(measured))
    return path, ["--readme", str(path), "--results", str(results)]


def test_readme_round_trip(page):
    path, args = page
    assert readme.main([*args, "--check"]) == 1
    assert path.read_text() == PAGE
    assert readme.main(args) == 0
    text = path.read_text()
    assert readme.main([*args, "--check"]) == 0
    assert readme.main(args) == 0
    assert path.read_text() == text
    assert text.startswith("# Title\n")
    assert "\nbetween\n" in text
    assert "old" not in text
    assert "0.4991" in text
    assert "50.00 ± 0.60" in text
    assert "+25.0%" in text
    assert "Tiny shapes" in text


def test_readme_check_sees_one_changed_digit(page):
    path, args = page
    readme.main(args)
    path.write_text(path.read_text().replace("0.4991", "0.4992"))
    assert readme.main([*args, "--check"]) == 1


def test_pages_beside_the_readme(page):
    path, args = page
    readme.main(args)
    assert list(readme.PAGES) == [
        "docs/quality.md",
        "docs/compressed.md",
        "docs/healing.md",
        "docs/distributed.md",
        "docs/performance.md",
    ]
    other = path.parent / "docs" / "quality.md"
    other.parent.mkdir()
    names = readme.PAGES["docs/quality.md"]
    other.write_text("".join(f"<!-- {n}:start -->\nold\n<!-- {n}:end -->\n" for n in names))
    assert readme.main([*args, "--check"]) == 1
    assert readme.main(args) == 0
    assert "old" not in other.read_text()
    assert readme.main([*args, "--check"]) == 0


def test_readme_without_results_has_empty_sections(tmp_path):
    assert readme.update(PAGE, tmp_path) == PAGE.replace("old\n", "")


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        PAGE.replace("<!-- demo:end -->", ""),
        PAGE + PAGE,
        PAGE.replace("demo:start", "x").replace("demo:end", "demo:start").replace("x", "demo:end"),
    ],
)
def test_readme_without_markers_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match="README"):
        readme.update(text, tmp_path)


def test_readme_agrees_with_the_results():
    assert readme.main(["--check"]) == 0


def test_tables_are_padded():
    lines = tables.table(["what", "n"], [["a", "1"], ["longer", "1,000"]]).splitlines()
    assert lines == [
        "| what   |     n |",
        "| ------ | ----: |",
        "| a      |     1 |",
        "| longer | 1,000 |",
    ]
