"""The extension under sanitizers, through the Python tests of ops, fit and kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from soak.outcome import Findings

__all__ = ["SANITIZERS", "TESTS", "Outcome", "run"]

ROOT = Path(__file__).parents[2]
TESTS = (
    "test_ops_forward.py", "test_ops_backward.py", "test_ops_activations.py",
    "test_ops_refusals.py",
    "test_kernels.py", "test_kern_products.py", "test_narrow.py", "test_compressed.py",
    "test_fit.py", "test_fit_weighted.py", "test_refitting.py", "test_moments.py", "test_adamw.py",
    "test_threads.py",
)  # fmt: skip

#: Switch of setup.py, the runtime to preload, its options, threads of molae's, and tests left out.
SANITIZERS = {
    # Python itself never frees some of what it has; the counting allocator looks for leaks.
    "asan": ("address", "libasan.so", {"ASAN_OPTIONS": "detect_leaks=0"}, 1, ""),
    "ubsan": ("undefined", "libubsan.so", {"UBSAN_OPTIONS": "print_stacktrace=1"}, 1, ""),
    # Left out: the runtime has a thread of its own and does not go on after a fork, and an
    # interpreter that is not instrumented hides how several Python threads take turns.
    "tsan": (
        "thread", "libtsan.so",
        {"TSAN_OPTIONS": f"exitcode=66 suppressions={Path(__file__).with_name('tsan.supp')}"}, 4,
        "not after_fork and not signals_reach and not many_python_threads",
    ),
}  # fmt: skip

_SAID = re.compile(
    r"ERROR: AddressSanitizer.*|runtime error:.*|WARNING: ThreadSanitizer.*|SUMMARY: \w+Sanitizer.*"
)


@dataclass
class Outcome(Findings):
    """Tests passed under each sanitizer, and what it said."""

    passed: Counter[str] = field(default_factory=Counter)


def run(names: Sequence[str] = (), tests: Sequence[str] = TESTS) -> Outcome:
    """Build molae with each sanitizer beside the tree, and run the tests on that."""
    found, started = Outcome(), time.perf_counter()
    for name in names or SANITIZERS:
        switch, runtime, options, threads, picked = SANITIZERS[name]
        target = ROOT / "build" / "sanitize" / name
        _build(target, switch)
        library = subprocess.run(
            ["gcc", f"-print-file-name={runtime}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        environ = os.environ | options | {
            "LD_PRELOAD": library, "PYTHONPATH": str(target), "OPENBLAS_NUM_THREADS": "1",
            "MOLAE_NUM_THREADS": str(threads), "PYTHONMALLOC": "malloc",
        }  # fmt: skip
        where = subprocess.run(
            [sys.executable, "-P", "-c", "from molae import _core; print(_core.__file__)"],
            env=environ, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        if not Path(where.strip()).is_relative_to(target):
            raise RuntimeError(f"another molae would be tested: {where}")
        # Without it the runtime of older compilers does not find its place in memory.
        fixed = ["setarch", "-R"] if shutil.which("setarch") else []
        argv = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        argv += ["-k", picked] if picked else []
        argv += [str(ROOT / "tests" / test) for test in tests]
        done = subprocess.run(
            [*fixed, *argv], env=environ, cwd=ROOT, capture_output=True, text=True, check=False
        )
        text = done.stdout + done.stderr
        for number, outcome in re.findall(r"(\d+) (passed|failed|error)", done.stdout[-300:]):
            found.passed[name] += int(number) if outcome == "passed" else 0
        said = sorted(set(_SAID.findall(text)))
        if done.returncode or said:
            found.faults.append(
                {"sanitizer": name, "fault": said[:20], "tail": text[-3000:]}
            )  # fmt: skip
    found.seconds = time.perf_counter() - started
    return found


def _build(target: Path, switch: str) -> None:
    shutil.rmtree(target, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    try:
        import scipy_openblas32  # noqa: F401  (then nothing need be fetched to build)

        pip.append("--no-build-isolation")
    except ImportError:
        pass
    for folder in ("lib", "bdist", "temp"):
        for old in (ROOT / "build").glob(f"{folder}*"):
            shutil.rmtree(old)
    subprocess.run(
        [*pip, "--no-deps", "--target", str(target), str(ROOT)],
        env=os.environ | {"MOLAE_SANITIZE": switch}, check=True,
    )  # fmt: skip
