"""Exceptions and warnings. Every error of molae's own is a `MolaeError`."""

from __future__ import annotations

from molae._core import (
    ArgumentError,
    ConvergenceWarning,
    MolaeError,
    NonFiniteError,
    NumericalError,
    PrecisionWarning,
    ShapeError,
)

__all__ = [
    "ArgumentError",
    "CalibrationWarning",
    "CheckpointError",
    "ClusterError",
    "ConvergenceWarning",
    "DestinationError",
    "MissingExtraError",
    "MolaeError",
    "NonFiniteError",
    "NumericalError",
    "PrecisionWarning",
    "ShapeError",
    "UnknownFamilyError",
]


def shorten(value: object, most: int = 200) -> str:
    """What an error shows of a value that a file gave; files may hold megabytes.

    Examples
    --------
    >>> from molae.errors import shorten
    >>> shorten([1] * 1000, most=12)
    '[1, 1, 1, 1,...'
    """
    text = repr(value)
    return text if len(text) <= most else text[:most] + "..."


class CheckpointError(MolaeError, ValueError):
    """A checkpoint is incomplete, damaged or not what was expected."""


class UnknownFamilyError(CheckpointError):
    """No family of models fits the checkpoint."""


class DestinationError(MolaeError, OSError):
    """The place to write to cannot be used."""


class ClusterError(MolaeError, RuntimeError):
    """The processes that a run was to be shared among cannot do it."""


class CalibrationWarning(UserWarning):
    """A calibration text says too little of some experts."""


class MissingExtraError(MolaeError, ImportError):
    """A part of molae needs packages that are not installed; the message says how to."""
