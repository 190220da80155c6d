"""Who may know whom: the rules hold in the tree, and each rule catches a breach."""

from __future__ import annotations

from pathlib import Path

import layers
import pytest

ROOT = Path(__file__).resolve().parent.parent
HEADER = {"csrc/molae.h": "#include <stddef.h>\n#include <stdint.h>\n"}


def read(*patterns: str) -> dict[str, str]:
    files = [f for p in patterns for f in ROOT.glob(p)]
    assert files, f"no files match {patterns}"
    return {f.relative_to(ROOT).as_posix(): f.read_text(encoding="utf-8") for f in files}


def test_c_tree():
    assert layers.c_faults(read("csrc/**/*.[ch]")) == []


def test_python_tree():
    assert layers.python_faults(read("molae/**/*.py", "tests/ref/*.py")) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        # 1. includes point down only
        ("csrc/base/a.c", '#include "../kern/kern.h"'),
        ("csrc/kern/a.c", '#include "../fit/fit.h"'),
        ("csrc/fit/a.c", '#include "../py/pystate.h"'),
        ("csrc/fit/a.c", '#include "nowhere.h"'),
        ("csrc/molae.h", "#include <stdio.h>"),
        ("csrc/molae.h", '#include "base/mem.h"'),
        ("csrc/stray.c", "int x;"),
        # 2. each name in its place
        ("csrc/fit/a.c", "#include <Python.h>"),
        ("csrc/base/a.c", "#include <numpy/arrayobject.h>"),
        ("csrc/fit/a.c", "#include <pthread.h>"),
        ("csrc/base/a.c", "#include <omp.h>"),
        ("csrc/fit/a.c", "#include <cblas.h>"),
        ("csrc/fit/a.c", "#include <immintrin.h>"),
        ("csrc/kern/ref.c", "#include <immintrin.h>"),
        ("csrc/fit/a.c", "void f(void) { cblas_sgemm(); }"),
        ("csrc/fit/a.c", "void f(void) { scipy_openblas_set_num_threads(1); }"),
        ("csrc/fit/a.c", "void f(void) { dsyevd_(); }"),
        ("csrc/fit/a.c", "void *f(void) { return malloc(1); }"),
        ("csrc/py/a.c", "void f(void *p) { free(p); }"),
        ("csrc/fit/a.c", "void f(void) { pthread_create(); }"),
        ("csrc/fit/a.c", "__m256 x;"),
        ("csrc/kern/rows_nt.inc.h", "__m256 x;"),
        ("csrc/fit/a.c", "void f(void) { _mm256_setzero_ps(); }"),
        # no printing, ending, environment
        ("csrc/fit/a.c", 'void f(void) { printf("x"); }'),
        ("csrc/fit/a.c", "void f(void) { abort(); }"),
        ("csrc/fit/a.c", "void f(void) { exit(1); }"),
        ("csrc/kern/table.c", 'char *f(void) { return getenv("X"); }'),
        ("csrc/fit/a.c", "int f(void) { return errno; }"),
        # 5. length
        ("csrc/fit/a.c", "\n" * 601),
    ],
)
def test_breach_in_c_is_caught(path, text):
    others = {"csrc/kern/kern.h": "", "csrc/fit/fit.h": "", "csrc/py/pystate.h": ""}
    assert layers.c_faults({**HEADER, **others, path: text}) != []


def test_c_in_order_passes():
    good = {
        **HEADER,
        "csrc/base/mem.h": "",
        "csrc/base/mem.c": '#include "mem.h"\nvoid f(void) { free(malloc(1)); }',
        "csrc/base/par.c": "#include <pthread.h>\nvoid g(void) { pthread_create(); }",
        "csrc/base/blas.c": "void h(void) { cblas_sgemm(); }",
        "csrc/kern/avx2.c": "#include <immintrin.h>\n__m256 x;",
        "csrc/fit/a.c": '#include "../base/mem.h"\n#include "../molae.h"\n'
        "/* free and printf in a comment */ void f(void) { mli_free(x.free); }\n"
        'const char *s = "malloc(1) /* ";',
        "csrc/py/a.c": "#include <Python.h>\n",
    }
    assert layers.c_faults(good) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("molae/convert/a.py", "import torch"),
        ("molae/cli.py", "def f():\n    import transformers"),
        ("molae/convert/a.py", "import distributed"),
        ("molae/convert/a.py", "from molae.cluster import Workers"),
        ("molae/fit/a.py", "from molae.convert import plan"),
        ("molae/io/a.py", "import molae.cli"),
        ("molae/convert/a.py", "from molae.hf import evaluate"),
        ("molae/hf/a.py", "from molae import convert"),
        ("molae/hf/a.py", "from molae.report import table"),
        ("molae/stray.py", "from molae import fit"),
        ("molae/io/a.py", "from . import header"),
        ("molae/fit/a.py", "try:\n    from molae import _core\nexcept ImportError:\n    pass"),
        ("tests/ref/a.py", "from molae import fit"),
    ],
)
def test_breach_in_python_is_caught(path, text):
    assert layers.python_faults({path: text}) != []


def test_python_in_order_passes():
    good = {
        "molae/hf/a.py": "import torch\nfrom molae.io import open_checkpoint",
        "molae/cli.py": "from molae import convert, hf, report, __version__",
        "molae/convert/a.py": "from molae.convert.plan import Plan\nfrom molae import fit",
        "molae/demo/train.py": "import torch",
        "molae/cluster/a.py": "from distributed import Client\nfrom molae.convert import plan",
        "tests/ref/a.py": "import numpy as np",
    }
    assert layers.python_faults(good) == []
