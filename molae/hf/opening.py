"""Open a checkpoint, ordinary or converted, to run it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from molae.errors import ArgumentError, CheckpointError, MolaeError, shorten
from molae.io.checkpoint import CONFIG, check_place, read_json
from molae.io.hub import fetch, is_hub_id

__all__ = [
    "check_harmless",
    "find_folder",
    "first_line",
    "open_model",
    "open_tokenizer",
    "use_threads",
]

ADAPTER = "adapter_config.json"

#: Config entries by which Transformers may fetch code from the hub.
KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")


def find_folder(path: str | os.PathLike[str]) -> Path:
    """Where a checkpoint lies, a hub id's in the hub's cache.

    Raises
    ------
    molae.errors.CheckpointError
        No checkpoint there.
    """
    folder = Path(path)
    if not folder.exists() and is_hub_id(os.fspath(path)):
        folder = fetch(os.fspath(path))
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{path}: no checkpoint here (no config.json)")
    config, _ = read_json(folder, CONFIG)
    check_harmless(config or {}, folder)
    return folder


def check_harmless(config: Mapping[str, Any], folder: Path | None = None) -> None:
    """Refuse what would make Transformers read or run something that is not in the folder.

    Code that comes with a checkpoint (``auto_map``) needs no check: it is never run, since
    Transformers is always told not to.

    Raises
    ------
    molae.errors.CheckpointError
        An attention kernel of the hub is asked for, the folder holds an adapter, whose base may be
        anywhere, or a link leads out of it.
    """
    for key in KERNELS:
        asked = config.get(key)
        for name in asked.values() if isinstance(asked, dict) else [asked]:
            if isinstance(name, str) and not name.replace("_", "").isalnum():
                raise CheckpointError(
                    f"config.json: {key} {shorten(name)} names code that is not Transformers' own; "
                    "remove the entry"
                )
    if folder is None:
        return
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{folder}: holds an adapter ({ADAPTER}); merge it into its model first, or remove it"
        )
    for file in folder.iterdir():
        if not file.name.startswith("."):
            check_place(folder, file)


def open_model(
    path: str | os.PathLike[str], *, dtype: Any = "float32", device: Any = "cpu"
) -> tuple[Any, Any]:
    """Load a checkpoint's model and tokenizer.

    Parameters
    ----------
    path : str or os.PathLike
        Folder of an ordinary or of a converted checkpoint, or a hub id. A converted one is
        loaded as it is, with latent experts.
    dtype : str or torch.dtype
        Type to compute in; ``"auto"`` for that of the files.
    device : str or torch.device

    Returns
    -------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase

    Raises
    ------
    molae.errors.ArgumentError
        No such type or device.
    molae.errors.CheckpointError
        No checkpoint or no tokenizer there, or one that leaves a weight of the model open.
    """
    from transformers import AutoModelForCausalLM

    import molae.hf.loading  # noqa: F401  (makes converted checkpoints known)

    dtype, device = _checked(dtype, device)
    folder = find_folder(path)
    tokenizer = open_tokenizer(folder, path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            use_safetensors=True,  # other formats are pickles
            trust_remote_code=False,
        )
    except MolaeError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        # No weights, or an unreadable shard, which torch says by a RuntimeError.
        raise CheckpointError(f"{path}: {first_line(error)}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{path}: {len(missing)} weights of the model are absent, such as {missing[0]}; "
            "it would run with random numbers in their place"
        )
    return model.to(device), tokenizer


def open_tokenizer(folder: Path, name: str | os.PathLike[str] | None = None) -> Any:
    """Load a checkpoint's tokenizer; `name` is what errors call the folder.

    Raises
    ------
    molae.errors.CheckpointError
        None there, or one that Transformers cannot load.
    """
    from transformers import AutoTokenizer

    name = name or folder
    # Without any of these Transformers makes an empty tokenizer up.
    if not any(
        any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
    ):
        raise CheckpointError(f"{name}: no tokenizer here; copy that of the original")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what the tokenizers library raises is nothing more special
        raise CheckpointError(
            f"{name}: no tokenizer that Transformers can load; copy that of the original here "
            f"({first_line(error)})"
        ) from error


def _checked(dtype: Any, device: Any) -> tuple[Any, Any]:
    import torch

    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ArgumentError(f"dtype: expected 'auto' or a type such as 'bfloat16', got {dtype!r}")
    try:
        return dtype, torch.device(device)
    except RuntimeError as error:
        raise ArgumentError(f"device: {first_line(error)}") from error


def use_threads(count: int | None) -> None:
    """Let torch compute with so many threads; None leaves it as it is."""
    if count is not None:
        import torch

        torch.set_num_threads(count)


def first_line(error: Exception) -> str:
    """What an error says, without what follows."""
    return str(error).strip().partition("\n")[0]
