"""The pages of docs/api are what their script writes, and public names say what they do."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: What a function gives back, and what Transformers makes: shown by other names' examples.
SHOWN_ELSEWHERE = {
    "molae.Report",
    "molae.fit.CompressedFit",
    "molae.fit.Energies",
    "molae.fit.LayerDistillation",
    "molae.fit.LayerFit",
    "molae.fit.LayerInput",
    "molae.fit.LayerMoments",
    "molae.fit.Refit",
    "molae.fit.NarrowFit",
    "molae.fit.RowMetric",
    "molae.fit.SecondMoments",
    "molae.fit.SharedFactors",
    "molae.hf.MolaeConfig",
    "molae.hf.MolaeQuantizer",
    "molae.ops.Gradients",
    "molae.ops.ProjectionGradients",
    "molae.ops.Routing",
    "molae.ops.Saved",
    "molae.ops.from_authors_layout",
    "molae.train.Example",
    "molae.train.Finetuned",
    "molae.train.Packed",
    "molae.train.finetune",
}


def _script():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


api = _script()


@pytest.fixture(params=api.MODULES)
def module_name(request):
    if request.param == "molae.hf":
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
    return request.param


def test_page_is_what_the_script_writes(module_name):
    kept = (api.FOLDER / f"{module_name}.md").read_text("utf-8")
    assert kept == api.page(module_name), "run: make docs"


def test_all_pages_are_kept():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    assert (api.FOLDER / "README.md").read_text("utf-8") == api.index(), "run: make docs"
    assert {path.name for path in api.FOLDER.iterdir()} == set(api.pages())


def test_every_name_says_what_it_does(module_name):
    for name, value in api.members(module_name).items():
        if not callable(value):
            continue  # a constant, whose page gives its value
        text = value.__doc__ or ""
        full = f"{module_name}.{name}"
        assert re.match(r"\S.*[.:]", inspect.cleandoc(text)), full
        if inspect.isclass(value) and issubclass(value, Exception):
            continue
        assert (">>> " in text) == (full not in SHOWN_ELSEWHERE), full
        for method, function in api.methods(value).items():
            assert function.__doc__, f"{full}.{method}"


def test_a_docstring_as_markdown():
    text = (
        "Adds ``a*b``, <b> * c.\n\n    a  *  b\n\nParameters\n----------\na, b : (N,) array\n"
        "    Two\n    lines.\nc\n\nReturns\n-------\nint\n\n"
        "Examples\n--------\nSo:\n\n>>> 1 + 1\n2"
    )
    assert api.markdown(text) == [
        "Adds ``a*b``, &lt;b&gt; \\* c.", "", "    a  *  b",
        "", "**Parameters**", "", "- `a, b` : (N,) array", "", "  Two", "  lines.", "", "- `c`",
        "", "**Returns**", "", "- `int`",
        "", "**Examples**", "", "So:", "", "```python", ">>> 1 + 1", "2", "```",
    ]  # fmt: skip


def test_signatures():
    def f(self, a: int, *, long_name_of_an_argument: str = "x", b: float = 0.1) -> None: ...

    assert api.signature("f", f) == "f(a, *, long_name_of_an_argument='x', b=0.1)"
    assert api.signature("f" * 60, f) == (
        "f" * 60 + "(\n    a,\n    *,\n    long_name_of_an_argument='x',\n    b=0.1,\n)"
    )
    assert api.signature("E", type("E", (ValueError,), {})) == "class E(ValueError)"
