"""What the tests of fine-tuning share: small checkpoints, a text, settings of quick runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import molae
import molae.demo
from molae.hf import latent_model
from molae.hf.opening import open_model
from molae.train import FinetuneConfig

DEMO = molae.demo.CHECKPOINT


def write_text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text(molae.demo.HELDOUT.read_text()[:6000])
    return path


def compressed_demo(folder: Path) -> Path:
    """The demonstration's model with two of four experts compressed, vectors of 1."""
    model, tokenizer = open_model(DEMO)
    new = latent_model(model.config, num_compressed=2)
    new.load_state_dict(model.state_dict(), strict=False)
    new.save_pretrained(folder / "dst")
    tokenizer.save_pretrained(folder / "dst")
    return folder / "dst"


def factored_demo(folder: Path) -> Path:
    """The demonstration's model with factors."""
    molae.convert(DEMO, folder / "dst", molae.ConvertConfig(size=0.6))
    return folder / "dst"


def settings(**options: Any) -> FinetuneConfig:
    return FinetuneConfig(
        **{"steps": 6, "batch_size": 2, "length": 64, "learning_rate": 1e-2, "save_every": 2,
           **options}
    )  # fmt: skip


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}
