"""Fine-tuning on texts, conversations, or what a teacher answers, by the Trainer of Transformers.

What is trained may be everything, the experts, their routers, or what acts in the place of
compressed experts. A run that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from molae.errors import ArgumentError, DestinationError, MissingExtraError, NonFiniteError
from molae.hf.experts import LatentExperts, NarrowExperts
from molae.hf.opening import open_model
from molae.train.examples import IGNORED, Packed, pack, read_examples

__all__ = ["FinetuneConfig", "Finetuned", "finetune", "select_parameters"]

Part = Literal["all", "experts", "router", "light"]

#: Positions whose logits are held at once: a vocabulary is wide.
LOGITS = 1024

#: Of a checkpoint to go on from.
WEIGHTS = "parameters.safetensors"

#: What a run leaves in its result.
LOG, PICTURE = "finetune.json", "finetune.png"


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
            "save_every": self.save_every >= 1,
        }
        for name, fine in good.items():
            if not fine:
                raise ArgumentError(f"{name}: {getattr(self, name)!r} makes no sense")


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


def select_parameters(model: nn.Module, part: Part) -> int:
    """Let only these weights of a model learn; see `FinetuneConfig`.

    Returns
    -------
    int
        How many numbers they are.

    Raises
    ------
    molae.errors.ArgumentError
        The model has no such weights.

    Examples
    --------
    >>> import molae.demo
    >>> from molae.hf.opening import open_model
    >>> from molae.train import select_parameters
    >>> model, _ = open_model(molae.demo.CHECKPOINT)
    >>> select_parameters(model, "router")  # three of 32 experts, each of a hidden size of 128
    12288
    """
    model.requires_grad_(part == "all")
    if part != "all":
        for own in _selected(model, part):
            own.requires_grad_(True)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not count:
        what = {"light": "compressed experts", "experts": "latent or compressed experts"}
        raise ArgumentError(f"train: the model has no {what.get(part, 'routers')}")
    return count


def _selected(model: nn.Module, part: Part) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if part == "router":
            experts = getattr(module, "experts", None)
            gate = getattr(module, "gate", None) or getattr(module, "router", None)
            if experts is not None and isinstance(gate, nn.Module):
                yield from gate.parameters()
        elif isinstance(module, LatentExperts):
            if part == "experts" or isinstance(module, NarrowExperts):
                yield from module.parameters()
            elif module.compressed is not None:
                yield module.compressed
        elif part == "experts" and isinstance(getattr(module, "down_proj", None), nn.Parameter):
            yield from module.parameters()


def finetune(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    data: str | os.PathLike[str],
    config: FinetuneConfig | None = None,
    *,
    teacher: str | os.PathLike[str] | None = None,
    dtype: Any = "float32",
    device: Any = "cpu",
    overwrite: bool = False,
    progress: Callable[[int, int, float | None], object] | None = None,
) -> Finetuned:
    """Train a checkpoint further.

    Parameters
    ----------
    src : str or path
        Folder of a checkpoint with its tokenizer, ordinary or converted, or a hub id.
    dst : str or path
        Folder of the result. A run that was interrupted leaves its checkpoints beside it, and
        the same call goes on from the last of them.
    data : str or path
        As `molae.train.examples.read_examples` reads it.
    config : FinetuneConfig, optional
    teacher : str or path, optional
        A checkpoint whose distributions of the next token are learned, such as the original:
        the loss has their Kullback-Leibler divergence KL(teacher, model).
    dtype : str or torch.dtype
        That the model is trained in. The teacher has that of its files.
    device : str or torch.device
    overwrite : bool
        Replace a result, or a run with other settings.
    progress : callable, optional
        Is told steps done, steps in all, and the last loss.

    Returns
    -------
    Finetuned
        Also in ``dst``, as ``finetune.json``, with a plot of the loss where matplotlib is.

    Raises
    ------
    molae.errors.ArgumentError
        The data, or a setting, makes no sense; the teacher has another vocabulary.
    molae.errors.DestinationError
        `dst` has something in it.
    molae.errors.NonFiniteError
        The loss became NaN or Inf; the step is named, and the last checkpoint stays.
    molae.errors.MissingExtraError
        The Trainer needs accelerate.
    """
    config = config or FinetuneConfig()
    _need_accelerate()
    dst = Path(dst)
    work = dst.with_name(dst.name + ".training")
    if dst.exists() and not overwrite:
        raise DestinationError(f"{dst}: there is something already; --overwrite replaces it")
    model, tokenizer = open_model(src, dtype=dtype, device=device)
    trained = select_parameters(model, config.train)
    limit = getattr(model.config, "max_position_embeddings", None) or config.length
    examples = read_examples(data, tokenizer)
    filler = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    rows = pack(examples, min(config.length, limit), filler=filler)
    guide = None if teacher is None else _teacher(teacher, tokenizer, device)
    arguments = _arguments(config, len(rows), work, model)
    digest = _digest(config, src, teacher, dtype, rows)
    with arguments.main_process_first():
        going_on = _prepare(work, digest, overwrite)
    trainer = _trainer(model, guide, rows, config, arguments, progress)
    with _quiet():
        trainer.train(resume_from_checkpoint=going_on)
    found = Finetuned(
        steps=int(trainer.state.global_step),
        trained_parameters=trained,
        parameters=sum(p.numel() for p in model.parameters()),
        learned_tokens=rows.learned,
        losses=[[int(e["step"]), float(e["loss"])] for e in trainer.state.log_history
                if "loss" in e],
    )  # fmt: skip
    if trainer.is_world_process_zero():
        _write(model, tokenizer, dst, work, found, config)
    return found


# ---------------------------------------------------------------------- the loss


def distilling_loss(
    model: nn.Module, teacher: nn.Module | None, inputs: Mapping[str, Any], distill: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss summed over the tokens that are learned, and how many these are.

    ``distill · KL(teacher, model) + (1 − distill) · (−log p)``, a few positions at a time, forward
    and backward, so that no more than `LOGITS` rows of the vocabulary are in memory.
    """
    call = {name: inputs[name] for name in ("input_ids", "position_ids")}
    hidden = _hidden(model, call)[:, :-1].flatten(0, 1)
    labels = inputs["labels"][:, 1:].flatten()
    learned = labels != IGNORED
    hidden, labels = hidden[learned], labels[learned]
    theirs = None
    if teacher is not None and distill > 0:
        with torch.no_grad():
            theirs = _hidden(teacher, call)[:, :-1].flatten(0, 1)[learned]
    total = hidden.new_zeros((), dtype=torch.float32)
    for at in range(0, len(labels), LOGITS):
        some = slice(at, at + LOGITS)
        own = None if theirs is None else _log_probabilities(teacher, theirs[some])
        total = total + checkpoint(
            _chunk_loss, model, hidden[some], labels[some], own, distill, use_reentrant=False
        )
    return total, learned.sum()


def _chunk_loss(
    model: nn.Module,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    theirs: torch.Tensor | None,
    distill: float,
) -> torch.Tensor:
    mine = _log_probabilities(model, hidden)
    if theirs is None:
        return functional.nll_loss(mine, labels, reduction="sum")
    loss = distill * functional.kl_div(mine, theirs, log_target=True, reduction="sum")
    if distill < 1:
        loss = loss + (1 - distill) * functional.nll_loss(mine, labels, reduction="sum")
    return loss


def _hidden(model: Any, call: Mapping[str, Any]) -> torch.Tensor:
    # By the whole model's own call, which is what wrappers for several processes look out for.
    out = model(**call, use_cache=False, output_hidden_states=True, logits_to_keep=1)
    last: torch.Tensor = out.hidden_states[-1]
    return last


def _log_probabilities(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    head = getattr(model, "module", model).get_output_embeddings()
    return functional.log_softmax(head(hidden).float(), dim=-1)


# -------------------------------------------------------------------- the Trainer


def _arguments(config: FinetuneConfig, rows: int, work: Path, model: Any) -> Any:
    """Those of the Trainer, which finds out with them how many processes there are."""
    from transformers import TrainingArguments

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch_size % processes:
        raise ArgumentError(
            f"batch_size: {config.batch_size} rows cannot be shared evenly by {processes} processes"
        )
    steps = config.steps or math.ceil(config.epochs * math.ceil(rows / config.batch_size))
    return TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=config.batch_size // processes,
        max_steps=steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(config.warmup * steps),
        weight_decay=config.weight_decay,
        seed=config.seed,
        logging_steps=max(1, min(10, steps // 20)),
        save_steps=config.save_every,
        save_total_limit=1,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=next(model.parameters()).device.type == "cpu",
    )


def _trainer(
    model: Any,
    teacher: Any,
    rows: Packed,
    config: FinetuneConfig,
    arguments: Any,
    progress: Callable[[int, int, float | None], object] | None,
) -> Any:
    from transformers import Trainer, TrainerCallback

    work = arguments.output_dir

    class Distilling(Trainer):
        model_accepts_loss_kwargs = True

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:  # fmt: skip
            total, learned = distilling_loss(model, teacher, inputs, config.distill)
            if num_items_in_batch is None:
                loss = total / learned
            else:  # of all processes, whose gradients are then averaged
                loss = total * self.accelerator.num_processes / num_items_in_batch
            if not torch.isfinite(value := loss.detach()):
                raise NonFiniteError(
                    f"step {self.state.global_step + 1}: the loss is {float(value):g}; the last "
                    f"checkpoint is in {work}; take a smaller --learning-rate"
                )
            return (loss, None) if return_outputs else loss

        # Checkpoints to go on from hold the parameters by the names of the model itself: the way
        # through the names of the files, which the Trainer takes, loses those of experts.
        def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
            folder = Path(str(output_dir or self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            model: Any = self.model
            values = model.state_dict() if state_dict is None else state_dict
            own = {name: tensor.detach().contiguous().clone() for name, tensor in values.items()}
            save_file(own, folder / WEIGHTS)

        def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
            values = load_file(Path(resume_from_checkpoint) / WEIGHTS)
            into: Any = model or self.model
            into.load_state_dict(values, strict=True)

    class Telling(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            last = next((e["loss"] for e in reversed(state.log_history) if "loss" in e), None)
            if progress is not None and state.is_world_process_zero:
                progress(state.global_step, state.max_steps, last)

    trainer = Distilling(model=model, args=arguments, train_dataset=rows, callbacks=[Telling()])
    quiet = [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"]
    for callback in quiet:
        trainer.remove_callback(callback)
    return trainer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what Transformers says of its own folders."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _need_accelerate() -> None:
    if find_spec("accelerate") is None:
        raise MissingExtraError(
            "fine-tuning needs accelerate, for the Trainer; run: pip install 'molae[train]'"
        )


def _teacher(path: str | os.PathLike[str], tokenizer: Any, device: Any) -> Any:
    guide, other = open_model(path, dtype="auto", device=device)
    if other.get_vocab() != tokenizer.get_vocab():
        raise ArgumentError(
            f"teacher: {path} has another tokenizer than the model, so that their distributions "
            "are of different tokens"
        )
    return guide.eval().requires_grad_(False)


# ------------------------------------------------------------------------- files


def _digest(config: FinetuneConfig, src: Any, teacher: Any, dtype: Any, rows: Packed) -> str:
    data = hashlib.sha256()
    for i in range(len(rows)):
        data.update(rows[i]["input_ids"].numpy().tobytes())
        data.update(rows[i]["labels"].numpy().tobytes())
    places = [os.fspath(src), teacher and os.fspath(teacher)]
    facts = [dataclasses.asdict(config), *places, str(dtype)]
    return hashlib.sha256(json.dumps([*facts, data.hexdigest()]).encode()).hexdigest()


def _prepare(work: Path, digest: str, overwrite: bool) -> bool:
    """Whether there is a checkpoint of the same run to go on from."""
    note = work / "run.txt"
    if work.exists():
        same = note.is_file() and note.read_text() == digest
        if not same and not overwrite:
            raise DestinationError(
                f"{work}: an unfinished run with other settings or data; --overwrite replaces it"
            )
        if same:
            return any(work.glob("checkpoint-*/trainer_state.json"))
        shutil.rmtree(work)
    work.mkdir(parents=True)
    note.write_text(digest)
    return False


def _write(
    model: Any,
    tokenizer: Any,
    dst: Path,
    work: Path,
    found: Finetuned,
    config: FinetuneConfig,
) -> None:
    """All of it in a folder beside, then in one step where it belongs."""
    made = work / "result"
    if made.exists():
        shutil.rmtree(made)
    model.requires_grad_(True)
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    facts = {**dataclasses.asdict(config), **dataclasses.asdict(found)}
    (made / LOG).write_text(json.dumps(facts, indent=2) + "\n")
    _plot(found, made / PICTURE)
    if dst.exists():
        shutil.rmtree(dst)
    made.replace(dst)
    shutil.rmtree(work)


def _plot(found: Finetuned, path: Path) -> None:
    if find_spec("matplotlib") is None or not found.losses:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*found.losses, strict=True), color="#1f77b4")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
