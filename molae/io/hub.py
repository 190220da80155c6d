"""Fetch a checkpoint from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from molae.errors import CheckpointError

__all__ = ["fetch", "is_hub_id"]

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Other formats of the same weights, and folders that hold them again.
_NOT_NEEDED = [
    "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.onnx",
    "*.onnx_data", "*.h5", "*.msgpack", "*.npz", "*.tflite", "consolidated*", "*/*.safetensors",
    "original/*", "metal/*", "onnx/*",
]  # fmt: skip


def is_hub_id(src: str) -> bool:
    """Whether `src` has the form ``org/name``."""
    return _ID.fullmatch(src) is not None and ".." not in src


def fetch(hub_id: str) -> Path:
    """Bring a repository into the hub's cache, or find it there.

    Parameters
    ----------
    hub_id : str
        ``org/name``.

    Returns
    -------
    Path
        The snapshot's folder, whose files are links into the cache.

    Raises
    ------
    CheckpointError
        huggingface_hub is not installed, the hub cannot be reached, or it refuses.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise CheckpointError(
            f"{hub_id}: no such folder, and huggingface_hub is not installed to fetch it; "
            f"run: pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(hub_id, ignore_patterns=_NOT_NEEDED))
    except LocalEntryNotFoundError as e:
        raise CheckpointError(
            f"{hub_id}: no such folder, and not in the hub's cache while the hub cannot be "
            f"reached; go online, or give the folder of a local copy"
        ) from e
    except HfHubHTTPError as e:
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise CheckpointError(
            f"{hub_id}: no such folder, and the hub refuses it ({first}); "
            f"check the name, and log in (hf auth login) if it is private or gated"
        ) from e
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{hub_id}: cannot be fetched from the hub ({e})") from e
