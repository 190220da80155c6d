"""Fine-tuning on texts, conversations, or what a teacher answers, by the Trainer of Transformers.

What is trained may be everything, the experts, their routers, or what acts in the place of
compressed experts. A run that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from molae.errors import ArgumentError, DestinationError, MissingExtraError
from molae.hf.opening import find_folder, open_model, open_tokenizer
from molae.train.adapters import add_adapters, need_peft
from molae.train.examples import pack, read_examples
from molae.train.loss import Teacher, TeacherBeside
from molae.train.results import named_troubles, prepare, rows_digest, write
from molae.train.selection import select_parameters
from molae.train.settings import FinetuneConfig, Finetuned
from molae.train.teachers import (
    Numbered,
    answers_digest,
    check_same_tokenizer,
    keep_answers,
    open_teacher,
)
from molae.train.trainer import (
    gather_parameters,
    make_arguments,
    make_trainer,
    set_parameters,
    sharding_is_asked,
    train,
    trained_parameters,
)

__all__ = ["finetune", "leave_processes"]

#: In the folder of a run.
ANSWERS = "teacher"


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
        A checkpoint whose distributions of the next token are learned, such as the original, or
        any other of the same tokenizer: the loss has their Kullback-Leibler divergence
        KL(teacher, model).
    dtype : str or torch.dtype
        That the model is trained in; it is stored in that of its source. The teacher has that of
        its files.
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
        The data, or a setting, makes no sense; the teacher has another tokenizer.
    molae.errors.DestinationError
        `dst` has something in it.
    molae.errors.NonFiniteError
        The loss became NaN or Inf; the step is named, and the last checkpoint stays.
    molae.errors.MissingExtraError
        The Trainer needs accelerate, and adapters need PEFT.
    """
    config = config or FinetuneConfig()
    _need_accelerate()
    dst = Path(dst)
    work = dst.with_name(dst.name + ".training")
    if config.lora is not None:
        need_peft()
    if dst.exists() and not overwrite:
        raise DestinationError(f"{dst}: there is something already; --overwrite replaces it")
    if config.teacher_top_k is not None and teacher is None:
        raise ArgumentError("teacher_top_k: only with a teacher")
    folder = find_folder(src)
    tokenizer = open_tokenizer(folder, src)
    if teacher is not None:
        check_same_tokenizer(teacher, tokenizer)
    source = _text_config(folder)
    length, filler = _row_length(source, config.length), _filler(tokenizer)
    rows = pack(read_examples(data, tokenizer), length, filler=filler)
    arguments = make_arguments(config, len(rows), work, device)
    of_rows, answers, kept = rows_digest(rows), "", config.teacher_top_k
    if teacher is not None and kept is not None:
        answers = answers_digest(teacher, of_rows, kept)
    places = [os.fspath(src), teacher and os.fspath(teacher)]
    facts = [dataclasses.asdict(config), *places, str(dtype), of_rows, answers]
    with named_troubles(work), arguments.main_process_first():
        going_on = prepare(work, facts, overwrite, keep={ANSWERS})
    guide: Teacher | None = None
    if teacher is not None and kept is not None:
        guide = keep_answers(
            work / ANSWERS, rows, teacher, kept, answers,
            batch_size=arguments.per_device_train_batch_size, device=device,
            writer=arguments.process_index == 0,
        )  # fmt: skip
    elif teacher is not None:
        guide = TeacherBeside(open_teacher(teacher, device))
    # A model that will be shared goes to the devices share by share.
    model = _open_to_train(src, config, dtype, "cpu" if sharding_is_asked() else device)
    trained = sum(p.numel() for p in trained_parameters(model).values())
    numbers = sum(p.numel() for p in model.parameters())
    trainer = make_trainer(
        model, guide, rows if kept is None else Numbered(rows), config, arguments, progress
    )
    with named_troubles(work):
        train(trainer, going_on)
    found = Finetuned(
        steps=int(trainer.state.global_step),
        trained_parameters=trained,
        parameters=numbers - (0 if config.lora is None else trained),
        learned_tokens=rows.learned,
        losses=[[int(e["step"]), float(e["loss"])] for e in trainer.state.log_history
                if "loss" in e],
    )  # fmt: skip
    sharded = gather_parameters(trainer.model) if trainer.is_fsdp_enabled else None
    if trainer.is_world_process_zero():
        if sharded is not None:
            model = _open_to_train(src, config, dtype, "cpu")
            set_parameters(model, sharded)
        if config.lora is not None:
            model = model.merge_and_unload()
        # What was not trained keeps its bytes, and the result its size.
        model = model.to(getattr(source, "dtype", None) or model.dtype)
        with named_troubles(work):
            write(model, tokenizer, dst, work, found, config)
    return found


def leave_processes() -> None:
    """Let go of the other processes of a run, where there are any.

    Their connections have threads, which must not be there any more when Python ends.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _open_to_train(src: Any, config: FinetuneConfig, dtype: Any, device: Any) -> Any:
    """The model, of which what is to learn does."""
    model, _ = open_model(src, dtype=dtype, device=device)
    select_parameters(model, config.train)
    if config.lora is not None:
        model = add_adapters(model, config.train, config.lora, config.lora_alpha, config.seed)
    return model


def _text_config(folder: Path) -> Any:
    """What a checkpoint's own configuration says of its language model."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return config.get_text_config()


def _row_length(config: Any, length: int) -> int:
    """No more than the model takes."""
    return min(length, getattr(config, "max_position_embeddings", None) or length)


def _filler(tokenizer: Any) -> int:
    """A token for the rest of a row."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in known if token is not None), 0)


def _need_accelerate() -> None:
    if find_spec("accelerate") is None:
        raise MissingExtraError(
            "fine-tuning needs accelerate, for the Trainer; run: pip install 'molae[train]'"
        )
