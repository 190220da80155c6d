"""How much memory a calibrated conversion takes, and how to keep it within bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from molae.arch import Model
from molae.config import TYPES, ConvertConfig
from molae.convert.allocation import split_numbers
from molae.convert.measuring import TRIAL_SIZES
from molae.errors import ArgumentError
from molae.factored import LightModule
from molae.fit.compressed import MEMORY
from molae.fit.reading import CHUNK
from molae.io import DTYPES, Checkpoint
from molae.threads import get_num_threads

__all__ = ["BASE_BYTES", "Footprint", "healing_bytes", "results_room"]

#: Python, NumPy and the libraries, before any work.
BASE_BYTES = 60_000_000

#: What torch and transformers take besides.
TORCH_BYTES = 500_000_000

#: Rows of one number a slot that are held while some tokens pass: gate, up, intermediate, its
#: slopes, gradients.
ROWS = 8

#: Arrays as large as the private factors that a refit holds: themselves, gradient, change and what
#: holds it, direction, and what becomes of that in the layer and in its metrics.
VECTORS = 7


#: Arrays as large as all factors that a training holds: themselves, their masters, gradients, both
#: moments, the best so far.
HEALED = 6


@dataclass(frozen=True)
class Footprint:
    """Anonymous memory of a calibrated conversion. Mapped files, which the system may drop
    whenever it needs the room, are not in it.

    Attributes
    ----------
    num_experts : int
        E.
    experts_at_once : int
        Whose moments are held at a time.
    fixed : int
        Bytes whatever these are: torch, the two ends of the model, a few tokens, the workspace of
        each thread, factors.
    expert : int
        Bytes of one expert's moments.
    refit : int
        Bytes of a refit, which holds no moments, or of the training after it.
    light : int
        Bytes of a fit of what acts in the place of compressed experts, after these.
    """

    num_experts: int
    experts_at_once: int
    fixed: int
    expert: int
    refit: int
    light: int = 0

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: Model, config: ConvertConfig) -> Footprint:
        """As few passes over a layer's tokens as `config.max_memory` allows.

        Raises
        ------
        ArgumentError
            There is no room for the groups asked for, or none for the refit.
        """
        vocab = _vocabulary(model, checkpoint)
        copied = not model.is_mapped(checkpoint.encoding)
        plan = cls.of_sizes(model.letters, model.dtype, config, vocab, copied=copied)
        if config.max_memory is None:
            return plan
        return plan._within(int(config.max_memory), config)

    @classmethod
    def of_sizes(
        cls,
        letters: Mapping[str, int],
        dtype: str,
        config: ConvertConfig,
        vocab: int = 0,
        *,
        copied: bool = False,
    ) -> Footprint:
        """Of layers of these sizes, all experts at once; `copied`: not read where they lie."""
        E, F, D = (letters[letter] for letter in "EFD")
        size = config.target_size or 1.0
        stack = E * F * D
        rank = math.ceil(size * D)  # about what large groups have; smaller ones have less
        private = E * F * min(rank, F, D)
        ends = _ends(vocab, D)
        tokens = _tokens(letters, rank)
        a_thread = 8 * (7 * D * D + 2 * max(D, F) ** 2 + 2 * F * F + 4 * F * D + rank * (F + D))
        factors = int((3 * size + sum(TRIAL_SIZES)) * stack) * DTYPES[dtype].itemsize
        wide = 12 * stack if dtype == "F16" or copied else 0
        fixed = BASE_BYTES + TORCH_BYTES + ends + tokens + factors + wide
        roots = 2 * E * F * F + 3 * E * min(rank, D) ** 2  # and what they are roots of
        refit = 4 * (VECTORS * private + roots) if config.refit else 0
        healed = 4 * HEALED * len(TYPES) * private if config.heal else 0
        return cls(
            E,
            E,
            fixed + get_num_threads() * a_thread,
            4 * (D * D + 3 * F * F),
            max(refit, healed),
            E * _light_bytes(config, F, D) if config.compressed_experts else 0,
        )

    def _within(self, limit: int, config: ConvertConfig) -> Footprint:
        needed = max(config.group_size_of(kind) or 1 for kind in TYPES)
        least = self.fixed + min(needed, self.num_experts) * self.expert
        if limit < least:
            raise ArgumentError(
                f"max_memory: {limit / 1e9:.3g} GB; moments of {needed} experts at a time, and "
                f"what else is needed, take about {least / 1e9:.3g} GB"
                + ("; smaller groups take less" if needed > 1 else "")
                + ("; fewer threads take less" if get_num_threads() > 1 else "")
            )
        if limit < self.fixed + self.refit:
            raise ArgumentError(
                f"max_memory: {limit / 1e9:.3g} GB; the refit takes about "
                f"{(self.fixed + self.refit) / 1e9:.3g} GB; allow more, or leave it out "
                f"({'heal=0' if config.heal else '--no-refit, refit=False'})"
            )
        if limit < self.fixed + self.light:
            raise ArgumentError(
                f"max_memory: {limit / 1e9:.3g} GB; the fit of {self.num_experts} light modules "
                f"takes about {(self.fixed + self.light) / 1e9:.3g} GB; allow more, or take "
                "narrower ones (--light-module)"
            )
        room = min((limit - self.fixed) // self.expert, self.num_experts)
        return replace(self, experts_at_once=int(room))

    @property
    def passes(self) -> int:
        """Over a layer's tokens to gather all its moments, at least."""
        blocks = -(-self.num_experts // self.experts_at_once)
        return blocks if blocks == 1 else blocks + 1  # one more to see whom they reach

    @property
    def nbytes(self) -> int:
        """Estimate of the peak."""
        return self.fixed + max(self.experts_at_once * self.expert, self.refit, self.light)


def healing_bytes(checkpoint: Checkpoint, model: Model) -> int:
    """Estimate of the peak of anonymous memory while the layers of a converted checkpoint are
    trained, one at a time."""
    assert model.factored is not None
    D = model.letters["D"]
    vocab = _vocabulary(model, checkpoint)
    largest = max(
        sum(split_numbers(split, F=model.letters["F"], D=D, form=model.factored.form)
            for split in kinds.values())
        for kinds in model.factored.layers.values()
    )  # fmt: skip
    fixed = BASE_BYTES + TORCH_BYTES + _ends(vocab, D) + _tokens(model.letters, D)
    wide = 12 * model.letters["E"] * model.letters["F"] * D if model.dtype == "F16" else 0
    # As stored and to be written besides.
    return fixed + wide + largest * (4 * HEALED + 2 * DTYPES[model.dtype].itemsize)


def _ends(vocab: int, D: int) -> int:
    """Both ends of the model, and logits."""
    return 8 * vocab * D + 4 * 3 * 256 * vocab


def _tokens(letters: Mapping[str, int], rank: int) -> int:
    """What is held while some tokens pass."""
    K, F, D = (letters[letter] for letter in "KFD")
    return 4 * CHUNK * (K * F * ROWS + 6 * D + K * min(rank, D))


def _light_bytes(config: ConvertConfig, F: int, D: int) -> int:
    """Of one expert while it is fitted."""
    light = LightModule.parse(config.light_form, F)
    own = light.numbers(F=F, D=D)
    if light.units is None:  # of the descent each pair that is kept, in double
        return 8 * (2 * MEMORY + 6) * own
    # The linear part has eight arrays of down in double; the descent five of all.
    return max(8 * 8 * (light.units + 1) * D, 4 * 5 * own)


def results_room(model: Model) -> int:
    """Bytes of results that may wait to be written: a matrix type of a layer in float32, and a
    quarter."""
    E, F, D = (model.letters[letter] for letter in "EFD")
    return int(1.25 * E * F * D * DTYPES["F32"].itemsize)


def _vocabulary(model: Model, checkpoint: Checkpoint) -> int:
    return int(model.family.settings(checkpoint.config).get("vocab_size", 0))
