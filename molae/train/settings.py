"""How a checkpoint is trained further, and what a training did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from molae.config import refuse_nonsense
from molae.errors import ArgumentError

__all__ = ["FinetuneConfig", "Finetuned", "Part"]

Part = Literal["all", "experts", "router", "light"]


@dataclass(frozen=True)
class FinetuneConfig:
    """How a checkpoint is trained further.

    Attributes
    ----------
    train : {'all', 'experts', 'router', 'light'}
        Which weights: all; the routed experts (factors, dense ones, and what acts in the place
        of compressed ones); the routers; or only what acts in the place of compressed experts.
    epochs : float
        Passes over the data, where `steps` does not say it.
    steps : int, optional
    learning_rate : float
        Falls on a cosine, after a warm-up over the share `warmup` of the steps.
    warmup : float
    weight_decay : float
    batch_size : int
        Rows a step, of all processes together.
    length : int
        Tokens of a row.
    distill : float
        With a teacher the share of its distributions in the loss: the rest is the texts'.
    teacher_top_k : int, optional
        Of the teacher's distributions only the so many most likely tokens and the mass of the
        rest, computed once and kept in files, so that the teacher is gone before the model comes.
        None has both in memory.
    lora : int, optional
        Rank of adapters, which alone are trained, and in the end merged into the weights: on
        the routed experts' factors and dense matrices, and with `train` all also on every
        linear layer but the head. They want a higher rate than whole weights.
    lora_alpha : float
        What an adapter adds is scaled by lora_alpha/lora.
    seed : int
    save_every : int
        Steps between checkpoints from which a run may go on.

    Notes
    -----
    Rates and epochs are by default those of the compressed experts' paper, arXiv 2503.00634.

    Examples
    --------
    >>> from molae.train import FinetuneConfig
    >>> FinetuneConfig(train="light", steps=300).learning_rate
    2e-05
    """

    train: Part = "all"
    epochs: float = 2.0
    steps: int | None = None
    learning_rate: float = 2e-5
    warmup: float = 0.03
    weight_decay: float = 0.0
    batch_size: int = 8
    length: int = 1024
    distill: float = 1.0
    teacher_top_k: int | None = None
    lora: int | None = None
    lora_alpha: float = 16.0
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        if self.train not in ("all", "experts", "router", "light"):
            raise ArgumentError(
                f"train: expected all, experts, router or light, got {self.train!r}"
            )
        good = {
            "epochs": self.epochs > 0,
            "steps": self.steps is None or self.steps >= 1,
            "learning_rate": self.learning_rate > 0,
            "warmup": 0 <= self.warmup < 1,
            "weight_decay": self.weight_decay >= 0,
            "batch_size": self.batch_size >= 1,
            "length": self.length >= 2,
            "distill": 0 <= self.distill <= 1,
            "teacher_top_k": self.teacher_top_k is None or self.teacher_top_k >= 1,
            "lora": self.lora is None or self.lora >= 1,
            "lora_alpha": self.lora_alpha > 0,
            "save_every": self.save_every >= 1,
        }
        refuse_nonsense(self, good)
        if self.lora is not None and self.train not in ("all", "experts"):
            raise ArgumentError(
                f"lora: adapters go on all or experts, not on {self.train}, which is small: train "
                "it itself"
            )


@dataclass(frozen=True)
class Finetuned:
    """What a run did.

    Attributes
    ----------
    steps, trained_parameters, parameters : int
    learned_tokens : int
        Of the data, once over it.
    losses : list of [int, float]
        Steps, and the mean loss up to them since the one before.
    """

    steps: int
    trained_parameters: int
    parameters: int
    learned_tokens: int
    losses: list[list[float]]
