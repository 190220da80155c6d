"""What a run will do and cost, before it does it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from molae.arch import Model, dense_flops, latent_flops
from molae.config import TYPES, ConvertConfig
from molae.convert.allocation import Candidate, split_numbers
from molae.factored import VECTORS, Form, LightModule, Split, numbers_by_role
from molae.io import DTYPES
from molae.io.hub import is_hub_id

if TYPE_CHECKING:
    from molae.convert.allocation import Allocation
    from molae.convert.fitting import Method
    from molae.convert.shards import Shard

__all__ = ["Plan", "Spent", "Storage", "TypeSummary"]

ROLES = ("shared", "private", "perm", "dense")


@dataclass(frozen=True)
class Storage:
    """Numbers and bytes of one form of a model.

    Attributes
    ----------
    numbers : dict of str to dict of str to int
        By matrix type and role ('shared', 'private', 'perm', 'dense'). ``perm`` counts
        indices, which are no parameters and in no sum.
    expert_numbers, other_numbers : int
        Parameters of the routed experts, and all others.
    expert_bytes, other_bytes : int
        Bytes of the tensors, permutations included.
    flops_per_token : float
        Of the routed experts, all layers: a multiplication and an addition are two. In
        molae's form the expected number for a router that picks evenly.
    """

    numbers: Mapping[str, Mapping[str, int]]
    expert_numbers: int
    other_numbers: int
    expert_bytes: int
    other_bytes: int
    flops_per_token: float

    @property
    def total_numbers(self) -> int:
        return self.expert_numbers + self.other_numbers

    @property
    def total_bytes(self) -> int:
        return self.expert_bytes + self.other_bytes


def storage(
    model: Model,
    layers: Mapping[int, Mapping[str, Split]],
    form: Form,
    others: tuple[int, int],
    compressed: Mapping[int, int] | None = None,
    light: LightModule = VECTORS,
) -> Storage:
    """Count a model whose types are stored as `layers` says, all others dense.

    Parameters
    ----------
    others : (int, int)
        Numbers and bytes of all but the routed experts.
    compressed : mapping of int to int, optional
        By layer how many of a token's experts do not run.
    light : LightModule
        What acts in their place.
    """
    E, top_k, F, D = (model.letters[letter] for letter in "EKFD")
    numbers = {kind: dict.fromkeys(ROLES, 0) for kind in TYPES}
    flops, light_numbers, own = 0.0, 0, light.numbers(F=F, D=D)
    for layer in model.moe_layers:
        n = (compressed or {}).get(layer, 0)
        K = top_k - n
        flops += 2 * n * own
        light_numbers += E * own if n else 0
        for kind in TYPES:
            split = layers.get(layer, {}).get(kind)
            if split is None:
                numbers[kind]["dense"] += E * F * D
                flops += dense_flops(K, F, D)
                continue
            for role, count in numbers_by_role(split, F=F, D=D, form=form).items():
                numbers[kind][role] += count
            sizes = [len(group) for group in split.groups]
            flops += latent_flops(sizes, split.ranks, form=form, K=K, F=F, D=D)
    indices = sum(roles["perm"] for roles in numbers.values())
    expert_numbers = sum(sum(roles.values()) for roles in numbers.values()) - indices
    expert_numbers += light_numbers
    itemsize = DTYPES[model.dtype].itemsize
    return Storage(
        numbers=numbers,
        expert_numbers=expert_numbers,
        other_numbers=others[0],
        expert_bytes=expert_numbers * itemsize + indices * DTYPES["I32"].itemsize,
        other_bytes=others[1],
        flops_per_token=flops,
    )


@dataclass(frozen=True)
class TypeSummary:
    """Group sizes and ranks of one matrix type that occur, over all layers."""

    group_sizes: tuple[int, ...]
    ranks: tuple[int | None, ...]
    layers: int


def summarize(layers: Mapping[int, Mapping[str, Split]]) -> dict[str, TypeSummary]:
    """Per matrix type in molae's form: the group sizes and ranks that occur."""
    found = {}
    for kind in TYPES:
        splits = [kinds[kind] for kinds in layers.values() if kind in kinds]
        if splits:
            sizes = {len(group) for split in splits for group in split.groups}
            ranks = {rank for split in splits for rank in split.ranks}
            ordered = sorted(ranks, key=lambda rank: (rank is None, rank or 0), reverse=True)
            found[kind] = TypeSummary(
                tuple(sorted(sizes, reverse=True)), tuple(ordered), len(splits)
            )
    return found


@dataclass(frozen=True)
class Spent:
    """What one layer's matrix type keeps of its numbers, and the ranks of its groups."""

    share: float
    ranks: tuple[int | None, ...]


def spread(
    layers: Mapping[int, Mapping[str, Split]], form: Form, *, F: int, D: int
) -> dict[int, dict[str, Spent]]:
    """By layer and type, where they differ; else nothing."""
    found = {
        layer: {
            kind: Spent(
                split_numbers(split, F=F, D=D, form=form) / (sum(map(len, split.groups)) * F * D),
                split.ranks,
            )
            for kind, split in kinds.items()
        }
        for layer, kinds in layers.items()
    }
    ranks = {rank for kinds in found.values() for own in kinds.values() for rank in own.ranks}
    each = [{own.ranks for kinds in found.values() for k, own in kinds.items() if k == kind}
            for kind in TYPES]  # fmt: skip
    return found if len(ranks) > 1 and any(len(own) > 1 for own in each) else {}


class Run(Protocol):
    """What is planned."""

    kind: str
    source_name: str
    model: Model
    shards: tuple[Shard, ...]

    @property
    def settings(self) -> Mapping[str, Any]: ...


class ConversionRun(Run, Protocol):
    """A conversion whose groups and ranks are decided."""

    config: ConvertConfig
    method: Method
    allocation: Allocation


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes
    ----------
    kind : {'convert', 'materialize'}
    source : str
    family, layout, dtype : str
        The layout is empty where there was a config alone, which does not say it.
    letters : dict of str to int
        L, E, K, D, F.
    method, form : str
    settings : dict
        As asked for; empty for 'materialize'.
    size_asked : float or None
    size_reached : float
        Numbers stored for the routed experts in molae's form, over those of the original.
    before, after : Storage
    types : dict of str to TypeSummary
        Types in molae's form.
    spread : dict of int to dict of str to Spent
        By layer and matrix type what is kept, where not all layers keep the same.
    candidates : tuple of Candidate
        Group sizes that were tried, where they were chosen by molae.
    memory_bytes : int
        Estimate of the peak of anonymous memory. Mapped pages of the source are not in it.
    disk_bytes : int
        What the result takes on the disk.
    seconds : float or None
        Estimate of the wall time; None where it was not asked for. With a calibration text it is
        that of the fits, after the groups and ranks were decided.
    passes : int
        Over a layer's tokens to gather its moments, at least: more than 1 where `max_memory`
        leaves no room for all.
    compressed : dict of int to int
        By layer how many of a token's experts are compressed, where any are.
    light : str, optional
        What acts in the place of compressed experts, where there are any.
    scratch_bytes : int
        Temporary files meanwhile, where there is a calibration text.
    parallel : int
        Files that may be computed at the same time by several processes; 1 where each layer
        waits for the one before it.
    experts_only : bool
        Nothing but the experts is known: the plan is of a config alone.
    encoding : str, optional
        What the source's files hold instead of the BF16 numbers that all sizes here are of.
    """

    kind: str
    source: str
    family: str
    layout: str
    dtype: str
    letters: Mapping[str, int]
    method: str
    form: str
    settings: Mapping[str, Any]
    size_asked: float | None
    size_reached: float
    before: Storage
    after: Storage
    types: Mapping[str, TypeSummary]
    spread: Mapping[int, Mapping[str, Spent]]
    candidates: tuple[Candidate, ...]
    memory_bytes: int
    disk_bytes: int
    seconds: float | None
    passes: int = 1
    compressed: Mapping[int, int] = field(default_factory=dict)
    light: str | None = None
    scratch_bytes: int = 0
    parallel: int = 1
    experts_only: bool = False
    encoding: str | None = None

    @classmethod
    def of(cls, run: Run, method: str, form: Form, **facts: Any) -> Plan:
        """With what a run says of itself, and these facts besides."""
        return cls(
            kind=run.kind,
            source=run.source_name,
            family=run.model.family.model_type,
            layout=run.model.layout,
            dtype=run.model.dtype,
            letters=dict(run.model.letters),
            method=method,
            form=form,
            settings=run.settings,
            disk_bytes=sum(shard.nbytes for shard in run.shards),
            **facts,
        )

    @classmethod
    def of_conversion(cls, run: ConversionRun, others: tuple[int, int], **facts: Any) -> Plan:
        """Of groups and ranks that are decided; `others` are the numbers and bytes of all but the
        experts."""
        model, decided = run.model, run.allocation
        layers, form = decided.layers, decided.form
        before = storage(model, {}, form, others)
        after = storage(model, layers, form, others, decided.compressed, decided.light)
        return cls.of(
            run,
            run.method.name,
            form,
            size_asked=run.config.target_size,
            size_reached=after.expert_numbers / before.expert_numbers,
            before=before,
            after=after,
            types=summarize(layers),
            spread=spread(layers, form, F=model.letters["F"], D=model.letters["D"]),
            candidates=decided.candidates,
            **facts,
        )

    @property
    def hub_id(self) -> str | None:
        """The source's id, where it came from the hub."""
        return self.source if is_hub_id(self.source) and not Path(self.source).exists() else None

    @property
    def source_title(self) -> str:
        """The source's id, or the name of its folder."""
        return self.hub_id or Path(self.source).resolve().name

    @property
    def compressed_text(self) -> str:
        """Such as "the last 2 of a token's experts do not run"."""
        counts = [self.compressed.get(layer, 0) for layer in range(max(self.compressed) + 1)]
        some = sorted(set(self.compressed.values()))
        if len(some) == 1:
            return f"the last {some[0]} of a token's {self.letters['K']} experts do not run"
        return (
            f"the last {some[0]} to {some[-1]} of a token's {self.letters['K']} experts do not "
            f"run, by layer {', '.join(map(str, counts))}"
        )

    @property
    def encoding_text(self) -> str:
        """What becomes of encoded tensors."""
        return (
            f"The source holds tensors in {str(self.encoding).upper()}. All of them are decoded to "
            f"{self.dtype}: sizes here are of that, and the result has no encoded tensor left."
        )

    @property
    def flops_ratio(self) -> float:
        """FLOPs per token of the routed experts, after over before."""
        return self.after.flops_per_token / self.before.flops_per_token

    def to_dict(self) -> dict[str, Any]:
        """The same facts for JSON."""
        out = dataclasses.asdict(self)
        for key, stored in (("before", self.before), ("after", self.after)):
            out[key]["total_numbers"] = stored.total_numbers
            out[key]["total_bytes"] = stored.total_bytes
        out["flops_ratio"] = self.flops_ratio
        out["source_title"] = self.source_title
        plain: dict[str, Any] = json.loads(json.dumps(out))  # lists for tuples, as when read back
        return plain
