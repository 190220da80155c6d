"""Method ``molae``: the two steps of the paper, arXiv 2503.23100.

First each expert is replaced by its best rank-R approximation, then the experts
of a group are factored together. As published: gate and up only, groups in index
order, plain factors, R = min(F, D). ``down_proj`` stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from molae.arch import Model
from molae.config import ConvertConfig
from molae.convert.allocation import Allocation, Measure, group_size, split_numbers
from molae.convert.fitting import Method, fit_two_steps
from molae.errors import ArgumentError
from molae.factored import Form, Split, index_groups
from molae.fit import stored_numbers

__all__ = ["METHOD"]

FORM: Form = "plain"
KINDS = ("gate_proj", "up_proj")

#: Group size a type, and the rank of all.
Option = tuple[dict[str, int], int]


def allocate(model: Model, config: ConvertConfig, probe: Measure) -> Allocation:
    """Groups and ranks: what is not given is chosen so that the size is reached.

    Raises
    ------
    ArgumentError
        A rank above min(F, D), a group larger than E, a setting for ``down_proj``,
        or a size that this method cannot reach; the message lists sizes that it can.
    """
    E, F, D = (model.letters[letter] for letter in "EFD")
    full = min(F, D)
    if isinstance(config.group_size, Mapping) and "down_proj" in config.group_size:
        raise ArgumentError("group_size: method 'molae' leaves down_proj as it is")
    asked = {kind: group_size(config, kind, E) for kind in KINDS}
    if config.rank is not None and config.rank > full:
        raise ArgumentError(f"rank: at most min(F, D) = {full}, got {config.rank}")

    if config.size == 1.0 and config.rank is None:
        return Allocation(FORM, {})
    size = config.target_size
    options = list(_options(config, asked, E, full))
    reached = [_reached(model, sizes, rank) for sizes, rank in options]
    for (sizes, rank), share in zip(options, reached, strict=True):
        if size is None or share <= size:
            return _allocation(model, sizes, rank)
    raise ArgumentError(
        f"size: method 'molae' cannot reach {size:g} here; it reaches "
        + (
            ", ".join(
                f"{share:.4g} (groups of {'/'.join(map(str, dict.fromkeys(sizes.values())))}, "
                f"rank {rank})"
                for (sizes, rank), share in _a_few(zip(options, reached, strict=True))
            )
            or "no size below 1"
        )
    )


def _options(
    config: ConvertConfig, asked: Mapping[str, int | None], E: int, full: int
) -> Iterator[Option]:
    """Group sizes and ranks that the settings leave open, the preferred ones first."""
    given = {kind: k for kind, k in asked.items() if k is not None}
    if len(given) < len(asked):
        for k in range(1, E + 1):
            yield {kind: given.get(kind, k) for kind in asked}, config.rank or full
    elif config.rank is not None:
        yield given, config.rank
    else:
        for rank in range(full, 0, -1):
            yield given, rank


def _split(model: Model, k: int, rank: int) -> Split:
    """Groups of k in index order; one whose factors would save nothing stays dense."""
    E, F, D = (model.letters[letter] for letter in "EFD")
    groups = index_groups(E, k)
    saves = [stored_numbers(rank, len(group), F, D, FORM) < len(group) * F * D for group in groups]
    return Split(groups=groups, ranks=tuple(rank if yes else None for yes in saves))


def _reached(model: Model, sizes: Mapping[str, int], rank: int) -> float:
    """Share of the experts' numbers that is stored, down_proj as it is."""
    E, F, D = (model.letters[letter] for letter in "EFD")
    stored = sum(split_numbers(_split(model, k, rank), F=F, D=D, form=FORM) for k in sizes.values())
    return (stored + E * F * D) / (3 * E * F * D)


def _allocation(model: Model, sizes: Mapping[str, int], rank: int) -> Allocation:
    splits = {kind: _split(model, k, rank) for kind, k in sizes.items()}
    latent = {kind: split for kind, split in splits.items() if split.is_latent}
    return Allocation(FORM, dict.fromkeys(model.moe_layers, latent) if latent else {})


def _a_few(reached: Iterable[tuple[Option, float]]) -> list[tuple[Option, float]]:
    """The options that save something, one for each size; of many, some and the smallest."""
    by_size: dict[float, tuple[Option, float]] = {}
    for option, share in reached:
        if share < 1:
            by_size.setdefault(share, (option, share))
    found = [by_size[share] for share in sorted(by_size, reverse=True)]
    return found if len(found) <= 8 else [*found[:: len(found) // 6][:7], found[-1]]


METHOD = Method(
    name="molae",
    form=FORM,
    summary="the paper's two steps: gate and up only, plain factors, no data needed",
    allocate=allocate,
    fit=fit_two_steps,
)
