"""Checkpoints made step by step, each step in a process of its own, whose memory is watched."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import ROOT
from benchmarks.memory import Peak
from benchmarks.quality.kept import Found
from benchmarks.quality.model import Source

__all__ = ["Bench", "Processes", "Step"]

# Behind the installed packages: the sources beside benchmarks may not be built.
SERVER = f"""
import sys
sys.path.append({str(ROOT)!r})
from benchmarks.heal.steps import serve
serve()
"""

#: Seconds between two looks at a step's memory.
INTERVAL = 0.01


@dataclass(frozen=True)
class Step:
    """What is done to a checkpoint.

    Attributes
    ----------
    name : str
        As `rows.STEPS` has it.
    kind : str
        As `steps.KINDS` has it.
    settings : mapping
        JSON-ready.
    """

    name: str
    kind: str
    settings: Mapping[str, Any]


class Processes:
    """One process a step, forked from one that has loaded the libraries and done nothing else.

    To be used as a context manager.
    """

    def __enter__(self) -> Processes:
        self._server = subprocess.Popen(
            [sys.executable, "-P", "-c", SERVER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        return self

    def __exit__(self, *error: object) -> None:
        with self._server:
            if error[0] is not None:
                self._server.kill()

    def run(self, spec: Path, out: Path) -> int:
        """Have `steps.main` called.

        Returns
        -------
        int
            The peak of the process's anonymous memory, in bytes.

        Raises
        ------
        RuntimeError
            It has failed; what it said is on standard error.
        """
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps([str(spec), str(out)]) + "\n")
        self._server.stdin.flush()
        pid = self._told()
        with Peak(pid, INTERVAL) as memory:
            code = self._told()
        if code != 0:
            raise RuntimeError(f"failed with exit code {code}")
        return memory.peak

    def _told(self) -> int:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError("the process that steps are forked from has ended")
        return int(line)


@dataclass(frozen=True, eq=False)
class Bench(Source):
    """What every row is made of.

    Attributes
    ----------
    text : Path
        Of `tokens`, to train with.
    work : Path
        Where every checkpoint is kept, so that rows which begin alike share their steps.
    threads : int
    processes : Processes
    """

    text: Path
    work: Path
    threads: int
    processes: Processes

    def make(self, steps: Sequence[Step]) -> tuple[Path, list[Found]]:
        """The checkpoint after these steps, and of each what it cost."""
        src, found = self.path, []
        for step in steps:
            src, facts = self._done(src, step)
            found.append(facts)
        return src, found

    def _done(self, src: Path, step: Step) -> tuple[Path, Found]:
        key = hashlib.sha256(json.dumps([src.name, asdict(step)]).encode()).hexdigest()[:12]
        dst = self.work / f"{step.name}-{key}"
        record = dst.with_suffix(".json")
        if not record.exists():
            for left in (dst, dst.with_name(f"{dst.name}.training")):
                shutil.rmtree(left, ignore_errors=True)  # the time of half a step says nothing
            found = {"step": step.name, **self._run(src, dst, step)}
            part = record.with_suffix(".part")
            part.write_text(json.dumps(found))
            part.replace(record)
        facts: Found = json.loads(record.read_text())
        return dst, facts

    def _run(self, src: Path, dst: Path, step: Step) -> Found:
        tokens, told, spec = (self.work / f"step.{end}" for end in ("npy", "out", "in"))
        if not tokens.exists():
            np.save(tokens, self.tokens)
        told.unlink(missing_ok=True)
        spec.write_text(
            json.dumps(
                {
                    "source": [str(self.path), str(tokens), self.sequences, self.length],
                    "text": str(self.text),
                    "threads": self.threads,
                    "src": str(src),
                    "dst": str(dst),
                    "kind": step.kind,
                    "settings": dict(step.settings),
                }
            )
        )
        try:
            peak = self.processes.run(spec, told)
        except RuntimeError as error:
            raise RuntimeError(f"{step.name}: {error}") from None
        found: Found = json.loads(told.read_text())
        return {**found, "peak_bytes": peak}
