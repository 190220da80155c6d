"""The examples in docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import molae

# These need torch, or run as programs.
SKIPPED = ("molae.hf", "molae.demo", "molae.__main__")

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(molae.__path__, "molae.")
    if not info.name.startswith(SKIPPED)
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    found = {
        name: sum(len(t.examples) for t in finder.find(importlib.import_module(name)))
        for name in ("molae.fit.shared", "molae.threads", "molae.info")
    }
    assert all(found.values()), found
