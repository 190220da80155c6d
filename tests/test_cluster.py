"""Conversions shared among processes: the same bytes, whatever becomes of the workers."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import MISSING, fields

import numpy as np
import pytest
from checkpoints import add_companions, make_checkpoint
from clusters import Cluster, wait_for
from converting import REPORT, tree
from encoded import fp8_pair

import molae
from molae import ConvertConfig, convert, materialize
from molae.cli import main
from molae.cluster import Workers, client
from molae.cluster.worker import Order, Unfit, Unwanted, describe_worker, write_shard
from molae.convert import Report, Watcher, staging
from molae.convert.conversion import Conversion
from molae.convert.destination import WORKERS, apart_name, sweep_apart
from molae.convert.journal import JOURNAL, Journal
from molae.errors import ArgumentError, ClusterError, DestinationError, NonFiniteError
from molae.fit import LayerInput
from molae.io import open_checkpoint

pytest.importorskip("distributed")

LAYERS = 6
CONFIG = ConvertConfig(size=0.5, group_size=2)
OPTIONS = ("--size", "0.5", "--group-size", "2")
APART = re.compile(r"\.[0-9a-f]{12}-[0-9]+(\.part)?$")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    src = make_checkpoint(tmp_path_factory.mktemp("cluster") / "src", L=LAYERS, E=4, dtype="BF16")
    add_companions(src)
    return src


@pytest.fixture(scope="module")
def wanted(source, tmp_path_factory):
    """The bytes of a run in one process."""
    dst = tmp_path_factory.mktemp("wanted") / "dst"
    convert(source, dst, CONFIG)
    return tree(dst)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A scheduler and two workers."""
    cluster = Cluster(tmp_path_factory.mktemp("clusters") / "pair")
    try:
        cluster.worker()
        cluster.worker()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def lone(tmp_path_factory):
    """A scheduler that has no worker yet, and one to which tests give a single worker."""
    cluster = Cluster(tmp_path_factory.mktemp("clusters") / "lone")
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def moody(lone):
    """With one worker, which is unfit as the test says."""
    if not getattr(lone, "has_worker", False):
        lone.worker(threads=3)
        lone.has_worker = True
    yield lone
    lone.set_mood()


@pytest.fixture
def slow(pair):
    pair.set_mood(slow=0.2)
    yield pair
    pair.set_mood()


class Teller(Watcher):
    def __init__(self):
        self.told = []

    def advanced(self, done, total, what):
        self.told.append((done, total, what))


def apart(dst):
    return [path.name for path in dst.iterdir() if APART.search(path.name)]


# ------------------------------------------------------------------- the same bytes


def test_two_workers_write_the_same_bytes(tmp_path, source, wanted, pair):
    wait_for_workers(pair, 2)
    teller = Teller()
    with Workers(pair.address) as workers:
        report = convert(source, tmp_path / "dst", CONFIG, executor=workers, watcher=teller)
    assert tree(tmp_path / "dst") == wanted
    assert Report.from_file(tmp_path / "dst") == report
    assert len(report.rows) == LAYERS * 3
    assert not report.mixed
    files = [file for row in report.workers for file in row.files]
    assert len(report.workers) == 2
    assert sorted(files) == sorted(name for name in wanted if name.endswith(".safetensors"))
    assert {row.threads for row in report.workers} == {1}
    done, total, _ = teller.told[-1]
    assert done == total
    dones = [done for done, _, _ in teller.told]
    assert dones == sorted(dones)


def test_the_command_takes_the_file_of_a_scheduler(tmp_path, source, wanted, pair, capsys):
    dst = tmp_path / "dst"
    given = ("--scheduler", str(pair.file), "--threads", "2")
    assert main(["convert", str(source), str(dst), *OPTIONS, *given]) == 0
    out = capsys.readouterr().out
    assert "Computed by 2 workers on one machine." in out
    assert f"up to {LAYERS} may share the work" in out
    assert tree(dst) == wanted
    assert {row.threads for row in Report.from_file(dst).workers} == {2}


def test_materialize(tmp_path, source, pair):
    small = tmp_path / "small"
    convert(source, small, CONFIG)
    materialize(small, tmp_path / "alone")
    with Workers(pair.address) as workers:
        materialize(small, tmp_path / "shared", executor=workers)
    assert tree(tmp_path / "shared") == tree(tmp_path / "alone")


def test_fp8_is_decoded_by_the_workers(tmp_path, pair):
    src, _ = fp8_pair(tmp_path, L=3, E=4)
    convert(src, tmp_path / "alone", CONFIG)
    teller = Teller()
    with Workers(pair.address) as workers:
        convert(src, tmp_path / "shared", CONFIG, executor=workers, watcher=teller)
    assert tree(tmp_path / "shared") == tree(tmp_path / "alone")
    done, total, _ = teller.told[-1]
    assert done == total


def test_the_groups_are_not_chosen_again(tmp_path, source, pair):
    """Workers take what was decided: group sizes that molae chooses are measured once."""
    convert(source, tmp_path / "alone", ConvertConfig(size=0.6))
    with Workers(pair.address) as workers:
        convert(source, tmp_path / "shared", ConvertConfig(size=0.6), executor=workers)
    assert tree(tmp_path / "shared") == tree(tmp_path / "alone")


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """A model whose layers can be run, and how to run a text through it."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from checkpoints import transformers_checkpoint

    from molae.hf import hide_progress
    from molae.hf.calibrate import Calibration

    hide_progress()
    src = tmp_path_factory.mktemp("read") / "src"
    sizes = {"L": 4, "E": 6, "K": 2, "D": 16, "F": 12}
    transformers_checkpoint(src, "olmoe", config={"initializer_range": 0.3}, **sizes)
    ids = np.random.default_rng(0).integers(3, 40, 160)
    return src, lambda: Calibration(src, ids, length=40)


@pytest.fixture
def one_molae_thread():
    """A text is run on as many of torch's threads as molae has."""
    with molae.num_threads(1):
        yield


@pytest.mark.usefixtures("one_thread", "one_molae_thread")
@pytest.mark.filterwarnings("ignore::molae.errors.CalibrationWarning")
def test_a_text_that_all_layers_read_in_the_original(tmp_path, read, pair):
    src, text = read
    config = ConvertConfig(size=0.6, one_shot=True, heal=2)
    with text() as calibration:
        alone = convert(src, tmp_path / "alone", config, calibration=calibration)
    assert alone.plan["parallel"] == 4
    dst = tmp_path / "shared"
    with text() as calibration, Workers(pair.address) as workers:
        # What an earlier run has left need not be read again.
        with pytest.raises(RuntimeError):
            convert(src, dst, config, calibration=calibration, executor=Takes(workers, 1))
        assert len(Journal(dst).shards) == 1
        shared = convert(src, dst, config, calibration=calibration, executor=workers)
    assert tree(dst) == tree(tmp_path / "alone")
    assert [row.layer_error for row in shared.rows] == [row.layer_error for row in alone.rows]
    assert [row.tokens for row in shared.rows] == [row.tokens for row in alone.rows]
    assert len(shared.healed) == len(alone.healed) == 4


def test_all_that_a_layer_reads_is_kept(tmp_path, rng):
    """Whatever a `LayerInput` has, now or later, but for the room, which is the reader's own."""
    x = rng.standard_normal((6, 4), dtype=np.float32)
    given = LayerInput(
        x, np.arange(12).reshape(6, 2) % 3, np.full((6, 2), 0.5, np.float32), "swiglu_clamped",
        lost=x + 1, answers=2 * x, left_out=np.arange(6) == 3, room=None, alpha=1.5, limit=3.25,
        biases=(x[:3, :2], x[3:, :2], x[:3]),
    )  # fmt: skip
    unlike_defaults = [
        field.name for field in fields(given)
        if field.default is not MISSING and getattr(given, field.name) is not field.default
    ]  # fmt: skip
    assert {field.name for field in fields(given) if field.default is not MISSING} == {
        *unlike_defaults, "room"
    }  # fmt: skip
    staging.write_reading(tmp_path / "reading", given)
    found = staging.read_reading(tmp_path / "reading", np.empty)
    assert found.room is np.empty
    for field in fields(given):
        was, now = getattr(given, field.name), getattr(found, field.name)
        if field.name == "biases":
            assert [array.tolist() for array in now] == [array.tolist() for array in was]
        elif isinstance(was, np.ndarray):
            assert (now.dtype, now.tolist()) == (was.dtype, was.tolist())
        elif field.name != "room":
            assert now == was
    bare = LayerInput(given.x, given.index, given.weights)
    staging.write_reading(tmp_path / "reading", bare)
    found = staging.read_reading(tmp_path / "reading", np.empty)
    assert (found.biases, found.lost, found.activation) == (None, None, "silu")


class Takes:
    """An executor that fails after some files."""

    def __init__(self, workers, count):
        self._workers, self._count = workers, count

    def begin(self, work):
        self._workers.begin(work)

    def run(self, work, dst, journal, progress):
        def told(done, total, what):
            if len(journal.shards) == self._count:
                raise RuntimeError("stopped")

        self._workers.run(work, dst, journal, told)


def wait_for_workers(cluster, count):
    with Workers(cluster.address) as workers:
        wait_for(lambda: len(workers._present()) >= count)


# ------------------------------------------------------------------ what may go wrong


def test_a_killed_worker_costs_no_more_than_its_file(tmp_path, source, wanted, slow):
    dst = tmp_path / "dst"
    victim = slow.worker()
    wait_for_workers(slow, 3)

    def kill():
        wait_for(lambda: (dst / WORKERS).exists() and len(apart(dst)) >= 3)
        victim.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    teller = Teller()
    with Workers(slow.address) as workers:
        report = convert(source, dst, CONFIG, executor=workers, watcher=teller)
    killer.join()
    victim.wait()
    assert tree(dst) == wanted
    assert sum("is lost; model-" in what for _, _, what in teller.told) == 1
    assert len(report.workers) == 2


def test_an_interrupted_run_goes_on_here_or_there(tmp_path, source, wanted, slow):
    dst = tmp_path / "dst"
    command = ["convert", str(source), str(dst), *OPTIONS, "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-m", "molae.cli", *command, "--scheduler", slow.address],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    wait_for(lambda: (dst / JOURNAL).exists() and Journal(dst).shards)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the same command goes on" in err
    assert "Traceback" not in err + out
    assert not (dst / WORKERS).exists()
    done = len(Journal(dst).shards)
    assert 1 <= done < LAYERS
    # The workers see that the run is over, and leave nothing behind.
    time.sleep(0.3)
    wait_for(lambda: not apart(dst))
    shutil.copytree(dst, tmp_path / "other")
    slow.set_mood()
    with Workers(slow.address) as workers:
        convert(source, dst, CONFIG, executor=workers)
    assert tree(dst) == wanted
    convert(source, tmp_path / "other", CONFIG)
    assert tree(tmp_path / "other") == wanted
    assert 1 <= len(Report.from_file(tmp_path / "other").workers) <= 2


def test_what_a_killed_client_leaves_is_cleaned_up(tmp_path, source, wanted):
    dst = tmp_path / "dst"
    with pytest.raises(RuntimeError):
        convert(source, dst, CONFIG, executor=Stops())
    name = f"model-00002-of-0000{LAYERS}.safetensors"
    left = [apart_name(name, "0123456789ab", 3), apart_name(name, "0123456789ab", 4) + ".part"]
    for file in left:
        (dst / file).write_bytes(b"left over")
    (dst / WORKERS).write_text("0123456789ab\n")
    convert(source, dst, CONFIG)
    assert tree(dst) == wanted
    # And what only looks like it is not touched.
    (dst / "notes.0123456789ab-3").write_text("mine")
    with pytest.raises(DestinationError, match="notes"):
        convert(source, dst, CONFIG, overwrite=True)


class Stops:
    """An executor that fails after the journal is there."""

    def begin(self, work):
        work.recipe()

    def run(self, work, dst, journal, progress):
        raise RuntimeError("stopped")


def test_a_nan_is_named_as_in_one_process(tmp_path, pair):
    bad = np.full((8, 16), np.nan, np.float32)
    name = "model.layers.1.mlp.experts.2.gate_proj.weight"
    src = make_checkpoint(tmp_path / "src", L=3, E=4, replace={name: bad})
    config = ConvertConfig(size=0.5, group_size=2)
    with (
        Workers(pair.address) as workers,
        pytest.raises(NonFiniteError, match="layer 1.*expert 2|expert 2.*layer 1") as caught,
    ):
        convert(src, tmp_path / "dst", config, executor=workers)
    assert caught.value.__notes__ == [f"on worker {caught.value.__notes__[0].split(' ', 2)[2]}"]
    assert not apart(tmp_path / "dst")
    assert not (tmp_path / "dst" / WORKERS).exists()


# -------------------------------------------------------------------- who is refused


def test_without_a_worker(tmp_path, source, lone):
    if getattr(lone, "has_worker", False):
        pytest.skip("its worker is there already: this test goes before those")
    with (
        Workers(lone.address, timeout=1) as workers,
        pytest.raises(ClusterError, match="no worker that can take part for 1 s; start some: dask"),
    ):
        convert(source, tmp_path / "dst", CONFIG, executor=workers)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("mood", "message"),
    [
        ({"says": {"molae": "0.0.9"}}, r"has molae 0\.0\.9, not .*; install that there"),
        ({"code": "0"}, "another working copy of molae"),
        ({"build": {"isa": "z80"}}, r"other last bits: isa: '\w+' here, 'z80' there"),
        ({"source": "/nowhere"}, r"cannot read the source \(/nowhere: no such folder"),
        ({"source": "COPY"}, r"another source: source.files.model.safetensors.mtime_ns: \d+ here"),
        ({"folder": "/nowhere"}, "does not see the destination .*dst; mount it there"),
    ],
    ids=["version", "code", "isa", "no source", "other source", "no destination"],
)
def test_a_worker_that_cannot_take_part_is_refused(tmp_path, source, moody, mood, message):
    if mood.get("source") == "COPY":
        shutil.copytree(source, tmp_path / "copy")
        os.utime(tmp_path / "copy" / "model.safetensors", (1, 1))
        mood = {"source": str(tmp_path / "copy")}
    moody.set_mood(**mood)
    dst = tmp_path / "dst"
    with (
        Workers(moody.address) as workers,
        pytest.raises(
            ClusterError, match=f"1 of 1 workers cannot .*\n  tcp://.*{message}"
        ) as found,
    ):
        convert(source, dst, CONFIG, executor=workers)
    assert ("--allow-mixed-workers" in str(found.value)) == ("isa" in str(found.value))
    if "folder" in mood:
        assert not apart(dst)
        assert not (dst / WORKERS).exists()
    else:
        assert not dst.exists()


def test_a_worker_with_a_molae_that_knows_nothing_of_this_is_refused(
    tmp_path, source, wanted, moody
):
    """It stays alive, and the others go on once it is gone."""
    older = moody.worker(preload="import sys; sys.modules['molae.cluster.worker'] = None")
    wait_for_workers(moody, 2)
    with Workers(moody.address) as workers:
        with pytest.raises(ClusterError, match=r"1 of 2 .*\n.* cannot run this molae \(ModuleNot"):
            convert(source, tmp_path / "dst", CONFIG, executor=workers)
        assert older.poll() is None
        older.kill()
        older.wait()
        wait_for(lambda: len(workers._present()) == 1)
        convert(source, tmp_path / "dst", CONFIG, executor=workers)
    assert tree(tmp_path / "dst") == wanted


def test_mixed_workers_are_allowed_on_request_and_the_report_says_so(
    tmp_path, source, moody, capsys
):
    moody.set_mood(build={"isa": "z80"})
    dst = tmp_path / "dst"
    given = ("--scheduler", moody.address, "--allow-mixed-workers")
    assert main(["convert", str(source), str(dst), *OPTIONS, *given]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "workers that computed the layers were of several kinds, as was allowed" in out
    assert "1 of 1 differ from where the run was planned: isa: " in out
    assert "were of several kinds" in (dst / "molae-report.html").read_text()
    report = Report.from_file(dst)
    assert report.mixed
    (row,) = report.workers
    assert row.build["isa"] == "z80"
    assert row.differs == [
        f"isa: {molae.show_config('dict')['kernels']['isa']!r} here, 'z80' there"
    ]
    assert row.threads == 3


def test_one_that_comes_late_is_left_out(tmp_path, source, wanted, pair, monkeypatch):
    """A worker that does not fit, and comes when the others are at work, gets none."""
    dst = tmp_path / "dst"
    real = client._why_unfit
    seen = []

    def why_unfit(mine, worker, run, allow_mixed):
        if run is not None and worker.address not in seen:
            seen.append(worker.address)
            if len(seen) == 2:
                return "is not to our taste"
        return real(mine, worker, run, allow_mixed)

    monkeypatch.setattr(client, "_why_unfit", why_unfit)
    teller = Teller()
    with Workers(pair.address) as workers:
        report = convert(source, dst, CONFIG, executor=workers, watcher=teller)
    assert tree(dst) == wanted
    assert [what for _, _, what in teller.told if "gets no work: is not to our taste" in what]
    assert len(report.workers) == 1


def test_no_scheduler_there(tmp_path, source, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    given = ("--scheduler", address, "--scheduler-timeout", "0.5")
    start = time.monotonic()
    assert main(["convert", str(source), str(tmp_path / "dst"), *OPTIONS, *given]) == 1
    assert time.monotonic() - start < 30
    err = capsys.readouterr().err
    assert f"{address}: no scheduler answers within 0.5 s" in err
    assert "dask scheduler --port 8786" in err
    assert not (tmp_path / "dst").exists()


def test_tls_without_certificates():
    with pytest.raises(ClusterError, match="needs certificates; name .*TLS__CLIENT__CERT"):
        Workers("tls://127.0.0.1:1")


def test_a_scheduler_that_has_written_no_file(tmp_path):
    with pytest.raises(ClusterError, match=r"s\.json: no such file for 0\.2 s; start a scheduler"):
        Workers(str(tmp_path / "s.json"), timeout=0.2)


def test_a_scheduler_that_goes_away(tmp_path, source, wanted):
    cluster = Cluster(tmp_path / "cluster")
    dst = tmp_path / "dst"
    try:
        cluster.worker()
        wait_for_workers(cluster, 1)
        cluster.set_mood(slow=0.2)

        def kill():
            wait_for(lambda: (dst / JOURNAL).exists() and Journal(dst).shards)
            cluster.scheduler.kill()

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        with (
            Workers(cluster.address) as workers,
            pytest.raises(ClusterError, match="finished files are kept|Finished files are kept"),
        ):
            convert(source, dst, CONFIG, executor=workers)
        killer.join()
    finally:
        cluster.close()
    assert Journal(dst).shards
    convert(source, dst, CONFIG)
    assert tree(dst) == wanted


@pytest.mark.parametrize(
    "given",
    [("--allow-mixed-workers",), ("--scheduler-timeout", "3")],
    ids=lambda given: given[0],
)
def test_options_that_need_a_scheduler(tmp_path, source, capsys, given):
    assert main(["convert", str(source), str(tmp_path / "dst"), *OPTIONS, *given]) == 2
    assert f"{given[0]}: only with --scheduler" in capsys.readouterr().err


def test_what_is_needed_is_named(monkeypatch, capsys, tmp_path, source):
    # None in sys.modules is how Python says that a module cannot be imported.
    monkeypatch.setitem(sys.modules, "distributed", None)
    given = ("--scheduler", "tcp://127.0.0.1:1")
    assert main(["convert", str(source), str(tmp_path / "dst"), *OPTIONS, *given]) == 1
    assert "pip install 'molae[distributed]'" in capsys.readouterr().err


# ------------------------------------------------------------- one file, in this process


@pytest.fixture
def begun(tmp_path, source):
    """A destination of a run, and how to order its third shard for it."""
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / WORKERS).write_text("0123456789ab\n")
    facts = describe_worker(str(source), str(dst))
    assert facts["run"] == "0123456789ab"
    with open_checkpoint(source) as checkpoint:
        conversion = Conversion(str(source), checkpoint, CONFIG)
        recipe, file = conversion.recipe(), conversion.shards[2].file

    def order(number, **changes):
        path = dst / apart_name(file, "0123456789ab", number)
        given = {
            "run": "0123456789ab", "source": str(source), "facts": facts, "recipe": recipe,
            "number": 2, "file": file, "path": str(path), "staged": None, "threads": 1,
        }  # fmt: skip
        return Order(**given | changes)

    return dst, order


def test_two_who_write_one_shard_do_not_meet(begun, wanted):
    dst, order = begun
    entries = []
    both = [
        threading.Thread(target=lambda n=n: entries.append(write_shard(order(n)))) for n in (1, 2)
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert [entry["sha256"] for entry in entries] == [wanted[entries[0]["file"]]] * 2
    assert len(apart(dst)) == 2
    sweep_apart(dst)
    assert [path.name for path in dst.iterdir()] == [WORKERS]


def test_a_worker_that_nobody_waits_for_leaves_nothing(begun, monkeypatch):
    dst, order = begun
    real = Conversion.compute

    def compute(self, job):
        (dst / WORKERS).write_text("another run\n")
        return real(self, job)

    monkeypatch.setattr(Conversion, "compute", compute)
    with pytest.raises(Unwanted, match="is over"):
        write_shard(order(1))
    assert not apart(dst)
    with pytest.raises(Unwanted):  # nor does it begin
        write_shard(order(2))
    assert not apart(dst)


def test_a_worker_looks_again_before_it_computes(begun, source):
    dst, order = begun
    facts = order(1).facts
    with pytest.raises(Unfit, match="not the process"):
        write_shard(order(1, facts=facts | {"build": {}}))
    with pytest.raises(Unfit, match="another source"):
        write_shard(order(1, facts=facts | {"source": {}}))
    with pytest.raises(Unfit, match="plans model-"):
        write_shard(order(1, file="model-00001-of-00001.safetensors"))
    assert not apart(dst)


def test_a_file_that_workers_are_lost_with_is_given_up(tmp_path, source):
    dst = tmp_path / "dst"
    dst.mkdir()
    with open_checkpoint(source) as checkpoint:
        conversion = Conversion(str(source), checkpoint, CONFIG)
        run = client._Run(conversion, dst, Journal(dst), lambda done, total, what: None)
        for loss in range(client.MOST_LOSSES):
            number = run.pending.popleft()
            assert number == 0
            worker = client._Worker(f"tcp://{loss}", 1, facts={"host": "h"})
            path = dst / apart_name(conversion.shards[0].file, run.name, loss)
            worker.order = number, path
            path.with_name(path.name + ".part").write_bytes(b"half")
            if loss < client.MOST_LOSSES - 1:
                run.lost(worker)
                assert not list(dst.iterdir())
            else:
                with pytest.raises(ClusterError, match=r"3 workers were lost .* tcp://2 \(h\)"):
                    run.lost(worker)


def test_a_file_that_only_the_worker_sees_is_not_taken(tmp_path, source):
    dst = tmp_path / "dst"
    dst.mkdir()
    with open_checkpoint(source) as checkpoint:
        conversion = Conversion(str(source), checkpoint, CONFIG)
        run = client._Run(conversion, dst, Journal(dst), lambda done, total, what: None)
        worker = client._Worker("tcp://a", 1, facts={"host": "h", "build": {}})
        entry = {"file": conversion.shards[0].file, "bytes": 5}
        with pytest.raises(ClusterError, match="let all machines see the same folder"):
            run.take(0, dst / "nothing", entry, worker, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "each layer is fitted to what the converted layers before it hand on.*--one-shot"),
        ({"one_shot": True, "compressed_experts": 1}, "judged by the whole model"),
    ],
)
def test_a_text_is_refused_before_anything_is_done(tmp_path, source, settings, message):
    config = ConvertConfig(size=0.5, **settings)
    with pytest.raises(ArgumentError, match=message):
        convert(source, tmp_path / "dst", config, calibration=object(), executor=Stops())
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("harm", [None, "address", "build"])
def test_a_line_of_a_journal_that_cannot_be_is_not_believed(tmp_path, harm):
    (tmp_path / "x.safetensors").write_bytes(b"abc")
    worker = {
        "address": "tcp://a",
        "host": "h",
        "threads": 1,
        "build": {"isa": "z80"},
        "differs": [],
    }
    if harm is not None:
        worker[harm] = 5
    sha256 = hashlib.sha256(b"abc").hexdigest()
    entry = {
        "file": "x.safetensors", "bytes": 3, "sha256": sha256, "inputs": {}, "rows": [],
        "worker": worker,
    }  # fmt: skip
    journal = Journal(tmp_path)
    journal.start({"files": ["x.safetensors"]})
    journal.add(entry)
    assert dict(Journal(tmp_path).verify()) == {"x.safetensors": harm is None}


def test_a_report_without_workers_is_still_read(tmp_path, source):
    convert(source, tmp_path / "dst", CONFIG)
    path = tmp_path / "dst" / REPORT
    data = json.loads(path.read_text())
    assert data.pop("workers") == []
    path.write_text(json.dumps(data))
    assert Report.from_file(path).workers == ()
