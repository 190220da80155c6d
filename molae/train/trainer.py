"""The Trainer of Transformers with molae's loss, and checkpoints to go on from."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from molae.errors import ArgumentError, CheckpointError, NonFiniteError
from molae.train.loss import Teacher, distilling_loss
from molae.train.settings import FinetuneConfig

__all__ = [
    "gather_parameters",
    "make_arguments",
    "make_trainer",
    "quiet",
    "set_parameters",
    "sharding_is_asked",
    "trained_parameters",
]

#: Of a checkpoint to go on from.
WEIGHTS = "parameters.safetensors"

#: In the names of a layer whose activations are computed again in the backward pass.
WRAPPED = "_checkpoint_wrapped_module"


def make_arguments(config: FinetuneConfig, rows: int, work: Path, device: Any) -> Any:
    """Those of the Trainer, which finds out with them how many processes there are.

    Raises
    ------
    molae.errors.ArgumentError
        The rows of a batch cannot be shared evenly, or the model not in the way asked for.
    """
    from transformers import TrainingArguments

    if sharding_is_asked():
        _prepare_sharding()
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
        use_cpu=torch.device(device).type == "cpu",
    )


def make_trainer(
    model: Any,
    teacher: Teacher | None,
    rows: Dataset[dict[str, torch.Tensor]],
    config: FinetuneConfig,
    arguments: Any,
    progress: Callable[[int, int, float | None], object] | None,
) -> Any:
    """A Trainer, whose checkpoints hold what is trained and nothing else of the model."""
    from transformers import Trainer, TrainerCallback

    work = arguments.output_dir

    class Distilling(Trainer):
        model_accepts_loss_kwargs = True

        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            if sharding_is_asked():
                _share_on_cpus(self.accelerator.state)
                self.is_fsdp_enabled = self.accelerator.is_fsdp2

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

        # Checkpoints to go on from hold parameters by the names of the model itself: the way
        # through the names of the files, which the Trainer takes, loses those of experts.
        def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
            if self.is_fsdp_enabled:
                return  # accelerate keeps each process's part, beside the optimizer's
            folder = Path(str(output_dir or self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            model: Any = self.model
            own = trained_parameters(model)
            save_file({name: p.detach().contiguous() for name, p in own.items()}, folder / WEIGHTS)

        def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
            if self.is_fsdp_enabled:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                return
            into: Any = model or self.model
            set_parameters(into, load_file(Path(resume_from_checkpoint) / WEIGHTS))

    class Telling(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step >= state.max_steps:
                raise _DoneBefore

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            last = next((e["loss"] for e in reversed(state.log_history) if "loss" in e), None)
            if progress is not None and state.is_world_process_zero:
                progress(state.global_step, state.max_steps, last)

    trainer = Distilling(model=model, args=arguments, train_dataset=rows, callbacks=[Telling()])
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    return trainer


class _DoneBefore(Exception):
    """The checkpoint to go on from is that of the last step."""


def train(trainer: Any, going_on: str | None) -> None:
    """Take the steps that are left; where there are none the Trainer would take one more."""
    with quiet(), contextlib.suppress(_DoneBefore):
        trainer.train(resume_from_checkpoint=going_on)


def sharding_is_asked() -> bool:
    """Whether accelerate's settings, which it hands on in the environment, are for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def _share_on_cpus(state: Any) -> None:
    """Let accelerate share models on CPUs.

    Its state takes FSDP up on every kind of accelerator, and on CPUs leaves it out without a word,
    so that each process would keep the whole model.
    """
    from accelerate import DistributedType
    from accelerate.utils import FullyShardedDataParallelPlugin

    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()


def _prepare_sharding() -> None:
    """Settings of accelerate's under which it can share a model among processes.

    Raises
    ------
    molae.errors.ArgumentError
        The older kind was asked for.
    """
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ArgumentError("fsdp_version: only 2 is supported; say so in accelerate's settings")
    # Every process reads the model. Where one alone does, accelerate hands out what is in the
    # state dict as if all of it were sharded, which buffers such as the factors' `perm` are not.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def gather_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """What learns, whole and on the CPU, by its names in the model before it was shared.

    Every process has to call it.
    """
    found = {}
    for name, parameter in trained_parameters(model).items():
        value = parameter.detach()
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        found[name.replace(f"{WRAPPED}.", "")] = whole.cpu()
    return found


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What learns, by its names in the model."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def set_parameters(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Give what learns in a model the values of a checkpoint.

    Raises
    ------
    molae.errors.CheckpointError
        The checkpoint is of other parameters.
    """
    own = trained_parameters(model)
    if own.keys() != values.keys():
        name = min(own.keys() ^ values.keys())
        raise CheckpointError(f"{name}: the checkpoint to go on from is of another training")
    for name, parameter in own.items():
        parameter.copy_(values[name])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what Transformers says of its own folders, and torch of what is not done here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FSDP2-wrapped .* returned a view", UserWarning)
            yield
    finally:
        logging.set_verbosity(before)
