"""Measure the anonymous memory of another process while it runs."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Peak", "peak_memory"]

#: Seconds between two looks.
EVERY = 0.002


@dataclass(frozen=True)
class Peak:
    """What a process used: bytes of anonymous memory at its highest, seconds, exit code."""

    anonymous: int
    seconds: float
    returncode: int
    looks: int


def peak_memory(command: Sequence[str], env: Mapping[str, str] | None = None) -> Peak:
    """Run a command and watch ``RssAnon`` of its process in ``/proc``.

    Mapped pages of files do not count: the system can drop them at any time.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    peak = looks = 0
    while process.poll() is None:
        peak, looks = max(peak, _anonymous(process.pid)), looks + 1
        time.sleep(EVERY)
    return Peak(peak, time.perf_counter() - start, process.returncode, looks)


def _anonymous(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has just ended
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
