"""What the measurements were made with: versions, BLAS, processor, commit, load."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import molae
from benchmarks import ROOT

__all__ = ["BUSY", "header", "usable_cpus"]

#: Features that decide which kernels a BLAS takes.
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")

#: Share of the CPUs' time taken by others from which the machine counts as busy, and the seconds
#: for which it is watched.
BUSY, WATCHED = 0.1, 2.0


def header(threads: int) -> dict[str, Any]:
    """Facts about this run, without names of the machine, its user or its folders."""
    load = _load(WATCHED)
    return {
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "threads": threads,
        "load_at_start": round(load, 3),
        "busy": load > BUSY,
        "commit": _commit(),
        "cpu": _cpu(),
        "versions": _versions(),
        "blas": _blas(),
        "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}",
    }


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


def _load(seconds: float) -> float:
    """Share of all CPUs' time that others take while this process waits; stolen time is theirs."""
    before = _cpu_times()
    time.sleep(seconds)
    spent = [after - start for start, after in zip(before, _cpu_times(), strict=True)]
    idle = spent[3] + spent[4]  # idle, and waiting for a disk
    return 1 - idle / max(sum(spent), 1)


def _cpu_times() -> list[int]:
    """user, nice, system, idle, iowait, irq, softirq, steal; guests are in user already."""
    return [int(ticks) for ticks in _read("/proc/stat").split("\n", 1)[0].split()[1:9]]


def _cpu() -> dict[str, Any]:
    entries: list[dict[str, str]] = [{}]
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip():
            entries[-1][name.strip()] = value.strip()
        else:
            entries.append({})
    cpus = [entry for entry in entries if "processor" in entry]
    first = cpus[0] if cpus else {}
    cores = {(c.get("physical id", ""), c.get("core id", c["processor"])) for c in cpus}
    flags = set(first.get("flags", "").split())
    return {
        "model": first.get("model name", platform.processor() or "unknown"),
        "family_model_stepping": [
            int(first[key]) for key in ("cpu family", "model", "stepping") if key in first
        ],
        "features": [flag for flag in FLAGS if flag in flags],
        "virtual": "hypervisor" in flags,
        "cores": len(cores),
        "cpus": len(cpus),
        "usable_cpus": usable_cpus(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip()
        or "not readable",
    }


def _versions() -> dict[str, str]:
    found = {
        "molae": molae.__version__,
        "Python": platform.python_version(),
        "NumPy": np.__version__,
    }
    if (torch := _torch()) is not None:
        found["PyTorch"] = torch.__version__
    return found


def _blas() -> dict[str, str]:
    """The BLAS of each contestant, in words."""
    own = molae.show_config("dict")["blas"]
    found = {"molae": f"{own['name']} {own['version']}, {own['core']} kernels, 1 thread a call"}
    blas = np.show_config("dicts")["Build Dependencies"]["blas"]
    found["NumPy"] = f"{blas['name']} {blas['version']}"
    for pool in _pools():
        if Path(pool["filepath"]).parent.name.startswith("numpy"):
            layer = pool.get("threading_layer", "unknown threading")
            found["NumPy"] = (
                f"{pool['internal_api']} {pool['version']}, {pool.get('architecture', '?')} "
                f"kernels, {layer}, {pool['num_threads']} threads"
            )
    if (torch := _torch()) is not None:
        lines = torch.__config__.parallel_info().splitlines()
        name = next((line for line in lines if "Math Kernel Library" in line), "")
        parts = [name.strip() or "BLAS not named", f"{torch.get_num_threads()} threads"]
        found["PyTorch"] = ", ".join(parts)
    return found


def _pools() -> list[dict[str, Any]]:
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return []
    pools: list[dict[str, Any]] = threadpool_info()
    return pools


def _torch() -> Any:
    return sys.modules.get("torch")


def _commit() -> str:
    """Short hash of the commit, with a mark where sources differ from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    dirty = _git(
        "status", "--porcelain", "--untracked-files=no", "--", "molae", "csrc", "benchmarks"
    )
    changed = [line for line in dirty.splitlines() if "benchmarks/results/" not in line]
    return f"{head} with changes" if changed else head


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False
    )
    return done.stdout.strip("\n") if done.returncode == 0 else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
