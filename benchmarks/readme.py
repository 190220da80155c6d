"""Write the tables of the README and of docs from the JSON results:
``python -m benchmarks.readme [--check]``."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT, schedule, tables
from benchmarks.compressed.tables import compressed
from benchmarks.heal.tables import heal
from benchmarks.quality.tables import quality

__all__ = ["SECTIONS", "update"]

#: What is between two markers: the file it is made from, in benchmarks/results, and how.
Sections = Mapping[str, tuple[str, Callable[[Mapping[str, Any]], str]]]

SECTIONS: Sections = {
    "demo": ("demo.json", tables.demo),
    "benchmarks": ("benchmarks.json", tables.benchmarks),
    "layers": ("layers.json", tables.benchmarks),
    "models": ("models.json", tables.benchmarks),
    "quality": ("quality.json", quality),
}

#: Other pages, by their place beside the README.
PAGES: Mapping[str, Sections] = {
    "docs/quality.md": {
        "second": ("quality_second.json", quality),
        "to-books": ("quality_to_books.json", quality),
        "to-mathematics": ("quality_to_mathematics.json", quality),
    },
    "docs/compressed.md": {
        "compressed": ("compressed.json", compressed),
        "compressed-second": ("compressed_second.json", compressed),
        "active": ("active.json", tables.benchmarks),
    },
    "docs/healing.md": {
        "heal": ("heal.json", heal),
        "heal-second": ("heal_second.json", heal),
        "heal-longer": ("heal_longer.json", heal),
    },
    "docs/distributed.md": {"schedule": ("schedule.json", schedule.table)},
    "docs/performance.md": {
        "calibration": ("calibration.json", tables.benchmarks),
        "distill": ("distill.json", tables.benchmarks),
    },
}


def update(text: str, results: Path = RESULTS, sections: Sections = SECTIONS) -> str:
    """A page with its tables made anew. A section without a result is left empty.

    Raises
    ------
    ValueError
        The markers of a section are not there exactly once, or not in order.
    """
    for name, (file, render) in sections.items():
        source = results / file
        body = f"{render(json.loads(source.read_text()))}\n" if source.exists() else ""
        text = _replace(text, name, body)
    return text


def _replace(text: str, name: str, body: str) -> str:
    start, end = f"<!-- {name}:start -->\n", f"<!-- {name}:end -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(
            f"README or docs: expected one {start.strip()} line and one {end} after it"
        )
    pattern = re.escape(start) + ".*?" + re.escape(end)
    return re.sub(pattern, lambda _: f"{start}{body}{end}", text, flags=re.S)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    pages = {args.readme: SECTIONS}
    for place, sections in PAGES.items():
        if (args.readme.parent / place).exists():
            pages[args.readme.parent / place] = sections
    stale = 0
    for page, sections in pages.items():
        before = page.read_text(encoding="utf-8")
        after = update(before, args.results, sections)
        if before == after:
            print(f"{page.name} is up to date")
        elif args.check:
            stale += 1
            print(
                f"{page.name} does not agree with {args.results.name}; "
                "run: python -m benchmarks.readme",
                file=sys.stderr,
            )
        else:
            page.write_text(after, encoding="utf-8")
            print(f"{page.name} written")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
