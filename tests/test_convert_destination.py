"""Where a result may go, and what happens when the disk says no."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from converting import tree

from molae import ConvertConfig, convert, materialize
from molae.convert import destination
from molae.convert.destination import LOCK, check_apart, locked
from molae.convert.journal import JOURNAL
from molae.errors import DestinationError, MolaeError

CONFIG = ConvertConfig(size=0.5, group_size=2)


@pytest.fixture
def source(tmp_path):
    return make_checkpoint(tmp_path / "src", L=3)


def test_source_and_destination_must_lie_apart(tmp_path, source):
    before = tree(source)
    link = tmp_path / "link"
    link.symlink_to(source, target_is_directory=True)
    for dst, text in (
        (source, "is the source itself"),
        (link, "is the source itself"),
        (source / "out", "lies inside the source"),
        (link / "a" / "b", "lies inside the source"),
        (tmp_path, "holds the source"),
        (tmp_path / "x" / "..", "holds the source"),
    ):
        with pytest.raises(DestinationError, match=text):
            convert(source, dst, CONFIG)
        with pytest.raises(DestinationError, match=text):
            convert(source, dst, CONFIG, overwrite=True)
    assert tree(source) == before
    check_apart(source, tmp_path / "src2")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "model-00001-of-00003.safetensors", "a/b/c", ".x"])
def test_files_of_others_are_never_touched(tmp_path, source, name, overwrite):
    dst = tmp_path / "dst"
    (dst / name).parent.mkdir(parents=True)
    (dst / name).write_text("mine")
    with pytest.raises(DestinationError, match="molae did not write") as caught:
        convert(source, dst, CONFIG, overwrite=overwrite)
    assert name in str(caught.value)
    assert (dst / name).read_text() == "mine"
    assert [p for p in dst.rglob("*") if p.is_file()] == [dst / name]


def test_an_empty_folder_and_a_folder_to_be_made_are_taken(tmp_path, source):
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty", CONFIG)
    convert(source, tmp_path / "a" / "b", CONFIG)
    assert tree(tmp_path / "empty") == tree(tmp_path / "a" / "b")
    assert not (tmp_path / "empty" / LOCK).exists()
    assert not (tmp_path / "empty" / JOURNAL).exists()


def test_a_finished_result_is_replaced_only_when_asked(tmp_path, source):
    dst = tmp_path / "dst"
    convert(source, dst, CONFIG)
    before = tree(dst)
    with pytest.raises(DestinationError, match="--overwrite"):
        convert(source, dst, ConvertConfig(size=0.3))
    assert tree(dst) == before
    convert(source, dst, ConvertConfig(size=0.3), overwrite=True)
    assert tree(dst) != before
    materialize(tmp_path / "dst", tmp_path / "back")
    convert(source, tmp_path / "back", CONFIG, overwrite=True)
    assert tree(tmp_path / "back") == before


def test_overwriting_keeps_files_added_by_others(tmp_path, source):
    dst = tmp_path / "dst"
    convert(source, dst, CONFIG)
    (dst / "notes.txt").write_text("mine")
    before = tree(dst)
    with pytest.raises(DestinationError, match=r"notes\.txt"):
        convert(source, dst, CONFIG, overwrite=True)
    assert tree(dst) == before


def test_overwriting_is_refused_before_anything_is_removed(tmp_path, source):
    dst = tmp_path / "dst"
    convert(source, dst, CONFIG)
    before = tree(dst)
    with pytest.raises(MolaeError):
        convert(source, dst, ConvertConfig(size=0.0001), overwrite=True)
    assert tree(dst) == before


def test_a_report_cannot_name_files_outside(tmp_path, source):
    """What is removed is only ever what lies in the folder."""
    dst = tmp_path / "dst"
    convert(source, dst, CONFIG)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    report = dst / "molae-report.json"
    report.write_text(report.read_text().replace('"config.json": {', '"../victim": {'))
    with pytest.raises(DestinationError, match=r"config\.json"):
        convert(source, dst, CONFIG, overwrite=True)
    assert victim.read_text() == "mine"


def test_a_file_in_the_place_of_the_folder(tmp_path, source):
    (tmp_path / "dst").write_text("mine")
    with pytest.raises(DestinationError, match="is a file"):
        convert(source, tmp_path / "dst", CONFIG)
    with pytest.raises(DestinationError, match="cannot be written"):
        convert(source, tmp_path / "dst" / "deeper", CONFIG)


# ---------------------------------------------------------------------------- the disk


def test_a_disk_too_small_is_refused_before_the_work(tmp_path, source, monkeypatch):
    small = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(destination.shutil, "disk_usage", lambda path: small)
    with pytest.raises(DestinationError, match=r"needs [\d,]+ bytes and 1,000 are free"):
        convert(source, tmp_path / "dst", CONFIG)
    assert list((tmp_path / "dst").iterdir()) == []


def test_files_to_be_replaced_count_as_free(tmp_path, source, monkeypatch):
    dst = tmp_path / "dst"
    convert(source, dst, CONFIG)
    before = tree(dst)
    size = sum(path.stat().st_size for path in dst.iterdir())
    monkeypatch.setattr(
        destination.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(size, size, 0)
    )
    convert(source, dst, CONFIG, overwrite=True)
    assert tree(dst) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", [1, 9, 40])
def test_a_disk_that_fails_in_the_middle(tmp_path, source, monkeypatch, code, call):
    convert(source, tmp_path / "wanted", CONFIG)
    real, calls = os.pwrite, 0

    def pwrite(*args):
        nonlocal calls
        calls += 1
        if calls >= call:
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(os, "pwrite", pwrite)
    dst = tmp_path / "dst"
    with pytest.raises(DestinationError) as caught:
        convert(source, dst, CONFIG)
    assert caught.value.errno == code
    assert "model-0000" in str(caught.value)
    names = {path.name for path in dst.iterdir()}
    assert JOURNAL in names
    assert not [name for name in names if name.endswith(".part")]
    monkeypatch.setattr(os, "pwrite", real)
    convert(source, dst, CONFIG)
    assert tree(dst) == tree(tmp_path / "wanted")


@pytest.mark.parametrize("name", ["config.json", "README.md", "molae-report.json"])
def test_a_disk_that_fills_up_at_the_small_files(tmp_path, source, monkeypatch, name):
    convert(source, tmp_path / "wanted", CONFIG)
    real = os.replace

    def replace(src, dst):
        if Path(dst).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(src, dst)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(DestinationError, match="disk is full") as caught:
        convert(source, tmp_path / "dst", CONFIG)
    assert name in str(caught.value)
    monkeypatch.setattr(os, "replace", real)
    convert(source, tmp_path / "dst", CONFIG)
    assert tree(tmp_path / "dst") == tree(tmp_path / "wanted")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path, source):
    dst = tmp_path / "dst"
    dst.mkdir(mode=0o555)
    with pytest.raises(DestinationError, match="choose a folder"):
        convert(source, dst, CONFIG)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_file_system_that_is_read_only(tmp_path, source, monkeypatch, code):
    real = os.open

    def refuse(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(code, os.strerror(code), path)
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DestinationError, match="cannot be written to") as caught:
        convert(source, tmp_path / "dst", CONFIG)
    assert str(tmp_path / "dst") in str(caught.value)
    assert "choose a folder" in str(caught.value)


def test_a_place_where_no_folder_can_be_made(source):
    with pytest.raises(DestinationError, match="cannot be written to"):
        convert(source, "/proc/molae-result", CONFIG)


# ---------------------------------------------------------------------------- the lock


def test_the_lock_is_held_and_given_back(tmp_path):
    with locked(tmp_path):
        with pytest.raises(DestinationError, match="another run"), locked(tmp_path):
            raise AssertionError("never here")
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()
    with locked(tmp_path):
        pass


def test_a_lock_file_left_behind_is_no_lock(tmp_path):
    (tmp_path / LOCK).touch()
    with locked(tmp_path):
        pass


def test_a_lock_on_a_removed_file_does_not_count(tmp_path, monkeypatch):
    """The holder removes the file as it leaves: whoever opened that one has to look again."""
    real, removed = destination.fcntl.flock, []

    def flock(descriptor, how):
        if not removed:
            removed.append(True)
            (tmp_path / LOCK).unlink()
        return real(descriptor, how)

    monkeypatch.setattr(destination.fcntl, "flock", flock)
    with locked(tmp_path):
        assert (tmp_path / LOCK).exists()
        with pytest.raises(DestinationError), locked(tmp_path):
            raise AssertionError("never here")
