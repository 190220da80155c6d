"""What the package says of itself, how it loads, and the exceptions it raises."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import subprocess
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

import molae
from molae import _core, errors

OK, E_SHAPE, E_ARG, E_NOMEM, E_TOO_LARGE, E_NONFINITE, E_LAPACK, E_ISA = range(0, -8, -1)
W_NOT_CONVERGED, W_RANK_DEFICIENT, W_PRECISION = 1, 2, 3


class TestConfig:
    def test_facts(self):
        facts = molae.show_config("dict")
        assert facts["molae"]["version"] == molae.__version__
        assert re.match(r"(gcc|clang) \d+", facts["molae"]["compiler"])
        assert "-fvisibility=hidden" in facts["molae"]["flags"]
        assert facts["molae"]["threads"] == molae.get_num_threads()
        assert facts["kernels"]["isa"] in facts["kernels"]["usable"]
        assert facts["kernels"]["usable"][0] == "ref"
        assert facts["python"]["numpy"] == np.__version__
        blas = facts["blas"]
        assert blas["name"] == "OpenBLAS"
        assert re.match(r"\d+\.\d+", blas["version"])
        assert blas["core"]
        assert Path(blas["path"]).is_file()
        assert blas["vendored"] == (blas["prefix"] == "scipy_")

    def test_own_library_by_name_and_place(self):
        blas = molae.show_config("dict")["blas"]
        if not blas["vendored"]:
            pytest.skip("built with the system's OpenBLAS")
        own = Path(molae.__file__).parent / ".libs" / "libmolae_openblas.so"
        assert Path(blas["path"]).samefile(own)
        assert b"\0libmolae_openblas.so\0" in own.read_bytes()  # its soname

    def test_printed(self, capsys):
        assert molae.show_config() is None
        text = capsys.readouterr().out
        for word in ("version", "compiler", "isa", "core", "threads", "path", "numpy"):
            assert word in text

    def test_wrong_mode(self):
        with pytest.raises(errors.ArgumentError, match="mode: expected 'print' or 'dict'"):
            molae.show_config("json")


class TestImport:
    def test_public_names(self):
        for name in molae.__all__:
            assert getattr(molae, name) is not None
            assert name in dir(molae)
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = molae.nothing

    def test_needs_numpy_alone(self, python):
        code = """
import sys, numpy
before = set(sys.modules)
import molae
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before
               if not name.startswith("molae")} - sys.stdlib_module_names - {"numpy"}))
"""
        assert python(code).split() == []

    def test_convert_is_a_function_and_a_package(self, python):
        for first in ("import molae.convert.report", "import molae", "from molae import convert"):
            code = f"{first}\nimport molae\nprint(callable(molae.convert))"
            assert python(code).strip() == "True"

    def test_loaded_once_in_a_process(self):
        loader = importlib.machinery.ExtensionFileLoader("molae._core", _core.__file__)
        spec = importlib.util.spec_from_file_location("molae._core", _core.__file__, loader=loader)
        with pytest.raises(ImportError, match="cannot be loaded twice"):
            loader.exec_module(importlib.util.module_from_spec(spec))

    def test_no_symbol_but_the_entry(self):
        try:
            out = subprocess.run(
                ["nm", "-D", "--defined-only", _core.__file__],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        except FileNotFoundError:
            pytest.skip("binutils' nm is not installed")
        names = {line.split()[-1] for line in out.splitlines()} - {"_init", "_fini"}
        assert names == {"PyInit__core"}


class TestErrors:
    @pytest.mark.parametrize("name", errors.__all__)
    def test_classes(self, name):
        cls = getattr(errors, name)
        assert cls.__module__ == "molae.errors"
        assert cls.__doc__
        base = UserWarning if name.endswith("Warning") else errors.MolaeError
        assert issubclass(cls, base)

    def test_bases(self):
        assert issubclass(errors.ShapeError, ValueError)
        assert issubclass(errors.ArgumentError, ValueError)
        assert issubclass(errors.NonFiniteError, errors.NumericalError)
        assert issubclass(errors.NumericalError, ArithmeticError)
        assert issubclass(errors.CheckpointError, ValueError)
        assert issubclass(errors.DestinationError, OSError)

    @pytest.mark.parametrize(
        ("status", "cls"),
        [
            (E_SHAPE, errors.ShapeError),
            (E_ARG, errors.ArgumentError),
            (E_NOMEM, MemoryError),
            (E_TOO_LARGE, errors.ArgumentError),
            (E_NONFINITE, errors.NonFiniteError),
            (E_LAPACK, errors.NumericalError),
            (E_ISA, errors.ArgumentError),
        ],
    )
    def test_status_to_exception(self, status, cls):
        with pytest.raises(cls) as caught:
            _core.raise_probe(status, None, -1, -1, -1)
        assert caught.type is cls

    def test_text_and_indices(self):
        with pytest.raises(errors.NonFiniteError, match=r"^expert 13: NaN or Inf") as e:
            _core.raise_probe(E_NONFINITE, None, 13, -1, -1)
        assert (e.value.expert, e.value.group, e.value.info) == (13, None, None)
        with pytest.raises(errors.NumericalError) as e:
            _core.raise_probe(E_LAPACK, "the eigenvalues did not converge", -1, 4, 7)
        assert str(e.value) == "group 4: the eigenvalues did not converge (info 7)"
        assert (e.value.expert, e.value.group, e.value.info) == (None, 4, 7)
        with pytest.raises(errors.NumericalError, match=r"^expert 0 of group 0: "):
            _core.raise_probe(E_LAPACK, "x", 0, 0, -1)
        assert errors.NonFiniteError("made by hand").expert is None

    @pytest.mark.parametrize(
        ("status", "cls"),
        [
            (W_NOT_CONVERGED, errors.ConvergenceWarning),
            (W_RANK_DEFICIENT, errors.PrecisionWarning),
            (W_PRECISION, errors.PrecisionWarning),
        ],
    )
    def test_warnings(self, status, cls):
        with pytest.warns(cls, match="^group 2: "):
            assert _core.raise_probe(status, None, -1, 2, -1) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(cls):
                _core.raise_probe(status, None, -1, 2, -1)

    def test_success_is_silent(self):
        assert _core.raise_probe(OK, "nothing", 1, 1, 1) is None


def test_version_is_that_of_the_package():
    assert version("molae") == molae.__version__ == _core.build_info()["version"]
