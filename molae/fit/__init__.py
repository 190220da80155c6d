"""Shared low-rank factors for groups of experts: the array API.

NumPy arrays in, NumPy arrays out. `W` is a stack of experts' matrices of one type,
``(E, rows, cols)``, or a sequence of E arrays ``(rows, cols)`` of one dtype: float32,
float64, float16 or `ml_dtypes.bfloat16`. Arithmetic is float64 for float64 and float32
for all others; factors come back in the dtype of `W`. Memory-mapped arrays are read
where they lie, without a copy.

Letters: E experts, F expert width, D model width, k experts of a group, R rank.
On the input side (``gate_proj``, ``up_proj``: F×D) the group shares the factor next to
the input, ``W_i ≈ A_i B``. On the output side (``down_proj``: D×F) it shares the factor
next to the output, ``W_i ≈ Bᵀ A_i``. ``B`` is (R, D) either way.
"""

from molae.fit.adamw import AdamW
from molae.fit.basis import gauge, stored_numbers, ungauge
from molae.fit.compressed import CompressedFit, compressed_experts
from molae.fit.distilling import LayerDistillation, distill_layer
from molae.fit.factors import SharedFactors
from molae.fit.layer import LayerFit, fit_layer
from molae.fit.layer_moments import Energies, LayerMoments, layer_energies, layer_moments
from molae.fit.moments import SecondMoments, second_moments
from molae.fit.narrow import NarrowFit, narrow_experts
from molae.fit.reading import LayerInput, answer_error
from molae.fit.refit_metrics import RowMetric, row_metric
from molae.fit.refitting import Refit, refit
from molae.fit.shared import factor_shared, reduce_rank, spectrum
from molae.fit.spectra import common_kernel_dim, discarded_energy, effective_rank
from molae.fit.weighted import factor_weighted, weighted_spectrum

__all__ = [
    "AdamW",
    "CompressedFit",
    "Energies",
    "LayerDistillation",
    "LayerFit",
    "LayerInput",
    "LayerMoments",
    "NarrowFit",
    "Refit",
    "RowMetric",
    "SecondMoments",
    "SharedFactors",
    "answer_error",
    "common_kernel_dim",
    "compressed_experts",
    "discarded_energy",
    "distill_layer",
    "effective_rank",
    "factor_shared",
    "factor_weighted",
    "fit_layer",
    "gauge",
    "layer_energies",
    "layer_moments",
    "narrow_experts",
    "reduce_rank",
    "refit",
    "row_metric",
    "second_moments",
    "spectrum",
    "stored_numbers",
    "ungauge",
    "weighted_spectrum",
]
