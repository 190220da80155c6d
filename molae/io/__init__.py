"""Checkpoints on disk: read safetensors lazily, write them without ever leaving half a file."""

from molae.io.checkpoint import (
    Checkpoint,
    lone_config,
    map_file,
    natural_key,
    open_checkpoint,
    read_config,
)
from molae.io.dtypes import COMPUTABLE, DTYPES, DType, dtype_name, numpy_dtype
from molae.io.encoded import ENCODINGS
from molae.io.header import TensorInfo, parse_json
from molae.io.lazy import LazyArrays
from molae.io.writer import (
    ShardWriter,
    TensorSpec,
    copy_file_atomic,
    plan_bytes,
    rename_durably,
    write_text_atomic,
)

__all__ = [
    "COMPUTABLE",
    "DTYPES",
    "ENCODINGS",
    "Checkpoint",
    "DType",
    "LazyArrays",
    "ShardWriter",
    "TensorInfo",
    "TensorSpec",
    "copy_file_atomic",
    "dtype_name",
    "lone_config",
    "map_file",
    "natural_key",
    "numpy_dtype",
    "open_checkpoint",
    "parse_json",
    "plan_bytes",
    "read_config",
    "rename_durably",
    "write_text_atomic",
]
