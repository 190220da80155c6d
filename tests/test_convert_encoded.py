"""Sources in FP8: the result is that of the BF16 checkpoint they stand for, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from converting import bits, read_json, tensors, tree
from encoded import fp8_config, fp8_pair, fp8_tensors

from molae import ConvertConfig
from molae.arch import describe
from molae.convert import convert, inspect, materialize, plan
from molae.errors import CheckpointError, NonFiniteError
from molae.io import open_checkpoint


def same_weights(one: Path, other: Path) -> None:
    first, second = tensors(one), tensors(other)
    assert list(first) == list(second)
    for name, array in first.items():
        assert bits(array) == bits(second[name]), name


def write(path: Path, config, stored) -> Path:
    return write_checkpoint(path / "src", config, stored)


# ------------------------------------------------------------------- reading


def test_an_encoded_checkpoint_is_seen_as_what_it_stands_for(tmp_path):
    fp8, bf16 = fp8_pair(tmp_path)
    with open_checkpoint(fp8) as one, open_checkpoint(bf16) as other:
        assert one.encoding == "fp8"
        assert other.encoding is None
        assert list(one.tensors) == list(other.tensors)
        assert one.nbytes == other.nbytes
        assert one.stored_nbytes < other.stored_nbytes == other.nbytes
        for name, info in other.tensors.items():
            seen = one.tensors[name]
            assert (seen.dtype, seen.shape, seen.nbytes) == (info.dtype, info.shape, info.nbytes)
            assert bits(one.array(name)) == bits(other.array(name))
            assert one.stored_size(name) == sum(piece.nbytes for piece in one.stored(name))
        encoded = next(name for name in one.tensors if one.is_encoded(name))
        with pytest.raises(CheckpointError, match="encoded"):
            one.raw(encoded)


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_matrices_are_decoded_one_at_a_time(tmp_path, monkeypatch, layout):
    fp8, bf16 = fp8_pair(tmp_path, "qwen2_moe", layout)
    with open_checkpoint(fp8) as one, open_checkpoint(bf16) as other:
        model, plain = describe(one), describe(other)
        assert model.dtype == "BF16"
        assert not model.is_mapped(one.encoding)
        assert plain.is_mapped(other.encoding)
        for kind in ("gate_proj", "up_proj", "down_proj"):
            wanted = plain.matrices(other, 1, kind)
            found = model.matrices(one, 1, kind)
            assert len(found) == len(wanted)
            for a, b in zip(found, wanted, strict=True):
                assert a.flags.c_contiguous
                assert bits(a) == bits(b)
            assert bits(found[1:3][1]) == bits(wanted[2])
        made = []
        decoded = type(one)._decoded

        def counted(self, *what):
            made.append(what)
            return decoded(self, *what)

        monkeypatch.setattr(type(one), "_decoded", counted)
        matrices = model.matrices(one, 1, "down_proj")
        assert made == []
        assert matrices[2].shape == model.shape("down_proj")
        assert len(made) == 1


# ---------------------------------------------------------------- conversion


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize(("method", "size"), [("latent", 0.8), ("molae", 0.84)])
def test_converted_as_the_ordinary_one(tmp_path, layout, method, size):
    fp8, bf16 = fp8_pair(tmp_path, layout=layout)
    settings = ConvertConfig(method=method, size=size)
    report = convert(fp8, tmp_path / "a", settings)
    other = convert(bf16, tmp_path / "b", settings)
    same_weights(tmp_path / "a", tmp_path / "b")
    quant = read_json(tmp_path / "a" / "config.json")["quantization_config"]
    assert quant == read_json(tmp_path / "b" / "config.json")["quantization_config"]
    assert quant["quant_method"] == "molae"
    assert report.plan["encoding"] == "fp8"
    assert other.plan["encoding"] is None
    assert report.plan["before"] == other.plan["before"]
    assert "FP8" in (tmp_path / "a" / "README.md").read_text()
    materialize(tmp_path / "a", tmp_path / "whole")
    materialize(tmp_path / "b", tmp_path / "other")
    same_weights(tmp_path / "whole", tmp_path / "other")
    config = read_json(tmp_path / "whole" / "config.json")
    assert "quantization_config" not in config
    assert inspect(tmp_path / "whole").encoding is None


def test_a_size_of_1_is_a_plain_decoding(tmp_path):
    fp8, bf16 = fp8_pair(tmp_path, layout="fused")
    convert(fp8, tmp_path / "out", ConvertConfig(size=1.0))
    same_weights(tmp_path / "out", bf16)
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")
    assert "Nothing was changed" not in (tmp_path / "out" / "README.md").read_text()


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    from molae.convert.pipeline import _Pipeline

    fp8, _ = fp8_pair(tmp_path)
    convert(fp8, tmp_path / "whole", ConvertConfig(size=0.8))
    work = _Pipeline._work_through

    def stop(self, shard, path):
        if shard.file.startswith("model-00002"):
            self._drain()
            raise KeyboardInterrupt
        work(self, shard, path)

    with monkeypatch.context() as patch:
        patch.setattr(_Pipeline, "_work_through", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(fp8, tmp_path / "out", ConvertConfig(size=0.8))
    convert(fp8, tmp_path / "out", ConvertConfig(size=0.8))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_progress_ends_at_the_bytes_of_the_source(tmp_path):
    from molae.convert import Watcher

    class Last(Watcher):
        seen = ()

        def advanced(self, done, total, what):
            assert 0 <= done <= total
            self.seen = done, total

    fp8, _ = fp8_pair(tmp_path)
    watcher = Last()
    convert(fp8, tmp_path / "out", ConvertConfig(size=0.8), watcher=watcher)
    with open_checkpoint(fp8) as checkpoint:
        assert watcher.seen == (checkpoint.stored_nbytes,) * 2


def test_inspect_and_plan(tmp_path):
    fp8, bf16 = fp8_pair(tmp_path)
    found, plain = inspect(fp8), inspect(bf16)
    assert found.encoding == "fp8"
    assert found.total_parameters == plain.total_parameters
    assert found.bytes < plain.bytes
    assert json.dumps(found.to_dict())
    own, other = plan(fp8, ConvertConfig(size=0.8)), plan(bf16, ConvertConfig(size=0.8))
    assert own.after == other.after
    assert own.memory_bytes > other.memory_bytes
    assert "FP8" in own.encoding_text


# ------------------------------------------------------------------ refusals

EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"


def test_nan_in_an_expert_is_named(tmp_path):
    config = fp8_config("qwen3_moe")
    stored, _ = fp8_tensors(config)
    stored[EXPERT].view(np.uint8)[3, 2] = 0x7F
    src = write(tmp_path, config, stored)
    with pytest.raises(NonFiniteError, match=rf"{EXPERT}: NaN .* row 3, column 2"):
        convert(src, tmp_path / "out", ConvertConfig(size=0.8))


def test_nan_in_a_copied_tensor_is_named(tmp_path):
    config = fp8_config("qwen3_moe")
    stored, _ = fp8_tensors(config)
    name = "model.layers.1.self_attn.o_proj.weight"
    stored[f"{name}_scale_inv"][0, 0] = np.nan
    src = write(tmp_path, config, stored)
    with pytest.raises(NonFiniteError, match=rf"{name}: NaN .* row 0, column 0"):
        convert(src, tmp_path / "out", ConvertConfig(size=0.8))
    assert not list((tmp_path / "out").glob("*.part"))


def faults():
    def case(name, text, edit):
        return pytest.param(edit, text, id=name)

    def without(config, stored):
        del stored[f"{EXPERT}_scale_inv"]

    def turned(config, stored):
        name = f"{EXPERT}_scale_inv"
        stored[name] = np.ascontiguousarray(stored[name].T[:, :1])

    def integers(config, stored):
        name = f"{EXPERT}_scale_inv"
        stored[name] = stored[name].astype(np.int32)

    def orphan(config, stored):
        stored["model.norm.weight_scale_inv"] = np.ones((1, 1), np.float32)

    def e5m2(config, stored):
        import ml_dtypes

        stored[EXPERT] = stored[EXPERT].view(ml_dtypes.float8_e5m2)

    def entry(key, value):
        def edit(config, stored):
            config["quantization_config"][key] = value

        return edit

    yield case("no scale", rf"{EXPERT}: FP8, and there is no {EXPERT}_scale_inv", without)
    yield case("shape", rf"{EXPERT}_scale_inv: expected shape \(2, 2\)", turned)
    yield case("type", rf"{EXPERT}_scale_inv: .* got I32", integers)
    yield case("orphan", "model.norm.weight_scale_inv: model.norm.weight is absent or", orphan)
    yield case("e5m2", rf"{EXPERT}: type F8_E5M2", e5m2)
    yield case("static", "activation_scheme: 'static'", entry("activation_scheme", "static"))
    for size in (None, [128], [0, 128], [True, 1], 128):
        yield case(f"block {size}", "weight_block_size", entry("weight_block_size", size))


@pytest.mark.parametrize(("edit", "text"), list(faults()))
def test_what_cannot_be_decoded_is_refused(tmp_path, edit, text):
    config = fp8_config("qwen3_moe", L=1)
    stored, _ = fp8_tensors(config)
    edit(config, stored)
    src = write(tmp_path, config, stored)
    with pytest.raises(CheckpointError, match=text):
        open_checkpoint(src)


def test_fp8_experts_of_a_config_that_says_nothing(tmp_path):
    config = fp8_config("qwen3_moe", L=1)
    stored, _ = fp8_tensors(config)
    del config["quantization_config"]
    with (
        open_checkpoint(write(tmp_path, config, stored)) as checkpoint,
        pytest.raises(CheckpointError, match="tensors that it does not know|type F8_E4M3"),
    ):
        describe(checkpoint)
