"""``python -m benchmarks.heal``: what training brings back of what a conversion has lost.

Without a model: the demonstration's. With ``--train-text FILE`` the second one of
``benchmarks.quality``, trained on that text first. Steps and rows that are done are kept in the
folder for the work, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

import molae
from benchmarks.header import header
from benchmarks.heal import figures, tables
from benchmarks.heal.making import Bench, Processes, Step
from benchmarks.heal.rows import ROWS
from benchmarks.quality.inputs import Inputs, add_inputs, begin, keep, prepare, say
from benchmarks.quality.kept import Found, Rows
from benchmarks.quality.model import Scores, load, rises, score
from benchmarks.quality.rows import PUBLISHED_GROUPS
from molae.errors import ArgumentError

FORMAT = 1
SIZES = (0.5, 0.4, 0.3, 0.2)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    begin(args)
    with Processes() as processes:
        result = _run(args, processes)
    print(tables.heal(result))
    keep(args, result, "heal", tuple(args.model_sizes) == SIZES and args.rows == list(ROWS))
    return 0


def _run(args: argparse.Namespace, processes: Processes) -> Found:
    given = prepare(args)
    bench = Bench(
        **vars(given.source), text=given.text, work=given.work, threads=args.threads,
        processes=processes,
    )  # fmt: skip
    rows, began = Rows(given.work / "rows.json"), time.perf_counter()
    found: list[Found] = []
    names = [name for name in ROWS if name == "original" or name in args.rows]
    for size in (1.0, *args.model_sizes):
        for name in (n for n in names if ROWS[n].sized == (size < 1)):
            ways = _ways(args, given, name, size)
            row = rows.find(key := _key(name, ways), size)
            if row is None:
                say(f"{ROWS[name].title}, size {size:g} ({time.perf_counter() - began:.0f} s)")
                row = {"name": key, "size": size, **_best(bench, given, ways)}
                rows.add(row)
                if "sums" in row:
                    say(f"  perplexity {math.exp(sum(row['sums']) / sum(row['sizes'])):.3f}")
            found.append({**row, "name": name})
    result: Found = {
        "molae_heal": FORMAT,
        "header": header(args.threads),
        "names": given.names,
        "model": given.facts,
        "calibration_tokens": bench.sequences * bench.length,
        "test_tokens": sum(found[0]["sizes"]),
        "training": {
            "layers": _layers(args, given),
            "router_steps": args.router_steps,
            "router_rate": args.router_rate,
            "tune_steps": args.tune_steps,
            "more_steps": _more(args, given),
            "tune_rate": args.tune_rate,
            "distill": args.distill,
            "batch": args.batch,
            "length": bench.length,
        },
        "rows": [],
    }
    for row in found:
        result["rows"].append(_against(row, found, result))
    figures.check(result)
    return result


# ------------------------------------------------------------------------ a row's steps


def _ways(args: argparse.Namespace, given: Inputs, name: str, size: float) -> list[list[Step]]:
    """Steps that make a row; of several ways the one with the lowest perplexity is the row's."""
    first: list[Found] = [{"size": size}]
    if ROWS[name].steps[:1] == ("published",):
        groups = [k for k in PUBLISHED_GROUPS if k <= given.facts["experts"]]
        first = [{"method": "molae", "size": size, "group_size": k} for k in groups]
        first = [settings for settings in first if _reaches(given.source.path, settings)]
    return [
        [_step(args, given, name, step, settings) for step in ROWS[name].steps]
        for settings in first
    ]


def _reaches(path: Path, settings: Found) -> bool:
    try:
        molae.plan(path, molae.ConvertConfig(**settings))
    except ArgumentError:
        return False
    return True


def _step(args: argparse.Namespace, given: Inputs, row: str, name: str, first: Found) -> Step:
    if name in ("published", "calibrated"):
        return Step(name, "convert", first)
    if name == "pruned":
        return Step(name, "prune", first)
    if name.startswith("layers"):
        own = _layers(args, given)
        if name == "layers-again":
            own["sequences"] = given.source.sequences
        return Step(name, "heal", {**own, "anchored": name == "layers-anchored"})
    more = _more(args, given) if name == "tuned-more" else 0
    # The original has nothing to learn from itself.
    tuned = {"train": "all", "steps": args.tune_steps + more, "learning_rate": args.tune_rate,
             "distill": args.distill if ROWS[row].before else 0.0}  # fmt: skip
    routers = {"train": "router", "steps": args.router_steps, "learning_rate": args.router_rate,
               "distill": 1.0}  # fmt: skip
    own = routers if name == "routers" else tuned
    return Step(name, "finetune", {**own, "batch_size": args.batch})


def _layers(args: argparse.Namespace, given: Inputs) -> Found:
    sequences = max(1, args.heal_tokens // given.source.length)
    return {"passes": args.heal_passes, "rate": args.heal_rate, "sequences": sequences}


def _more(args: argparse.Namespace, given: Inputs) -> int:
    """Steps of fine-tuning that read the text of the layers' training once."""
    return math.ceil(_layers(args, given)["sequences"] / args.batch)


def _key(name: str, ways: Sequence[Sequence[Step]]) -> str:
    facts = json.dumps([[asdict(step) for step in steps] for steps in ways])
    return f"{name} {hashlib.sha256(facts.encode()).hexdigest()[:12]}"


# ------------------------------------------------------------------------- its figures


def _best(bench: Bench, given: Inputs, ways: Sequence[Sequence[Step]]) -> Found:
    best: Found | None = None
    for steps in ways:
        path, costs = bench.make(steps)
        model, _ = load(path)
        scores = score(model, given.scored)
        found = {
            "steps": costs,
            "experts": model.config.num_experts,
            "sums": scores.sums.tolist(),
            "sizes": scores.sizes.tolist(),
        }
        if best is None or sum(found["sums"]) < sum(best["sums"]):
            best = found
    return best or {"out_of_reach": "no group size is small enough"}


def _against(row: Found, rows: Sequence[Found], result: Found) -> Found:
    """With what it has lost, and what of that its steps have taken back."""
    kept = {key: value for key, value in row.items() if key not in ("sums", "sizes")}
    if "sums" not in row:
        return kept
    own = _scores(row)
    kept |= rises(own, _scores(rows[0]))
    tuned = next((r for r in rows if r["name"] == "original-tuned"), None)
    if ROWS[row["name"]].tuned and tuned is not None:
        over = rises(own, _scores(tuned))
        kept |= {"rise_tuned": over["rise"], "rise_tuned_se": over["rise_se"]}
    before = ROWS[row["name"]].before
    if before and (healed := figures.find(result, before, row["size"])) is not None:
        kept["taken_back"] = figures.taken_back(healed["rise"], kept["rise"])
    return kept


def _scores(row: Found) -> Scores:
    return Scores(np.array(row["sums"]), np.array(row["sizes"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.heal", description=(__doc__ or "").partition("\n\n")[0]
    )
    add_inputs(parser, "heal")
    parser.add_argument("--model-sizes", type=float, nargs="+", default=list(SIZES))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument(
        "--heal-tokens", type=int, default=262_144, help="of the text, to train layers with"
    )
    parser.add_argument("--heal-passes", type=int, default=8, help="over the text, each layer's")
    parser.add_argument("--heal-rate", type=float, default=0.02)
    parser.add_argument("--router-steps", type=int, default=100)
    parser.add_argument("--router-rate", type=float, default=1e-3)
    parser.add_argument("--tune-steps", type=int, default=100)
    parser.add_argument("--tune-rate", type=float, default=2e-4)
    parser.add_argument(
        "--distill", type=float, default=1.0, metavar="SHARE",
        help="of the original's distributions in the loss of the fine-tuning; 0: the text alone",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=4, help="rows a step, of routers and tuning")
    return parser


if __name__ == "__main__":
    sys.exit(main())
