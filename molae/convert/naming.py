"""Errors of the kernels, told in the names that a user knows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from molae.arch import Model
from molae.errors import NonFiniteError

__all__ = ["named"]


@contextlib.contextmanager
def named(
    model: Model, layer: int, kind: str, experts: Sequence[int] | None = None
) -> Iterator[None]:
    """Let a `NonFiniteError` inside name tensor, expert and layer.

    `experts` are the experts' numbers in the layer where only some of them are at work.
    """
    try:
        yield
    except NonFiniteError as error:
        if getattr(error, "tensor", None) is not None:  # met while decoding, and says it all
            raise
        what = str(error).rpartition(": ")[2]
        kind = getattr(error, "kind", kind)  # where several types are worked on at once
        at = error.expert
        if at is None:
            raise NonFiniteError(
                f"layer {layer}, {kind}: {what}; check the source checkpoint"
            ) from error
        expert = at if experts is None else experts[at]
        names = model.expert_tensors(layer, kind)
        name = names[expert] if len(names) > 1 else f"{names[0]}[{expert}]"
        renamed = NonFiniteError(
            f"{name}: {what} (expert {expert} of layer {layer}, {kind}); "
            "check the source checkpoint, or download it again"
        )
        renamed.expert = expert
        raise renamed from error
