"""``python -m benchmarks.quality``: every method at equal stored numbers, and what it costs.

Without a model: the demonstration's. With ``--train-text FILE`` a second one is trained on that
text first, which takes one to two hours. Rows that are done are kept in the folder for the work,
and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.header import header
from benchmarks.quality import tables
from benchmarks.quality.errors import output_error, weight_error
from benchmarks.quality.inputs import add_inputs, begin, find_inputs, keep, say, work_folder
from benchmarks.quality.kept import Found, Rows
from benchmarks.quality.layer import OutOfReach
from benchmarks.quality.model import Scores, Text, layers_of, load, replaced, rises, score
from benchmarks.quality.noise import gaussian_twin
from benchmarks.quality.rows import ROWS, Attempt, Bench
from molae.hf.windows import ratio, tokenize

FORMAT = 1
SIZES = (0.75, 0.6, 0.5, 0.4, 0.3, 0.2)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    begin(args)
    path, text, held_out, names = find_inputs(args)
    result = _run(args, path, text, held_out, names)
    print(tables.quality(result))
    whole = tuple(args.sizes) == SIZES and args.rows == list(ROWS) and args.noise_size
    keep(args, result, "quality", whole)
    return 0


def _run(
    args: argparse.Namespace, path: Path, text: str, held_out: str, names: dict[str, str]
) -> Found:
    """Each row at each size, and the noise floor."""
    began = time.perf_counter()
    model, tokenizer = load(path)
    longest = getattr(model.config, "max_position_embeddings", None)
    length = min(args.length, longest or args.length)
    sequences = max(1, args.tokens // length)
    scored = Text(tokenizer, held_out, args.test_tokens, longest)
    base = score(model, scored)
    work = work_folder(args, path, text, held_out)
    bench = Bench(path, tokenize(tokenizer, text).numpy(), sequences, length, [], work)
    with bench.calibration() as calibration:
        bench.layers.extend(layers_of(model, calibration))
    layers = bench.layers
    own = ratio(list(base.sums), list(base.sizes))
    result: Found = {
        "molae_quality": FORMAT,
        "header": header(args.threads),
        "names": names,
        "model": {
            "kind": model.config.model_type,
            "parameters": sum(p.numel() for p in model.parameters()),
            "layers": len(layers),
            "experts": layers[0].num_experts,
            "num_experts_per_tok": int(layers[0].index.shape[1]),
            "hidden_size": int(layers[0].x.shape[1]),
            "intermediate_size": int(layers[0].weights["gate_proj"].shape[1]),
            "tokens_per_expert": [
                [int(layer.counts.min()), round(float(layer.counts.mean())),
                 int(layer.counts.max())] for layer in layers
            ],
            "perplexity": math.exp(own.mean),
            "perplexity_se": math.exp(own.mean) * own.se,
        },
        "calibration_tokens": int(sum(len(layer.x) for layer in layers[:1])),
        "test_tokens": int(base.sizes.sum()),
    }  # fmt: skip
    rows = Rows(work / "rows.json")
    for size in args.sizes:
        for name in args.rows:
            if rows.find(name, size) is not None:
                continue
            start = time.perf_counter()
            say(f"{name} at {size:g} ({start - began:.0f} s)")
            row = _row(bench, model, scored, base, name, size)
            rows.add({**row, "seconds": round(time.perf_counter() - start, 1)})
            say(f"  {row.get('note', '')}: {_short(row)}")
    result["rows"] = _ranked(
        [row for size in args.sizes for name in args.rows if (row := rows.find(name, size))]
    )
    if args.noise_size:
        result["noise"] = _noise(args, bench, rows, began)
    return result


def _row(bench: Bench, model: Any, scored: Text, base: Scores, name: str, size: float) -> Found:
    best: Found | None = None
    try:
        for attempt in ROWS[name](bench, size):
            found = _scored(bench, model, scored, base, attempt)
            if best is None or found["loss"] < best["loss"]:
                best = found
    except OutOfReach as error:
        if best is None:
            return {"name": name, "size": size, "out_of_reach": str(error)}
    assert best is not None
    return {"name": name, "size": size, **best}


def _scored(bench: Bench, model: Any, scored: Text, base: Scores, attempt: Attempt) -> Found:
    if attempt.model is not None:
        found = score(attempt.model, scored)
    else:
        with replaced(model, attempt.layers):
            found = score(model, scored)
    stored = sum(layer.stored for layer in attempt.layers)
    return {
        "note": attempt.note,
        "reached": stored / sum(layer.numbers for layer in bench.layers),
        **rises(found, base),
        "weight_error": weight_error(bench.layers, attempt.layers),
        "output_error": output_error(bench.layers, attempt.layers),
        "sums": found.sums.tolist(),
        "sizes": found.sizes.tolist(),
    }


def _ranked(rows: list[Found]) -> list[Found]:
    """With each row's distance to the best of its size, by paired windows."""
    found = []
    for row in rows:
        others = [o for o in rows if o["size"] == row["size"] and "loss" in o]
        row = dict(row)
        if "loss" in row:
            best = min(others, key=lambda other: other["loss"])
            apart = ratio(
                list(np.subtract(row["sums"], best["sums"])), [int(n) for n in row["sizes"]]
            )
            row["behind"], row["behind_se"] = apart.mean, apart.se
            del row["sums"], row["sizes"]
        found.append(row)
    return found


def _noise(args: argparse.Namespace, bench: Bench, rows: Rows, began: float) -> Found:
    """Weight errors of the same methods on Gaussian experts, at one size."""
    size, twin = args.noise_size, bench.work / "gaussian"
    missing = [name for name in args.rows if rows.find(f"noise {name}", size) is None]
    if missing:
        say(f"Gaussian experts ({time.perf_counter() - began:.0f} s)")
        gaussian_twin(bench.path, twin)
        work = bench.work / "noise"
        work.mkdir(exist_ok=True)
        other = replace(bench, path=twin, layers=[], work=work)
        with other.calibration() as calibration:
            other.layers.extend(layers_of(load(twin)[0], calibration))
        for name in missing:
            row: Found = {"name": f"noise {name}", "size": size, "weight_error": None}
            try:
                tried = [
                    weight_error(other.layers, attempt.layers)
                    for attempt in ROWS[name](other, size)
                ]
                row["weight_error"] = min(tried)
            except OutOfReach:
                pass
            rows.add(row)
    found = {name: rows.find(f"noise {name}", size) for name in args.rows}
    return {
        "size": size,
        "weight_error": {name: row["weight_error"] for name, row in found.items() if row},
    }


def _short(row: Found) -> str:
    if "out_of_reach" in row:
        return f"out of reach, {row['out_of_reach']}"
    return f"{row['rise']:+.2%} ± {row['rise_se']:.2%}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=(__doc__ or "").partition("\n")[0]
    )
    add_inputs(parser, "quality")
    parser.add_argument("--sizes", type=float, nargs="+", default=list(SIZES))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--noise-size", type=float, default=0.5, help="0: no noise floor")
    return parser


if __name__ == "__main__":
    sys.exit(main())
