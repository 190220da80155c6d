"""Group sizes are measured on the model's middle layer, not guessed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from molae import fit
from molae.arch import Model
from molae.convert.allocation import Candidate, gauge_ranks
from molae.convert.naming import named
from molae.factored import index_groups
from molae.io import Checkpoint

__all__ = ["GROUP_SIZES", "Probe"]

#: Group sizes that are tried; those above E are left out.
GROUP_SIZES = (2, 4, 8, 16, 32)

#: At most so many experts of the layer are looked at, which bounds time and memory.
MOST_EXPERTS = 32


class Probe:
    """Spectra of one layer's experts, for methods that choose group sizes."""

    def __init__(self, checkpoint: Checkpoint, model: Model) -> None:
        self._checkpoint = checkpoint
        self._model = model
        self.layer = model.moe_layers[len(model.moe_layers) // 2]
        self.experts = min(model.letters["E"], MOST_EXPERTS)

    def candidates(self, kind: str, size: float) -> tuple[Candidate, ...]:
        """Each group size with the gauge-form error it would give at `size`.

        The one with the lowest error is marked; of equals, the smaller. Group sizes
        that cannot reach `size` are left out, so the result may be empty.
        """
        F, D = self._model.letters["F"], self._model.letters["D"]
        found = []
        for k in [k for k in GROUP_SIZES if k <= self.experts] or [1]:
            ranks = gauge_ranks(index_groups(self.experts, k), size, F=F, D=D)
            if min(ranks) >= 1:
                found.append((self._error(kind, k, ranks), k, ranks[0]))
        best = min(found, default=None)
        return tuple(
            Candidate(kind, k, rank, error, chosen=(error, k, rank) == best)
            for error, k, rank in found
        )

    def _error(self, kind: str, k: int, ranks: Sequence[int]) -> float:
        matrices = self._model.matrices(self._checkpoint, self.layer, kind)[: self.experts]
        with named(self._model, self.layer, kind):
            spectra = fit.spectrum(
                matrices, groups=index_groups(self.experts, k), side=self._model.side(kind)
            )
        lost = sum(float((s[rank:] ** 2).sum()) for s, rank in zip(spectra, ranks, strict=True))
        total = sum(float((s**2).sum()) for s in spectra)
        return math.sqrt(lost / total) if total else 0.0
