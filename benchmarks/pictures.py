"""Results drawn as pictures in docs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks import RESULTS, ROOT

__all__ = ["STYLE", "write"]

#: The same bytes each time.
STYLE = {"svg.hashsalt": "molae", "font.size": 9}


def write(
    prog: str,
    pictures: Mapping[str, str],
    draw: Callable[[Mapping[str, Any]], Figure],
    argv: list[str] | None,
) -> int:
    """The command `prog`: each result that there is, to its picture."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    args = parser.parse_args(argv)
    for file, picture in pictures.items():
        if (args.results / file).exists():
            figure = draw(json.loads((args.results / file).read_text()))
            with mpl.rc_context(STYLE):
                figure.savefig(args.docs / picture, metadata={"Date": None})
            print(args.docs / picture)
    return 0
