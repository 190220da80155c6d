"""Damaged files on every way in: no crash, no hang, no great allocation, no other error.

A case is a surface (a folder and what reads it) with one file of it mutated. What reads it must
get through or raise an error of molae's. `run` is for a process of its own, whose memory is
limited; mutants that once failed are kept in ``corpus.json`` and run first.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from checkpoints import add_companions, make_checkpoint
from converting import tree
from encoded import fp8_pair, oss_pair
from safetensors.numpy import load_file, save_file

from molae import ConvertConfig, cli, convert, inspect, materialize
from molae.arch import check_factors, describe, load_family
from molae.convert import Report, plan, plan_materialize
from molae.convert.journal import JOURNAL
from molae.convert.layer_state import STATE, LayerState
from molae.convert.measuring import TRIAL_SIZES, Look, Measurements
from molae.errors import MolaeError
from molae.fit.adamw import AdamW
from molae.fit.descent import Descended, _set_down, _taken_up
from molae.io import open_checkpoint
from molae.io.checkpoint import INDEX
from soak.mutate import mutated
from soak.outcome import Findings

__all__ = ["CORPUS", "Outcome", "run", "surfaces"]

CORPUS = Path(__file__).with_name("corpus.json")

#: Seconds a case may take, bytes it may use in all and for each byte of its folder, and what the
#: whole process may use beyond what it has at the beginning.
SECONDS, ALLOWED, TIMES, WHOLE = 20.0, 32 << 20, 64, 2 << 30


class Hang(BaseException):
    """A case took too long."""


@dataclass(frozen=True)
class Surface:
    """A folder, the files of it that are damaged with their kinds, and what reads it.

    `fresh`: reading writes, so each case needs a copy of its own.
    """

    name: str
    folder: Path
    files: Mapping[str, str]
    read: Callable[[Path], object]
    fresh: bool = False


@dataclass
class Outcome(Findings):
    """Counts by surface, and what must not be."""

    read: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    most_bytes: int = 0


def surfaces(work: Path) -> list[Surface]:
    """Made anew below `work`; small, since each case reads one from end to end."""
    sizes = {"L": 2, "E": 4, "D": 8, "F": 4, "V": 8}
    source = make_checkpoint(work / "source", dtype="BF16", **sizes)  # is not touched again
    single = make_checkpoint(work / "single", dtype="BF16", **sizes)
    sharded = make_checkpoint(work / "sharded", "mixtral", "fused", shards=3, **sizes)
    add_companions(single)
    add_companions(source)
    converted = work / "converted"
    convert(source, converted, ConvertConfig(size=0.6, group_size=2))
    light = _with_light_modules(converted, work / "light")
    half = work / "half"
    shutil.copytree(converted, half)
    (half / "molae-report.json").unlink()
    _put_journal(source, half)
    wanted = tree(converted)

    def resumed(folder: Path) -> None:
        convert(source, folder, ConvertConfig(size=0.6, group_size=2))
        if tree(folder) != wanted:
            raise AssertionError("resumed to other bytes")

    def overwritten(folder: Path) -> None:
        convert(source, folder, ConvertConfig(size=0.6, group_size=2), overwrite=True)
        if tree(folder) != wanted:
            raise AssertionError("overwritten to other bytes")

    config, header = "config.json", "model.safetensors"
    fp8, oss = fp8_pair(work / "fp8")[0], oss_pair(work / "oss")[0]
    thirds, halves = "model-00002-of-00003.safetensors", "model-00002-of-00002.safetensors"
    first = "model-00001-of-00002.safetensors"
    return [
        Surface("header", single, {header: "safetensors"}, _checkpoint),
        Surface("index", sharded, {INDEX: "json"}, _checkpoint),
        Surface("config", single, {config: "json"}, _command),
        Surface("fused config", sharded, {config: "json"}, _command),
        Surface("converted config", converted, {config: "json"}, _converted),
        Surface("light config", light, {config: "json", first: "safetensors"}, _understood),
        Surface("converted header", converted, {first: "safetensors", INDEX: "json"}, _converted),
        Surface("journal", half, {JOURNAL: "lines"}, resumed, fresh=True),
        Surface(
            "report", converted, {"molae-report.json": "json"}, Report.from_file, fresh=False
        ),
        Surface(
            "old result", converted, {"molae-report.json": "json"}, overwritten, fresh=True
        ),
        Surface("FP8", fp8, {config: "json", thirds: "safetensors"}, _encoded),
        Surface("MXFP4", oss, {config: "json", halves: "safetensors"}, _encoded),
        _layer_state(work / "state"),
        _measurements(work / "stats"),
        _family(work / "family"),
    ]  # fmt: skip


def run(count: int, seed: int, *, corpus: bool = True, told: Path | None = None) -> Outcome:
    """So many mutants, spread evenly over the surfaces.

    Parameters
    ----------
    told : Path, optional
        Is told the number of each case before it begins, for when the process dies of it.
    """
    found = Outcome()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, _limits():
        known = surfaces(Path(name))
        if corpus:
            by_name = {surface.name: surface for surface in known}
            for entry in json.loads(CORPUS.read_text()):
                raw = entry["text"].encode("latin-1")
                _case(found, by_name[entry["surface"]], entry["file"], raw, "corpus")
        for number in range(count):
            if told is not None:
                told.write_text(f"{seed} {number}")
            rng = random.Random(f"{seed}/{number}")
            surface = known[number % len(known)]
            file = rng.choice(sorted(surface.files))
            raw = mutated((surface.folder / file).read_bytes(), surface.files[file], rng)
            _case(found, surface, file, raw, f"{seed}/{number}")
    found.seconds = time.perf_counter() - started
    return found


def _case(found: Outcome, surface: Surface, file: str, raw: bytes, number: str) -> None:
    folder, sound = surface.folder, None
    if surface.fresh:
        folder = folder.with_name("case")
        shutil.copytree(surface.folder, folder)
    else:
        sound = (folder / file).read_bytes()
    (folder / file).write_bytes(raw)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    tracemalloc.reset_peak()
    base, started, fault = tracemalloc.get_traced_memory()[0], time.perf_counter(), None
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        surface.read(folder)
        found.read[surface.name] += 1
    except MolaeError as error:
        found.refused[surface.name] += 1
        if not str(error) or len(str(error)) > 20_000:
            fault = f"a message of {len(str(error))} characters"
    except (Exception, Hang) as error:
        fault = "".join(traceback.format_exception(error)[-3:])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if sound is None:
            shutil.rmtree(folder)
        else:
            (folder / file).write_bytes(sound)
    used = tracemalloc.get_traced_memory()[1] - base
    found.slowest = max(found.slowest, time.perf_counter() - started)
    found.most_bytes = max(found.most_bytes, used)
    if used > ALLOWED + TIMES * size:
        fault = fault or f"{used} bytes for a folder of {size}"
    if fault is not None:
        text = raw.decode("latin-1")
        found.faults.append(
            {"surface": surface.name, "file": file, "case": number, "fault": fault, "text": text}
        )


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Within, a hang is an exception, warnings are errors, and memory is counted and bounded."""

    def hang(number: int, frame: Any) -> None:
        raise Hang(f"more than {SECONDS} seconds")

    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, hang)
    resource.setrlimit(resource.RLIMIT_AS, (now + WHOLE, hard[1]))
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_AS, hard)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------ what reads


def _checkpoint(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        for name in checkpoint.tensors:
            with contextlib.suppress(MolaeError):  # encoded
                checkpoint.raw(name)
            with contextlib.suppress(MolaeError):  # of a type that can only be copied
                checkpoint.array(name)
        checkpoint.companions()
        checkpoint.fingerprint()
        describe(checkpoint).counts()
    inspect(folder, compressed_experts=1).to_dict()


def _encoded(folder: Path) -> None:
    _checkpoint(folder)
    plan(folder, ConvertConfig(size=0.9, group_size=2)).to_dict()


def _command(folder: Path) -> None:
    """As a user would: exit code 0 or 1, and one line of molae's that is no surprise."""
    for argv in (["inspect", str(folder)], ["convert", str(folder), "--dry-run"]):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(argv)
        said = err.getvalue()
        if code not in (0, 1) or "--debug shows where" in said:
            raise AssertionError(f"exit code {code}: {said}")
    plan(folder, ConvertConfig(size=0.5, group_size=2)).to_dict()


def _understood(folder: Path) -> None:
    inspect(folder).to_dict()
    with open_checkpoint(folder) as checkpoint:
        model = describe(checkpoint, converted=True)
        if model.factored is not None:
            check_factors(model, checkpoint.tensors)


def _converted(folder: Path) -> None:
    _understood(folder)
    plan_materialize(folder).to_dict()
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        materialize(folder, Path(name) / "dst")


# --------------------------------------------------------------- what is read


def _with_light_modules(converted: Path, folder: Path) -> Path:
    """A converted checkpoint with narrow experts of one unit in layer 0."""
    shutil.copytree(converted, folder)
    at, (E, D) = "model.layers.0.mlp.experts.light.", (4, 8)
    shapes = {"gate_proj": (E, 1, D), "up_proj": (E, 1, D), "down_proj": (E, D, 1), "bias": (E, D)}
    added = {at + name: np.ones(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()}
    shard, index = folder / "model-00001-of-00002.safetensors", folder / INDEX
    save_file({**load_file(shard), **added}, shard)
    named = json.loads(index.read_text())
    named["weight_map"] |= dict.fromkeys(added, shard.name)
    index.write_text(json.dumps(named))
    config = json.loads((folder / "config.json").read_text())
    quant = config["quantization_config"]
    quant |= {"format_version": 3, "compressed_experts": {"0": 1}, "light_units": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _put_journal(source: Path, half: Path) -> None:
    """The journal of a run that wrote all but its report."""
    from molae.convert import execution

    class Stop(BaseException):
        pass

    def stop(*args: object) -> None:
        raise Stop

    real, execution._finish = execution._finish, stop  # type: ignore[assignment]
    folder = half.with_name("stopped")
    try:
        with contextlib.suppress(Stop):
            convert(source, folder, ConvertConfig(size=0.6, group_size=2))
    finally:
        execution._finish = real
    shutil.copy(folder / JOURNAL, half / JOURNAL)


def _layer_state(folder: Path) -> Surface:
    folder.mkdir()
    weights = {"a": np.ones((3, 2), np.float32), "b": np.zeros(4, np.float32)}
    descent = AdamW(weights)
    found = Descended({n: w.copy() for n, w in weights.items()}, [(0, 1.0), (2, 0.5)], 2)
    LayerState(folder / STATE, 3).save(*_set_down(found, descent))

    def read(folder: Path) -> None:
        kept = LayerState(folder / STATE, 3).load()
        if kept is not None:
            _taken_up(*kept, AdamW({n: w.copy() for n, w in weights.items()}))

    return Surface("layer state", folder, {STATE: "state"}, read)


def _measurements(folder: Path) -> Surface:
    folder.mkdir()
    measured = Measurements({"text": "t"})
    groups = [(0, 1), (2, 3)]
    ranks: list[tuple[int, ...]] = [(2, 1)] * len(TRIAL_SIZES)
    spectra = (np.array([3.0, 2.0]), np.array([1.0]))
    measured.looks[0, "gate_proj", 2] = Look(groups, spectra, ranks, [0.5] * len(TRIAL_SIZES))
    measured.tried["gate_proj", 2, 0.5] = 0.25
    measured.compressed[0, 1] = 0.125
    measured.save(folder / "stats")

    def read(folder: Path) -> None:
        known = Measurements.load(folder / "stats", {"text": "t"}, 4)
        for look in known.looks.values():
            look.curves(4, 8, dict.fromkeys(TRIAL_SIZES, 0.5))

    return Surface("measurements", folder, {"stats": "metadata"}, read)


def _family(folder: Path) -> Surface:
    from importlib import resources

    folder.mkdir()
    text = (resources.files("molae.arch") / "mixtral.json").read_text("utf-8")
    (folder / "family.json").write_text(text)
    return Surface(
        "family", folder, {"family.json": "json"}, lambda f: load_family(f / "family.json")
    )
