"""Write docs/api from the docstrings: ``python docs/make_api.py``, or ``make docs``.

One page a public module: its text, its names with their signatures, and below them each
docstring in full. Signatures come without types, which the docstrings give. A test checks
that the pages in the repository are what this writes.
"""

from __future__ import annotations

import html
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

#: Public modules; names of a module that are modules themselves have a page of their own.
MODULES = (
    "molae",
    "molae.fit",
    "molae.ops",
    "molae.hf",
    "molae.hf.calibrate",
    "molae.train",
    "molae.cluster",
    "molae.errors",
)

FOLDER = Path(__file__).resolve().parent / "api"

#: Sections whose entries are ``name : type`` with an indented text below.
LISTS = ("Parameters", "Attributes", "Returns", "Raises", "Warns")


def pages() -> dict[str, str]:
    """The text of each page, by the name of its file."""
    made = {f"{name}.md": page(name) for name in MODULES}
    made["README.md"] = index()
    return made


def index() -> str:
    """The list of the pages."""
    rows = (
        f"- [`{name}`]({name}.md): {summary(importlib.import_module(name))}" for name in MODULES
    )
    return "\n".join(("# Public names", "", NOTE, "", *rows, ""))


NOTE = "Written by `docs/make_api.py` from the docstrings, whose examples are run by the tests."


def page(module_name: str) -> str:
    """One module's page."""
    module = importlib.import_module(module_name)
    lines = [f"# `{module_name}`", "", NOTE, "", *markdown(text_of(module)), ""]
    found = members(module_name)
    for name, value in found.items():
        lines.append(f"- [`{name}`](#{name.lower()}): {summary(value)}")
    for name, value in found.items():
        lines += ["", f"## {name}", ""]
        if not callable(value):
            lines += [f"    {name} = {value!r}"]
            continue
        lines += block(f"{module_name}.{name}", value)
        for method, function in methods(value).items():
            lines += ["", f"### {name}.{method}", ""]
            if isinstance(function, property):
                lines += ["Property.", "", *markdown(text_of(function))]
            else:
                lines += block(method, function)
    return "\n".join(lines).rstrip() + "\n"


def members(module_name: str) -> dict[str, Any]:
    """Public names of a module, without modules and the like of ``__version__``."""
    module = importlib.import_module(module_name)
    found = {}
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.ismodule(value):
            # molae.convert is a package that can be called: its function of that name
            value = getattr(value, name, None)
        if value is not None and not name.startswith("__"):
            found[name] = value
    return found


def methods(value: Any) -> dict[str, Any]:
    """A class's own public methods and properties that have a docstring."""
    if not inspect.isclass(value):
        return {}
    found = {}
    for name, attribute in vars(value).items():
        function = attribute.__func__ if isinstance(attribute, classmethod) else attribute
        usual = inspect.isfunction(function) or isinstance(function, property)
        if usual and not name.startswith("_") and function.__doc__:
            found[name] = function
    return found


def block(name: str, value: Any) -> list[str]:
    """The signature and the docstring."""
    return ["```python", signature(name, value), "```", "", *markdown(text_of(value))]


def signature(name: str, value: Any) -> str:
    """``name(a, *, b=1)``, without types; one line an argument where it gets long."""
    if inspect.isclass(value) and issubclass(value, BaseException):
        bases = ", ".join(base.__name__ for base in value.__bases__)
        return f"class {name}({bases})"
    found = inspect.signature(value)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    if bare and bare[0].name in ("self", "cls"):
        bare = bare[1:]
    text = str(inspect.Signature(bare))
    prefix = "class " if inspect.isclass(value) else ""
    if len(prefix + name + text) > 88:
        text = "(\n    " + text[1:-1].replace(", ", ",\n    ") + ",\n)"
    return prefix + name + text


def text_of(value: Any) -> str:
    """The docstring, as every Python version shows it."""
    return inspect.cleandoc(value.__doc__ or "")


def summary(value: Any) -> str:
    """The first paragraph of the docstring, on one line; of a constant, its value."""
    if not (callable(value) or inspect.ismodule(value)):
        return f"`{value!r}`"
    return escaped(" ".join(text_of(value).split("\n\n")[0].split()))


# -------------------------------------------------------------------- numpydoc to Markdown


def markdown(text: str) -> list[str]:
    """A numpydoc docstring as lines of Markdown."""
    parts = re.split(r"^(\w[\w ]*)\n-{3,}\n", text, flags=re.MULTILINE)
    lines = prose(parts[0])
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        lines += ["", f"**{title}**", "", *(entries(body) if title in LISTS else prose(body))]
    return lines


def prose(text: str) -> list[str]:
    """Paragraphs, with examples fenced. What is indented stays code."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        if lines:
            lines.append("")
        if paragraph.startswith(">>>"):
            lines += ["```python", *paragraph.splitlines(), "```"]
        else:
            lines += [line if line.startswith("    ") else escaped(line)
                      for line in paragraph.splitlines()]  # fmt: skip
    return lines


def entries(text: str) -> list[str]:
    """``name : type`` and the text below it, as items of a list."""
    lines: list[str] = []
    for line in text.strip("\n").splitlines():
        if not line.strip():
            continue
        if line.startswith("    "):
            lines.append(f"  {escaped(line.strip())}")
            continue
        if lines and not lines[-1].startswith("- "):
            lines.append("")
        name, colon, kind = line.partition(" : ")
        lines.append(f"- `{name}`" + (f" : {escaped(kind)}" if colon else ""))
        lines.append("")
    return [*tidy(lines)]


def tidy(lines: list[str]) -> list[str]:
    """Without blank lines after one another, and at the end."""
    kept = [line for i, line in enumerate(lines) if line or (i and lines[i - 1])]
    while kept and not kept[-1]:
        kept.pop()
    return kept


def escaped(text: str) -> str:
    """What Markdown would take for a tag or emphasis, outside of code."""
    pieces = re.split(r"(`+[^`]*`+)", text)
    return "".join(
        piece if piece.startswith("`") else html.escape(piece, quote=False).replace("*", r"\*")
        for piece in pieces
    )


def main() -> int:
    """Write the pages, and take away those of modules that are public no longer."""
    FOLDER.mkdir(exist_ok=True)
    made = pages()
    for old in FOLDER.glob("*.md"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
