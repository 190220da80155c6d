"""The loss of a batch: of its own tokens, of a teacher's distributions, or of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from molae.train.examples import IGNORED

__all__ = [
    "Head",
    "Target",
    "Teacher",
    "TeacherBeside",
    "distilling_loss",
    "divergence",
    "learned_states",
    "log_probabilities",
    "pieces",
]

#: Positions whose logits are held at once: a vocabulary is wide.
LOGITS = 1024


class Target(NamedTuple):
    """Distributions of a teacher at n positions, whole or in part.

    Attributes
    ----------
    log_probabilities : (n, V) or (n, N) tensor
    tokens : (n, N) tensor of integers, or None
        Whose they are; None for all in their order.
    rest : (n,) tensor, or None
        Log of the mass of all other tokens; None where there are none.
    """

    log_probabilities: torch.Tensor
    tokens: torch.Tensor | None = None
    rest: torch.Tensor | None = None


class Teacher(Protocol):
    """What gives the distributions that a model learns."""

    def targets(self, inputs: Mapping[str, Any]) -> Callable[[slice], Target]:
        """Of a batch: of some of its learned positions, as `learned_states` orders them."""
        ...


class TeacherBeside:
    """A teacher that is in memory with the model, and answers whenever it is asked."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @torch.no_grad()
    def targets(self, inputs: Mapping[str, Any]) -> Callable[[slice], Target]:
        """See `Teacher`."""
        hidden, _, _ = learned_states(self._model, inputs)
        head = Head.of(self._model)
        return torch.no_grad()(lambda some: Target(log_probabilities(head, hidden[some])))


class Head(NamedTuple):
    """The weights that make logits of hidden states."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, model: Any) -> Head:
        """Those of a model that was just run.

        The weights and not their module, whose call belongs to the model's own one where a
        wrapper gathers them from several processes.
        """
        module = getattr(model, "module", model).get_output_embeddings()
        if isinstance(module, FSDPModule):
            module.unshard()  # nothing to do where they still lie gathered
        return cls(module.weight, module.bias)


def distilling_loss(
    model: nn.Module, teacher: Teacher | None, inputs: Mapping[str, Any], distill: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss summed over the tokens that are learned, and how many these are.

    ``distill · KL(teacher, model) + (1 − distill) · (−log p)``, a few positions at a time, forward
    and backward, so that no more than `LOGITS` rows of the vocabulary are in memory.
    """
    hidden, labels, learned = learned_states(model, inputs)
    head = Head.of(model)
    targets = None if teacher is None or distill == 0 else teacher.targets(inputs)
    total = hidden.new_zeros((), dtype=torch.float32)
    for some in pieces(len(labels)):
        own = None if targets is None else targets(some)
        total = total + checkpoint(
            _piece_loss, head, hidden[some], labels[some], own, distill, use_reentrant=False
        )
    return total, learned.sum()


def learned_states(
    model: nn.Module, inputs: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a batch the last hidden states (n, D) before learned tokens, these tokens, and where.

    Row by row; the last, of booleans, has an entry for each place but the first of every row.
    """
    call = {name: inputs[name] for name in ("input_ids", "position_ids")}
    # By the whole model's own call, which is what wrappers for several processes look out for.
    out = model(**call, use_cache=False, output_hidden_states=True, logits_to_keep=1)
    hidden = out.hidden_states[-1][:, :-1].flatten(0, 1)
    labels = inputs["labels"][:, 1:].flatten()
    learned = labels != IGNORED
    return hidden[learned], labels[learned], learned


def pieces(count: int) -> Iterator[slice]:
    """Of so many positions a few at a time."""
    return (slice(at, at + LOGITS) for at in range(0, count, LOGITS))


def log_probabilities(head: Head, hidden: torch.Tensor) -> torch.Tensor:
    """(n, V) of the next token."""
    return functional.log_softmax(functional.linear(hidden, *head).float(), dim=-1)


def divergence(theirs: Target, mine: torch.Tensor) -> torch.Tensor:
    """KL(teacher, model), summed over n positions.

    Of a target in part it is that of N + 1 events, its tokens and all others together, which is
    never more than that of the whole distributions.

    Parameters
    ----------
    theirs : Target
    mine : (n, V) tensor
        Log-probabilities of the model.
    """
    if theirs.tokens is None:
        return _divergence(theirs.log_probabilities, mine)
    tokens = theirs.tokens
    total = _divergence(theirs.log_probabilities, mine.gather(1, tokens))
    if theirs.rest is not None:
        others = mine.scatter(1, tokens, -torch.inf).logsumexp(1)
        total = total + _divergence(theirs.rest, others)
    return total


def _divergence(theirs: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
    return functional.kl_div(mine, theirs, log_target=True, reduction="sum")


def _piece_loss(
    head: Head,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    theirs: Target | None,
    distill: float,
) -> torch.Tensor:
    mine = log_probabilities(head, hidden)
    if theirs is None:
        return functional.nll_loss(mine, labels, reduction="sum")
    loss = distill * divergence(theirs, mine)
    if distill < 1:
        loss = loss + (1 - distill) * functional.nll_loss(mine, labels, reduction="sum")
    return loss
