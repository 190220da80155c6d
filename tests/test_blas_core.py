"""The choice of OpenBLAS's kernels for molae's own copy, and that nothing else is touched."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from molae import _blas, _core
from molae._blas import CoreChoice, choose_core

ZEN = _blas.SKYLAKEX_FLAGS | {"avx2", "fma"}
vendored = pytest.mark.skipif(
    not _core.build_info()["blas"]["vendored"], reason="built with the system's OpenBLAS"
)
avx512 = pytest.mark.skipif(
    not _blas.cpu_flags() >= _blas.SKYLAKEX_FLAGS, reason="the CPU has no AVX-512"
)

REPORT = """
import json, os
before = dict(os.environ)
import molae
restored = dict(os.environ) == before
from threadpoolctl import threadpool_info
pools = {os.path.basename(p["filepath"]): p for p in threadpool_info()}
print(json.dumps({
    "blas": molae.show_config("dict")["blas"],
    "restored": restored,
    "numpy": [[p["architecture"], p["num_threads"]] for name, p in pools.items()
              if "numpy.libs" in p["filepath"]],
}))
"""
NUMPY_ALONE = """
import json, numpy
from threadpoolctl import threadpool_info
print(json.dumps([[p["architecture"], p["num_threads"]] for p in threadpool_info()]))
"""


class TestChoice:
    def test_by_features(self):
        assert choose_core({}, ZEN, True) == CoreChoice("SkylakeX", "CPU features")

    @pytest.mark.parametrize("missing", sorted(_blas.SKYLAKEX_FLAGS))
    def test_every_feature_is_needed(self, missing):
        assert choose_core({}, ZEN - {missing}, True) == CoreChoice(None, "OpenBLAS")

    def test_users_own_setting_wins(self):
        environ = {"OPENBLAS_CORETYPE": "Zen"}
        assert choose_core(environ, ZEN, True) == CoreChoice("Zen", "OPENBLAS_CORETYPE")

    def test_for_molae_alone(self):
        environ = {"OPENBLAS_CORETYPE": "Zen", "MOLAE_BLAS_CORE": "Haswell"}
        assert choose_core(environ, ZEN, True) == CoreChoice("Haswell", "MOLAE_BLAS_CORE")
        environ = {"MOLAE_BLAS_CORE": "default"}
        assert choose_core(environ, ZEN, True) == CoreChoice(None, "MOLAE_BLAS_CORE")

    def test_system_library_is_left_alone(self):
        assert choose_core({"MOLAE_BLAS_CORE": "Haswell"}, ZEN, False).core is None

    def test_empty_settings_are_none(self):
        environ = {"OPENBLAS_CORETYPE": "", "MOLAE_BLAS_CORE": ""}
        assert choose_core(environ, frozenset(), True) == CoreChoice(None, "OpenBLAS")


class TestFlags:
    def test_first_cpu(self, tmp_path):
        path = tmp_path / "cpuinfo"
        path.write_text("processor\t: 0\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nflags\t: sse\n")
        assert _blas.cpu_flags(str(path)) == {"fpu", "avx2"}

    def test_unknown(self, tmp_path):
        assert _blas.cpu_flags(str(tmp_path / "none")) == frozenset()
        (tmp_path / "arm").write_text("processor\t: 0\nFeatures\t: fp asimd\n")
        assert _blas.cpu_flags(str(tmp_path / "arm")) == frozenset()


class TestEnvironment:
    def test_restored(self, monkeypatch):
        monkeypatch.setenv("MOLAE_TEST_A", "old")
        monkeypatch.delenv("MOLAE_TEST_B", raising=False)
        changed = _blas.environment({"MOLAE_TEST_A": "new", "MOLAE_TEST_B": "new"})
        with changed:
            assert os.environ["MOLAE_TEST_A"] == os.environ["MOLAE_TEST_B"] == "new"
        assert os.environ["MOLAE_TEST_A"] == "old"
        assert "MOLAE_TEST_B" not in os.environ

    def test_restored_when_the_import_fails(self, python):
        code = """
import os, sys
sys.modules["molae._core"] = None
before = dict(os.environ)
try:
    import molae
except ImportError:
    print(dict(os.environ) == before)
"""
        assert python(code).strip() == "True"
        assert python(code, OPENBLAS_CORETYPE="Haswell", OPENBLAS_NUM_THREADS="2").strip() == "True"


@vendored
class TestLoaded:
    def report(self, python, **environ):
        return json.loads(python(REPORT, **environ))

    @avx512
    def test_by_features(self, python):
        got = self.report(python)
        assert got["blas"]["core"] == "SkylakeX"
        assert got["blas"]["core_asked_by"] == "CPU features"
        assert got["restored"]

    def test_for_molae_alone(self, python):
        got = self.report(python, MOLAE_BLAS_CORE="Nehalem")
        assert got["blas"]["core"] == "Nehalem"
        assert got["restored"]
        assert got["numpy"] == json.loads(python(NUMPY_ALONE))

    def test_users_own_setting(self, python):
        got = self.report(python, OPENBLAS_CORETYPE="Nehalem")
        assert got["blas"]["core"] == "Nehalem"
        assert got["blas"]["core_asked_by"] == "OPENBLAS_CORETYPE"
        assert got["restored"]

    def test_numpy_is_untouched(self, python):
        alone = json.loads(python(NUMPY_ALONE))
        assert self.report(python)["numpy"] == alone

    def test_one_thread_and_none_idle(self, python):
        code = """
import os, numpy
before = len(os.listdir("/proc/self/task"))
import molae
print(len(os.listdir("/proc/self/task")) - before, molae.show_config("dict")["blas"]["threads"])
"""
        assert python(code).split() == ["0", "1"]
        assert python(code, OPENBLAS_NUM_THREADS="2").split() == ["0", "1"]


def test_product_of_each_core_type(python, rng):
    """Kernels of other core types round otherwise but compute the same product."""
    code = """
import numpy as np
from molae import _core
rng = np.random.default_rng(3)
a = rng.standard_normal((65, 131), dtype=np.float32)
b = rng.standard_normal((131, 37), dtype=np.float32)
c = _core.gemm(a, b)
want = a.astype(np.float64) @ b.astype(np.float64)
bound = 131 * np.finfo(np.float32).eps * (np.abs(a) @ np.abs(b))
print(bool((np.abs(c - want) <= bound).all()))
"""
    for core in ("default", "Nehalem", "Haswell"):
        if core == "Haswell" and "avx2" not in _core.build_info()["isas"]:
            continue
        assert python(code, MOLAE_BLAS_CORE=core).strip() == "True"


def test_shapes_of_a_product():
    with pytest.raises(ValueError, match=r"b: expected shape \(k=3, n\), got \(2, 3\)"):
        _core.gemm(np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32))
