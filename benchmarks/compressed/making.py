"""Each row's model, made from the original."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import molae
from benchmarks.compressed.forms import FORMS
from benchmarks.quality.model import Source, load
from molae.convert import convert
from molae.hf import LatentExperts
from molae.train import FinetuneConfig, finetune

__all__ = ["Bench", "Training"]


@dataclass(frozen=True)
class Training:
    """How rows are trained: the same steps for all.

    Attributes
    ----------
    steps : int
    rate : float
        Where all weights are tuned.
    light_rates : mapping of str to float
        Where only what acts in the experts' place is, by its form: vectors begin at 1, the others
        at the scale of weights.
    """

    steps: int
    rate: float
    batch_size: int = 8
    light_rates: Mapping[str, float] = field(
        default_factory=lambda: {"vectors": 3e-2, "additive": 1e-3, "narrow-8": 3e-3}
    )


@dataclass(frozen=True, eq=False)
class Bench(Source):
    """What every row is made of.

    Attributes
    ----------
    text : Path
        To train with; that of `tokens`.
    work : Path
    training : Training
    """

    text: Path
    work: Path
    training: Training

    def make(self, form: str, stage: str, size: float, n: int) -> tuple[Any, dict[str, Any]]:
        """The model of a row, and facts about it."""
        if stage in ("distilled", "tuned", "from-1"):
            folder = self._trained(form, stage, size, n)
        else:
            folder = self._fitted(form, size, n)
        model, _ = load(folder)
        found = molae.inspect(folder)
        active = found.active_parameters
        if form == "plain":  # vectors of 1, which nobody needs
            _at_one(model)
            own = found.factored.light.numbers(F=found.letters["F"], D=found.letters["D"])
            active -= sum(found.factored.compressed.values()) * own
        return model, {"active_parameters": active, "expert_parameters": found.expert_parameters}

    def _fitted(self, form: str, size: float, n: int) -> Path:
        """The checkpoint before any training; it is made once."""
        if form == "stock":
            return self._stock(size, n)
        if form == "full":
            n = 0
        if size == 1 and n == 0:
            return self.path
        uniform = form in FORMS and FORMS[form].uniform
        light = (FORMS[form].light if form in FORMS else None) or "vectors"
        name = f"{size:g}-{n}-{light}{'-even' * uniform}"
        dst = self.work / name.replace("/", "_").replace(":", "_")
        if not (dst / "config.json").exists():
            config = molae.ConvertConfig(
                size=size, compressed_experts=n, light_module=light, uniform=uniform
            )
            with self.calibration() as calibration:
                stats = self.work / "measured.stats"
                convert(self.path, dst, config, calibration=calibration, stats=stats)
        return dst

    def _stock(self, size: float, n: int) -> Path:
        """The router chooses fewer, and weighs them as it does."""
        dst = self.work / f"{size:g}-{n}-stock"
        if not dst.exists():
            part = dst.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(self._fitted("full", size, 0), part)
            config = json.loads((part / "config.json").read_text())
            config["num_experts_per_tok"] -= n
            (part / "config.json").write_text(json.dumps(config))
            part.replace(dst)
        return dst

    def _trained(self, form: str, stage: str, size: float, n: int) -> Path:
        src = self._fitted(form, size, n)
        if stage == "from-1":
            at_one = self.work / "at-one"
            shutil.rmtree(at_one, ignore_errors=True)
            model, tokenizer = load(src)
            _at_one(model)
            model.save_pretrained(at_one)
            tokenizer.save_pretrained(at_one)
            src = at_one
        steps, light = self.training.steps, stage == "distilled"
        config = FinetuneConfig(
            train="light" if light else "all",
            steps=steps,
            learning_rate=self.training.light_rates[form] if light else self.training.rate,
            batch_size=self.training.batch_size,
            length=self.length,
            save_every=10**6,
        )
        dst = self.work / "trained"
        finetune(src, dst, self.text, config, teacher=self.path if light else None, overwrite=True)
        return dst


def _at_one(model: Any) -> None:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LatentExperts) and module.compressed is not None:
                module.compressed.fill_(1.0)
