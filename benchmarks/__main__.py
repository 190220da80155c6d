"""``python -m benchmarks``: measure, print tables, keep the figures as JSON."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import molae
from benchmarks import RESULTS, tables
from benchmarks.cases import CASES, FILES, NEED_HF, Settings
from benchmarks.contestants import limit_threads
from benchmarks.header import header, usable_cpus
from benchmarks.peak import peaks
from benchmarks.settings import CALIBRATED, SHAPES, Calibrated, Distilled, Shape

FORMAT = 1

#: Shapes that take seconds: to see that everything works, not to measure anything.
QUICK: dict[str, Any] = {
    "E": 16, "F": 64, "D": 128, "V": 256, "layers": 2, "repeats": 2, "pause": 0.0,
    "shapes": (Shape("tiny", E=16, K=4, D=128, F=64),), "tokens": (1, 16, 64), "many": 64,
    "stream_bytes": 2**20, "prompt": 64, "new_tokens": 8, "fits": 2,
    "calibrated": Calibrated("tiny", E=16, K=4, F=64, D=128, N=3000),
    "distilled": (Distilled("tiny", E=8, K=2, D=48, F=32, steps=2, epochs=2),),
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    chosen = args.cases or _possible()
    settings = _settings(args)
    molae.set_num_threads(settings.threads)
    limit_threads(settings.threads)
    if importlib.util.find_spec("torch"):
        importlib.import_module("torch")  # the header names its version and threads
    result: dict[str, Any] = {
        "molae_benchmarks": FORMAT,
        "quick": args.quick,
        "header": header(settings.threads),
    }
    if result["header"]["busy"]:
        load = result["header"]["load_at_start"]
        _say(f"the machine is busy (others take {load:.0%}): read ratios, not seconds")
    _say("peaks")
    result["peaks"] = peaks(settings.threads, quick=args.quick)
    start = time.perf_counter()
    for name in chosen:
        _say(f"{name} ({time.perf_counter() - start:.0f} s)")
        with warnings.catch_warnings():
            warnings.simplefilter("error", molae.errors.PrecisionWarning)
            unfinished = partial(_keep_unfinished, args, result, name, start)
            result[name] = CASES[name](
                replace(settings, kept=unfinished), result["peaks"]["best_gflops"]
            )
    _unfinished(args).unlink(missing_ok=True)
    _say(f"done ({time.perf_counter() - start:.0f} s)")
    print(tables.benchmarks(result))
    _keep(args, chosen, result)
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    given: dict[str, Any] = {"threads": args.threads}
    if args.quick:
        given |= QUICK
    if args.repeats:
        given["repeats"] = given["fits"] = args.repeats
    if args.calibration_tokens:
        given["calibrated"] = replace(CALIBRATED, N=args.calibration_tokens)
    if args.shapes:
        given["shapes"] = tuple(shape for shape in SHAPES if shape.name in args.shapes)
    return Settings(**given)


def _possible() -> list[str]:
    """All cases that what is installed allows."""
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        _say(f"left out: {', '.join(NEED_HF)}, which need {' and '.join(missing)}")
    return [name for name in CASES if not (missing and name in NEED_HF)]


def _keep(args: argparse.Namespace, chosen: list[str], result: dict[str, Any]) -> None:
    """Write the figures: all to the file that was asked for, or each file's cases to it."""
    if args.json is not None:
        _write(args.json, result)
        return
    incomplete = set(CASES) if args.quick else set()
    if args.shapes:
        incomplete.add("layers")
    if args.calibration_tokens:
        incomplete.add("calibration")
    whole = set(chosen) - incomplete
    kept = {file: cases for file, cases in FILES.items() if set(cases) <= whole}
    for file, cases in kept.items():
        others = set(CASES) - set(cases)
        part = {key: value for key, value in result.items() if key not in others}
        _write(RESULTS / file, part)
    if left := [case for case in chosen if not any(case in cases for cases in kept.values())]:
        sets = " or ".join(" ".join(cases) for cases in FILES.values())
        _say(
            f"not kept: {', '.join(left)}; only a full run of {sets} goes to benchmarks/results "
            "unless --json names a file"
        )


def _unfinished(args: argparse.Namespace) -> Path:
    given: Path | None = args.json
    return RESULTS / "unfinished.json" if given is None else given.with_suffix(".unfinished.json")


def _keep_unfinished(
    args: argparse.Namespace, result: dict[str, Any], name: str, start: float, found: dict[str, Any]
) -> None:
    """Write what a case has so far: a run of an hour may be cut off."""
    out = _unfinished(args)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result | {name: found}, indent=1) + "\n")
    done = found["rows"][-1]
    _say(f"  {done['shape']}, {done['dtype']} ({time.perf_counter() - start:.0f} s): in {out}")


def _write(out: Path, result: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    _say(f"kept in {out}; python -m benchmarks.readme writes the README's tables")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _count(text: str) -> int:
    n = int(text)
    if n < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {n}")
    return n


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that all works")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="default: all")
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=[shape.name for shape in SHAPES],
        help="of the case 'layers'; default: all",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=_count,
        metavar="N",
        help=f"of the case 'calibration'; default {CALIBRATED.N:,}",
    )
    parser.add_argument("--repeats", type=_count, help="rounds; default 5, of 'calibration' 1")
    parser.add_argument(
        "--threads", type=_count, default=usable_cpus(), help="for every contestant; default: CPUs"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="keep the figures in this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
