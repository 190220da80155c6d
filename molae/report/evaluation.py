"""The tables of ``molae eval`` and ``molae finetune``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from molae.report.units import size_text

if TYPE_CHECKING:
    from molae.hf.compare import Comparison
    from molae.hf.evaluate import Evaluation
    from molae.train import Finetuned

__all__ = [
    "comparison_view",
    "evaluation_view",
    "finetuned_view",
    "steps_progress",
    "windows_progress",
]


def evaluation_view(path: str, score: Evaluation, peak: Mapping[str, int]) -> RenderableType:
    """One line for the checkpoint, and what was run."""
    table = _scores()
    _add_score(table, path, score)
    return Group(table, _remarks(score, peak))


def comparison_view(
    path: str, against: str, found: Comparison, peak: Mapping[str, int]
) -> RenderableType:
    """One line for each checkpoint, and how far apart they are."""
    table = _scores()
    _add_score(table, path, found.model)
    _add_score(table, against, found.against)
    apart = Table.grid(padding=(0, 2))
    for name, value in (
        ("loss, PATH less PATH2", f"{_pm(found.loss_difference, found.loss_difference_se)} nats"),
        ("KL(PATH2 || PATH)", f"{_pm(found.kl, found.kl_se)} nats a token"),
        ("KL(PATH || PATH2)", f"{_pm(found.kl_reverse, found.kl_reverse_se)} nats a token"),
        (
            "same most likely token",
            f"{found.agreement:.2%} ± {found.agreement_se:.2%} of the tokens",
        ),
    ):
        apart.add_row(name, value)
    return Group(table, apart, Text(), _remarks(found.model, peak))


def finetuned_view(found: Finetuned) -> RenderableType:
    """What a training did."""
    share = found.trained_parameters / found.parameters
    lines = [
        f"{found.steps:,} steps on {found.learned_tokens:,} tokens to learn; trained "
        f"{found.trained_parameters:,} of {found.parameters:,} numbers ({share:.2%})."
    ]
    if found.losses:
        lines += [f"Loss {found.losses[0][1]:.4g} at first, {found.losses[-1][1]:.4g} at the end."]
    return Text("\n".join(lines))


@contextlib.contextmanager
def windows_progress(console: Console | None) -> Iterator[Callable[[int, int], object] | None]:
    """A bar over the windows, which appears with the first of them; None shows nothing."""
    with _bar(console, "windows") as show:
        yield show


@contextlib.contextmanager
def steps_progress(
    console: Console | None,
) -> Iterator[Callable[[int, int, float | None], object] | None]:
    """A bar over the steps of a training, with the last loss; None shows nothing."""
    with _bar(console, "steps") as show:
        if show is None:
            yield None
        else:
            yield lambda done, total, loss: show(
                done, total, "steps" if loss is None else f"steps, loss {loss:.4f}"
            )


@contextlib.contextmanager
def _bar(console: Console | None, what: str) -> Iterator[Callable[..., object] | None]:
    if console is None:
        yield None
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(what, total=None)

    def show(done: int, total: int, text: str = what) -> None:
        bar.start()
        bar.update(task, completed=done, total=total, description=text)

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()


def _scores() -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("", overflow="fold")
    for name in ("perplexity", "loss, nats", "tokens/s"):
        table.add_column(name, justify="right")
    return table


def _add_score(table: Table, path: str, score: Evaluation) -> None:
    table.add_row(
        path,
        f"{score.perplexity:.3f} ± {score.perplexity_se:.3f}",
        f"{score.loss:.4f} ± {score.loss_se:.4f}",
        f"{score.tokens_per_second:,.0f}",
    )


def _pm(mean: float, error: float) -> str:
    return f"{mean:.4g} ± {error:.2g}"


def _remarks(score: Evaluation, peak: Mapping[str, int]) -> Text:
    where = {"resident": "in RAM", "gpu": "on the GPU"}
    memory = ", ".join(f"{size_text(count)} {where[name]}" for name, count in peak.items())
    return Text(
        f"On {score.tokens:,} tokens in {score.windows:,} windows, {score.threads} threads; "
        f"peak memory {memory}.\n± is one standard error, from the spread of the windows."
    )
