"""The command: exit codes, messages, tables, JSON."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from checkpoints import make_checkpoint
from converting import source_matrices, tensors, tree

import molae
from molae import cli
from molae.config import ConvertConfig
from molae.convert import Report, convert


@pytest.fixture
def source(tmp_path):
    return make_checkpoint(tmp_path / "src", E=8)


@pytest.fixture
def run(capsys):
    """Run the command here; gives exit code, standard output and standard error."""

    def run(*argv):
        try:
            code = cli.main([str(arg) for arg in argv])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


def process(*argv, **options):
    return subprocess.run(
        [sys.executable, "-m", "molae.cli", *map(str, argv)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        timeout=120,
        check=False,
        **options,
    )


# ------------------------------------------------------------------------------- usage


def test_version(run):
    assert run("--version") == (0, f"molae {molae.__version__}\n", "")


def test_version_needs_no_heavy_modules():
    code = (
        "import sys; from molae import cli\n"
        "try: cli.main(['--version'])\n"
        "except SystemExit: pass\n"
        "heavy = {'rich', 'torch', 'transformers', 'safetensors', 'ml_dtypes'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_without_a_command_it_says_what_there_is(run):
    code, out, err = run()
    assert code == 2
    assert out == ""
    for command in ("inspect", "convert", "materialize", "demo"):
        assert command in err


@pytest.mark.parametrize(
    "argv",
    [
        ("unknown",),
        ("convert",),
        ("convert", "SRC"),
        ("materialize", "SRC"),
        ("convert", "SRC", "DST", "--size", "half"),
        ("convert", "SRC", "DST", "--size", "0"),
        ("convert", "SRC", "DST", "--size", "1.5"),
        ("convert", "SRC", "DST", "--size", "nan"),
        ("convert", "SRC", "DST", "--rank", "0"),
        ("convert", "SRC", "DST", "--group-size", "several"),
        ("convert", "SRC", "DST", "--group-size", "gate=x"),
        ("convert", "SRC", "DST", "--group-size", "router=2"),
        ("convert", "SRC", "DST", "--threads", "0"),
        ("inspect", "SRC", "--no-such-option"),
    ],
)
def test_bad_usage_is_exit_code_2(run, source, tmp_path, argv):
    argv = [{"SRC": source, "DST": tmp_path / "dst"}.get(arg, arg) for arg in argv]
    code, out, err = run(*argv)
    assert code == 2
    assert err
    assert out == ""
    assert not (tmp_path / "dst").exists()


def test_help_shows_the_texts_of_the_settings(run):
    code, out, _ = run("convert", "--help")
    assert code == 0
    assert "Share of the experts' numbers to keep" in " ".join(out.split())


# ---------------------------------------------------------------------------- failures


def test_a_failure_is_one_clean_line_and_exit_code_1(run, source, tmp_path):
    for argv, text in (
        (("inspect", tmp_path / "nowhere"), "no such folder"),
        (("convert", tmp_path / "nowhere", tmp_path / "dst"), "no such folder"),
        (("convert", source, tmp_path / "dst", "--size", "0.0001"), "smallest size"),
        (("convert", source, tmp_path / "dst", "--method", "magic"), "known are latent"),
        (("convert", source, source / "dst"), "inside the source"),
        (("materialize", source, tmp_path / "dst"), "an ordinary checkpoint"),
        (("inspect", source, "--arch", tmp_path / "no.json"), "cannot be read"),
    ):
        code, out, err = run(*argv)
        assert code == 1, argv
        assert out == ""
        assert err.startswith("molae: ")
        assert text in err
        assert err.count("\n") == 1
        assert "Traceback" not in err


def test_debug_shows_where_it_came_from(run, tmp_path, monkeypatch):
    with pytest.raises(molae.errors.CheckpointError):
        cli.main(["inspect", str(tmp_path / "nowhere"), "--debug"])
    monkeypatch.setenv("MOLAE_DEBUG", "1")
    with pytest.raises(molae.errors.CheckpointError):
        cli.main(["inspect", str(tmp_path / "nowhere")])


def test_a_failure_of_ours_is_told_as_such(run, source, monkeypatch):
    def broken(args):
        raise RuntimeError("what now")

    monkeypatch.setattr(cli, "_inspect", broken)
    code, _, err = run("inspect", source)
    assert (code, err) == (1, "molae: RuntimeError: what now (--debug shows where)\n")

    def full(args):
        raise MemoryError

    monkeypatch.setattr(cli, "_inspect", full)
    assert "not enough memory" in run("inspect", source)[2]


def test_interrupted_is_exit_code_130(run, source, tmp_path, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_convert", interrupted)
    code, _, err = run("convert", source, tmp_path / "dst")
    assert code == 130
    assert "the same command goes on" in err


def test_a_reader_that_goes_away_is_no_traceback(source):
    read, write = os.pipe()
    os.close(read)
    done = process("inspect", source, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    done = process("inspect", source, "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0


# ---------------------------------------------------------------------------- commands


def test_convert_and_materialize(run, source, tmp_path):
    code, out, err = run("convert", source, tmp_path / "dst", "--size", "0.5")
    assert code == 0
    for text in ("asked 0.5", "reached 0.4", "gate_proj", "FLOPs a token", "peak memory", "taken"):
        assert text in out
    assert f"Written to {tmp_path / 'dst'}" in out
    assert "Traceback" not in err
    code, out, _ = run("materialize", tmp_path / "dst", tmp_path / "back")
    assert code == 0
    assert "full size" in out
    assert tensors(tmp_path / "back").keys() == tensors(source).keys()


def test_options_reach_the_settings(run, source, tmp_path):
    code, _, _ = run(
        "convert", source, tmp_path / "dst", "--method", "molae", "--rank", "4",
        "--group-size", "gate=4,up=8", "--quiet",
    )  # fmt: skip
    assert code == 0
    settings = Report.from_file(tmp_path / "dst").settings
    assert ConvertConfig.from_dict(settings) == ConvertConfig(
        method="molae", rank=4, group_size={"gate_proj": 4, "up_proj": 8}
    )


def test_the_command_and_the_function_make_the_same(run, source, tmp_path):
    run("convert", source, tmp_path / "one", "--size", "0.6", "--threads", "1")
    convert(source, tmp_path / "two", ConvertConfig(size=0.6))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_threads_are_set_for_the_run_only(run, source, tmp_path, monkeypatch):
    seen = []
    real = cli._convert

    def convert_here(args):
        seen.append(molae.get_num_threads())
        real(args)

    monkeypatch.setattr(cli, "_convert", convert_here)
    before = molae.get_num_threads()
    run("convert", source, "--dry-run", "--threads", "3")
    assert seen == [3]
    assert molae.get_num_threads() == before


def test_quiet_prints_nothing(run, source, tmp_path):
    assert run("convert", source, tmp_path / "dst", "--quiet") == (0, "", "")
    code, out, err = run("convert", source, tmp_path / "dst", "--quiet")
    assert (code, out) == (1, "")
    assert "--overwrite" in err
    assert run("convert", source, tmp_path / "dst", "--quiet", "--overwrite") == (0, "", "")


def test_dry_run_writes_nothing(run, source, tmp_path):
    code, out, _ = run("convert", source, tmp_path / "dst", "--dry-run")
    assert code == 0
    assert "about" in out
    assert not (tmp_path / "dst").exists()
    code, out, _ = run("convert", source, "--dry-run", "--method", "molae", "--size", "0.9")
    assert "more operations than before" in out
    code, out, _ = run("convert", source, "--dry-run", "--size", "1.0")
    assert "Nothing would be saved" in out


def test_a_plan_as_json(run, source):
    code, out, err = run("convert", source, "--dry-run", "--size", "0.5", "--json")
    plan = json.loads(out)
    assert (code, err) == (0, "")
    assert plan["size_reached"] <= 0.5 == plan["size_asked"]
    dense = 2 * 3 * 8 * 8 * 16
    assert plan["before"]["expert_numbers"] == dense
    assert plan["after"]["expert_numbers"] == plan["size_reached"] * dense
    parts = plan["after"]["numbers"]["down_proj"]
    assert set(parts) == {"shared", "private", "perm", "dense"}
    assert (
        plan["after"]["flops_per_token"] / plan["before"]["flops_per_token"]
        == (plan["flops_ratio"])
    )
    for key in ("memory_bytes", "disk_bytes", "seconds"):
        assert plan[key] > 0


def test_a_report_as_json_is_the_file(run, source, tmp_path):
    code, out, _ = run("convert", source, tmp_path / "dst", "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "dst" / "molae-report.json").read_text())


def test_inspect_an_ordinary_checkpoint(run, source):
    code, out, _ = run("inspect", source, "--json")
    found = json.loads(out)
    own = tensors(source)
    experts = sum(a.size for n, a in own.items() if ".experts." in n)
    total = sum(a.size for a in own.values())
    assert code == 0
    assert found["letters"] == {"L": 2, "E": 8, "K": 2, "D": 16, "F": 8}
    assert found["total_parameters"] == total
    assert found["expert_parameters"] == experts
    assert found["active_parameters"] == total - experts + experts * 2 // 8
    assert found["bytes"] == sum(a.nbytes for a in own.values())
    assert found["shapes"]["down_proj"] == [16, 8]
    assert found["converted"] is False
    code, out, _ = run("inspect", source)
    assert code == 0
    assert f"{total:,}" in out
    assert "E=8" in out


def test_inspect_a_converted_checkpoint(run, source, tmp_path):
    run("convert", source, tmp_path / "dst", "--size", "0.5", "--group-size", "4", "--quiet")
    code, out, _ = run("inspect", tmp_path / "dst")
    assert code == 0
    assert "2 groups of 4" in out
    assert "method latent, gauge form" in out
    found = json.loads(run("inspect", tmp_path / "dst", "--json")[1])
    assert found["converted"] is True
    assert found["factored"]["layers"]["1"]["up_proj"]["groups"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert found["expert_parameters"] == sum(
        a.size
        for n, a in tensors(tmp_path / "dst").items()
        if ".experts." in n and not n.endswith(".perm")
    )


def test_a_weight_that_is_not_finite_is_named_on_the_command_line(run, tmp_path):
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    src = make_checkpoint(tmp_path / "src")
    W = source_matrices(src, 1, "down_proj")[3].copy()
    W[0, 0] = np.nan
    make_checkpoint(src, replace={name: W})
    code, _, err = run("convert", src, tmp_path / "dst", "--size", "0.5", "--group-size", "2")
    assert code == 1
    assert f"{name}: NaN or Inf" in err
    assert "expert 3 of layer 1" in err


def test_progress_bars_are_for_terminals_only(source, tmp_path):
    """On a terminal there are bars on standard error; elsewhere plain lines, and few."""
    plain = process("convert", source, tmp_path / "plain", capture_output=True, text=True)
    assert plain.returncode == 0
    assert "\x1b" not in plain.stdout + plain.stderr
    leader, follower = os.openpty()
    shown = process("convert", source, tmp_path / "bars", stdout=subprocess.PIPE, stderr=follower)
    os.close(follower)
    assert shown.returncode == 0
    text = b""
    try:
        while block := os.read(leader, 65536):
            text += block
    except OSError:  # the end of a terminal that nobody holds
        pass
    os.close(leader)
    assert b"\x1b[" in text
    assert b"layer 0 gate_proj" in text or b"model-00001" in text
