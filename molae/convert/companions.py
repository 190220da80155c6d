"""Small files that go with a checkpoint: tokenizer, licence, chat template, code."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePosixPath

from molae.io import Checkpoint

__all__ = ["companion_names"]


def companion_names(checkpoint: Checkpoint, taken: Collection[str]) -> dict[str, Path]:
    """Where each companion of the source goes, by its name in the result.

    A file whose name molae writes itself (its model card, ``README.md``, above all) is
    kept as ``README.source.md``; if the source has that too, as ``README.source.source.md``.
    """
    files = {path.relative_to(checkpoint.path).as_posix(): path for path in checkpoint.companions()}
    names = {name: path for name, path in files.items() if name not in taken}
    for name in sorted(files.keys() - names.keys()):
        kept = PurePosixPath(name)
        while str(kept) in names or str(kept) in taken:
            kept = kept.with_name(f"{kept.stem}.source{kept.suffix}")
        names[str(kept)] = files[name]
    return dict(sorted(names.items()))
