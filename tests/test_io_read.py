"""Reading checkpoints: right bytes, no copies, and every damaged file refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    NUMPY,
    library_types,
    make_checkpoint,
    make_config,
    make_tensors,
    write_index,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from molae.errors import CheckpointError, MolaeError
from molae.io import DTYPES, dtype_name, natural_key, numpy_dtype, open_checkpoint
from molae.io.header import read_header

INDEX = "model.safetensors.index.json"
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write_raw(path: Path, header: object, data: bytes, length: int | None = None) -> Path:
    """A safetensors file by hand; `length` is a false length of the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    n = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", n) + text + data)
    return path


def refused(path: Path, *parts: str) -> str:
    """The message with which a checkpoint is refused; it must hold all parts."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    for part in parts:
        assert part in text, text
    return text


# ------------------------------------------------------------------- reading


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_those_that_the_library_reads(tmp_path, dtype, shards):
    make_checkpoint(tmp_path, dtype=dtype, shards=shards)
    with open_checkpoint(str(tmp_path)) as checkpoint:
        assert checkpoint.is_sharded == (shards > 1)
        assert len(checkpoint.files) == shards
        seen = set()
        for file in checkpoint.files:
            for name, wanted in load_file(tmp_path / file).items():
                seen.add(name)
                info, got = checkpoint.tensors[name], checkpoint.array(name)
                assert (info.file, info.dtype, info.shape) == (file, dtype, wanted.shape)
                assert info.nbytes == wanted.nbytes
                assert info.size == wanted.size
                assert got.dtype == wanted.dtype
                np.testing.assert_array_equal(got, wanted)
                assert bytes(checkpoint.raw(name)) == wanted.tobytes()
        assert list(checkpoint.tensors) == sorted(seen, key=natural_key)
        assert checkpoint.nbytes == sum(t.nbytes for t in checkpoint.tensors.values())
        assert checkpoint.config["model_type"] == "olmoe"


def test_arrays_are_read_only_views_of_the_file(tmp_path):
    make_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    a, b = (checkpoint.array("lm_head.weight") for _ in range(2))
    assert not a.flags.writeable
    assert not a.flags.owndata
    assert checkpoint.raw("lm_head.weight").readonly
    assert np.shares_memory(a, b)
    base = a
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap)


def test_views_outlive_the_checkpoint(tmp_path):
    make_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    view, wanted = (
        checkpoint.array("model.norm.weight"),
        checkpoint.array("model.norm.weight").copy(),
    )
    checkpoint.close()
    np.testing.assert_array_equal(view, wanted)
    with pytest.raises(CheckpointError, match="closed; open it again"):
        checkpoint.array("model.norm.weight")


def test_mapped_weights_are_no_anonymous_memory(tmp_path):
    big = np.ones((64, 1 << 18), np.float32)  # 64 MB
    make_checkpoint(tmp_path, replace={"big": big})
    del big
    checkpoint = open_checkpoint(tmp_path)

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024

    before = anonymous()
    assert sum(float(row.sum()) for row in checkpoint.array("big")) == 64 * (1 << 18)
    assert anonymous() - before < 8 << 20


def test_every_type_of_the_format(tmp_path):
    header, data = {}, b""
    types = {name: DTYPES[name] for name in library_types()}
    assert {"BOOL", "U8", "I64", "F16", "BF16", "F32", "F64", "F8_E4M3"} <= types.keys()
    for dtype in types.values():
        n = dtype.nbytes(8)
        entry = {"dtype": dtype.name, "shape": [2, 4], "data_offsets": [len(data), len(data) + n]}
        header[dtype.name] = entry
        data += bytes(range(1, n + 1))
    make_checkpoint(tmp_path)
    write_raw(tmp_path / "model.safetensors", header, data)
    checkpoint = open_checkpoint(tmp_path)
    for name, dtype in types.items():
        info = checkpoint.tensors[name]
        assert bytes(checkpoint.raw(name)) == bytes(range(1, info.nbytes + 1))
        if dtype.numpy is None:
            with pytest.raises(CheckpointError, match="only be copied"):
                checkpoint.array(name)
        else:
            assert checkpoint.array(name).shape == (2, 4)
            assert dtype_name(checkpoint.array(name).dtype) == name
            assert dtype.itemsize * 8 == dtype.bits


def test_numpy_types_have_the_right_meaning():
    assert numpy_dtype("BF16") == ml_dtypes.bfloat16
    assert np.array([0x3F80], "<u2").view(numpy_dtype("BF16"))[0] == 1
    assert np.array([0x38], "u1").view(numpy_dtype("F8_E4M3"))[0] == 1
    assert dtype_name(np.float64) == "F64"
    with pytest.raises(CheckpointError, match=r"'F7' is unknown; known are .*BF16"):
        numpy_dtype("F7")
    with pytest.raises(CheckpointError, match="cannot be stored"):
        dtype_name(np.dtype(">f4"))


def test_scalars_empty_tensors_and_misaligned_ones(tmp_path):
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "empty": {"dtype": "F32", "shape": [0, 3], "data_offsets": [1, 1]},
        "odd": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [9, 13]},
    }
    make_checkpoint(tmp_path)
    data = b"\7" + np.array([1.5, -2, 3], np.float32).tobytes()
    write_raw(tmp_path / "model.safetensors", header, data)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.array("empty").shape == (0, 3)
    assert checkpoint.array("scalar")[()] == 3
    assert checkpoint.array("odd").tolist() == [1.5, -2]
    assert checkpoint.array("byte").tolist() == [7]


def test_natural_order():
    names = ["layers.10.a", "layers.2.b", "layers.2.a", "layers.02.a", "a", "layers", "9" * 5000]
    assert sorted(names, key=natural_key) == [
        "9" * 5000, "a", "layers", "layers.02.a", "layers.2.a", "layers.2.b", "layers.10.a",
    ]  # fmt: skip


@given(st.lists(st.text("ab.019٣", max_size=6)))
def test_natural_order_compares_anything(names):
    backwards = names[::-1]
    assert sorted(names, key=natural_key) == sorted(backwards, key=natural_key)


def test_companions(tmp_path):
    source = tmp_path / "source"
    make_checkpoint(source, shards=2)
    kept = ["LICENSE", "README.md", "generation_config.json", "tokenizer.json", "merges.txt"]
    for name in [
        *kept, "pytorch_model.bin", "pytorch_model.bin.index.json", "x.gguf", "tf_model.h5",
        "model.onnx", "flax.msgpack", "consolidated.00.pth", "consolidated.safetensors.index.json",
        "stale.safetensors", ".gitattributes", "model-9.safetensors.part", "rng.pt",
    ]:  # fmt: skip
        (source / name).write_text(name)
    (source / "original").mkdir()
    (source / "original" / "params.json").write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("x")
    (source / "original" / "blob").write_text("linked")
    (source / "vocab.json").symlink_to("original/blob")
    (source / "dangling.json").symlink_to("../nothing")
    found = {p.relative_to(source).as_posix() for p in open_checkpoint(source).companions()}
    assert found == {*kept, "vocab.json", "additional_chat_templates/rag.jinja"}


def test_shards_may_be_links_as_in_a_hub_cache(tmp_path):
    real = make_checkpoint(tmp_path / "blobs", shards=2)
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in real.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert open_checkpoint(snapshot).tensors.keys() == open_checkpoint(real).tensors.keys()


def test_fingerprint_tells_changes(tmp_path):
    make_checkpoint(tmp_path, shards=2)
    first = open_checkpoint(tmp_path).fingerprint()
    assert first == open_checkpoint(tmp_path).fingerprint()
    assert json.loads(json.dumps(first)) == first
    config = (tmp_path / "config.json").read_bytes()
    assert first["config"] == hashlib.sha256(config).hexdigest()
    file = tmp_path / open_checkpoint(tmp_path).files[0]
    os.utime(file, ns=(1, 1))
    touched = open_checkpoint(tmp_path).fingerprint()
    assert touched != first
    facts = touched["files"][file.name]
    assert facts["mtime_ns"] == 1
    assert facts["size"] == file.stat().st_size
    raw = file.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    assert facts["header_sha256"] == hashlib.sha256(raw[8 : 8 + n]).hexdigest()


def test_a_tensor_the_index_does_not_list_is_read(tmp_path):
    make_checkpoint(tmp_path, shards=2)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["lm_head.weight"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "lm_head.weight" in open_checkpoint(tmp_path).tensors


def test_an_index_of_the_single_file_is_no_conflict(tmp_path):
    make_checkpoint(tmp_path)
    tensors = open_checkpoint(tmp_path).tensors
    write_index(tmp_path, dict.fromkeys(tensors, "model.safetensors"))
    assert open_checkpoint(tmp_path).tensors == tensors


# ----------------------------------------------------------- damaged folders


def test_no_folder(tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "no such folder", "hub id")


def test_a_file_instead_of_a_folder(tmp_path):
    make_checkpoint(tmp_path)
    refused(tmp_path / "model.safetensors", "not a folder", "config.json")


def test_no_config(tmp_path):
    make_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "no config.json", "the checkpoint's own folder?")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", "[" * 100_000])
def test_a_config_that_is_no_json_object(tmp_path, text):
    make_checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path, "config.json", "again")


def test_no_weights(tmp_path):
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin", "save_pretrained")
    (tmp_path / "pytorch_model.bin").unlink()
    refused(tmp_path, "no model.safetensors")


def test_shards_without_index(tmp_path):
    make_checkpoint(tmp_path, shards=2)
    (tmp_path / INDEX).unlink()
    refused(tmp_path, "model-00001-of-00002.safetensors", f"without {INDEX}", "copy the index")


def test_single_file_and_an_index_of_others(tmp_path):
    make_checkpoint(tmp_path, shards=2)
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(tmp_path, "both model.safetensors and", "remove the one")


def test_a_missing_shard(tmp_path):
    make_checkpoint(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, "model-00002-of-00003.safetensors", "missing", "download the file again")


def test_an_index_that_names_an_absent_tensor(tmp_path):
    make_checkpoint(tmp_path, shards=2)
    index = json.loads((tmp_path / INDEX).read_text())
    file = "model-00001-of-00002.safetensors"
    index["weight_map"]["model.ghost.weight"] = file
    (tmp_path / INDEX).write_text(json.dumps(index))
    refused(tmp_path, "model.ghost.weight", file, "does not hold it", "download them again")


def test_an_index_that_names_the_wrong_shard(tmp_path):
    make_checkpoint(tmp_path, shards=2)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    right = index["weight_map"]["lm_head.weight"]
    wrong = next(f for f in files if f != right)
    index["weight_map"]["lm_head.weight"] = wrong
    (tmp_path / INDEX).write_text(json.dumps(index))
    refused(tmp_path, f"lm_head.weight in {wrong}", f"it is in {right}")


def test_a_tensor_in_two_shards(tmp_path):
    make_checkpoint(tmp_path, shards=2)
    file = tmp_path / "model-00001-of-00002.safetensors"
    other = load_file(tmp_path / "model-00002-of-00002.safetensors")
    name = sorted(other)[0]
    save_file(load_file(file) | {name: other[name]}, file)
    refused(tmp_path, name, file.name, "model-00002-of-00002.safetensors", "two shards")


@pytest.mark.parametrize(
    "entry",
    ["../model.safetensors", "/etc/passwd.safetensors", "a/../../b.safetensors",
     "..\\x.safetensors", "a\0.safetensors", "", "."],
)  # fmt: skip
def test_an_index_entry_that_leads_out_of_the_folder(tmp_path, entry):
    make_checkpoint(tmp_path / "x", shards=2)
    make_checkpoint(tmp_path)
    index = json.loads((tmp_path / "x" / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = entry
    (tmp_path / "x" / INDEX).write_text(json.dumps(index))
    refused(tmp_path / "x", repr(entry), "leads out of the folder", "trust its source")


def test_an_index_of_other_formats(tmp_path):
    make_checkpoint(tmp_path, shards=2)
    write_index(tmp_path, {"lm_head.weight": "pytorch_model.bin"})
    refused(tmp_path, "pytorch_model.bin", "save_pretrained")


@pytest.mark.parametrize(
    "text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "nonsense"]
)
def test_an_index_without_a_map(tmp_path, text):
    make_checkpoint(tmp_path, shards=2)
    (tmp_path / INDEX).write_text(text)
    refused(tmp_path, INDEX, "download it again")


def test_an_empty_index(tmp_path):
    make_checkpoint(tmp_path, shards=2)
    (tmp_path / INDEX).write_text('{"weight_map": {}}')
    refused(tmp_path, "is empty")


def test_an_index_with_a_name_twice(tmp_path):
    make_checkpoint(tmp_path, shards=2)
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    refused(tmp_path, INDEX, "'a' twice", "keep one")


# ------------------------------------------------------------- damaged files


def test_a_truncated_shard(tmp_path):
    make_checkpoint(tmp_path, shards=2)
    file = tmp_path / "model-00002-of-00002.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    refused(tmp_path, file.name, "truncated", f"promises {size} bytes, it has {size - 1}", "again")
    os.truncate(file, 100)
    refused(tmp_path, file.name, "truncated", "the header claims", "again")
    os.truncate(file, 5)
    refused(tmp_path, file.name, "has 5 bytes", "again")
    os.truncate(file, 0)
    refused(tmp_path, file.name, "is empty", "again")


def test_a_shard_with_bytes_too_many(tmp_path):
    make_checkpoint(tmp_path)
    with open(tmp_path / "model.safetensors", "ab") as f:
        f.write(b"xyz")
    refused(tmp_path, "model.safetensors", "3 bytes more")


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"garbage", bytes(8)),
        (b"\xff\xfe", bytes(8)),
        (b"[]", b""),
        (b"[" * 5000, bytes(8)),
        ({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8)),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8)),
        ({"a": {"dtype": "F32", "shape": [2 ** 62, 8], "data_offsets": [0, 8]}}, bytes(8)),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)),
        ({"a": F32, "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)),
        ({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, bytes(8)),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
        ({"a": 1}, bytes(8)),
        ({"__metadata__": {"x": 1}, "a": F32}, bytes(8)),
    ],
)  # fmt: skip
def test_a_header_that_is_not_valid(tmp_path, header, data):
    make_checkpoint(tmp_path)
    write_raw(tmp_path / "model.safetensors", header, data)
    refused(tmp_path, "model.safetensors", "again")


def test_a_header_with_a_tensor_twice(tmp_path):
    make_checkpoint(tmp_path)
    one = json.dumps(F32)
    write_raw(tmp_path / "model.safetensors", f'{{"a": {one}, "a": {one}}}'.encode(), bytes(8))
    refused(tmp_path, "model.safetensors", "'a' twice", "write the file anew")


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 100_000_001, 1 << 20, 70])
def test_a_false_header_length_is_refused_before_anything_is_read(tmp_path, length, monkeypatch):
    make_checkpoint(tmp_path)
    write_raw(tmp_path / "model.safetensors", {"a": F32}, bytes(8), length)
    # The last length is one byte too long.
    assert (tmp_path / "model.safetensors").stat().st_size == 8 + 69
    monkeypatch.setattr("molae.io.header.safe_open", None)  # must not come so far
    refused(tmp_path, "model.safetensors", f"claims {length} bytes", "again")


def test_a_folder_in_place_of_a_file(tmp_path):
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path, "model.safetensors", "cannot be read")


def test_a_file_that_changes_while_it_is_open(tmp_path):
    make_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 1000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: changed since"):
        checkpoint.array("lm_head.weight")


def test_an_unknown_tensor(tmp_path):
    make_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"ghost: no such tensor in"):
        open_checkpoint(tmp_path).array("ghost")


@pytest.fixture(scope="module")
def sound_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    tensors = make_tensors(make_config("olmoe", L=1, E=2), dtype="F16")
    save_file(dict(list(tensors.items())[-6:]), path, {"format": "pt"})
    return path


@given(data=st.data())
@settings(
    max_examples=400,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_mutated_files_never_give_another_error(sound_file, data):
    raw = bytearray(sound_file.read_bytes())
    header_end = 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, min(header_end, len(raw)) - 1)))
        kind = data.draw(st.sampled_from(["set", "delete", "insert", "cut"]))
        piece = data.draw(
            st.binary(min_size=1, max_size=6)
            | st.sampled_from([b"9", b"-", b"0", b"null", b'"', b"[", b"{}", b"1e9", b"F64", b","])
        )
        if kind == "set":
            raw[at : at + len(piece)] = piece
        elif kind == "delete":
            del raw[at : at + len(piece)]
        elif kind == "insert":
            raw[at:at] = piece
        else:
            del raw[at:]
    fix = data.draw(st.booleans())  # else the length field would hide most damage
    if fix and len(raw) > 8:
        grown = len(raw) - sound_file.stat().st_size
        raw[:8] = struct.pack("<Q", max(0, header_end - 8 + grown))
    path = sound_file.with_name("mutant.safetensors")
    path.write_bytes(raw)
    try:
        header = read_header(path, path.name)
    except MolaeError as e:
        assert path.name in str(e)  # noqa: PT017 (accepting the file is right too)
        return
    end = len(raw) - sum(t.nbytes for t in header.tensors)
    for info in sorted(
        header.tensors, key=lambda t: (t.offset, t.nbytes)
    ):  # accepted: then the tensors tile the data
        assert info.offset == end
        end += info.nbytes
    assert end == len(raw)


# ----------------------------------------------------------------------- hub


class _Hub:
    """A stand-in for huggingface_hub."""

    def __init__(self, monkeypatch, answer):
        import types

        self.asked: list[tuple] = []
        package, errors = types.ModuleType("huggingface_hub"), types.ModuleType("errors")

        class LocalEntryNotFoundError(FileNotFoundError):
            pass

        class HfHubHTTPError(OSError):
            pass

        errors.LocalEntryNotFoundError = LocalEntryNotFoundError
        errors.HfHubHTTPError = HfHubHTTPError

        def snapshot_download(*args, **kwargs):
            self.asked.append((args, kwargs))
            if isinstance(answer, str):
                raise {"offline": LocalEntryNotFoundError, "refuses": HfHubHTTPError}[answer](
                    "401\nx"
                )
            return str(answer)

        package.snapshot_download = snapshot_download
        monkeypatch.setitem(sys.modules, "huggingface_hub", package)
        monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)


def test_a_hub_id_is_fetched(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "cache")
    hub = _Hub(monkeypatch, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("org/name").path == tmp_path / "cache"
    ((args, kwargs),) = hub.asked
    assert args == ("org/name",)
    assert {"*.bin", "*.gguf", "original/*"} <= set(kwargs["ignore_patterns"])


def test_a_folder_wins_over_the_hub(tmp_path, monkeypatch):
    hub = _Hub(monkeypatch, "offline")
    make_checkpoint(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert "lm_head.weight" in open_checkpoint("org/name").tensors
    assert hub.asked == []


def test_a_hub_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _Hub(monkeypatch, "offline")
    refused(Path("org/name"), "org/name", "cannot be reached", "go online")
    _Hub(monkeypatch, "refuses")
    refused(Path("org/name"), "org/name", "refuses", "401", "log in")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(Path("org/name"), "org/name", "pip install huggingface_hub")


def test_what_is_no_hub_id_is_not_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = _Hub(monkeypatch, "offline")
    for text in ("a/b/c", "/a/b", "../b", "name", "./a", "a/..b"):
        refused(text, "no such folder")
    assert hub.asked == []


def test_the_real_hub_library_offline(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    import huggingface_hub.constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    refused("org/name", "org/name", "cannot be reached", "local copy")
