"""``python -m soak``: the long runs, and the table of their results in docs/reliability.md.

From the repository's folder, with ``tests`` in PYTHONPATH; ``make soak`` does it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before NumPy and torch are loaded: children are forked, and a machine may be small.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MOLAE_NUM_THREADS"):
    os.environ.setdefault(_name, "1")


def _fuzz(args: argparse.Namespace) -> Any:
    from soak import fuzz

    told = Path(os.environ["MOLAE_SOAK_TOLD"]) if "MOLAE_SOAK_TOLD" in os.environ else None
    return fuzz.run(args.mutations, args.seed, told=told)


def _kills(args: argparse.Namespace) -> Any:
    from soak import kills

    return kills.run(args.kills, args.seed, args.kinds)


def _walk(args: argparse.Namespace) -> Any:
    from soak import walk

    return walk.run(args.operations, args.seed)


def _faults(args: argparse.Namespace) -> Any:
    from soak import faults

    return faults.run(args.calls, args.seed, args.commands)


def _allocations(args: argparse.Namespace) -> Any:
    from soak import native

    return native.allocations()


def _poisons(args: argparse.Namespace) -> Any:
    from soak import native

    return native.poisons()


def _leaks(args: argparse.Namespace) -> Any:
    from soak import native

    return native.leaks(args.repeats, args.names)


def _sanitizers(args: argparse.Namespace) -> Any:
    from soak import sanitize

    return sanitize.run(args.only)


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "fuzz": _fuzz,
    "kills": _kills,
    "walk": _walk,
    "faults": _faults,
    "allocations": _allocations,
    "poisons": _poisons,
    "leaks": _leaks,
    "sanitizers": _sanitizers,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--kinds", action="append", default=[], help="of the runs that are killed")
    parser.add_argument("--operations", type=int, default=10_000, help="of the random walk")
    parser.add_argument("--calls", type=int, default=10_000, help="system calls that fail")
    parser.add_argument(
        "--commands", action="append", default=[], help="of those whose system calls fail"
    )
    parser.add_argument("--repeats", type=int, default=10_000, help="calls of each function")
    parser.add_argument("--names", default="", help="of the functions, a part of them")
    parser.add_argument(
        "--only", action="append", default=[], choices=("asan", "ubsan", "tsan"),
        help="of the sanitizers",
    )  # fmt: skip
    parser.add_argument("--write", type=Path, help="the page whose table is to be written anew")
    args = parser.parse_args()
    if unknown := sorted(set(args.parts) - set(PARTS)):
        parser.error(f"no such part: {', '.join(unknown)}")
    if not args.parts or "faults" in args.parts:
        from soak.faults import preload

        preload(["-m", "soak", *sys.argv[1:]])
    faults = 0
    for part in args.parts or PARTS:
        found = PARTS[part](args).to_dict()
        faults += len(found["faults"])
        print(json.dumps({"part": part, **found}), flush=True)
        if args.write is not None:
            from soak import table

            table.write(args.write, part, args.seed, found)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
