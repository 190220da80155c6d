"""``python -m benchmarks.schedule``: hours and machines that a conversion would take, by a model's
config alone.

The rates come from a short measurement on this machine, or from options. How the layers are handed
to the workers is simulated as `molae.cluster.Workers` does it. What is estimated is a conversion
without a text, of the routed experts; the other tensors are copied besides.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import molae
from benchmarks import RESULTS
from benchmarks.header import header, usable_cpus
from benchmarks.weights import write_checkpoint
from molae import fit
from molae.arch import Family, load_family
from molae.arch.registry import find_family
from molae.config import TYPES
from molae.convert.allocation import gauge_ranks
from molae.convert.estimate import group_bytes, group_flops
from molae.convert.footprint import BASE_BYTES
from molae.convert.probe import GROUP_SIZES, MOST_EXPERTS
from molae.errors import ArgumentError
from molae.factored import index_groups
from molae.fit import stored_numbers
from molae.io import DTYPES, ShardWriter, TensorSpec, read_config
from molae.io.dtypes import config_dtype

__all__ = ["Layer", "Pool", "Rates", "estimate", "layers_of", "makespan", "measure", "table"]

#: The widest matrices that the measurement factors; those of the model are scaled down to it.
WIDEST = 1536

#: Bytes of the file that is written to measure how fast that goes.
WRITTEN = 256_000_000

#: Bytes of an encoded number, without scales of blocks.
ENCODED = {"fp8": 1.0, "mxfp4": 17 / 32}

#: What is converted for `check`: experts a layer, and their sizes; in groups of 8.
CHECKED = {"layers": 2, "E": 16, "F": 768, "D": 1536, "V": 256}


@dataclass(frozen=True)
class Rates:
    """How fast one thing goes.

    Attributes
    ----------
    gflops : float
        Of a factorization, by one thread.
    read_gbs : float
        Of a worker that reads and hashes its source.
    write_gbs : float
        Of a worker that writes a file, syncs it and reads it back.
    shared_gbs : float, optional
        Of the file system, for all workers together; None where it is no limit.
    """

    gflops: float
    read_gbs: float
    write_gbs: float
    shared_gbs: float | None = None


@dataclass(frozen=True)
class Pool:
    """Machines, workers on each, threads of each worker."""

    machines: int
    workers: int
    threads: int

    @property
    def size(self) -> int:
        return self.machines * self.workers


@dataclass(frozen=True)
class Layer:
    """The experts of one layer.

    Attributes
    ----------
    groups : int
        Of each matrix type.
    group_flops : float
        To factor one.
    read, written : int
        Bytes of all types.
    """

    groups: int
    group_flops: float
    read: int
    written: int

    def seconds(self, rates: Rates, pool: Pool, layers: int) -> dict[str, float]:
        """What a worker takes: to compute, to read, to write, and in all.

        A group is factored by one thread. Reading and writing go on beside the computing, but for
        the first matrix type, which must be there, and the last, which is still to be written.
        """
        rounds = len(TYPES) * math.ceil(self.groups / pool.threads)
        compute = rounds * self.group_flops / rates.gflops / 1e9
        share = math.inf
        if rates.shared_gbs is not None:
            share = rates.shared_gbs / min(pool.size, layers)
        read = self.read / min(rates.read_gbs, share) / 1e9
        write = self.written / min(rates.write_gbs, share) / 1e9
        whole = max(compute, read, write) + (read + write) / len(TYPES)
        return {"compute": compute, "read": read, "write": write, "whole": whole}


def layers_of(
    config: Mapping[str, Any], family: Family, *, size: float, k: int
) -> tuple[list[Layer], dict[str, Any]]:
    """The layers with experts in groups of k, and facts about the model."""
    letters = family.read_letters(config)
    E, F, D = (letters[letter] for letter in "EFD")
    groups = index_groups(E, k)
    ranks = gauge_ranks(groups, size, F=F, D=D)
    numbers = sum(
        stored_numbers(rank, len(group), F, D, "gauge")
        for group, rank in zip(groups, ranks, strict=True)
    )
    encoding = (config.get("quantization_config") or {}).get("quant_method")
    if encoding not in (None, *ENCODED):
        raise ArgumentError(
            f"config.json: quant_method {encoding!r}; estimates are for {', '.join(ENCODED)}, or "
            "for a release without quantization_config"
        )
    stored = DTYPES[config_dtype(config) or "BF16"].itemsize
    layer = Layer(
        groups=len(groups),
        group_flops=group_flops(k, ranks[0], F=F, D=D),
        read=round(len(TYPES) * E * F * D * ENCODED.get(str(encoding), stored)),
        written=len(TYPES) * numbers * stored,
    )
    count = len(family.read_moe_layers(config))
    facts = {
        "family": family.model_type, "letters": letters, "moe_layers": count, "size": size,
        "group_size": k, "rank": ranks[0], "encoding": encoding,
        "read_bytes": count * layer.read, "written_bytes": count * layer.written,
        "workspace_bytes": group_bytes(k, ranks[0], F=F, D=D),
        "results_bytes": 2 * layer.written // len(TYPES),
    }  # fmt: skip
    return [layer] * count, facts


def makespan(seconds: Sequence[float], workers: int) -> float:
    """When the last is done, where each worker takes the next one as soon as it is free.

    Examples
    --------
    >>> from benchmarks.schedule import makespan
    >>> makespan([3, 1, 2], 1), makespan([3, 1, 2], 2), makespan([3, 1, 2], 9)
    (6.0, 3.0, 3.0)
    """
    free = [0.0] * workers
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def choice_flops(letters: Mapping[str, int]) -> float:
    """To choose the group sizes on one layer, which the client does before anything else."""
    E, F, D = (letters[letter] for letter in "EFD")
    some = min(E, MOST_EXPERTS)
    return len(TYPES) * sum(
        group_flops(len(group), 0, F=F, D=D)
        for k in GROUP_SIZES
        if k <= some
        for group in index_groups(some, k)
    )


def estimate(
    layers: Sequence[Layer],
    letters: Mapping[str, int],
    rates: Rates,
    pool: Pool,
    *,
    choice: bool,
) -> dict[str, Any]:
    """Of one pool of machines.

    Returns
    -------
    dict
        ``choice_s``: before the layers, in one process; ``layers_s``: all layers; ``wall_s``: both.
        ``machine_hours``: of all machines. ``efficiency``: how much of the workers' time is spent
        on a layer. ``bound``: what a layer waits for.
    """
    each = [layer.seconds(rates, pool, len(layers)) for layer in layers]
    times = [seconds["whole"] for seconds in each]
    before = choice_flops(letters) / rates.gflops / 1e9 / pool.threads if choice else 0.0
    during = makespan(times, pool.size)
    slowest = max(each, key=lambda seconds: seconds["whole"])
    return {
        **asdict(pool),
        "choice_s": before,
        "layer_s": max(times),
        "layers_s": during,
        "wall_s": before + during,
        "machine_hours": pool.machines * (before + during) / 3600,
        "efficiency": sum(times) / (pool.size * (before + during)),
        "bound": max(("compute", "read", "write"), key=lambda name: slowest[name]),
    }


def measure(letters: Mapping[str, int], k: int, size: float, folder: Path | None = None) -> Rates:
    """Rates of this machine, in processor time where that is what counts.

    One group of the model's shape is factored by one thread, scaled down so that it is at most
    `WIDEST` wide: larger ones go rather faster. A file is written to `folder`, as a shard is.
    """
    F, D = letters["F"], letters["D"]
    scale = max(1.0, D / WIDEST)
    f, d = max(int(F / scale), 1), int(D / scale)
    rng = np.random.default_rng(0)
    W = list(rng.standard_normal((k, f, d), dtype=np.float32))
    (rank,) = gauge_ranks([range(k)], size, F=f, D=d)
    best = math.inf
    with molae.num_threads(1):
        for _ in range(3):
            start = time.process_time()
            fit.factor_shared(W, [rank], groups=[tuple(range(k))], side="input", form="gauge")
            best = min(best, time.process_time() - start)
    gflops = group_flops(k, rank, F=f, D=d) / best / 1e9

    data = rng.integers(0, 256, WRITTEN, dtype=np.uint8)
    start = time.process_time()
    hashlib.sha256(data.data)
    read = WRITTEN / (time.process_time() - start) / 1e9
    with tempfile.TemporaryDirectory(prefix="molae-benchmark-", dir=folder) as place:
        start = time.perf_counter()
        with ShardWriter(Path(place, "shard"), [TensorSpec("t", "U8", data.shape)]) as out:
            out.write("t", data)
            out.finish()
        write = WRITTEN / (time.perf_counter() - start) / 1e9
    return Rates(gflops, read, write)


def check(threads: int = 1) -> dict[str, float]:
    """Processor seconds that the fits of a small generated checkpoint take, foreseen and taken."""
    sizes = dict(CHECKED)
    with tempfile.TemporaryDirectory(prefix="molae-benchmark-") as name, molae.num_threads(threads):
        folder = Path(name)
        write_checkpoint(folder / "src", **sizes)
        config = json.loads((folder / "src" / "config.json").read_text(encoding="utf-8"))
        layers, facts = layers_of(config, find_family(config), size=0.5, k=8)
        rates = measure(facts["letters"], 8, 0.5, folder)
        start = time.process_time()
        molae.convert(folder / "src", folder / "dst", molae.ConvertConfig(size=0.5, group_size=8))
        taken = time.process_time() - start
    pool = Pool(1, 1, threads)
    foreseen = sum(layer.seconds(rates, pool, len(layers))["compute"] for layer in layers)
    return {**{k: float(v) for k, v in sizes.items()}, "foreseen_s": foreseen, "taken_s": taken}


def table(found: Mapping[str, Any]) -> str:
    """The estimates as text for a page."""
    model, rates = found["model"], found["rates"]
    letters = ", ".join(f"{x}={model['letters'][x]}" for x in "LEKDF")
    threads = found["estimates"][0]["threads"]
    memory = BASE_BYTES + model["results_bytes"] + threads * model["workspace_bytes"]
    shared, origin = rates["shared_gbs"], found["origin"]
    lines = [
        f"{found['title']} ({model['family']}, {letters}; {model['moe_layers']} layers with "
        f"experts), size {model['size']:g} in groups of {model['group_size']} at rank "
        f"{model['rank']}: {model['read_bytes'] / 1e12:.2f} TB read"
        f"{' in ' + model['encoding'] if model['encoding'] else ''}, "
        f"{model['written_bytes'] / 1e12:.2f} TB written.",
        "",
        f"A thread factors at {rates['gflops']:.0f} GFLOP/s ({origin['gflops']}), a worker reads "
        f"at {rates['read_gbs']:.2f} GB/s ({origin['read_gbs']}) and writes at "
        f"{rates['write_gbs']:.2f} GB/s ({origin['write_gbs']}); the file system "
        + (f"gives {shared:g} GB/s to all together (given)." if shared else "is no limit."),
        f"{found['estimates'][0]['workers']} workers a machine, {threads} threads each; about "
        f"{memory / 1e9:.0f} GB of memory a worker, mapped pages of the source not counted."
        + (" Group sizes are chosen by measurement first." if found["choice"] else ""),
        "",
        "| machines | hours | machine-hours | a layer | of the workers' time used | bound by |",
        "| -------: | ----: | ------------: | ------: | ----------------------: | -------- |",
    ]
    lines += [
        f"| {row['machines']} | {row['wall_s'] / 3600:.2f} | {row['machine_hours']:.1f} | "
        f"{row['layer_s'] / 60:.1f} min | {row['efficiency']:.0%} | {row['bound']} |"
        for row in found["estimates"]
    ]
    if found["check"]:
        own = found["check"]
        lines += [
            "",
            f"Checked on {own['layers']:.0f} generated layers (E={own['E']:.0f}, F={own['F']:.0f}, "
            f"D={own['D']:.0f}), converted here on one thread: {own['foreseen_s']:.1f} s of "
            f"processor time foreseen, {own['taken_s']:.1f} s taken.",
        ]
    cpu = found["header"]["cpu"]
    lines += ["", f"Measured on {cpu['model']}, {found['header']['time']}."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    config = read_config(args.config)
    family = load_family(args.arch) if args.arch else find_family(config)
    choice = args.group_size is None
    k = args.group_size or GROUP_SIZES[-1]
    layers, facts = layers_of(config, family, size=args.size, k=k)
    given = (args.gflops, args.read_gbs, args.write_gbs)
    rates = Rates(0.0, 0.0, 0.0)
    if None in given:
        rates = measure(facts["letters"], k, args.size, args.folder)
    rates = Rates(
        args.gflops or rates.gflops,
        args.read_gbs or rates.read_gbs,
        args.write_gbs or rates.write_gbs,
        args.shared_gbs,
    )
    found = {
        "title": args.title or args.config.stem,
        "header": header(usable_cpus()),
        "model": facts,
        "rates": asdict(rates),
        "origin": {
            name: "measured" if value is None else "given"
            for name, value in zip(("gflops", "read_gbs", "write_gbs"), given, strict=True)
        },
        "choice": choice,
        "check": check() if args.check else None,
        "estimates": [
            estimate(
                layers, facts["letters"], rates, Pool(machines, args.workers, args.threads),
                choice=choice,
            )
            for machines in args.machines
        ],
    }  # fmt: skip
    print(table(found))
    if args.keep:
        path = args.results / "schedule.json"
        path.write_text(json.dumps(found, indent=2) + "\n")
        print(f"kept in {path.name}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedule", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the model's config.json")
    parser.add_argument(
        "--arch", type=Path, help="its family's description, where molae does not know it"
    )
    parser.add_argument("--title", help="what to call it (the file's name)")
    parser.add_argument(
        "--size", type=float, default=0.5, help="share of the numbers to keep (0.5)"
    )
    parser.add_argument(
        "--group-size", type=int,
        help="experts a group; else the largest that molae would try, and the time to choose",
    )  # fmt: skip
    parser.add_argument(
        "--machines", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], metavar="N"
    )
    parser.add_argument("--workers", type=int, default=1, help="workers a machine (1)")
    parser.add_argument("--threads", type=int, default=usable_cpus(), help="of each worker")
    parser.add_argument("--gflops", type=float, help="of a factorization by one thread")
    parser.add_argument("--read-gbs", type=float, help="of one worker, hashing included")
    parser.add_argument("--write-gbs", type=float, help="of one worker, synced and read back")
    parser.add_argument("--shared-gbs", type=float, help="of the file system, for all (no limit)")
    parser.add_argument("--folder", type=Path, help="where the measurement writes its file")
    parser.add_argument("--check", action="store_true", help="convert a small model, and compare")
    parser.add_argument("--keep", action="store_true", help="keep the figures in --results")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
