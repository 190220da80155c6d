"""The text the demonstration model learns from: what every CPython ships.

Two kinds of text are gathered from the running Python, and nothing is
imported or downloaded to get them:

* *documentation*: the topics of ``help()`` and the docstrings of the standard
  library, one document per topic and per module;
* *source*: the standard library's source files themselves.

Documents are split by a hash of their name, so that a whole topic or module
is either trained on, or used for validation, or held out.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import re
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Corpus", "builtin_text", "gather"]

#: Folders of the standard library that are left out: other people's packages,
#: the test suite (little prose), and tables of character codes.
SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "__pycache__",
}

#: Shares of the documents, by hash of the name.
HELDOUT_SHARE = 0.085
VALIDATION_SHARE = 0.055


@dataclass(frozen=True)
class Corpus:
    """The gathered text, split by document.

    Attributes
    ----------
    documentation : tuple of str
        Training documents: topics and docstrings.
    source : tuple of str
        Training source files. No file whose docstrings are in ``validation``
        or ``heldout`` is among them.
    validation : tuple of str
        Documents used to choose between settings and weights.
    heldout : str
        Documents nobody looked at before the final measurement, as one text.
    """

    documentation: tuple[str, ...]
    source: tuple[str, ...]
    validation: tuple[str, ...]
    heldout: str


def gather() -> Corpus:
    """Gather and split the documentation of the running Python.

    Returns
    -------
    Corpus
        The same for the same Python release, in the same order.
    """
    topics = _topics()
    modules = _modules()

    documents = {f"topics/{name}": text for name, text in topics.items()}
    seen: set[str] = set()
    for name, source in modules.items():
        new = [text for text in dict.fromkeys(_docstrings(source)) if text not in seen]
        seen.update(new)
        if new:
            documents[f"modules/{name}"] = "\n\n".join(new)

    split: dict[str, list[str]] = {"train": [], "validation": [], "heldout": []}
    for name, text in documents.items():
        split[_part(name)].append(text)
    code = [text for name, text in modules.items() if _part(f"modules/{name}") == "train"]

    # A docstring may quote a topic, and one module may repeat another, so a
    # paragraph met in training is no test: drop it from the other parts.
    known = _words("\n".join(split["train"] + code))
    validation = _without_known(split["validation"], known)
    known += _words("\n".join(validation))
    heldout = _without_known(split["heldout"], known)

    return Corpus(
        documentation=tuple(split["train"]),
        source=tuple(code),
        validation=tuple(validation),
        heldout="\n\n".join(heldout) + "\n",
    )


def builtin_text() -> tuple[str, str]:
    """English that every Python brings along, and what it is called in reports.

    The documentation in CPython's standard library, which the running Python has: technical
    prose. A text like those that the model is meant for is better.

    Returns
    -------
    text, name : str
    """
    name = f"documentation of CPython {platform.python_version()}"
    return "\n".join(gather().documentation), name


def _part(name: str) -> str:
    """Which part a document belongs to: a pure function of its name."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    if place < HELDOUT_SHARE:
        return "heldout"
    return "validation" if place < HELDOUT_SHARE + VALIDATION_SHARE else "train"


def _topics() -> dict[str, str]:
    """The texts behind ``help('TOPIC')``."""
    from pydoc_data.topics import topics

    return {name: topics[name].strip() for name in sorted(topics)}


def _modules() -> dict[str, str]:
    """The standard library's source files, by relative path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        # The topics are gathered apart, and the build's own settings tell of one machine.
        if (
            SKIPPED & set(relative.parts)
            or relative.parts[0] == "pydoc_data"
            or path.name.startswith("_sysconfigdata")
        ):
            continue
        try:
            found[relative.as_posix()] = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
    return found


def _docstrings(source: str) -> list[str]:
    """All docstrings of a source file, in the order they are written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text.strip() for node in nodes if (text := ast.get_docstring(node))]


def _words(text: str) -> str:
    """The words of a text between single blanks, to compare by."""
    return " " + " ".join(re.findall(r"\w+", text)) + " "


def _without_known(documents: list[str], known: str) -> list[str]:
    """Drop the paragraphs that occur in `known`, and documents left empty."""
    kept = []
    for text in documents:
        paragraphs = [
            p for p in text.split("\n\n") if (words := _words(p)).strip() and words not in known
        ]
        if paragraphs:
            kept.append("\n\n".join(p.strip("\n") for p in paragraphs))
    return kept
