"""What every test has: no leak of native memory, a seeded generator, data from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Test processes share the cores: threads that wait for one another would lose their turns. Set
# before NumPy and molae look.
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("MOLAE_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(name, "1")

import hypothesis
import numpy as np
import pytest

from molae import _core

# The installed package is tested, by child processes too, not the sources in the working folder.
os.environ["PYTHONSAFEPATH"] = "1"

# Two busy cores make single examples slow now and then; hangs are caught by the time limit.
hypothesis.settings.register_profile("molae", deadline=None, derandomize=True)
hypothesis.settings.load_profile("molae")


@pytest.fixture(autouse=True)
def native_memory() -> Iterator[None]:
    """Fails a test that leaves native memory behind or a failing allocator switched on."""
    before = _core.mem_live()
    yield
    _core.mem_fail_after(0)
    assert _core.mem_live() == before, "native memory was not freed"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240607)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of larger texts that the repository does not ship."""
    folder = os.environ.get("MOLAE_TEST_DATA")
    if not folder:
        pytest.skip("MOLAE_TEST_DATA is not set to the folder of test data")
    if not Path(folder).is_dir():
        pytest.skip(f"MOLAE_TEST_DATA is not a folder: {folder}")
    return Path(folder)


@pytest.fixture
def python() -> Callable[..., str]:
    """Runs code in a fresh interpreter without molae's and OpenBLAS's variables."""

    def run(code: str, **environ: str) -> str:
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MOLAE_", "OPENBLAS_", "OMP_"))
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**clean, **environ},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread: tiny models gain nothing by more, and lose much on busy cores."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _core.mem_live() != 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def unset_is_nan(monkeypatch):
    """New arrays for results hold NaN, so that nobody adds to what was never set."""
    monkeypatch.setattr(_core, "empty", lambda shape, dtype: np.full(shape, np.nan, dtype))
