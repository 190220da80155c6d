"""Carry out a conversion or a materialization: lock, resume, write, finish."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from molae import __version__
from molae.arch import Model
from molae.convert.companions import companion_names
from molae.convert.destination import locked, named_troubles, prepare
from molae.convert.executor import Divisible, Executor, Here, build_facts
from molae.convert.journal import Journal, file_sha256
from molae.convert.jsontext import json_text
from molae.convert.layer_state import STATE
from molae.convert.loss_plot import PICTURE, plot_losses
from molae.convert.planning import Plan
from molae.convert.report import PAGE, REPORT, Report, Rows, sorted_rows, worker_rows
from molae.convert.shards import INDEX, index_text
from molae.info import show_config
from molae.io import copy_file_atomic, write_text_atomic
from molae.io.checkpoint import CONFIG

__all__ = ["CARD", "Task", "Watcher", "execute"]

CARD = "README.md"


class Task(Divisible, Protocol):
    """A run: the work on the shards, and the small files around them."""

    kind: str
    source_name: str
    model: Model

    @property
    def settings(self) -> Mapping[str, Any]: ...

    @property
    def digest(self) -> str: ...

    def config_text(self) -> str: ...

    def card(self, plan: Plan, rows: Rows, kept: Sequence[str]) -> str: ...

    def plan(self, *, timed: bool) -> Plan: ...


class Watcher:
    """Is told how a run goes on; override what is of interest."""

    def planned(self, plan: Plan) -> None:
        """Groups and ranks are decided; nothing is written yet."""

    def resumed(self, shards: int) -> None:
        """So many shards were finished by an earlier run of the same command."""

    def advanced(self, done: int, total: int, what: str) -> None:
        """So many bytes of the source are done; `what` is worked on now."""

    def finished(self, report: Report) -> None:
        """The result is whole."""


def execute(
    task: Task,
    dst: Path,
    *,
    overwrite: bool,
    watcher: Watcher | None,
    executor: Executor | None = None,
) -> Report:
    """Write the result of `task` to `dst`, or what an interrupted run has left to be done.

    `executor` computes the shards; by default this process.

    Raises
    ------
    DestinationError
        See `molae.convert.destination`.
    """
    start = time.perf_counter()
    executor = executor or Here()
    executor.begin(task)
    plan = task.plan(timed=watcher is not None)
    watcher = watcher or Watcher()
    watcher.planned(plan)
    taken = (CARD, CONFIG, INDEX, PICTURE, REPORT, PAGE)
    companions = companion_names(task.checkpoint, taken=taken)
    header = _header(task, companions)
    needed = plan.disk_bytes + sum(path.stat().st_size for path in companions.values())
    with named_troubles(dst), locked(dst):
        journal = prepare(dst, header, overwrite=overwrite, needed=needed)
        if journal.shards:
            watcher.resumed(len(journal.shards))
        executor.run(task, dst, journal, watcher.advanced)
        report = _finish(task, plan, dst, journal, companions, start)
        journal.remove()
    watcher.finished(report)
    return report


def _header(task: Task, companions: Mapping[str, Path]) -> dict[str, Any]:
    """What must be the same for a run to go on where another stopped."""
    return {
        "molae_journal": 1,
        "kind": task.kind,
        "settings": dict(task.settings),
        "family": hashlib.sha256(repr(task.model.family).encode()).hexdigest(),
        "groups_and_ranks": task.digest,
        "source": task.checkpoint.fingerprint(),
        "molae": __version__,
        "build": build_facts(),
        "files": [
            *(shard.file for shard in task.shards),
            STATE,
            INDEX,
            *companions,
            CARD,
            CONFIG,
            PICTURE,
            REPORT,
            PAGE,
        ],
    }


def _finish(
    task: Task,
    plan: Plan,
    dst: Path,
    journal: Journal,
    companions: Mapping[str, Path],
    start: float,
) -> Report:
    """Write the small files; each is whole or absent at any moment, the report comes last."""
    written = [INDEX, *companions, CARD, CONFIG]
    entries = [journal.shards[shard.file] for shard in task.shards]
    found = [row for entry in entries for row in entry["rows"]]
    rows = sorted_rows(found)
    write_text_atomic(dst / INDEX, index_text(task.shards))
    for name, path in companions.items():
        (dst / name).parent.mkdir(exist_ok=True)
        copy_file_atomic(path, dst / name)
    write_text_atomic(dst / CARD, task.card(plan, rows, list(companions)))
    write_text_atomic(dst / CONFIG, task.config_text())
    files = {e["file"]: {"bytes": e["bytes"], "sha256": e["sha256"]} for e in entries}
    if rows["healed"] and plot_losses(dst / PICTURE, rows["healed"]):
        written.append(PICTURE)
    for name in written:
        path = dst / name
        files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    report = Report(
        kind=task.kind,
        versions=_versions(),
        settings=dict(task.settings),
        plan=plan.to_dict(),
        inputs={
            "path": task.source_name,
            "fingerprint": task.checkpoint.fingerprint(),
            "sha256": {entry["file"]: entry["inputs"] for entry in entries},
        },
        files=files,
        seconds=time.perf_counter() - start,
        workers=worker_rows(entries),
        **rows,
    )
    write_text_atomic(dst / REPORT, json_text(report.to_dict()))
    return report


def _versions() -> dict[str, Any]:
    facts = show_config("dict")
    return {
        "molae": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "ml_dtypes": ml_dtypes.__version__,
        "blas": {key: facts["blas"][key] for key in ("name", "version", "core", "vendored")},
        "isa": facts["kernels"]["isa"],
        "compiler": facts["molae"]["compiler"],
        "threads": facts["molae"]["threads"],
    }
