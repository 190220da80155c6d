"""``python -m benchmarks.compressed``: what acts in the place of compressed experts, and what it
saves.

Without a model: the demonstration's. With ``--train-text FILE`` the second one of
``benchmarks.quality``, trained on that text first. Rows that are done are kept in the folder for
the work, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import math
import sys
import time

import numpy as np

from benchmarks.compressed import tables
from benchmarks.compressed.forms import FORMS, TRAINED, title
from benchmarks.compressed.making import Bench, Training
from benchmarks.header import header
from benchmarks.quality.inputs import add_inputs, begin, keep, prepare, say
from benchmarks.quality.kept import Found, Rows
from benchmarks.quality.model import Scores, rises, score

FORMAT = 1
SIZES = (1.0, 0.75)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    begin(args)
    result = _run(args)
    print(tables.compressed(result))
    whole = tuple(args.model_sizes) == SIZES and args.forms == list(FORMS) and args.steps
    keep(args, result, "compressed", whole)
    return 0


def _run(args: argparse.Namespace) -> Found:
    given = prepare(args, args.steps, args.tune_rate)
    K, training = given.facts["num_experts_per_tok"], Training(args.steps, args.tune_rate)
    bench = Bench(**vars(given.source), text=given.text, work=given.work, training=training)
    rows = Rows(given.work / "rows.json")
    began = time.perf_counter()

    def done(form: str, stage: str, size: float, n: int) -> Found:
        name = f"{form} {stage} {n}"
        found = rows.find(name, size)
        if found is None:
            passed = time.perf_counter() - began
            say(f"{title(form, stage)}, n = {n}, size {size:g} ({passed:.0f} s)")
            start = time.perf_counter()
            other, facts = bench.make(form, stage, size, n)
            scores = score(other, given.scored)
            found = {
                "name": name, "form": form, "stage": stage, "size": size, "n": n, **facts,
                "seconds": round(time.perf_counter() - start, 1),
                "sums": scores.sums.tolist(), "sizes": scores.sizes.tolist(),
            }  # fmt: skip
            rows.add(found)
            say(f"  perplexity {math.exp(sum(scores.sums) / sum(scores.sizes)):.3f}")
        return found

    made: list[Found] = []
    for size in args.model_sizes:
        made.append(done("full", "fitted" if size < 1 else "", size, 0))
        for n in range(1, K):
            for form in args.forms:
                if FORMS[form].uniform and size < 1:
                    continue
                made.append(done(form, "" if FORMS[form].light is None else "fitted", size, n))
        if args.steps:
            for form, stage in TRAINED:
                made.append(done(form, stage, size, 0 if form == "full" else K // 2))
    base = Scores(*(np.array(made[0][key]) for key in ("sums", "sizes")))
    return {
        "molae_compressed": FORMAT,
        "header": header(args.threads),
        "names": given.names,
        "model": given.facts,
        "calibration_tokens": bench.sequences * bench.length,
        "test_tokens": int(base.sizes.sum()),
        "training": {"steps": args.steps, "rate": args.tune_rate, "batch": training.batch_size,
                     "length": bench.length, "light_rates": dict(training.light_rates)},
        "rows": [_against(row, base, made) for row in made],
    }  # fmt: skip


def _against(row: Found, base: Scores, rows: list[Found]) -> Found:
    """With its rise over the whole original, and the share of the gap that it closes."""
    kept = {key: value for key, value in row.items() if key not in ("sums", "sizes")}
    own = Scores(np.array(row["sums"]), np.array(row["sizes"]))
    kept |= rises(own, base)
    ends = {other["form"]: sum(other["sums"]) for other in rows
            if other["size"] == row["size"] and other["stage"] in ("", "fitted")
            and other["n"] in (0, row["n"])}  # fmt: skip
    if row["n"] and row["form"] not in ("plain", "stock") and "plain" in ends:
        gap = ends["plain"] - ends["full"]
        kept["closed"] = (ends["plain"] - sum(row["sums"])) / gap if gap > 0 else None
    return kept


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compressed", description=(__doc__ or "").partition("\n\n")[0]
    )
    add_inputs(parser, "compressed")
    parser.add_argument("--model-sizes", type=float, nargs="+", default=list(SIZES))
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--steps", type=int, default=200, help="of each training; 0: none")
    parser.add_argument("--tune-rate", type=float, default=2e-4, help="when all weights are tuned")
    return parser


if __name__ == "__main__":
    sys.exit(main())
