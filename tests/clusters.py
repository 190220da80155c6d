"""Dask schedulers and workers in processes of their own, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Runs in a worker before it works: makes it slow, or unfit, as a file says at the moment.
PRELOAD = """
import json, os, time
from pathlib import Path
from molae.cluster import worker
from molae.convert.conversion import Conversion
from molae.convert.materialization import Materialization

def now():
    try:
        return json.loads(Path(os.environ["WORKER_MOOD"]).read_text())
    except OSError:
        return {}

def slowed(real):
    def compute(self, job):
        time.sleep(now().get("slow", 0))
        return real(self, job)
    return compute

def moody(name, change):
    real = getattr(worker, name)
    setattr(worker, name, lambda *given: change(now(), real, *given))

if not hasattr(worker, "is_moody"):  # Dask runs this twice
    worker.is_moody = True
    for work in (Conversion, Materialization):
        work.compute = slowed(work.compute)
    moody("open_checkpoint", lambda mood, real, path: real(Path(mood.get("source", path))))
    moody("_run_in", lambda mood, real, folder: real(Path(mood.get("folder", folder))))
    moody("build_facts", lambda mood, real: real() | mood.get("build", {}))
    moody("code_sha256", lambda mood, real: mood.get("code", real()))
    moody("describe_worker", lambda mood, real, *given: real(*given) | mood.get("says", {}))
"""


class Cluster:
    """A scheduler and its workers; `mood` is what the workers' preload reads."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.file = folder / "scheduler.json"
        self._mood = folder / "mood.json"
        self._started: list[subprocess.Popen[bytes]] = []
        self.scheduler = self._start(
            "scheduler", "--port", "0", "--host", "127.0.0.1", "--scheduler-file", str(self.file)
        )
        wait_for(self.file.exists)
        wait_for(lambda: self.file.read_text().endswith("}"))
        self.address: str = json.loads(self.file.read_text())["address"]

    def worker(self, threads: int = 1, preload: str = PRELOAD) -> subprocess.Popen[bytes]:
        """One more; it connects when it is ready."""
        file = self.folder / f"preload-{len(self._started)}.py"
        file.write_text(preload)
        return self._start(
            "worker", self.address, "--nthreads", str(threads), "--no-nanny",
            "--memory-limit", "0", "--preload", str(file),
            "--local-directory", str(self.folder / "space"),
        )  # fmt: skip

    def set_mood(self, **mood: Any) -> None:
        new = self._mood.with_suffix(".new")
        new.write_text(json.dumps(mood))
        new.replace(self._mood)

    def close(self) -> None:
        for process in reversed(self._started):
            process.kill()
        for process in self._started:
            process.wait()

    def _start(self, role: str, *options: str) -> subprocess.Popen[bytes]:
        with open(self.folder / f"{role}-{len(self._started)}.log", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.dask_{role}", "--no-dashboard", *options],
                stdout=log, stderr=log,
                env=os.environ | {"WORKER_MOOD": str(self._mood), "MOLAE_NUM_THREADS": "1"},
            )  # fmt: skip
        self._started.append(process)
        return process


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)
