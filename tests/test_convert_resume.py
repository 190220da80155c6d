"""A run that is killed, interrupted or fails goes on where it stopped, to the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import add_companions, make_checkpoint
from converting import REPORT, tree

import molae
from molae import ConvertConfig, convert, materialize
from molae.convert import METHODS, Report
from molae.convert.destination import LOCK
from molae.convert.journal import JOURNAL, Journal, differences
from molae.errors import DestinationError

CONFIG = ConvertConfig(size=0.5, group_size=2)
LAYERS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    src = make_checkpoint(tmp_path_factory.mktemp("resume") / "src", L=LAYERS, E=4, dtype="BF16")
    add_companions(src)
    return src


@pytest.fixture(scope="module")
def wanted(source, tmp_path_factory):
    """The bytes of an uninterrupted run."""
    dst = tmp_path_factory.mktemp("wanted") / "dst"
    convert(source, dst, CONFIG)
    return tree(dst)


# A run in another process that ends itself, or is slow enough to be ended.
PROGRAM = """
import os, signal, sys, time
import molae, molae.cli
from molae.convert import conversion, execution, journal, materialization, pipeline

# A test run in the background of a script inherits an ignored SIGINT; this one must hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)

def at(owner, name, count, when):
    real = getattr(owner, name)
    calls = 0
    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if calls == count and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, call)

def slow(owner, name, seconds):
    real = getattr(owner, name)
    def call(*args, **kwargs):
        time.sleep(seconds)
        return real(*args, **kwargs)
    setattr(owner, name, call)

exec(sys.argv[1])
sys.exit(molae.cli.main(sys.argv[2:]))
"""


def start(prepare, *command):
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, prepare, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
    )


def convert_command(source, dst):
    return ("convert", source, dst, "--size", "0.5", "--group-size", "2", "--quiet")


def killed(prepare, source, dst):
    process = start(prepare, *convert_command(source, dst))
    _, err = process.communicate(timeout=180)
    assert process.returncode == -signal.SIGKILL, err


def wait_for(condition, seconds=90.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)


def without_lock(dst):
    """What a run that was killed on its way out left, but for its empty lock file."""
    return {name: sha for name, sha in tree(dst).items() if name != LOCK}


BOTH = ("before", "after")
MOMENTS = [
    *(f"at(pipeline.ShardWriter, 'finish', {n}, '{w}')" for n in (1, 2, 4) for w in BOTH),
    *(f"at(journal.Journal, 'add', {n}, '{w}')" for n in (1, 4) for w in BOTH),
    *(f"at(journal.Journal, 'start', 1, '{w}')" for w in BOTH),
    *(f"at(pipeline.ShardWriter, 'write', {n}, 'after')" for n in (1, 20)),
    *(f"at(execution, 'write_text_atomic', {n}, '{w}')" for n in (1, 2, 3, 4) for w in BOTH),
    *(f"at(execution, 'copy_file_atomic', {n}, 'after')" for n in (1, 2)),
    "at(journal.Journal, 'remove', 1, 'before')",
    "at(os, 'fsync', 3, 'after')",
    "at(os, 'replace', 2, 'before')",
    "at(os, 'replace', 2, 'after')",
]  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_at_any_step(tmp_path, source, wanted, moment):
    dst = tmp_path / "dst"
    killed(moment, source, dst)
    assert not (dst / REPORT).exists() or (dst / JOURNAL).exists()
    report = convert(source, dst, CONFIG)
    assert tree(dst) == wanted
    assert len(report.rows) == LAYERS * 3
    assert Report.from_file(dst) == report


def test_kill_9_after_the_journal_is_gone_is_a_finished_result(tmp_path, source, wanted):
    dst = tmp_path / "dst"
    killed("at(journal.Journal, 'remove', 1, 'after')", source, dst)
    with pytest.raises(DestinationError, match="finished result"):
        convert(source, dst, CONFIG)
    assert without_lock(dst) == wanted


def test_kill_9_at_random_moments_again_and_again(tmp_path, source, wanted):
    """Each run is killed a random while after it began to write, until one gets through."""
    chance = random.Random(5)
    dst = tmp_path / "dst"
    kills = 0
    for _ in range(30):
        process = start(
            "slow(conversion.Conversion, 'compute', 0.03)", *convert_command(source, dst)
        )
        wait_for(lambda p=process: (dst / JOURNAL).exists() or p.poll() is not None)
        time.sleep(chance.uniform(0, 0.25))
        process.kill()
        process.communicate(timeout=180)
        if process.returncode == 0:
            break
        kills += 1
        if (dst / REPORT).exists() and not (dst / JOURNAL).exists():
            break  # killed after all was done, on its way out
    else:
        convert(source, dst, CONFIG)
    assert kills >= 1
    assert without_lock(dst) == wanted


def test_finished_shards_are_not_computed_again(tmp_path, source, wanted, monkeypatch):
    dst = tmp_path / "dst"
    killed("at(journal.Journal, 'add', 2, 'after')", source, dst)
    computed = []
    method = METHODS["latent"]

    def fit(*args):
        computed.append(args)
        return method.fit(*args)

    monkeypatch.setitem(METHODS, "latent", type(method)(**{**vars(method), "fit": fit}))
    convert(source, dst, CONFIG)
    assert len(computed) == (LAYERS - 2) * 3
    assert tree(dst) == wanted


def test_a_run_that_overwrites_goes_on_too(tmp_path, source, wanted, monkeypatch):
    """The old result is gone at the first try; the second does not begin again."""
    dst = tmp_path / "dst"
    convert(source, dst, ConvertConfig(size=0.3))
    process = start(
        "at(journal.Journal, 'add', 2, 'after')", *convert_command(source, dst), "--overwrite"
    )
    process.communicate(timeout=180)
    assert process.returncode == -signal.SIGKILL
    started = []
    monkeypatch.setattr(Journal, "start", lambda self, header: started.append(header))
    convert(source, dst, CONFIG, overwrite=True)
    assert not started
    assert tree(dst) == wanted


def test_kill_9_while_the_old_result_is_removed(tmp_path, source, wanted):
    """What is left still says whose it is, so the same command gets through."""
    dst = tmp_path / "dst"
    for count in (1, 3, 8):
        convert(source, dst, ConvertConfig(size=0.3), overwrite=True)
        process = start(
            f"import pathlib; at(pathlib.Path, 'unlink', {count}, 'after')",
            *convert_command(source, dst), "--overwrite",
        )  # fmt: skip
        process.communicate(timeout=180)
        assert process.returncode == -signal.SIGKILL
        with pytest.raises(DestinationError, match="finished result"):
            convert(source, dst, CONFIG)
        convert(source, dst, CONFIG, overwrite=True)
        assert tree(dst) == wanted


@pytest.mark.parametrize("harm", ["truncated", "changed", "removed"])
def test_a_finished_shard_that_was_harmed_is_made_again(tmp_path, source, wanted, harm):
    dst = tmp_path / "dst"
    killed("at(journal.Journal, 'add', 3, 'after')", source, dst)
    shard = dst / f"model-00002-of-0000{LAYERS}.safetensors"
    data = bytearray(shard.read_bytes())
    if harm == "removed":
        shard.unlink()
    else:
        data[-1] ^= 1
        shard.write_bytes(data if harm == "changed" else data[:-1])
    convert(source, dst, CONFIG)
    assert tree(dst) == wanted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_the_same_command_goes_on(tmp_path, source, wanted, number):
    dst = tmp_path / "dst"
    process = start("slow(conversion.Conversion, 'compute', 0.1)", *convert_command(source, dst))
    wait_for(lambda: (dst / JOURNAL).exists() and Journal(dst).shards)
    process.send_signal(number)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 130
    assert "the same command goes on" in err
    assert "Traceback" not in err + out
    left = {path.name for path in dst.iterdir()}
    assert JOURNAL in left
    assert not [name for name in left if name.endswith(".part")]
    done = len(Journal(dst).shards)
    assert 1 <= done < LAYERS
    second = subprocess.run(
        [sys.executable, "-m", "molae.cli", *map(str, convert_command(source, dst)[:-1])],
        capture_output=True, text=True, timeout=180, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert second.returncode == 0, second.stderr
    assert f"Going on: {done} finished files are kept" in second.stderr
    assert tree(dst) == wanted


def test_two_runs_on_one_destination(tmp_path, source, wanted):
    dst = tmp_path / "dst"
    first = start("slow(conversion.Conversion, 'compute', 0.1)", *convert_command(source, dst))
    wait_for(lambda: (dst / JOURNAL).exists())
    second = start("", *convert_command(source, dst))
    _, err = second.communicate(timeout=180)
    assert second.returncode == 1
    assert "another run is writing there" in err
    _, err = first.communicate(timeout=180)
    assert first.returncode == 0, err
    assert tree(dst) == wanted


def test_the_lock_goes_with_a_killed_run(tmp_path, source, wanted):
    dst = tmp_path / "dst"
    killed("at(journal.Journal, 'add', 1, 'after')", source, dst)
    convert(source, dst, CONFIG)
    assert tree(dst) == wanted


# ------------------------------------------------------------- what must be the same


@pytest.fixture
def half(tmp_path, source):
    """A destination with two of four shards."""
    dst = tmp_path / "half"
    killed("at(journal.Journal, 'add', 2, 'after')", source, dst)
    return dst


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (ConvertConfig(size=0.6, group_size=2), "settings.size: 0.5 then, 0.6 now"),
        (ConvertConfig(size=0.5, group_size=4), "settings.group_size: 2 then, 4 now"),
        (ConvertConfig(method="molae", size=0.9), "settings.method: 'latent' then, 'molae' now"),
    ],
)
def test_other_settings_on_a_half_finished_run(half, source, config, named):
    before = tree(half)
    with pytest.raises(DestinationError) as caught:
        convert(source, half, config)
    assert named in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert tree(half) == {name: sha for name, sha in before.items() if name != LOCK}
    convert(source, half, config, overwrite=True)
    assert Report.from_file(half).settings == config.to_dict()


def test_a_source_that_changed_meanwhile(half, source, tmp_path, wanted):
    other = make_checkpoint(tmp_path / "other", L=LAYERS, E=4, dtype="BF16", seed=1)
    add_companions(other)
    with pytest.raises(DestinationError, match=r"differs: source\."):
        convert(other, half, CONFIG)
    convert(source, half, CONFIG)
    assert tree(half) == wanted


@pytest.mark.parametrize("key", ["molae", "build"])
def test_another_version_or_build(half, source, key):
    path = half / JOURNAL
    lines = path.read_text().splitlines(keepends=True)
    header = json.loads(lines[0])
    header[key] = "0.0.9" if key == "molae" else header[key] | {"blas_core": "Prescott"}
    path.write_text(json.dumps(header) + "\n" + "".join(lines[1:]))
    with pytest.raises(DestinationError, match="differs") as caught:
        convert(source, half, CONFIG)
    assert ("build.blas_core" if key == "build" else "molae: '0.0.9'") in str(caught.value)


def test_a_materialization_does_not_go_on_with_a_conversion(half, source, tmp_path):
    converted = tmp_path / "converted"
    convert(source, converted, CONFIG)
    with pytest.raises(DestinationError, match="kind: 'convert' then, 'materialize' now"):
        materialize(converted, half)


def test_another_number_of_threads_may_go_on(half, source, wanted):
    with molae.num_threads(1):
        convert(source, half, CONFIG)
    assert tree(half) == wanted


# ----------------------------------------------------------------------- the journal


def journal_of(folder: Path, text: str) -> Journal:
    (folder / JOURNAL).write_text(text)
    return Journal(folder)


def test_a_torn_last_line_is_ignored_and_written_over(tmp_path):
    whole = '{"a": 1}\n{"file": "x", "bytes": 1}\n'
    for torn in ('{"file": "y", "by', '{"file": "y"}', "\0\0\0\n", '["file"]\n'):
        journal = journal_of(tmp_path, whole + torn)
        assert journal.header == {"a": 1}
        assert list(journal.shards) == ["x"]
        journal.add({"file": "z"})
        text = (tmp_path / JOURNAL).read_text()
        assert text.startswith(whole)
        assert text.count("\n") == 3
        assert json.loads(text.splitlines()[2])["file"] == "z"
        assert list(Journal(tmp_path).shards) == ["x", "z"]


def test_a_torn_first_line_is_no_journal(tmp_path, source, wanted):
    assert journal_of(tmp_path, '{"a": ').header is None
    convert(source, tmp_path, CONFIG)
    assert tree(tmp_path) == wanted


def test_differences_are_named_by_their_path():
    old = {"a": {"b": 1, "c": 2}, "d": 3}
    assert differences(old, old) == []
    assert differences(old, {"a": {"b": 1, "c": 4}, "e": 5}) == [
        "a.c: 2 then, 4 now",
        "d: 3 then, None now",
        "e: None then, 5 now",
    ]


def test_verify_sees_a_changed_byte(tmp_path):
    """The check that resuming rests on rejects a wrong answer."""
    (tmp_path / "x").write_bytes(b"abc")
    journal = journal_of(tmp_path, '{"a": 1}\n')
    journal.add(
        {
            "file": "x",
            "bytes": 3,
            "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            "inputs": {},
            "rows": [],
        }
    )
    assert dict(journal.verify()) == {"x": True}
    (tmp_path / "x").write_bytes(b"xyz")
    assert dict(journal.verify()) == {"x": False}
    (tmp_path / "x").unlink()
    assert dict(journal.verify()) == {"x": False}
