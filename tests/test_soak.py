"""Short forms of what ``make soak`` does for hours, and checks that it would see a fault."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_checkpoint
from converting import REPORT, tree
from soak import native
from soak.calls import Case
from soak.faults import compiler

from molae import ConvertConfig, convert
from molae.errors import CheckpointError
from molae.io import ShardWriter, TensorSpec

TESTS = Path(__file__).parent


def soak(*argv, seconds=240):
    """A part of the soak in a process of its own; what it found."""
    found = [str(TESTS), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, "-m", "soak", *map(str, argv)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(found)},
        capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    assert out["faults"] == [], out["faults"][:3]
    assert done.returncode == 0, done.stderr
    return out


def test_damaged_files_are_read_or_refused():
    found = soak("fuzz", "--mutations", 500, "--seed", 7)
    kept = len(json.loads((TESTS / "soak" / "corpus.json").read_text()))
    assert sum(found["read"].values()) + sum(found["refused"].values()) == 500 + kept
    # Both ends of each way in are met, so that no surface refuses all for a reason of its own.
    assert len(found["read"]) >= 11
    assert len(found["refused"]) >= 12


def test_every_surface_reads_what_is_sound(tmp_path):
    from shutil import copytree, rmtree

    from soak import fuzz

    for surface in fuzz.surfaces(tmp_path):
        folder = surface.folder
        if surface.fresh:
            folder = copytree(folder, tmp_path / "case")
        surface.read(folder)
        if surface.fresh:
            rmtree(folder)


@pytest.mark.parametrize(
    ("reading", "said"),
    [
        (lambda folder: {}["x"], "KeyError"),
        (lambda folder: bytearray(100 << 20), "bytes for a folder of"),
        (lambda folder: iter(int, 1).__class__ and [0 for _ in iter(int, 1)], "Hang"),
    ],
)
def test_the_fuzzer_sees_what_must_not_be(tmp_path, monkeypatch, reading, said):
    from soak import fuzz

    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "x").write_bytes(b"{}")
    bad = fuzz.Surface("bad", tmp_path / "f", {"x": "json"}, reading)
    monkeypatch.setattr(fuzz, "surfaces", lambda work: [bad])
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    (fault,) = fuzz.run(1, 0, corpus=False).faults
    assert said in fault["fault"]


def test_killed_runs_resume_to_the_same_bytes():
    pytest.importorskip("torch")
    kinds = ("data-free", "compressed experts", "heal")
    named = [word for kind in kinds for word in ("--kinds", kind)]
    found = soak("kills", "--kills", 10, "--seed", 3, *named, seconds=550)
    assert sum(found["kills"].values()) == 10


def test_random_operations():
    found = soak("walk", "--operations", 60, "--seed", 5)
    assert sum(found["operations"].values()) == 60
    assert len(found["operations"]) == 5
    assert min(found["refused"].values()) > 0


@pytest.mark.parametrize("harm", ["report", "weights"])
def test_the_walk_sees_a_result_that_is_wrong(monkeypatch, harm):
    from soak import walk

    def convert_badly(src, dst, config, **options):
        report = convert(src, dst, config, **options)
        if harm == "report":
            path = dst / REPORT
            data = json.loads(path.read_text())
            for row in data["rows"]:
                row["error"] *= 1.01
            path.write_text(json.dumps(data))
        elif dst.name == "dst-other":
            file = next(path for path in sorted(dst.glob("*.safetensors")))
            raw = bytearray(file.read_bytes())
            raw[-1] ^= 1
            file.write_bytes(raw)
        return report

    monkeypatch.setattr(walk, "convert", convert_badly)
    faults = walk.run(12, 1).faults
    wanted = {"_converted"} if harm == "report" else {"_interrupted", "_overwritten"}
    assert wanted <= {fault["operation"] for fault in faults}


@pytest.mark.skipif(compiler() is None, reason="no C compiler to build the injector with")
def test_system_calls_that_fail():
    found = soak("faults", "--calls", 60, "--seed", 2, "--commands", "data-free")
    assert found["cases"] == {"data-free": 60}
    assert found["ended"]["exit code 1"] > 40


@pytest.mark.skipif(compiler() is None, reason="no C compiler to build the injector with")
def test_system_calls_of_runs_with_a_text_that_fail():
    pytest.importorskip("torch")
    named = ("--commands", "heal", "--commands", "calibrated")
    found = soak("faults", "--calls", 20, "--seed", 3, *named)
    assert sum(found["cases"].values()) == 20
    assert {place.partition(" ")[0] for place in found["failed"]} > {"src", "scratch", "out"}


def test_a_source_cut_short_under_a_run_ends_it_and_is_refused_after(tmp_path):
    """The pages are mapped: the system ends the process, and nothing half-written is left."""
    source = make_checkpoint(tmp_path / "src", L=3, E=4, D=64, F=64)
    file, config = source / "model.safetensors", ConvertConfig(size=0.5, group_size=2)
    whole, times = file.read_bytes(), file.stat()
    convert(source, tmp_path / "wanted", config)
    code = (
        "import os, sys, molae\n"
        "from molae.convert import journal\n"
        "real = journal.Journal.add\n"
        "def add(self, entry):\n"
        "    real(self, entry)\n"
        "    os.truncate(sys.argv[1] + '/model.safetensors', 8192)\n"
        "journal.Journal.add = add\n"
        "molae.convert(sys.argv[1], sys.argv[2], molae.ConvertConfig(size=0.5, group_size=2))\n"
    )
    dst = tmp_path / "dst"
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(dst)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    # By whom the page is met first: one of us, or the system while it writes for us.
    assert done.returncode == -signal.SIGBUS or b"was cut short" in done.stderr, done.stderr
    with pytest.raises(CheckpointError, match="truncated"):
        convert(source, dst, config)
    file.write_bytes(whole)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    convert(source, dst, config)
    assert tree(dst) == tree(tmp_path / "wanted")


def test_what_is_copied_from_a_file_cut_short(tmp_path):
    """The system says "bad address" of what it writes; the message names the other side."""
    (tmp_path / "source").write_bytes(bytes(1 << 16))
    mapped = np.memmap(tmp_path / "source", np.uint8, "r")
    os.truncate(tmp_path / "source", 0)
    writer = ShardWriter(tmp_path / "x", [TensorSpec("a", "U8", (1 << 16,))])
    with writer, pytest.raises(CheckpointError, match="x: what is to be written cannot be read"):
        writer.write("a", mapped)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_table_is_written_from_the_results(tmp_path, monkeypatch):
    from soak import table

    monkeypatch.setattr(table, "RESULTS", tmp_path / "results.json")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.write(page, "kills", 5, {"kills": {"a": 2, "b": 1}, "faults": [], "seconds": 1.5})
    table.write(page, "fuzz", 6, {"slowest": 0.25, "faults": [1], "seconds": 2.5})
    text = page.read_text()
    assert text.startswith(f"before\n{table.BEGIN}\n| part |")
    assert "| kills | kills 3 (a 2, b 1) | 0 | 5 | 2 |" in text
    assert "| fuzz | slowest 0.25 | 1 | 6 | 2 |" in text
    assert "old" not in text
    assert text.endswith(f"{table.END}\nafter\n")


def test_the_page_has_what_the_results_say():
    from soak import table

    page = (TESTS.parent / "docs" / "reliability.md").read_text()
    results = json.loads(table.RESULTS.read_text())
    assert table.table_text(results) in page


# ------------------------------------------------------------------ native functions


@pytest.mark.parametrize("part", ["experts f32", "experts bf16", "refit", "moments f64"])
def test_allocations_that_fail(part):
    found = native.allocations(part)
    assert found.counts["failed allocations"] >= 3
    assert found.faults == []


@pytest.mark.parametrize("part", ["f32", "bf16"])
def test_poisoned_inputs(part):
    found = native.poisons(part)
    assert found.counts["NonFiniteError"] > 200
    assert found.counts["results with NaN or Inf"] > 200
    assert found.faults == []


def test_many_calls_leave_no_memory_behind():
    found = soak("leaks", "--repeats", 200, "--names", "f32")  # where nobody else's comes and goes
    assert found["counts"]["functions"] >= 20


def test_what_the_native_checks_see(monkeypatch):
    kept, block = [], np.ones(3)

    def leaky(x):
        kept.append(np.ones(1 << 20))
        return x * 2

    def careless(x):
        x[0] = 5.0 if np.isnan(x).any() else x[0]
        return np.zeros(3)

    made = [Case("leaky", (block,), leaky, False), Case("careless", (block,), careless, True)]
    monkeypatch.setattr(native, "cases", lambda: made)
    assert "bytes more after" in native.leaks(20, "leaky").faults[0]["fault"]
    said = [fault["fault"] for fault in native.poisons("careless").faults]
    assert any("not refused" in text for text in said)
    assert any("an input was changed" in text for text in said)
