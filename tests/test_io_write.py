"""Writing: what is under its own name is whole, and a disk that refuses is named."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import struct
import subprocess
import sys
import textwrap
import threading

import ml_dtypes
import numpy as np
import pytest
from checkpoints import library_types
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from molae.errors import ArgumentError, CheckpointError, DestinationError
from molae.io import (
    DTYPES,
    ShardWriter,
    TensorSpec,
    copy_file_atomic,
    plan_bytes,
    write_text_atomic,
)

SPECS = (
    TensorSpec("half", "F16", (3, 5)),
    TensorSpec("perm", "I32", (7,)),
    TensorSpec("brain", "BF16", (2, 3, 4)),
    TensorSpec("none", "F32", (0, 4)),
    TensorSpec("byte", "U8", (3,)),
    TensorSpec("scalar", "F64", ()),
)


def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "half": rng.standard_normal((3, 5)).astype(np.float16),
        "perm": rng.permutation(7).astype(np.int32),
        "brain": rng.standard_normal((2, 3, 4)).astype(ml_dtypes.bfloat16),
        "none": np.empty((0, 4), np.float32),
        "byte": np.array([1, 2, 3], np.uint8),
        "scalar": np.float64(0.1).reshape(()),
    }


def write_all(path, arrays, specs=SPECS) -> str:
    with ShardWriter(path, specs) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
        return writer.finish()


def one(path, n=4) -> ShardWriter:
    return ShardWriter(path, [TensorSpec("a", "F32", (n,))])


def test_the_library_reads_what_was_written(tmp_path):
    path, arrays = tmp_path / "x.safetensors", values()
    digest = write_all(path, dict(reversed(arrays.items())))
    raw = path.read_bytes()
    assert digest == hashlib.sha256(raw).hexdigest()
    assert len(raw) == plan_bytes(SPECS)
    assert os.listdir(tmp_path) == ["x.safetensors"]
    got = load_file(path)
    assert got.keys() == arrays.keys()
    for name, array in arrays.items():
        assert got[name].dtype == array.dtype
        assert got[name].shape == array.shape
        assert got[name].tobytes() == array.tobytes()
    with safe_open(path, "np") as f:
        assert f.metadata() == {"format": "pt"}


def test_torch_reads_what_was_written(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    path, arrays = tmp_path / "x.safetensors", values()
    write_all(path, arrays)
    got = load_torch(path)
    assert got["brain"].dtype == torch.bfloat16
    assert got["brain"].float().numpy().tolist() == arrays["brain"].astype(np.float32).tolist()


def test_the_order_in_the_file_keeps_tensors_aligned(tmp_path):
    path = tmp_path / "x.safetensors"
    write_all(path, values())
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + n])
    assert n % 8 == 0
    assert list(header) == ["__metadata__", "scalar", "perm", "none", "half", "brain", "byte"]
    for spec in SPECS:
        begin = 8 + n + header[spec.name]["data_offsets"][0]
        assert begin % DTYPES[spec.dtype].itemsize == 0


def test_bytes_do_not_depend_on_the_order_of_writing(tmp_path):
    arrays = values()
    first = write_all(tmp_path / "a", arrays)
    assert first == write_all(tmp_path / "b", dict(reversed(arrays.items())))


def test_bytes_are_taken_as_they_are(tmp_path):
    path = tmp_path / "x.safetensors"
    fp8 = TensorSpec("fp8", "F8_E4M3", (2, 2))
    fp4 = TensorSpec("fp4", "F4", (3, 2))
    with ShardWriter(path, [fp8, fp4]) as writer:
        writer.write("fp8", bytearray(b"\x80\xff\x00\x7f"))
        writer.write("fp4", memoryview(b"abc"))
        writer.finish()
    assert path.read_bytes()[-7:] == b"\x80\xff\x00\x7fabc"


def test_any_memory_order(tmp_path):
    base = np.arange(4 * 6 * 10, dtype=np.float32).reshape(4, 6, 10)
    views = {
        "fortran": np.asfortranarray(base),
        "slice": base[:, 1:4],
        "steps": base[::2, :, ::3],
        "transposed": base.transpose(2, 0, 1),
        "negative": base[:, ::-1],
        "vector": base[1, 2, ::2],
    }
    specs = [TensorSpec(n, "F32", v.shape) for n, v in views.items()]
    write_all(tmp_path / "x", views, specs)
    got = load_file(tmp_path / "x")
    for name, view in views.items():
        np.testing.assert_array_equal(got[name], view)


def test_a_stack_is_written_without_stacking(tmp_path):
    base = np.arange(5 * 4 * 3, dtype=np.float16).reshape(5, 4, 3)
    with ShardWriter(tmp_path / "x", [TensorSpec("a", "F16", (5, 2, 3))]) as writer:
        writer.write_stack("a", [m[1:3] for m in base])
        writer.finish()
    np.testing.assert_array_equal(load_file(tmp_path / "x")["a"], base[:, 1:3])


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real, calls = os.pwrite, []

    def stingy(fd, data, offset):
        calls.append(len(data))
        return real(fd, data[:3], offset)

    monkeypatch.setattr(os, "pwrite", stingy)
    arrays = values()
    write_all(tmp_path / "x", arrays)
    assert load_file(tmp_path / "x")["brain"].tobytes() == arrays["brain"].tobytes()
    assert len(calls) > 50


def test_many_threads(tmp_path):
    arrays = {f"t{i}": np.full((50, 40), i, np.float32) for i in range(64)}
    specs = [TensorSpec(n, "F32", a.shape) for n, a in arrays.items()]
    with ShardWriter(tmp_path / "x", specs) as writer:
        names = list(arrays)
        workers = [
            threading.Thread(target=lambda s=s: [writer.write(n, arrays[n]) for n in names[s::8]])
            for s in range(8)
        ]
        for w in workers:
            w.start()
        for w in workers:
            w.join()
        writer.finish()
    got = load_file(tmp_path / "x")
    assert all((got[n] == arrays[n]).all() for n in arrays)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(library_types()), st.lists(st.integers(0, 4).map(lambda n: 2 * n))
        ),
        max_size=5,
    )
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_plan_gives_a_file_that_the_library_takes(tmp_path_factory, plan):
    path = tmp_path_factory.mktemp("plan") / "x"
    # The library wants whole bytes a tensor.
    specs = [TensorSpec(f"ü{i}", d, (*shape[:3], 4)) for i, (d, shape) in enumerate(plan)]
    with ShardWriter(path, specs) as writer:
        for s in specs:
            writer.write(s.name, bytes(s.nbytes))
        writer.finish()
    assert path.stat().st_size == plan_bytes(specs)
    with safe_open(path, "np") as f:
        assert set(f.keys()) == {s.name for s in specs}


# -------------------------------------------------------------- wrong use


def test_wrong_data_is_refused(tmp_path):
    with one(tmp_path / "x") as writer:
        with pytest.raises(ArgumentError, match=r"b: not planned for x"):
            writer.write("b", b"")
        with pytest.raises(ArgumentError, match=r"a: expected type F32, got float64"):
            writer.write("a", np.zeros(4))
        with pytest.raises(ArgumentError, match=r"a: expected type F32, got >f4"):
            writer.write("a", np.zeros(4, ">f4"))
        with pytest.raises(ArgumentError, match=r"a: expected shape \(4,\), got \(2, 2\)"):
            writer.write("a", np.zeros((2, 2), np.float32))
        with pytest.raises(ArgumentError, match="a: expected 16 bytes, got 15"):
            writer.write("a", bytes(15))
        with pytest.raises(ArgumentError, match=r"a: got 1 arrays for shape \[4\]"):
            writer.write_stack("a", [np.zeros(4, np.float32)])
        writer.write("a", bytes(16))
        with pytest.raises(ArgumentError, match="a: written twice"):
            writer.write("a", bytes(16))
        writer.finish()
        with pytest.raises(ArgumentError, match="x: the writer is finished"):
            writer.write("a", bytes(16))
        with pytest.raises(ArgumentError, match="x: the writer is finished"):
            writer.finish()


def test_wrong_plans_are_refused(tmp_path):
    a = TensorSpec("a", "F32", (1,))
    for specs, text in (
        ([a, a], "a: planned twice"),
        ([TensorSpec("a", "F7", (1,))], "a: unknown dtype 'F7'"),
        ([TensorSpec("a", "F32", (-1,))], "a: negative size"),
        ([TensorSpec("__metadata__", "F32", (1,))], "planned twice"),
    ):
        with pytest.raises(ArgumentError, match=text):
            ShardWriter(tmp_path / "x", specs)
        with pytest.raises(ArgumentError, match=text):
            plan_bytes(specs)
    assert os.listdir(tmp_path) == []


def test_a_file_with_a_tensor_missing_is_never_finished(tmp_path):
    writer = ShardWriter(tmp_path / "x", SPECS)
    writer.write("half", values()["half"])
    with pytest.raises(ArgumentError, match=r"x: 4 tensors not written, first perm"):
        writer.finish()
    assert os.listdir(tmp_path) == ["x.part"]
    writer.abort()
    assert os.listdir(tmp_path) == []
    writer.abort()
    with pytest.raises(ArgumentError, match="the writer is aborted"):
        writer.write("perm", values()["perm"])


def test_leaving_the_block_removes_the_part(tmp_path):
    (tmp_path / "x").write_text("the old one")
    with pytest.raises(KeyboardInterrupt), one(tmp_path / "x") as writer:
        writer.write("a", bytes(16))
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "the old one"


def test_an_interrupted_tensor_is_written_again(tmp_path, monkeypatch):
    real = os.pwrite

    def interrupt(*args):
        monkeypatch.setattr(os, "pwrite", real)
        raise KeyboardInterrupt

    with one(tmp_path / "x") as writer:
        monkeypatch.setattr(os, "pwrite", interrupt)
        with pytest.raises(KeyboardInterrupt):
            writer.write("a", bytes(16))
        with pytest.raises(ArgumentError, match="not written"):
            writer.finish()
        writer.write("a", np.ones(4, np.float32))
        writer.finish()
    assert load_file(tmp_path / "x")["a"].tolist() == [1, 1, 1, 1]


def test_a_stale_part_is_written_over(tmp_path):
    (tmp_path / "x.part").write_bytes(b"old" * 1000)
    with one(tmp_path / "x") as writer:
        writer.write("a", bytes(16))
        writer.finish()
    assert load_file(tmp_path / "x")["a"].tolist() == [0, 0, 0, 0]


def test_a_link_in_place_of_the_part_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "x.part").symlink_to("precious")
    with pytest.raises(DestinationError):
        one(tmp_path / "x")
    with pytest.raises(DestinationError):
        write_text_atomic(tmp_path / "x", "text")
    assert (tmp_path / "precious").read_text() == "precious"


def test_kill_9_leaves_a_part_or_the_whole_file(tmp_path):
    code = textwrap.dedent(
        """
        import os, signal, sys
        import numpy as np
        from molae.io import ShardWriter, TensorSpec
        step, path = int(sys.argv[1]), sys.argv[2]
        w = ShardWriter(path, [TensorSpec("a", "F32", (1000,)), TensorSpec("b", "F32", (9,))])
        def at(n):
            if step == n:
                os.kill(os.getpid(), signal.SIGKILL)
        at(0)
        w.write("a", np.zeros(1000, np.float32)); at(1)
        w.write("b", np.ones(9, np.float32)); at(2)
        replace, fsync = os.replace, os.fsync
        def os_replace(*a):
            at(3); replace(*a); at(4)
        os.replace = os_replace
        w.finish()
        """
    )
    for step in range(5):
        path = tmp_path / f"{step}"
        done = subprocess.run([sys.executable, "-c", code, str(step), str(path)])
        assert done.returncode == -9
        assert path.exists() == (step == 4)
        if path.exists():
            assert load_file(path)["b"].tolist() == [1] * 9
        else:
            assert path.with_name(f"{step}.part").exists()


# ------------------------------------------------------- disks that refuse


def raising(code, real, *, after=0):
    """A system call that fails with an error code at the call number `after`."""
    calls = iter(range(10_000))

    def call(*args, **kwargs):
        if next(calls) >= after:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    return call


REMEDIES = {
    errno.ENOSPC: "free space and run the same command again",
    errno.EDQUOT: "free space and run the same command again",
    errno.EROFS: "choose a destination on a file system that can be written to",
    errno.EACCES: "give write permission on the folder",
    errno.EIO: "check the disk and run the same command again",
    errno.EFBIG: "choose a destination on another file system",
}


def check_message(error: DestinationError, code: int, name: str, size: int) -> None:
    text = str(error)
    assert name in text
    assert REMEDIES[code] in text
    assert error.errno == code
    assert isinstance(error, OSError)
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert f"{size} bytes" in text


@pytest.mark.parametrize("code", REMEDIES)
@pytest.mark.parametrize("call", ["pwrite", "fsync", "pread", "replace", "open"])
def test_a_disk_that_refuses(tmp_path, monkeypatch, code, call):
    path, arrays = tmp_path / "x.safetensors", values()
    path.write_text("the old one")
    # The header and two tensors are written before the disk is full in the middle.
    after = 3 if call == "pwrite" else 0
    monkeypatch.setattr(os, call, raising(code, getattr(os, call), after=after))
    with pytest.raises(DestinationError) as caught:
        write_all(path, arrays)
    monkeypatch.undo()
    check_message(caught.value, code, str(path), plan_bytes(SPECS))
    assert path.read_text() == "the old one"
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_what_is_renamed_is_durable_and_the_name_too(tmp_path, monkeypatch):
    order = []

    def noted(call, what):
        def noting(*args):
            order.append(what(*args))
            return call(*args)

        return noting

    def kind(fd):
        return "sync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "sync file"

    monkeypatch.setattr(os, "fsync", noted(os.fsync, kind))
    monkeypatch.setattr(os, "replace", noted(os.replace, lambda *a: "rename"))
    write_all(tmp_path / "x", values())
    write_text_atomic(tmp_path / "y", "text")
    copy_file_atomic(tmp_path / "y", tmp_path / "z")
    assert order == ["sync file", "rename", "sync folder"] * 3


def test_a_file_system_that_cannot_sync_a_folder(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    write_all(tmp_path / "x", values())
    assert load_file(tmp_path / "x").keys() == values().keys()


def test_a_disk_full_at_the_header(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", raising(errno.ENOSPC, os.pwrite))
    with pytest.raises(DestinationError, match="disk is full"):
        one(tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_a_write_of_nothing_is_no_endless_loop(tmp_path, monkeypatch):
    with one(tmp_path / "x") as writer:
        monkeypatch.setattr(os, "pwrite", lambda *a: 0)
        with pytest.raises(DestinationError, match="wrote nothing"):
            writer.write("a", bytes(16))


def test_other_threads_stop_when_the_disk_is_full(tmp_path, monkeypatch):
    """The descriptor stays open until the last writer left: its number must not be reused."""
    real, entered, go = os.pwrite, threading.Event(), threading.Event()
    results: list[int] = []

    def pwrite(fd, data, offset):
        if bytes(data[:1]) == b"s":
            entered.set()
            assert go.wait(10)
            results.append(os.fstat(fd).st_nlink)  # would raise on a closed descriptor
            return real(fd, data, offset)
        raise OSError(errno.ENOSPC, "full")

    specs = [TensorSpec("slow", "U8", (1,)), TensorSpec("full", "U8", (1,))]
    writer = ShardWriter(tmp_path / "x", specs)
    monkeypatch.setattr(os, "pwrite", pwrite)
    slow = threading.Thread(target=lambda: writer.write("slow", b"s"))
    slow.start()
    assert entered.wait(10)
    with pytest.raises(DestinationError):
        writer.write("full", b"f")
    assert os.listdir(tmp_path) == []
    fd = writer._fd
    os.fstat(fd)
    go.set()
    slow.join()
    assert results == [0]  # the same file, removed but open
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DestinationError, match=r"nowhere/x: cannot be written: .*make the folder"):
        one(tmp_path / "nowhere" / "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(DestinationError, match="give write permission"):
            one(tmp_path / "x")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_device_that_is_really_full():
    """No mock: the kernel itself says that there is no space."""
    from molae.io.writer import destination_error, write_all

    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="No space") as caught:
            write_all(fd, b"x")
    finally:
        os.close(fd)
    from pathlib import Path

    check_message(destination_error(caught.value, Path("/dev/x"), 5), errno.ENOSPC, "/dev/x", 5)


# --------------------------------------------------------- texts and copies


def test_text_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_text_atomic(path, "eins ü\n")
    assert path.read_bytes() == "eins ü\n".encode()
    for call in ("write", "fsync", "replace", "open"):
        for code in REMEDIES:
            monkeypatch.setattr(os, call, raising(code, getattr(os, call)))
            with pytest.raises(DestinationError) as caught:
                write_text_atomic(path, "zwei")
            monkeypatch.undo()
            check_message(caught.value, code, str(path), 4)
            assert path.read_text("utf-8") == "eins ü\n"
            assert os.listdir(tmp_path) == ["config.json"]
    write_text_atomic(path, "zwei")
    assert path.read_text() == "zwei"


def test_a_copy_is_whole(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    content = os.urandom(3_000_000)
    source.write_bytes(content)
    (tmp_path / "link").symlink_to("source")
    copy_file_atomic(tmp_path / "link", target)
    assert target.read_bytes() == content
    assert not target.is_symlink()
    source.write_bytes(b"new")
    monkeypatch.setattr(os, "write", raising(errno.ENOSPC, os.write))
    with pytest.raises(DestinationError, match="target: .*the file needs 3 bytes"):
        copy_file_atomic(source, target)
    monkeypatch.undo()
    assert target.read_bytes() == content
    with pytest.raises(CheckpointError, match="nothing: cannot be read"):
        copy_file_atomic(tmp_path / "nothing", target)
    with pytest.raises(CheckpointError, match="cannot be read"):
        copy_file_atomic(tmp_path, target)
    assert target.read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["link", "source", "target"]
