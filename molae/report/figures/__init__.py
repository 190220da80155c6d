"""The charts of a report's page, each with its table; None where there is nothing to draw."""

from molae.report.figures.common import LOOKS
from molae.report.figures.layers import (
    answer_errors,
    layer_seconds,
    output_errors,
    shares,
    sizes,
    weight_errors,
)
from molae.report.figures.ranks import rank_maps, sensitivity
from molae.report.figures.routing import load
from molae.report.figures.spectra import curves, effective_ranks
from molae.report.figures.trained import (
    compressed_counts,
    compressed_errors,
    healing_curves,
    healing_ends,
)

__all__ = [
    "LOOKS",
    "answer_errors",
    "compressed_counts",
    "compressed_errors",
    "curves",
    "effective_ranks",
    "healing_curves",
    "healing_ends",
    "layer_seconds",
    "load",
    "output_errors",
    "rank_maps",
    "sensitivity",
    "shares",
    "sizes",
    "weight_errors",
]
