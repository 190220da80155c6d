"""Throughput and memory of a conversion of a generated checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.memory import Peak
from benchmarks.weights import write_checkpoint

__all__ = ["bound", "conversion"]

#: What a conversion may hold beyond a multiple of the largest stack.
ALLOWANCE = 300_000_000

# The report goes through a file: standard output may have warnings in it.
CHILD = """
import json, sys, molae
src, dst, out, size, threads = sys.argv[1:]
molae.set_num_threads(int(threads))
report = molae.convert(src, dst, molae.ConvertConfig(size=float(size)))
with open(out, "w") as file:
    json.dump(report.to_dict(), file)
"""


def bound(E: int, F: int, D: int) -> float:
    """Most anonymous memory a conversion may take: 1.5 times one stack in float32, and 300 MB."""
    return 1.5 * 4 * E * F * D + ALLOWANCE


def conversion(
    *, size: float, layers: int, E: int, F: int, D: int, V: int, threads: int
) -> dict[str, Any]:
    """Convert a generated checkpoint once and say how long it took and what it held.

    Returns
    -------
    dict
        ``wall_s`` is the whole process: start, choice of group sizes on one layer, and
        ``run_s``, the run proper: factorizing, writing, syncing and checksums. ``factor_s`` is
        the sum over matrix types, beside which reading and writing go on. ``copy_s`` is a
        plain copy of the same files.
        ``peak_rss_anon_bytes`` is sampled every 2 ms.
    """
    with tempfile.TemporaryDirectory(prefix="molae-benchmark-") as name:
        folder = Path(name)
        src, dst, facts = folder / "source", folder / "result", folder / "report.json"
        nbytes = write_checkpoint(src, layers=layers, E=E, F=F, D=D, V=V)
        start = time.perf_counter()
        shutil.copytree(src, folder / "copy")
        copy_s = time.perf_counter() - start
        shutil.rmtree(folder / "copy")

        words = [str(src), str(dst), str(facts), str(size), str(threads)]
        start = time.perf_counter()
        child = subprocess.Popen([sys.executable, "-P", "-c", CHILD, *words])
        with Peak(child.pid) as memory:
            code = child.wait()
        wall_s = time.perf_counter() - start
        if code != 0:
            raise RuntimeError(f"the conversion failed with exit code {code}")
        report = json.loads(facts.read_text())
    return {
        "layers": layers,
        "E": E,
        "F": F,
        "D": D,
        "dtype": "bfloat16",
        "size": report["plan"]["size_reached"],
        "types": report["plan"]["types"],
        "checkpoint_bytes": nbytes,
        "result_bytes": sum(f["bytes"] for f in report["files"].values()),
        "wall_s": wall_s,
        "run_s": report["seconds"],
        "factor_s": sum(row["seconds"] for row in report["rows"]),
        "copy_s": copy_s,
        "gbs": nbytes / wall_s / 1e9,
        "error": (sum(row["error"] ** 2 for row in report["rows"]) / len(report["rows"])) ** 0.5
        if report["rows"]
        else 0.0,
        "peak_rss_anon_bytes": memory.peak,
        "bound_bytes": bound(E, F, D),
        "estimated_bytes": report["plan"]["memory_bytes"],
    }
