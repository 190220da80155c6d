"""Conversion of checkpoints: plan, layer jobs, writer, report.

The package can be called: ``molae.convert(src, dst, config)`` is `convert.convert`.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

from molae.arch import Family
from molae.config import ConvertConfig, HealConfig
from molae.convert.calibrated import Calibration
from molae.convert.conversion import Conversion, check_divisible
from molae.convert.destination import check_apart, check_usable
from molae.convert.execution import Watcher, execute
from molae.convert.executor import Executor
from molae.convert.healing import Healing
from molae.convert.inspection import Inspection, inspect
from molae.convert.materialization import Materialization
from molae.convert.methods import METHODS
from molae.convert.planning import Plan
from molae.convert.report import HealRow, Report, TypeRow, WorkerRow
from molae.io import open_checkpoint

__all__ = [
    "METHODS",
    "Calibration",
    "Executor",
    "HealRow",
    "Inspection",
    "Plan",
    "Report",
    "TypeRow",
    "Watcher",
    "WorkerRow",
    "check_divisible",
    "convert",
    "heal",
    "inspect",
    "materialize",
    "plan",
    "plan_heal",
    "plan_materialize",
]

Source = str | os.PathLike[str]


def convert(
    src: Source,
    dst: str | os.PathLike[str],
    config: ConvertConfig | None = None,
    *,
    calibration: Calibration | None = None,
    stats: str | os.PathLike[str] | None = None,
    family: Family | None = None,
    overwrite: bool = False,
    watcher: Watcher | None = None,
    executor: Executor | None = None,
) -> Report:
    """Make a smaller checkpoint from a mixture-of-experts checkpoint.

    Parameters
    ----------
    src : str or path
        Folder of the checkpoint, or a hub id ``org/name``.
    dst : str or path
        Folder of the result; made, or empty, or left by an interrupted run of the same kind.
    config : ConvertConfig, optional
        Settings; by default method 'latent' at size 0.75.
    calibration : Calibration, optional
        A text run through the same checkpoint, such as a `molae.hf.calibrate.Calibration`: the
        fit then knows what the experts read, and the size is spent where it does most good.
    stats : str or path, optional
        File for what the first pass over the original measures: read where it is there, so that
        another size of the same checkpoint with the same text costs less; else written.
    family : Family, optional
        Describes the model where molae does not know its family; see `molae.arch.load_family`.
    overwrite : bool
        Replace a finished result, or an unfinished run that differs from this one. An
        unfinished run that does not differ goes on all the same.
    watcher : Watcher, optional
        Is told the plan and the progress.
    executor : Executor, optional
        Who computes the layers, such as a `molae.cluster.Workers`; by default this process.

    Returns
    -------
    Report
        Also written to ``dst/molae-report.json``.

    Raises
    ------
    CheckpointError, UnknownFamilyError
        The source is damaged, or not a checkpoint that molae knows.
    ArgumentError
        A setting does not fit the model, or the size cannot be reached.
    NonFiniteError
        NaN or infinity in a weight; the message names tensor, layer and expert.
    DestinationError
        The destination cannot be used; the message says why and what to do.

    Notes
    -----
    Interrupted at any moment, even by a kill, the same call goes on where it stopped, and the
    result has the same bytes (but for times in the report). Memory is bounded by the largest
    matrix type of one layer, not by the checkpoint; results do not depend on the number of
    threads.

    Examples
    --------
    >>> import tempfile, molae, molae.demo
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = molae.convert(molae.demo.CHECKPOINT, folder, molae.ConvertConfig(size=0.6))
    >>> report.plan["size_reached"] <= 0.6
    True
    """
    if executor is not None:
        check_divisible(config or ConvertConfig(), calibration is not None)
    with open_checkpoint(src) as checkpoint:
        check_apart(checkpoint.path, Path(dst))
        check_usable(Path(dst), overwrite=overwrite)  # before the work of planning
        conversion = Conversion(
            os.fspath(src), checkpoint, config or ConvertConfig(), family, calibration, _path(stats)
        )
        return execute(
            conversion, Path(dst), overwrite=overwrite, watcher=watcher, executor=executor
        )


def plan(
    src: Source,
    config: ConvertConfig | None = None,
    *,
    calibration: Calibration | None = None,
    stats: str | os.PathLike[str] | None = None,
    family: Family | None = None,
) -> Plan:
    """What `convert` would do, without writing anything.

    Parameters
    ----------
    src, config, calibration, stats, family
        As in `convert`. With a calibration the original is run to decide groups and ranks.

    Returns
    -------
    Plan
        Sizes, groups and ranks, memory, disk, and an estimate of the time.

    Raises
    ------
    CheckpointError, UnknownFamilyError, ArgumentError, NonFiniteError
        As in `convert`.

    Examples
    --------
    >>> import molae, molae.demo
    >>> plan = molae.plan(molae.demo.CHECKPOINT, molae.ConvertConfig(size=0.6))
    >>> plan.size_reached <= 0.6, plan.after.expert_bytes < plan.before.expert_bytes
    (True, True)
    """
    with open_checkpoint(src) as checkpoint:
        conversion = Conversion(
            os.fspath(src), checkpoint, config or ConvertConfig(), family, calibration, _path(stats)
        )
        return conversion.plan(timed=True)


def heal(
    src: Source,
    dst: str | os.PathLike[str],
    teacher: Source,
    config: HealConfig | None = None,
    *,
    calibration: Calibration,
    family: Family | None = None,
    overwrite: bool = False,
    watcher: Watcher | None = None,
) -> Report:
    """Train the layers of a converted checkpoint to answer as the original's do.

    One layer after the other, each on what the trained ones before it hand on; see
    `molae.fit.distill_layer`. Sizes, ranks and all tensors but the factors stay.

    Parameters
    ----------
    src : str or path
        Folder that `convert` wrote, or a hub id of such a one.
    dst, family, overwrite, watcher
        As in `convert`.
    teacher : str or path
        The original: the checkpoint that `src` was converted from.
    config : HealConfig, optional
    calibration : Calibration
        A text run through the original, such as a `molae.hf.calibrate.Calibration`. A text that
        the conversion has not seen tells better where a layer still gains.

    Returns
    -------
    Report
        Also written to ``dst/molae-report.json``; that of the conversion stays beside it as
        ``molae-report.source.json``.

    Raises
    ------
    CheckpointError, UnknownFamilyError, DestinationError
        As in `convert`.
    ArgumentError
        The teacher is of another family, shape or tokenizer, or the checkpoint has been trained
        since.
    NonFiniteError, NumericalError
        The loss of a layer became NaN or grew out of all proportion; layer and step are named,
        and the layers before it are kept.

    Notes
    -----
    One layer is in memory at a time. Interrupted at any moment the same call goes on, within a
    layer from the last state that was kept, to the same bytes.

    Examples
    --------
    >>> import tempfile, molae, molae.demo
    >>> from molae.hf.calibrate import Calibration
    >>> text = "The experts of a layer read what the router sends them. " * 50
    >>> with (
    ...     tempfile.TemporaryDirectory() as folder,
    ...     Calibration(molae.demo.CHECKPOINT, text) as calibration,
    ... ):
    ...     small, healed = f"{folder}/small", f"{folder}/healed"
    ...     _ = molae.convert(molae.demo.CHECKPOINT, small, molae.ConvertConfig(size=0.4))
    ...     report = molae.heal(small, healed, molae.demo.CHECKPOINT, calibration=calibration)
    >>> all(row.layer_error[1] < row.layer_error[0] for row in report.healed)
    True
    """
    with open_checkpoint(src) as checkpoint, open_checkpoint(teacher) as original:
        check_apart(checkpoint.path, Path(dst))
        check_apart(original.path, Path(dst))
        check_usable(Path(dst), overwrite=overwrite)
        task = Healing(
            os.fspath(src), checkpoint, original, calibration, config or HealConfig(), family
        )
        return execute(task, Path(dst), overwrite=overwrite, watcher=watcher)


def plan_heal(
    src: Source,
    teacher: Source,
    config: HealConfig | None = None,
    *,
    calibration: Calibration,
    family: Family | None = None,
) -> Plan:
    """What `heal` would do, without writing anything."""
    with open_checkpoint(src) as checkpoint, open_checkpoint(teacher) as original:
        task = Healing(
            os.fspath(src), checkpoint, original, calibration, config or HealConfig(), family
        )
        return task.plan(timed=True)


def materialize(
    src: Source,
    dst: str | os.PathLike[str],
    *,
    family: Family | None = None,
    overwrite: bool = False,
    watcher: Watcher | None = None,
    executor: Executor | None = None,
) -> Report:
    """Multiply the factors of a converted checkpoint out to an ordinary one.

    The result has the original's full size, names and layout; stock Transformers, vLLM and
    llama.cpp load it.

    Parameters
    ----------
    src : str or path
        Folder that `convert` wrote, or a hub id of such a one.
    dst, family, overwrite, watcher, executor
        As in `convert`.

    Returns
    -------
    Report
        Also written to ``dst/molae-report.json``.

    Raises
    ------
    CheckpointError, UnknownFamilyError, ArgumentError, DestinationError
        As in `convert`.

    Notes
    -----
    Resumes as `convert` does, and its memory is bounded in the same way.

    Examples
    --------
    >>> import tempfile, molae, molae.demo
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     small, whole = f"{folder}/small", f"{folder}/whole"
    ...     _ = molae.convert(molae.demo.CHECKPOINT, small, molae.ConvertConfig(size=0.6))
    ...     _ = molae.materialize(small, whole)
    ...     was, now = (molae.inspect(path) for path in (molae.demo.CHECKPOINT, whole))
    >>> now.total_parameters == was.total_parameters
    True
    """
    with open_checkpoint(src) as checkpoint:
        check_apart(checkpoint.path, Path(dst))
        check_usable(Path(dst), overwrite=overwrite)
        task = Materialization(os.fspath(src), checkpoint, family)
        return execute(task, Path(dst), overwrite=overwrite, watcher=watcher, executor=executor)


def plan_materialize(src: Source, *, family: Family | None = None) -> Plan:
    """What `materialize` would do, without writing anything."""
    with open_checkpoint(src) as checkpoint:
        return Materialization(os.fspath(src), checkpoint, family).plan(timed=True)


def _path(file: str | os.PathLike[str] | None) -> Path | None:
    return None if file is None else Path(file)


class _Callable(types.ModuleType):
    """This package is also the function `molae.convert`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        return convert(*args, **kwargs)


_Callable.__call__.__doc__ = convert.__doc__
sys.modules[__name__].__class__ = _Callable
