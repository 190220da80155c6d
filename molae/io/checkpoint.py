"""Open a checkpoint folder: its config, its tensors as lazy views, its other files."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import numpy as np

from molae.errors import CheckpointError, NonFiniteError, shorten
from molae.io.dtypes import numpy_dtype
from molae.io.encoded import Encoded, encoded_tensors
from molae.io.header import (
    FileHeader,
    RepeatedKey,
    TensorInfo,
    parse_json,
    read_header,
)
from molae.io.hub import fetch, is_hub_id
from molae.io.lazy import LazyArrays

__all__ = [
    "CONFIG",
    "INDEX",
    "SINGLE",
    "Checkpoint",
    "check_place",
    "lone_config",
    "map_file",
    "natural_key",
    "open_checkpoint",
    "read_config",
    "read_json",
]

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Weights in any format, and what belongs to them: never copied as a companion.
_WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt",
    ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".npz", ".tflite", ".part",
)  # fmt: skip
# The one folder Transformers itself writes beside a tokenizer.
_FOLDERS = ("additional_chat_templates",)


def natural_key(name: str) -> tuple[tuple[Any, ...], str]:
    """Sort key that orders ``layers.2`` before ``layers.10``.

    Digits are compared by length and then as text, so that a name with thousands of digits
    costs nothing.
    """
    parts: list[Any] = re.split(r"([0-9]+)", name)
    for i in range(1, len(parts), 2):
        digits = parts[i].lstrip("0")
        parts[i] = (len(digits), digits)
    return tuple(parts), name


def open_checkpoint(src: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint and check the headers of all its files.

    Parameters
    ----------
    src : str or path
        A folder with ``config.json`` and ``model.safetensors``, or shards with
        ``model.safetensors.index.json``; or a hub id ``org/name``, which is fetched with
        huggingface_hub.

    Returns
    -------
    Checkpoint

    Raises
    ------
    CheckpointError
        Nothing there, no config, no safetensors weights, a missing, truncated or damaged
        shard, an index that names a tensor its shard lacks, a tensor in two shards, an index
        entry or a link that leads out of the folder, encoded tensors without the scales they
        need, or a hub id that cannot be fetched.

    Notes
    -----
    Only headers are read, so opening takes milliseconds whatever the checkpoint's size.
    """
    path = Path(src)
    if not path.exists() and is_hub_id(str(src)):
        path = fetch(str(src))
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such folder; give a checkpoint's folder or a hub id 'org/name'"
        )
    if not path.is_dir():
        raise CheckpointError(f"{path}: not a folder; give the folder that holds {CONFIG}")
    for name in (CONFIG, INDEX, SINGLE):
        check_place(path, path / name)
    config, config_sha = read_json(path, CONFIG)
    if config is None:
        raise CheckpointError(f"{path}: no {CONFIG}; is this the checkpoint's own folder?")
    weight_map, index_sha = _weight_map(path)
    for f in weight_map:
        check_place(path, path / f)
    headers = tuple(read_header(path / f, f) for f in weight_map)
    tensors = _gather(headers, weight_map)
    encoded = encoded_tensors(config, tensors)
    return Checkpoint(path, config, tensors, headers, config_sha, index_sha, encoded)


def lone_config(path: str | os.PathLike[str]) -> Path | None:
    """The ``config.json`` that was named, or that of a folder without weights; else None."""
    path = Path(path)
    if path.suffix == ".json" and not path.is_dir():
        return path
    if not (path / CONFIG).is_file():
        return None
    weights = any(own.name.lower().endswith(_WEIGHTS) for own in path.iterdir())
    return None if weights else path / CONFIG


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A ``config.json`` without its checkpoint.

    Raises
    ------
    CheckpointError
        It is not there, cannot be read, or is no JSON object.
    """
    path = Path(path)
    config, _ = read_json(path.parent, path.name)
    if config is None:
        raise CheckpointError(f"{path}: cannot be read: no such file")
    return config


class Checkpoint:
    """A checkpoint folder, opened by `open_checkpoint`.

    Attributes
    ----------
    path : Path
        The folder.
    config : dict
        ``config.json`` as it stands; keys keep their order.
    tensors : dict of str to TensorInfo
        In natural order of their names, whatever the order in files and index. Where the config
        says that tensors are encoded in FP8 or MXFP4: the BF16 tensors that they stand for.
    files : tuple of str
        The weight files, in natural order.
    encoding : str or None
        The ``quant_method`` of encoded tensors, where there are any.

    Notes
    -----
    The arrays are views of memory-mapped files. The C kernels read the mapped pages
    directly, so weights never enter the process's own (anonymous) memory, and the system
    drops pages when it needs the room. A source must not be truncated while it is read: the
    system would end the process (SIGBUS).
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        tensors: dict[str, TensorInfo],
        headers: tuple[FileHeader, ...],
        config_sha: str,
        index_sha: str | None,
        encoded: Mapping[str, Encoded] | None = None,
    ) -> None:
        self.path = path
        self.config = config
        self._encoded = encoded or {}
        self.tensors = _seen(tensors, self._encoded)
        self.encoding = config["quantization_config"]["quant_method"] if self._encoded else None
        self.files = tuple(h.file for h in headers)
        self._headers = {h.file: h for h in headers}
        self._config_sha = config_sha
        self._index_sha = index_sha
        self._maps: dict[str, np.ndarray] | None = {}
        self._lock = threading.Lock()

    @property
    def is_sharded(self) -> bool:
        """Whether the folder has an index."""
        return self._index_sha is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, decoded."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def stored_nbytes(self) -> int:
        """Bytes of all tensors as the files hold them."""
        return sum(self.stored_size(name) for name in self.tensors)

    def array(self, name: str) -> np.ndarray:
        """Read-only view of a tensor, without a copy.

        Parameters
        ----------
        name : str

        Returns
        -------
        ndarray
            Of the tensor's shape and type; ``ml_dtypes.bfloat16`` for BF16. The view stays
            valid after `close`. It may be misaligned in files not written by the reference
            library: NumPy copes, and code that needs alignment copies. An encoded tensor is no
            view: it is decoded, all of it.

        Raises
        ------
        CheckpointError
            No such tensor, no NumPy type for it, or the file has changed since it was opened.
        NonFiniteError
            NaN or infinity in an encoded tensor; the message has its name and the place.
        """
        info = self._info(name)
        if name not in self._encoded:
            return _array(info, self._map(info.file))
        if len(info.shape) == 2:
            return self._decoded(name, None)
        whole = np.empty(info.shape, numpy_dtype(info.dtype))
        for e, own in enumerate(self.slices(name)):
            whole[e] = own
        return whole

    def slices(self, name: str) -> Sequence[np.ndarray]:
        """The arrays along a tensor's first axis; of an encoded one each decoded when asked for."""
        info = self._info(name)
        if name not in self._encoded:
            return list(self.array(name))
        return LazyArrays(info.shape[0], lambda e: self._decoded(name, e))

    def is_encoded(self, name: str) -> bool:
        """Whether the files hold a tensor in another form than `tensors` says."""
        return name in self._encoded

    def raw(self, name: str) -> memoryview:
        """Bytes of a tensor as they lie in the file, of whatever type, without a copy.

        Raises
        ------
        CheckpointError
            The tensor is encoded; `stored` has what the files hold of it.
        """
        info = self._info(name)
        if name in self._encoded:
            raise CheckpointError(f"{name}: encoded in the files; ask for its array")
        return _bytes(info, self._map(info.file)).data

    def stored(self, name: str) -> tuple[memoryview, ...]:
        """Bytes of a tensor as they lie in the files; of an encoded one its numbers and scales."""
        return tuple(_bytes(p, self._map(p.file)).data for p in self._parts(name))

    def stored_size(self, name: str) -> int:
        """How many bytes `stored` gives."""
        return sum(part.nbytes for part in self._parts(name))

    def companions(self) -> list[Path]:
        """Files to copy beside converted weights: tokenizer, licence, templates, code.

        Returns
        -------
        list of Path
            Paths below `path`, in order: every regular file of the folder but
            ``config.json``, weights of any format and their indexes, files
            named ``consolidated*`` and hidden ones; and those of
            ``additional_chat_templates``. A link to an existing file counts as a file where
            `check_place` lets it; no other folder is entered.

        Raises
        ------
        CheckpointError
            A link leads out of the checkpoint: what it leads to is not copied.
        """
        folders = [self.path, *(self.path / f for f in _FOLDERS if (self.path / f).is_dir())]
        found = [p for f in folders for p in f.iterdir() if _is_companion(p)]
        files = sorted((p for p in found if p.is_file()), key=str)
        for file in files:
            check_place(self.path, file)
        return files

    def fingerprint(self) -> dict[str, Any]:
        """Facts that tell whether the checkpoint has changed, cheap enough for every start.

        Returns
        -------
        dict
            ``files``: for each weight file its size, mtime_ns and the SHA-256 of its header;
            ``config`` and ``index``: SHA-256 of the two JSON files (None without an index).
        """
        files = {
            h.file: {"size": h.size, "mtime_ns": h.mtime_ns, "header_sha256": h.sha256}
            for h in self._headers.values()
        }
        return {"files": files, "config": self._config_sha, "index": self._index_sha}

    def close(self) -> None:
        """Forget the maps; each goes when its last view does."""
        with self._lock:
            self._maps = None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self.tensors)} tensors)"

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{name}: no such tensor in {self.path}")
        return info

    def _parts(self, name: str) -> tuple[TensorInfo, ...]:
        info = self._info(name)
        return self._encoded[name].parts if name in self._encoded else (info,)

    def _decoded(self, name: str, expert: int | None) -> np.ndarray:
        own = self._encoded[name]
        arrays = [_array(part, self._map(part.file)) for part in own.parts]
        if expert is not None:
            arrays = [array[expert] for array in arrays]
        try:
            return own.decode(*arrays)
        except NonFiniteError as error:
            where = "" if expert is None else f"[{expert}]"
            row, column = divmod(error.info or 0, own.columns)
            named = NonFiniteError(
                f"{own.parts[0].name}{where}: NaN or Inf at row {row}, column {column}, or in its "
                f"scale in {own.parts[1].name}; check the source checkpoint, or download it again"
            )
            named.tensor = name  # type: ignore[attr-defined]
            raise named from error

    def _map(self, file: str) -> np.ndarray:
        with self._lock:
            if self._maps is None:
                raise CheckpointError(f"{self.path}: the checkpoint is closed; open it again")
            if file not in self._maps:
                self._maps[file] = _map_file(self.path / file, self._headers[file])
            return self._maps[file]


def check_place(folder: Path, file: Path) -> None:
    """Refuse a file of a checkpoint that is none, or a link to somewhere else.

    Links may lead to files of the same folder, and, in a hub cache, from
    ``.../snapshots/REVISION`` to ``.../blobs``. Any other could make a file of the user's part
    of the result.

    Raises
    ------
    CheckpointError
        The message names the link and where it leads.
    """
    real, place = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
    blobs = place.parent.parent / "blobs"
    inside = real.is_relative_to(place)
    if not inside and not (place.parent.name == "snapshots" and real.is_relative_to(blobs)):
        raise CheckpointError(
            f"{file}: leads out of the checkpoint, to {real}; if you trust it, put a copy of the "
            "file in its place"
        )
    if os.path.exists(real) and not os.path.isfile(real) and not os.path.isdir(real):
        raise CheckpointError(f"{file}: is no ordinary file; copy or download it again")


def map_file(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one safetensors file, as read-only views of it.

    Raises
    ------
    CheckpointError
        It cannot be read, or is damaged.
    """
    header = read_header(path, path.name)
    whole = _map_file(path, header)
    return {info.name: _array(info, whole) for info in header.tensors}


def _seen(tensors: dict[str, TensorInfo], encoded: Mapping[str, Encoded]) -> dict[str, TensorInfo]:
    """The tensors with what the encoded ones stand for in the place of their parts."""
    if not encoded:
        return tensors
    parts = {part.name for own in encoded.values() for part in own.parts}
    seen = {name: info for name, info in tensors.items() if name not in parts}
    for name, own in encoded.items():
        if name in seen:
            raise CheckpointError(
                f"{name}: there as it is, and encoded as {own.parts[0].name}; keep one of the two"
            )
        seen[name] = own.info
    return dict(sorted(seen.items(), key=lambda item: natural_key(item[0])))


def _bytes(info: TensorInfo, whole: np.ndarray) -> np.ndarray:
    return whole[info.offset : info.offset + info.nbytes]


def _array(info: TensorInfo, whole: np.ndarray) -> np.ndarray:
    return _bytes(info, whole).view(numpy_dtype(info.dtype)).reshape(info.shape)


def _map_file(path: Path, header: FileHeader) -> np.ndarray:
    try:
        with open(path, "rb") as f:
            stat = os.fstat(f.fileno())
            if (stat.st_size, stat.st_mtime_ns) != (header.size, header.mtime_ns):
                raise CheckpointError(
                    f"{header.file}: changed since the checkpoint was opened; "
                    f"let the other program finish and start again"
                )
            return np.asarray(np.memmap(f, dtype=np.uint8, mode="r"))
    except OSError as e:
        raise CheckpointError(f"{header.file}: cannot be mapped: {e.strerror or e}") from e


def _is_companion(p: Path) -> bool:
    name = p.name.lower()
    return not (name == CONFIG or name.startswith((".", "consolidated")) or name.endswith(_WEIGHTS))


def read_json(
    folder: Path, name: str, *, repeats: bool = True
) -> tuple[dict[str, Any] | None, str]:
    """One JSON object and the SHA-256 of its text; None where there is no such file."""
    try:
        raw = (folder / name).read_bytes()
    except FileNotFoundError:
        return None, ""
    except OSError as e:
        raise CheckpointError(f"{name}: cannot be read: {e.strerror or e}") from e
    try:
        value = parse_json(raw, repeats=repeats)
    except RepeatedKey as e:
        raise CheckpointError(
            f"{name}: has {shorten(e.args[0])} twice; keep one of the two"
        ) from None
    except ValueError as e:
        raise CheckpointError(f"{name}: not valid JSON ({e}); copy or download it again") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{name}: expected a JSON object; copy or download it again")
    return value, hashlib.sha256(raw).hexdigest()


def _weight_map(folder: Path) -> tuple[dict[str, list[str]], str | None]:
    """The weight files in natural order with the names the index gives each; the index's hash."""
    index, sha = read_json(folder, INDEX, repeats=False)
    single = (folder / SINGLE).exists()
    if index is None:
        if single:
            return {SINGLE: []}, None
        raise CheckpointError(_no_weights(folder))
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(f, str) for f in names.values()):
        raise CheckpointError(f"{INDEX}: no 'weight_map' from names to files; download it again")
    if not names:
        raise CheckpointError(f"{INDEX}: 'weight_map' is empty; download it again")
    files: dict[str, list[str]] = {f: [] for f in sorted(set(names.values()), key=natural_key)}
    for name, file in names.items():
        files[file].append(name)
    for file in files:
        _check_inside(file)
    if single and SINGLE not in files:
        raise CheckpointError(
            f"{folder}: both {SINGLE} and {INDEX}, which does not list it; "
            f"remove the one that is out of date"
        )
    return files, sha


def _check_inside(file: str) -> None:
    # By the text alone: hub caches hold links that lead out of the folder rightly.
    parts = PurePosixPath(file).parts
    if not parts or file.startswith("/") or ".." in parts or "\\" in file or "\0" in file:
        raise CheckpointError(
            f"{INDEX}: the entry {shorten(file)} leads out of the folder; "
            f"do not use this checkpoint unless you trust its source and have mended the index"
        )
    if not _is_encodable(file) or len(file) > 255:
        raise CheckpointError(
            f"{INDEX}: the entry {shorten(file)} is no file's name; download it again"
        )
    if not file.endswith(".safetensors"):
        raise CheckpointError(
            f"{INDEX}: the entry {shorten(file)} is no safetensors file; "
            f"save the model as safetensors (save_pretrained) first"
        )


def _is_encodable(name: str) -> bool:
    """Whether a file can have the name; JSON has texts that are none."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_weights(folder: Path) -> str:
    shards = sorted((p.name for p in folder.glob("*.safetensors")), key=natural_key)
    if shards:
        return (
            f"{folder}: {_some(shards)} without {INDEX}; copy the index too, "
            f"or name a lone file {SINGLE}"
        )
    other = sorted(p.name for p in folder.iterdir() if p.name.lower().endswith(_WEIGHTS))
    if other:
        return (
            f"{folder}: no {SINGLE}, only {_some(other)}; "
            f"save the model as safetensors (save_pretrained) first"
        )
    return f"{folder}: no {SINGLE} and no {INDEX}; is this the checkpoint's own folder?"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = "" if len(names) <= 3 else f" and {len(names) - 3} more"
    return ", ".join(names[:3]) + more


def _gather(
    headers: tuple[FileHeader, ...], weight_map: dict[str, list[str]]
) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for header in headers:
        for info in header.tensors:
            if info.name in found:
                raise CheckpointError(
                    f"{info.name}: in two shards, {found[info.name].file} and {info.file}; "
                    f"it is unclear which one is meant: save the model anew (save_pretrained)"
                )
            found[info.name] = info
    for file, names in weight_map.items():
        absent = [n for n in names if n not in found or found[n].file != file]
        if absent:
            name = min(absent, key=natural_key)
            where = f" (it is in {found[name].file})" if name in found else ""
            raise CheckpointError(
                f"{INDEX}: names {name} in {file}, which does not hold it{where}; "
                f"{len(absent)} such in this file: index and shards do not belong together, "
                f"download them again"
            )
    return {n: found[n] for n in sorted(found, key=natural_key)}
