"""Each system call that fails in turn: a clear error, nothing half-written, and a run to resume.

``faults.c`` is preloaded and lets the n-th call of a kind fail on files below one of some folders,
in the children in which commands run.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from converting import tree

from soak.bench import Bench
from soak.outcome import Findings

__all__ = ["KINDS", "compiler", "preload", "run"]

#: As numbered in faults.c.
KINDS = ("open", "read", "write", "fsync", "rename", "unlink", "mkdir", "mmap", "truncate")

#: What each kind of call may answer, on what is only read and on what is written.
READ = {"open": ("EACCES", "EIO"), "read": ("EIO",), "mmap": ("ENODEV",)}
WRITTEN = READ | {
    "open": ("EACCES", "EROFS", "ENOSPC"), "write": ("ENOSPC", "EIO"), "fsync": ("EIO",),
    "rename": ("EIO", "EACCES"), "unlink": ("EACCES",), "mkdir": ("EACCES",), "truncate": ("EIO",),
}  # fmt: skip

#: Folders of a `Bench`, as numbered in faults.c.
PLACES = {
    "src": READ, "converted": READ, "text": READ, "stats": WRITTEN, "scratch": WRITTEN,
    "out": WRITTEN,
}  # fmt: skip

#: Reads and writes that move so many bytes at a time.
SHORT = (1, 7, 100)

LIBRARY = "MOLAE_SOAK_FAULTS"


@dataclass
class Outcome(Findings):
    """Faults by the command, by the call that failed, how commands ended, and what must not be.

    `cases` are those that were tried, `possible` all there are.
    """

    cases: Counter[str] = field(default_factory=Counter)
    possible: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)


class Case(NamedTuple):
    """The n-th call of a kind fails, and with `sticky` all after it; or moves n bytes at most.

    `begun`: in a run that goes on where another stopped.
    """

    begun: bool
    place: str
    kind: str
    n: int
    code: str = ""
    sticky: bool = False


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


def run(most: int, seed: int, commands: Sequence[str] = ()) -> Outcome:
    """Each call of each kind fails once, and each from then on; of each command, or of some, an
    even share of so many cases."""
    library = ctypes.CDLL(os.environ[LIBRARY])
    library.soak_calls.restype = ctypes.c_long
    found, started = Outcome(), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name).resolve())
        for at, place in enumerate(PLACES):
            if library.soak_place(at, str(getattr(bench, place)).encode()) != 0:
                raise MemoryError
        names = commands or list(bench.commands)
        for at, own in enumerate(names):
            command = _Command(bench, own, library)
            command.run(found, (most + at) // len(names), random.Random(f"faults {seed} {own}"))
    found.seconds = time.perf_counter() - started
    return found


class _Command:
    """One command of a bench, and what it comes to where nothing fails."""

    def __init__(self, bench: Bench, name: str, library: Any) -> None:
        self._bench, self._name, self._library = bench, name, library
        bench.clear()
        bench.run(name)
        self._wanted = self._written()
        self._begun = bench.out.with_name("begun")
        self._read = self._only_read()

    def run(self, found: Outcome, most: int, rng: random.Random) -> None:
        cases = self._cases(begun=False)
        self._begin()
        cases += self._cases(begun=True)
        found.possible[self._name] = len(cases)
        for case in _spread(cases, rng)[:most]:
            trouble = self._try(found, case)
            if trouble:
                found.faults.append({
                    "command": self._name, "case": case._asdict(), "fault": trouble,
                    "said": self._bench.said,
                })  # fmt: skip
        if self._only_read() != self._read:
            found.faults.append({"command": self._name, "fault": "what is read was changed"})
        shutil.rmtree(self._begun)

    # ------------------------------------------------------------------- the cases

    def _cases(self, *, begun: bool) -> list[Case]:
        """One of each, of a command that does not fail."""
        self._ready(begun)
        self._go(count=True)
        every = []
        for place, kinds in PLACES.items():
            calls = {kind: self._calls(place, kind) for kind in kinds}
            every += [
                Case(begun, place, kind, n, code, sticky)
                for kind, codes in kinds.items()
                for n in range(1, calls[kind] + 1)
                for code in codes
                for sticky in (False, True)
            ]
            if calls["read"] or calls.get("write"):
                every += [Case(begun, place, "short", length) for length in SHORT]
        return every

    def _begin(self) -> None:
        """Keep what a run leaves that fails midway."""
        self._ready(False)
        self._go(count=True)
        half = self._calls("out", "write") // 2
        self._ready(False)
        if self._go(Case(False, "out", "write", half, "ENOSPC", True)) != 1:
            raise RuntimeError(f"{self._name}: {self._bench.said}")
        for folder in (self._bench.out, self._bench.stats):
            shutil.copytree(folder, self._begun / folder.name)

    def _ready(self, begun: bool) -> None:
        self._bench.clear()
        if begun:
            for folder in (self._bench.out, self._bench.stats):
                shutil.copytree(self._begun / folder.name, folder, dirs_exist_ok=True)

    def _go(self, case: Case | None = None, *, count: bool = False) -> int:
        """Run the command, and let a call fail; its exit code."""
        before: Callable[[], object] | None = None
        if case is not None and case.kind == "short":
            before = self._fault(case.place, "read", most=case.n)
        elif case is not None:
            code = getattr(errno, case.code)
            before = self._fault(case.place, case.kind, case.n, code, case.sticky)
        elif count:
            before = self._fault("out", "read")
        child = self._bench.start(self._name, before)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _fault(
        self, place: str, kind: str, n: int = 0, code: int = 0, sticky: bool = False, most: int = 0
    ) -> Callable[[], object]:
        return lambda: self._library.soak_fault(
            list(PLACES).index(place), KINDS.index(kind), ctypes.c_long(n), code, int(sticky),
            ctypes.c_long(most),
        )  # fmt: skip

    def _calls(self, place: str, kind: str) -> int:
        return self._library.soak_calls(list(PLACES).index(place), KINDS.index(kind))

    # ------------------------------------------------------------------ what is seen

    def _try(self, found: Outcome, case: Case) -> str:
        """What must not be, in words."""
        self._ready(case.begun)
        end = self._go(case)
        found.cases[self._name] += 1
        found.ended[f"exit code {end}"] += 1
        if case.kind == "short" or self._calls(case.place, case.kind) >= case.n:
            found.failed[f"{case.place} {case.kind}"] += 1
        now = self._written()
        torn = [name for name, sha in self._wanted.items() if now.get(name, sha) != sha]
        torn = [name for name in torn if name.startswith(self._bench.out.name)]
        if torn:
            return f"not whole under its own name: {torn}"
        if case.kind == "unlink" or self._name == "finetune":
            # What cannot be removed in the end stays, and does no harm.
            now = {name: sha for name, sha in now.items() if name in self._wanted}
        if end == 0:
            return self._other(now)
        if end != 1 or case.kind == "short":
            return f"exit code {end}"
        said = self._bench.said
        if not said.startswith("molae: ") or said.count("\n") != 1 or "--debug shows" in said:
            return "no clear error"
        if not any(name in said for name in self._names(case.place)):
            return "the error does not name the file"
        if case.kind != "unlink" and (parts := self._parts(case.place)):
            return f"left: {parts}"
        if self._bench.done:  # all was done but for the last word
            return self._other(now)
        if self._go() != 0:
            return f"not resumed, after it had said {said!r}"
        return self._other(self._written())

    def _written(self) -> dict[str, str]:
        return _trees(self._bench.out, self._bench.stats)

    def _only_read(self) -> dict[str, str]:
        return _trees(*(getattr(self._bench, name) for name, may in PLACES.items() if may is READ))

    def _other(self, now: dict[str, str]) -> str:
        names = sorted(self._wanted.keys() | now.keys())
        other = [name for name in names if now.get(name) != self._wanted.get(name)]
        return f"other bytes: {other}" if other else ""

    def _names(self, place: str) -> list[str]:
        """What an error may call a file of a folder."""
        folder = getattr(self._bench, place)
        return [str(folder), *(Path(name).name for name in tree(folder) | self._wanted)]

    def _parts(self, place: str) -> list[str]:
        """What must not be left; a folder in which nothing works cannot be tidied."""
        left = [name for name in self._written() if name.endswith(".part")]
        if place != "scratch":
            left += [path.name for path in self._bench.scratch.iterdir()]
        return left


def _trees(*folders: Path) -> dict[str, str]:
    return {f"{own.name}/{name}": sha for own in folders for name, sha in tree(own).items()}


def _spread(cases: Sequence[Case], rng: random.Random) -> list[Case]:
    """In random order, but so that calls that are rare come among the first."""
    shuffled = rng.sample(cases, len(cases))
    seen: Counter[tuple[object, ...]] = Counter()
    order = []
    for case in shuffled:
        alike = case.begun, case.place, case.kind
        order.append(seen[alike])
        seen[alike] += 1
    return [case for _, case in sorted(zip(order, shuffled, strict=True), key=lambda own: own[0])]
