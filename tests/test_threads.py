"""The thread count, and the one parallel loop under load, failure and fork."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import molae
from molae import _core
from molae.errors import ArgumentError


@pytest.fixture(autouse=True)
def same_count():
    before = molae.get_num_threads()
    yield
    molae.set_num_threads(before)


def test_set_and_restore():
    molae.set_num_threads(3)
    assert molae.get_num_threads() == 3
    with molae.num_threads(1):
        assert molae.get_num_threads() == 1
        with molae.num_threads(2):
            assert molae.get_num_threads() == 2
        assert molae.get_num_threads() == 1
    assert molae.get_num_threads() == 3
    with pytest.raises(KeyError), molae.num_threads(1):
        raise KeyError
    assert molae.get_num_threads() == 3


@pytest.mark.parametrize("n", [0, -1, 2**31, 1.5, "2", True, None])
def test_wrong_counts(n):
    with pytest.raises(ArgumentError, match=r"^n: expected .* got "):
        molae.set_num_threads(n)


def test_environment(python):
    code = "import molae; print(molae.get_num_threads())"
    assert python(code, MOLAE_NUM_THREADS="5").strip() == "5"
    code = "import os, molae; print(molae.get_num_threads() == len(os.sched_getaffinity(0)))"
    assert python(code).strip() == "True"
    code = """
try:
    import molae
except ValueError as exc:
    print(exc)
"""
    assert "MOLAE_NUM_THREADS" in python(code, MOLAE_NUM_THREADS="many")
    assert "got '0'" in python(code, MOLAE_NUM_THREADS="0")


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 300])
@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_each_task_runs_once(threads, n):
    rc, worker = _core.parallel_probe(np.zeros(n, np.int64), threads)
    assert rc == 0
    assert worker.shape == (n,)
    assert np.all((worker >= 0) & (worker < min(threads, max(n, 1))))


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_status_does_not_depend_on_threads(threads):
    status = np.zeros(200, np.int64)
    status[[20, 150]] = 1, 3
    assert _core.parallel_probe(status, threads)[0] == 3  # the largest warning
    status[[60, 61, 199]] = -5, -6, -3
    for _ in range(20):
        assert _core.parallel_probe(status, threads)[0] == -5  # the failure of the lowest index


def test_num_threads_is_checked():
    for n in (0, -3, 2**31):
        with pytest.raises(ArgumentError, match="num_threads: expected 1 or more"):
            _core.parallel_probe([0], n)


def test_many_python_threads():
    wrong = []

    def call():
        for _ in range(100):
            rc, worker = _core.parallel_probe(np.zeros(50, np.int64), 3)
            if rc != 0 or (worker < 0).any() or (worker > 2).any():
                wrong.append(rc)

    threads = [threading.Thread(target=call) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_after_fork(python):
    code = """
import os, warnings
import numpy as np
import molae
from molae import _core
warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of fork with threads
_core.parallel_probe(np.zeros(100, int), 4)
assert _core.build_info()["pool_threads"] == 3
child = os.fork()
if child == 0:
    started = _core.build_info()["pool_threads"]
    rc, worker = _core.parallel_probe(np.zeros(100, int), 4)
    os._exit(0 if started == 0 and rc == 0 and (worker >= 0).all() else 1)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), _core.parallel_probe(np.zeros(100, int), 4)[0])
"""
    assert python(code).split() == ["0", "0"]


def test_signals_reach_the_interpreter(python):
    code = """
import os, signal, time
import numpy as np
from molae import _core
_core.parallel_probe(np.zeros(100, int), 4)
for line in open(f"/proc/self/status"):
    if line.startswith("SigBlk"):
        assert int(line.split()[1], 16) == 0
blocked = 0
for task in os.listdir("/proc/self/task"):
    text = open(f"/proc/self/task/{task}/status").read()
    mask = int(text.split("SigBlk:")[1].split()[0], 16)
    blocked += bool(mask & 1 << signal.SIGINT - 1)
print(blocked)
"""
    assert python(code, OPENBLAS_NUM_THREADS="1").strip() == "3"


def test_nobody_lends_threads(python):
    """Without a library that lends them, molae's own serve."""
    code = """
import numpy as np
from molae import _core
print(_core.borrow_threads("/nowhere/libnone.so"), _core.borrow_threads("libc.so.6"))
print(_core.parallel_probe(np.zeros(50, np.int64), 2, True)[0], _core.build_info()["pool_threads"])
"""
    assert python(code).split() == ["False", "False", "0", "1"]
