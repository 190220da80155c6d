"""What a converted checkpoint says about itself: groups, ranks, tensor names.

The same facts serve the writer, the reader and whoever loads such a model:
`Split` is one layer's matrix type, `Factored` the whole ``quantization_config``,
and `group_tensors` gives the names and shapes of one group. The format is
described in ``docs/formats.md``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from molae.config import TYPES
from molae.errors import ArgumentError, CheckpointError, shorten

__all__ = [
    "FORMAT_VERSION",
    "FORMS",
    "QUANT_METHOD",
    "VECTORS",
    "Factored",
    "Form",
    "LightModule",
    "Part",
    "Split",
    "group_tensors",
    "index_groups",
    "numbers_by_role",
]

QUANT_METHOD = "molae"
#: 2 has compressed experts, 3 narrow experts in their place, 4 biases of these.
FORMAT_VERSION = 4
Form = Literal["gauge", "plain"]
FORMS: tuple[Form, ...] = ("gauge", "plain")

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_NARROW = re.compile(r"narrow:(?:(\d+)|1/([1-9]\d*))")


@dataclass(frozen=True)
class Split:
    """How the experts of one layer and matrix type are stored.

    Parameters
    ----------
    groups : tuple of tuple of int
        Expert numbers, each expert in one group; groups may differ in size.
    ranks : tuple of (int or None)
        One a group: the rank of its factors, 0 for "nothing is kept", None for "left dense".
    """

    groups: tuple[tuple[int, ...], ...]
    ranks: tuple[int | None, ...]

    @property
    def is_latent(self) -> bool:
        """Whether any group is stored as factors."""
        return any(rank is not None for rank in self.ranks)

    def latent_groups(self) -> Iterator[tuple[int, tuple[int, ...], int]]:
        """(number, experts, rank) of each group that is not left dense."""
        for g, (experts, rank) in enumerate(zip(self.groups, self.ranks, strict=True)):
            if rank is not None:
                yield g, experts, rank

    def to_dict(self) -> dict[str, Any]:
        return {"groups": [list(group) for group in self.groups], "ranks": list(self.ranks)}


def index_groups(experts: int, size: int) -> tuple[tuple[int, ...], ...]:
    """Groups of `size` experts in index order; the last may be smaller."""
    return tuple(tuple(range(i, min(i + size, experts))) for i in range(0, experts, size))


@dataclass(frozen=True)
class Part:
    """One tensor of a group: its role, name, shape, and whether it holds integers."""

    role: str
    name: str
    shape: tuple[int, ...]
    integer: bool = False

    @property
    def numbers(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count


def group_tensors(
    prefix: str,
    kind: str,
    group: int,
    experts: int,
    rank: int | None,
    *,
    F: int,
    D: int,
    form: Form,
) -> tuple[Part, ...]:
    """Names and shapes of the tensors of one group.

    Parameters
    ----------
    prefix : str
        The family's prefix of a layer's experts.
    kind : str
        One of `TYPES`.
    group, experts : int
        Number of the group, and how many experts it has.
    rank : int or None
        0 gives no tensors, None one dense tensor.
    F, D : int
        Expert width and model width.
    form : {'gauge', 'plain'}
    """
    down = kind == "down_proj"
    base = f"{prefix}.{kind}.{group}"
    if rank is None:
        shape = (experts, D, F) if down else (experts, F, D)
        return (Part("dense", f"{base}.dense", shape),)
    if rank == 0:
        return ()
    private = Part("private", f"{base}.private", (experts, rank, F) if down else (experts, F, rank))
    if form == "plain":
        return (Part("shared", f"{base}.shared", (rank, D)), private)
    return (
        Part("perm", f"{base}.perm", (D,), integer=True),
        Part("shared", f"{base}.shared", (rank, D - rank)),
        private,
    )


@dataclass(frozen=True)
class LightModule:
    """What acts in the place of a compressed expert.

    Parameters
    ----------
    units : int or None
        None: vectors of 2 D + F numbers that scale what the others read, as in
        `molae.ops.compressed_experts_forward`. Else a narrow expert of so many units and a bias, as
        in `molae.ops.narrow_experts_forward`; with 0 units the bias alone.
    biased : bool
        Gate and up of narrow experts have biases, as those that they stand for.
    """

    units: int | None = None
    biased: bool = False

    @classmethod
    def parse(cls, text: str, F: int, *, biased: bool = False) -> LightModule:
        """From 'vectors', 'additive', 'narrow:M' or, as a share of F, 'narrow:1/8', for experts
        that are `biased` or not.

        Raises
        ------
        ArgumentError
            Another text, or a width that is not 1 to F.
        """
        if text in ("vectors", "additive"):
            return cls(None if text == "vectors" else 0)
        match = _NARROW.fullmatch(text)
        if match is None:
            raise ArgumentError(
                "light_module: expected vectors, additive, narrow:UNITS or narrow:1/N, got "
                f"{text!r}"
            )
        units = F // int(match[2]) if match[2] else int(match[1])
        if not 1 <= units <= F:
            raise ArgumentError(
                f"light_module: {text!r} are {units} units, the experts have {F}; take 1 to {F}"
            )
        return cls(units, biased)

    @property
    def title(self) -> str:
        """Such as 'narrow experts of 128 units'."""
        if self.units is None:
            return "vectors that scale what the others read"
        if self.units == 0:
            return "additive vectors"
        return f"narrow experts of {self.units} unit{'s' * (self.units > 1)}"

    def numbers(self, *, F: int, D: int) -> int:
        """Of one expert; a row costs twice as many operations."""
        if self.units is None:
            return 2 * D + F
        return (3 * self.units + 1) * D + (2 * self.units if self.biased else 0)

    def tensors(self, prefix: str, *, E: int, F: int, D: int) -> tuple[Part, ...]:
        """Names and shapes of one layer's, roles as in `molae.ops.NarrowExperts`."""
        if self.units is None:
            return (Part("compressed", f"{prefix}.compressed", (E, 2 * D + F)),)
        m = self.units
        shapes = {"gate": (E, m, D), "up": (E, m, D), "down": (E, D, m)} if m else {}
        parts = [Part(role, f"{prefix}.light.{role}_proj", s) for role, s in shapes.items()]
        biases = {"bias": (E, D)}
        if self.biased:
            biases |= {"gate_bias": (E, m), "up_bias": (E, m)}
        return (*parts, *(Part(role, f"{prefix}.light.{role}", s) for role, s in biases.items()))


def numbers_by_role(split: Split, *, F: int, D: int, form: Form) -> dict[str, int]:
    """Numbers that one layer's matrix type stores, by role."""
    totals = {"shared": 0, "private": 0, "perm": 0, "dense": 0}
    for group, rank in zip(split.groups, split.ranks, strict=True):
        for part in group_tensors("", "gate_proj", 0, len(group), rank, F=F, D=D, form=form):
            totals[part.role] += part.numbers
    return totals


#: The form of the paper.
VECTORS = LightModule()


@dataclass(frozen=True)
class Factored:
    """The ``quantization_config`` of a converted checkpoint.

    `layers` holds the types that are stored in molae's form; a type without an
    entry is stored as the source stores it. `layout` is the name of the source's
    layout in the family's description. `compressed` says of each layer that has compressed
    experts how many of a token's they are, and `light` what acts in their place.
    `arch` is the family's description where molae does not have it.
    """

    method: str
    form: Form
    layout: str
    layers: Mapping[int, Mapping[str, Split]]
    molae_version: str
    compressed: Mapping[int, int] = field(default_factory=dict)
    light: LightModule = VECTORS
    arch: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The value of ``quantization_config`` in ``config.json``."""
        compressed = {str(layer): n for layer, n in self.compressed.items()}
        narrow = bool(compressed) and self.light.units is not None
        biased = bool(compressed) and self.light.biased
        return {
            "quant_method": QUANT_METHOD,
            # What older ones can read.
            "format_version": 4 if biased else 3 if narrow else 2 if compressed else 1,
            "molae_version": self.molae_version,
            "method": self.method,
            "form": self.form,
            "layout": self.layout,
            "layers": {
                str(layer): {kind: split.to_dict() for kind, split in kinds.items()}
                for layer, kinds in self.layers.items()
            },
            **({"compressed_experts": compressed} if compressed else {}),
            **({"light_units": self.light.units} if narrow else {}),
            **({"light_biases": True} if biased else {}),
            **({"arch": dict(self.arch)} if self.arch is not None else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], letters: Mapping[str, int]) -> Factored:
        """Read and check the ``quantization_config`` of a model with these E, K, D and F.

        Raises
        ------
        CheckpointError
            Another quantization, a newer format, or an entry that makes no sense;
            the message names the entry.
        """
        if data.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(
                f"quantization_config: expected quant_method 'molae', "
                f"got {shorten(data.get('quant_method'))}"
            )
        version: Any = data.get("format_version")
        if not _is_count(version) or version < 1:
            raise CheckpointError(f"quantization_config.format_version: got {shorten(version)}")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"quantization_config.format_version: this molae reads up to {FORMAT_VERSION}, "
                f"the checkpoint has {version}; install a newer molae"
            )
        form: Any = data.get("form")
        if form not in FORMS:
            raise CheckpointError(
                f"quantization_config.form: expected one of {FORMS}, got {shorten(form)}"
            )
        E, K, D, F = (letters[letter] for letter in "EKDF")
        units = data.get("light_units")
        if units is not None and not (_is_count(units) and units <= F):
            raise CheckpointError(
                f"quantization_config.light_units: expected 0 to F = {F}, got {shorten(units)}"
            )
        biased: Any = data.get("light_biases", False)
        if not isinstance(biased, bool) or (biased and not units):
            raise CheckpointError(
                "quantization_config.light_biases: expected true only beside light_units of 1 and "
                f"more, got {shorten(biased)}"
            )
        layers = data.get("layers")
        if not isinstance(layers, Mapping):
            raise CheckpointError("quantization_config.layers: missing, or not a JSON object")
        compressed: Any = data.get("compressed_experts", {})
        return cls(
            method=str(data.get("method")),
            form=form,
            layout=str(data.get("layout")),
            layers={
                _layer_number(key): _read_kinds(key, kinds, E, D) for key, kinds in layers.items()
            },
            molae_version=str(data.get("molae_version")),
            compressed=_read_compressed(compressed, K),
            light=LightModule(units, biased),
            arch=data.get("arch"),
        )


def _read_compressed(data: Any, K: int) -> dict[int, int]:
    where = "quantization_config.compressed_experts"
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{where}: expected an object of layer numbers, got {shorten(data)}")
    counts = {_layer_number(key): n for key, n in data.items()}
    for layer, n in counts.items():
        if not _is_count(n) or not 0 < n < K:
            raise CheckpointError(
                f"{where}.{layer}: expected 1 to K - 1 = {K - 1}, got {shorten(n)}"
            )
    return counts


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _layer_number(key: str) -> int:
    # As it is written, and no other spelling of the same number: two entries would be one layer's.
    if not _NUMBER.fullmatch(key):
        raise CheckpointError(f"quantization_config.layers: {shorten(key)} is not a layer number")
    return int(key)


def _read_kinds(layer: str, kinds: Any, E: int, D: int) -> dict[str, Split]:
    where = f"quantization_config.layers.{_layer_number(layer)}"
    if not isinstance(kinds, Mapping) or not set(kinds) <= set(TYPES):
        raise CheckpointError(
            f"{where}: expected an object with keys among {TYPES}, got {shorten(kinds)}"
        )
    return {kind: _read_split(f"{where}.{kind}", kinds[kind], E, D) for kind in kinds}


def _read_split(where: str, data: Any, E: int, D: int) -> Split:
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{where}: expected an object with 'groups' and 'ranks'")
    groups: Any = data.get("groups")
    ranks: Any = data.get("ranks")
    if not _is_list_of_lists(groups):
        raise CheckpointError(f"{where}.groups: expected a list of lists of expert numbers")
    members = sorted(expert for group in groups for expert in group)
    if len(members) != E or members != list(range(E)):
        raise CheckpointError(
            f"{where}.groups: expected each of the E={E} experts once, got {shorten(members)}"
        )
    if not isinstance(ranks, Sequence) or len(ranks) != len(groups):
        raise CheckpointError(
            f"{where}.ranks: expected one for each of the {len(groups)} groups, "
            f"got {shorten(ranks)}"
        )
    if not all(rank is None or (_is_count(rank) and rank <= D) for rank in ranks):
        raise CheckpointError(
            f"{where}.ranks: expected null or whole numbers of at most D={D}, got {shorten(ranks)}"
        )
    return Split(groups=tuple(tuple(group) for group in groups), ranks=tuple(ranks))


def _is_list_of_lists(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(group, list) and group and all(_is_count(item) for item in group)
        for group in value
    )
