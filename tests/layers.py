"""Rules about who may know whom, as functions from sources to complaints.

`c_faults` and `python_faults` take a mapping from path (relative to the
repository) to text and return one line a fault; tests/test_csrc_lint.py runs
them over the tree and over samples that break each rule.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator, Mapping

# ------------------------------------------------------------------------- C

#: Includes point down only.
C_LAYERS = ("base", "kern", "ops", "fit", "py")

MAX_LINES = 600

#: Headers that one place alone may include: pattern -> where.
HEADERS = {
    r"Python\.h|structmember\.h|numpy/.*": r"csrc/py/.*",
    r"omp\.h|pthread\.h|threads\.h": r"csrc/base/par\.c",
    r"cblas\.h|lapacke?\.h|f77blas\.h|openblas_config\.h": r"csrc/base/blas\.c",
    r".*intrin\.h|arm_neon\.h|arm_sve\.h": r"csrc/kern/(?!ref|table)\w+\.c",
}

#: Names that one place alone may use: pattern -> where. An empty place is nowhere.
NAMES = {
    r"(scipy_)?cblas_\w+|(scipy_)?[sdcz](gemm|syrk|trsm|potrf|syevd|geqp3|gelqf|gesdd)_?"
    r"|(scipy_)?openblas_\w+|LAPACKE_\w+": r"csrc/base/blas(\.inc)?\.[ch]",
    r"malloc|calloc|realloc|free|aligned_alloc|posix_memalign|memalign|strdup": (
        r"csrc/base/mem\.c"
    ),
    r"pthread_\w+|thrd_\w+|mtx_\w+": r"csrc/base/par\.c",
    r"_mm\d*_\w+|__m\d+\w*|__mmask\d+|__builtin_ia32_\w+|vld1q_\w+|float32x4_t": (
        r"csrc/kern/((?!ref|table)\w+\.c|avx\w+\.inc\.h)"
    ),
    r"f?printf|v?s?n?printf|puts|putchar|fputs|fwrite|perror": "",
    r"exit|_exit|abort|longjmp|setjmp|signal|raise": "",
    r"errno|getenv|setenv|putenv": "",
}


def strip_c(text: str) -> str:
    """C without comments and without the insides of strings; lines stay where they are."""

    def blank(match: re.Match[str]) -> str:
        if match[0].startswith("/"):
            return " " + "\n" * match[0].count("\n")
        return '""' if match[0].startswith('"') else "' '"

    pattern = r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'"
    return re.sub(pattern, blank, text, flags=re.S)


def _includes(text: str) -> Iterator[tuple[int, str, bool]]:
    for number, line in enumerate(text.splitlines(), 1):
        if found := re.match(r"\s*#\s*include\s*([<\"])([^>\"]+)[>\"]", line):
            yield number, found[2], found[1] == '"'


def _layer(path: str) -> int | None:
    parts = path.split("/")
    return C_LAYERS.index(parts[1]) if len(parts) > 2 and parts[1] in C_LAYERS else None


def c_faults(sources: Mapping[str, str]) -> list[str]:
    """Faults of the C sources under csrc/."""
    faults = []
    for path, text in sorted(sources.items()):
        where = _layer(path)
        if path == "csrc/molae.h":
            for number, name, own in _includes(text):
                if own or name not in ("stddef.h", "stdint.h"):
                    faults.append(f"{path}:{number}: the public header includes {name}")
        elif where is None:
            faults.append(f"{path}: outside the layers {', '.join(C_LAYERS)}")
            continue
        if (lines := text.count("\n")) > MAX_LINES:
            faults.append(f"{path}: {lines} lines, at most {MAX_LINES}")
        for number, name, own in _includes(text):
            if own and path != "csrc/molae.h":
                target = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
                below = _layer(target)
                if target not in sources:
                    faults.append(f"{path}:{number}: includes {name}, which is not there")
                elif target != "csrc/molae.h" and (below is None or below > where):
                    faults.append(f"{path}:{number}: includes {target}, which is above it")
            for pattern, place in HEADERS.items():
                if re.fullmatch(pattern, name) and not re.fullmatch(place, path):
                    faults.append(f"{path}:{number}: includes {name}")
        code = re.sub(r"^\s*#\s*include.*$", "", strip_c(text), flags=re.M)
        for pattern, place in NAMES.items():
            if place and re.fullmatch(place, path):
                continue
            # Not a member (x.free, p->free) and not a slot of a struct (.free = ).
            for found in re.finditer(rf"(?<![\w.>])(?:{pattern})(?!\w)", code):
                number = code.count("\n", 0, found.start()) + 1
                faults.append(f"{path}:{number}: names {found[0]}")
    return faults


# -------------------------------------------------------------------- Python

#: Modules and packages of molae by layer; an import points to the same layer or down.
PYTHON_LAYERS = {
    "_core": 0,
    "_version": 0,
    "_blas": 0,
    "errors": 1,
    "threads": 1,
    "config": 2,
    "info": 2,
    "factored": 2,
    "fit": 2,
    "ops": 2,
    "io": 2,
    "arch": 2,
    "convert": 3,
    "hf": 3,
    "train": 4,
    "cluster": 4,
    "report": 4,
    "demo": 4,
    "arguments": 4,
    "cli": 5,
    "__main__": 5,
}

#: Pairs that do not know each other.
STRANGERS = (("convert", "hf"), ("io", "fit"), ("arch", "fit"))

TORCH = {"torch", "transformers", "accelerate", "peft", "trl", "datasets", "tokenizers"}
TORCH_PLACES = r"molae/(hf|train)/.*|molae/demo/train\.py"

DASK = {"dask", "distributed"}
DASK_PLACES = r"molae/cluster/.*"


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def python_faults(sources: Mapping[str, str]) -> list[str]:
    """Faults of the Python sources under molae/ and tests/ref/."""
    faults = []
    for path, text in sorted(sources.items()):
        tree = ast.parse(text)
        parts = path.removesuffix(".py").split("/")
        for number, name in _imports(tree):
            root = name.split(".")[0]
            if path.startswith("tests/ref/"):
                if root == "molae":
                    faults.append(f"{path}:{number}: a reference imports {name}")
                continue
            if name.startswith("."):
                faults.append(f"{path}:{number}: relative import {name}")
            if root in TORCH and not re.fullmatch(TORCH_PLACES, path):
                faults.append(f"{path}:{number}: imports {root}")
            if root in DASK and not re.fullmatch(DASK_PLACES, path):
                faults.append(f"{path}:{number}: imports {root}")
            if root != "molae" or parts[1] == "__init__":
                continue
            mine, theirs = parts[1], name.split(".")[1]
            if theirs not in PYTHON_LAYERS:
                continue  # a plain name of the package, such as __version__
            if mine not in PYTHON_LAYERS:
                faults.append(f"{path}: {mine} has no layer")
                break
            if PYTHON_LAYERS[theirs] > PYTHON_LAYERS[mine]:
                faults.append(f"{path}:{number}: {mine} imports {theirs}, which is above it")
            if (mine, theirs) in STRANGERS or (theirs, mine) in STRANGERS:
                faults.append(f"{path}:{number}: {mine} imports {theirs}")
        # No fallback from the extension to Python.
        for node in ast.walk(tree):
            if isinstance(node, ast.Try):
                for inner in node.body:
                    for number, name in _imports(inner):
                        if name.startswith("molae") and "_core" in name.split("."):
                            faults.append(f"{path}:{number}: {name} is imported inside a try")
    return faults
