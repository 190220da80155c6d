"""Temporary files: there is room for them, or the error says where there is none."""

import errno

import pytest

from molae.errors import ArgumentError
from molae.io.scratch import scratch_array, scratch_folder


def test_a_folder_goes_with_what_is_in_it(tmp_path):
    with scratch_folder("x-", tmp_path) as folder:
        array = scratch_array(folder / "a", (3, 4))
        array[:] = 1.0
        assert (folder / "a").stat().st_size == 48
        again = scratch_array(folder / "a", (2,))
        assert again.tolist() == [0.0, 0.0]
        assert (array == 1.0).all()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path):
    with pytest.raises(ArgumentError, match="gone: no temporary files can be made here: No such"):
        scratch_folder("x-", tmp_path / "gone").__enter__()


def refuse(*args, **options):
    raise PermissionError(errno.EACCES, "refused")


def test_a_folder_that_cannot_be_removed_hides_no_other_trouble(tmp_path, monkeypatch):
    """The standard library's own temporary folder ends in a RecursionError there."""
    with pytest.raises(ValueError, match="the trouble"), scratch_folder("x-", tmp_path) as folder:
        (folder / "a").touch()
        monkeypatch.setattr("os.unlink", refuse)
        monkeypatch.setattr("os.rmdir", refuse)
        raise ValueError("the trouble")


@pytest.mark.parametrize("call", ["os.posix_fallocate", "numpy.memmap"])
def test_no_room(tmp_path, monkeypatch, call):
    monkeypatch.setattr(call, refuse)
    with (
        scratch_folder("x-", tmp_path) as folder,
        pytest.raises(ArgumentError, match=f"0.0 GB of temporary files in {tmp_path}: refused"),
    ):
        scratch_array(folder / "a", (1 << 20,))


def test_room_is_taken_before_it_is_written_to(tmp_path):
    """A file with holes would end the process where the disk is full."""
    with scratch_folder("x-", tmp_path) as folder:
        scratch_array(folder / "a", (1 << 16,))
        assert (folder / "a").stat().st_blocks * 512 >= 4 << 16
