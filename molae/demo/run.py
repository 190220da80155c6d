"""Convert the checkpoint that comes with molae, and see what it cost."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from molae.config import TYPES, ConvertConfig
from molae.convert import Report, convert, inspect, materialize
from molae.demo import CHECKPOINT, HELDOUT
from molae.errors import ArgumentError

__all__ = ["CASES", "Demo", "Row", "run"]

#: Method and size of each conversion. The paper's plain method reaches few sizes.
CASES = (
    ("latent", 0.75),
    ("latent", 0.5),
    ("latent", 0.3),
    ("molae", 0.75),
    ("molae", 0.5),
)


@dataclass(frozen=True)
class Row:
    """The original, or one result.

    `errors` has the relative weight error of each matrix type that was converted;
    `perplexity` is None where Transformers is not installed.
    """

    title: str
    size: float
    bytes: int
    flops_ratio: float
    errors: Mapping[str, float]
    perplexity: float | None = None
    perplexity_se: float | None = None


@dataclass(frozen=True)
class Demo:
    """All rows, the original first; why some sizes were refused; tokens that were scored."""

    rows: tuple[Row, ...]
    refused: tuple[str, ...]
    tokens: int
    out: str | None

    @property
    def evaluated(self) -> bool:
        return self.rows[0].perplexity is not None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def run(
    *, out: str | os.PathLike[str] | None = None, say: Callable[[str], None] | None = None
) -> Demo:
    """Convert at each of `CASES`, multiply out, and measure.

    Parameters
    ----------
    out : str or path, optional
        Folder to keep the checkpoints in; by default they are thrown away.
    say : callable, optional
        Is told what is worked on.

    Returns
    -------
    Demo
    """
    say = say or (lambda text: None)
    if out is not None:
        return _run(Path(out), str(out), say)
    with tempfile.TemporaryDirectory(prefix="molae-demo-") as folder:
        return _run(Path(folder), None, say)


def _run(folder: Path, out: str | None, say: Callable[[str], None]) -> Demo:
    measure = _measure if find_spec("transformers") and find_spec("torch") else None
    say(f"original: {CHECKPOINT}")
    original = inspect(CHECKPOINT)
    score = measure(CHECKPOINT) if measure else None
    rows = [_with_score(Row("original", 1.0, original.decoded_bytes, 1.0, {}), score)]
    refused = []
    for method, size in CASES:
        title = f"{method} {size:g}"
        say(title)
        try:
            report = convert(
                CHECKPOINT,
                folder / f"{method}-{size:g}",
                ConvertConfig(method=method, size=size),
                overwrite=True,
            )
        except ArgumentError as error:
            refused.append(str(error))
            continue
        row = _row(title, report)
        if measure or out is not None:
            ordinary = folder / f"{method}-{size:g}-materialized"
            materialize(folder / f"{method}-{size:g}", ordinary, overwrite=True)
            row = _with_score(row, measure(ordinary) if measure else None)
        rows.append(row)
    return Demo(tuple(rows), tuple(refused), score.tokens if score else 0, out)


def _row(title: str, report: Report) -> Row:
    kinds = {row.kind for row in report.rows}
    return Row(
        title=title,
        size=report.plan["size_reached"],
        bytes=report.plan["after"]["total_bytes"],
        flops_ratio=report.plan["flops_ratio"],
        errors={kind: report.error(kind) for kind in TYPES if kind in kinds},
    )


def _measure(path: Path) -> Any:
    from molae.hf import hide_progress
    from molae.hf.evaluate import evaluate_path

    hide_progress()
    return evaluate_path(path, HELDOUT)


def _with_score(row: Row, score: Any) -> Row:
    if score is None:
        return row
    return dataclasses.replace(row, perplexity=score.perplexity, perplexity_se=score.perplexity_se)
