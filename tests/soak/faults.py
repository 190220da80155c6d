"""Each system call that fails in turn: a clear error, nothing half-written, and a run to resume.

``faults.c`` is preloaded and lets the n-th call of a kind fail on files below one folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints import add_companions, make_checkpoint
from converting import REPORT, tree

from molae import ConvertConfig, cli, convert
from molae.convert.destination import LOCK
from molae.convert.journal import JOURNAL
from soak.outcome import Findings

__all__ = ["KINDS", "compiler", "preload", "run"]

#: As numbered in faults.c.
KINDS = ("open", "read", "write", "fsync", "rename", "unlink", "mkdir", "mmap", "truncate")

#: What each kind of call may answer, on the source and on the destination.
ERRORS = {
    "src": {"open": ("EACCES", "EIO"), "read": ("EIO",), "mmap": ("ENODEV",)},
    "dst": {
        "open": ("EACCES", "EROFS", "ENOSPC"), "read": ("EIO",), "write": ("ENOSPC", "EIO"),
        "fsync": ("EIO",), "rename": ("EIO", "EACCES"), "unlink": ("EACCES",),
        "mkdir": ("EACCES",), "truncate": ("EIO",),
    },
}  # fmt: skip

LIBRARY = "MOLAE_SOAK_FAULTS"


@dataclass
class Outcome(Findings):
    """Faults by the call that failed, how the command ended, and what must not be."""

    failed: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)


def compiler() -> str | None:
    """The system's C compiler, if there is one."""
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def preload(argv: Sequence[str]) -> None:
    """Run this program again with the library loaded; returns where it already is."""
    if LIBRARY in os.environ:
        return
    cc = compiler()
    if cc is None:
        raise SystemExit("soak faults: no C compiler; install gcc or clang")
    with tempfile.TemporaryDirectory() as folder:
        library = os.path.join(folder, "faults.so")
        source = Path(__file__).with_name("faults.c")
        subprocess.run(
            [cc, "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", str(source), "-o",
             library, "-ldl"], check=True,
        )  # fmt: skip
        environ = os.environ | {"LD_PRELOAD": library, LIBRARY: library}
        done = subprocess.run([sys.executable, "-P", *argv], env=environ, check=False)
    raise SystemExit(done.returncode)


def run(most: int, seed: int) -> Outcome:
    """Each call of each kind fails once, and each from then on; at most so many cases."""
    library = ctypes.CDLL(os.environ[LIBRARY])
    library.soak_calls.restype = ctypes.c_long
    found, started = Outcome(), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name).resolve()
        source = make_checkpoint(work / "src", L=2, E=4, D=8, F=4, dtype="BF16", shards=2)
        add_companions(source)
        convert(source, work / "wanted", ConvertConfig(size=0.6, group_size=2))
        wanted = tree(work / "wanted")
        bench = _Bench(library, source, work / "dst", wanted)
        chosen = random.Random(f"faults {seed}")
        cases = bench.cases()
        for case in cases if len(cases) <= most else chosen.sample(cases, most):
            bench.run(found, *case)
        for place in ("src", "dst"):
            for length in (1, 7, 100):
                bench.short(found, place, length)
    found.seconds = time.perf_counter() - started
    return found


class _Bench:
    def __init__(self, library: Any, source: Path, dst: Path, wanted: dict[str, str]) -> None:
        self._library, self._source, self._dst, self._wanted = library, source, dst, wanted

    def _fault(
        self, place: str, kind: str, n: int, code: int = 0, sticky: bool = False, most: int = 0
    ) -> None:
        folder = str(self._source if place == "src" else self._dst).encode()
        self._library.soak_fault(
            folder, KINDS.index(kind), ctypes.c_long(n), code, int(sticky), ctypes.c_long(most)
        )

    def _off(self) -> None:
        self._library.soak_fault(b"", -1, ctypes.c_long(0), 0, 0, ctypes.c_long(0))

    def cases(self) -> list[tuple[str, str, int, str, bool]]:
        """Place, kind, which call, error, and whether all calls after it fail too."""
        every = []
        for place, kinds in ERRORS.items():
            self._fault(place, "open", 0)
            code, _, error = self._convert()
            assert code == 0, error
            counts = {kind: self._library.soak_calls(KINDS.index(kind)) for kind in kinds}
            self._off()
            for kind, codes in kinds.items():
                assert counts[kind] > 0, f"{kind} is never called on {place}"
                every += [
                    (place, kind, n, code, sticky)
                    for n in range(1, counts[kind] + 1)
                    for code in codes
                    for sticky in (False, True)
                ]
        return every

    def _convert(self) -> tuple[int, str, str]:
        shutil.rmtree(self._dst, ignore_errors=True)
        return self._again()

    def _again(self) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        argv = ["convert", str(self._source), str(self._dst), "--size", "0.6"]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main([*argv, "--group-size", "2", "--quiet"])
        return code, out.getvalue(), err.getvalue()

    def run(self, found: Outcome, place: str, kind: str, n: int, code: str, sticky: bool) -> None:
        self._off()
        shutil.rmtree(self._dst, ignore_errors=True)
        self._fault(place, kind, n, getattr(errno, code), sticky)
        end, _, said = self._again()
        self._off()
        found.failed[f"{place} {kind} {code}"] += 1
        found.ended[f"exit code {end}"] += 1
        trouble = self._trouble(end, said, kind, sticky)
        if trouble:
            where = f"{place} {kind} {n} {code}{' from then on' if sticky else ''}"
            found.faults.append({"case": where, "fault": trouble, "said": said})

    def _trouble(self, end: int, said: str, kind: str, sticky: bool) -> str:
        there = tree(self._dst) if self._dst.exists() else {}
        torn = [name for name, sha in there.items() if self._wanted.get(name, sha) != sha]
        if torn:
            return f"not whole under its own name: {torn}"
        if end not in (0, 1):
            return f"exit code {end}"
        if end == 1:
            clear = said.startswith("molae: ") and said.count("\n") == 1 and ": " in said[7:]
            names = [*self._wanted, REPORT, JOURNAL, LOCK, "src", "dst"]
            if not clear or "--debug shows" in said or not any(name in said for name in names):
                return "no clear error"
            if kind != "unlink" and any(name.endswith(".part") for name in there):
                return "a part was left"
            if self._done():
                shutil.rmtree(self._dst)  # all was done but for the last word
            end, _, said = self._again()
            if end != 0:
                return f"not resumed: {said}"
        now = tree(self._dst)
        now.pop(LOCK, None)
        if now == self._wanted:
            return ""
        return f"other bytes: {sorted(k for k in now if now[k] != self._wanted.get(k))}"

    def _done(self) -> bool:
        return (self._dst / REPORT).exists() and not (self._dst / JOURNAL).exists()

    def short(self, found: Outcome, place: str, length: int) -> None:
        """Reads and writes that move few bytes at a time."""
        self._fault(place, "read", 0, most=length)
        end, _, said = self._convert()
        self._off()
        found.failed[f"{place} short"] += 1
        found.ended[f"exit code {end}"] += 1
        if end != 0 or tree(self._dst) != self._wanted:
            found.faults.append({"case": f"{place} short {length}", "fault": "short", "said": said})
