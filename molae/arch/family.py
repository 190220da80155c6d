"""A model family: which tensors it has, of which shapes, under which names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from molae.config import is_int
from molae.errors import CheckpointError, UnknownFamilyError, shorten
from molae.factored import Factored

__all__ = ["FUSED", "SHAPES", "Family", "Layout", "Letter", "MoeLayers", "Tensor"]

FUSED = "gate_up_proj"
"""Role of a tensor whose first F rows are gate, and its last F rows up."""

# Far above any model's; a config may say anything, and layers are counted one by one.
_MOST = {"L": 1 << 16}
_MOST_OF_OTHERS = (1 << 31) - 1
#: Of an expert's matrices by role, in letters.
SHAPES: Mapping[str, tuple[str, ...]] = {
    "gate_proj": ("F", "D"),
    "up_proj": ("F", "D"),
    "down_proj": ("D", "F"),
    FUSED: ("2F", "D"),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: its role, a template of its name, its shape in letters.

    Some files call it by one of `others`; where it is `optional`, some have it not.
    `transposed`: each expert's matrix lies with its two axes exchanged, (D, F) for gate and up.
    `interleaved`: gate and up take turns, row by row, gate first.
    """

    role: str
    name: str
    shape: tuple[str, ...]
    others: tuple[str, ...] = ()
    optional: bool = False
    transposed: bool = False
    interleaved: bool = False

    @property
    def types(self) -> tuple[str, ...]:
        """The matrix types it holds."""
        return ("gate_proj", "up_proj") if self.role == FUSED else (self.role,)

    @property
    def per_expert(self) -> bool:
        """Whether each expert has one of its own."""
        return "${expert}" in self.name

    @property
    def as_matrices(self) -> bool:
        """Whether the matrices (rows, cols) lie in it as they are, in C order."""
        return not self.transposed and not self.interleaved

    def view(self, stored: Any, kind: str) -> Any:
        """Of one expert's part of it the view that is the matrix (rows, cols) of a type.

        `stored` is anything with the indexing of NumPy and two axes, an array or a tensor.
        """
        W = stored.T if self.transposed else stored
        if self.role != FUSED:
            return W
        gate = kind == "gate_proj"
        if self.interleaved:
            return W[0 if gate else 1 :: 2]
        half = len(W) // 2
        return W[:half] if gate else W[half:]

    def joined(self, matrices: Sequence[Any], out: Any) -> None:
        """Put the matrices of its types, in the order of `types`, into one expert's part of it."""
        for kind, matrix in zip(self.types, matrices, strict=True):
            self.view(out, kind)[...] = matrix


@dataclass(frozen=True, slots=True)
class Layout:
    """One way in which files hold the experts."""

    name: str
    tensors: tuple[Tensor, ...]

    def of_type(self, kind: str) -> Tensor:
        """The tensor that holds a matrix type."""
        return next(t for t in self.tensors if kind in t.types)


@dataclass(frozen=True, slots=True)
class Letter:
    """Where a size is found: keys of which the first present counts, else `default`.

    A letter with a default may be 0: then the tensors that have it in their shapes are not there.
    """

    keys: tuple[str, ...]
    default: int | None = None


@dataclass(frozen=True, slots=True)
class MoeLayers:
    """Which layers have experts, by config keys; a key the config lacks changes nothing.

    Layer l has experts iff first <= l <= last, l % every == offset (0 where there is none),
    (l + 1) % step == 0, and l is not in except. `every` may be a list of 0 and 1 for each layer.
    Where the config has the key of `types` (a text for each layer, ``"sparse"`` for those with
    experts) or of `only` (the layers), this alone decides. No layer has experts where `enabled` is
    false. Where there is a `pattern`, the config must have its key, a text with a letter for each
    layer, E for those with experts, and this alone decides.
    """

    first: str | None = None
    last: str | None = None
    every: str | None = None
    offset: str | None = None
    step: str | None = None
    excluded: str | None = None
    only: str | None = None
    types: str | None = None
    pattern: str | None = None
    enabled: str | None = None

    def indices(self, config: Mapping[str, Any], L: int) -> tuple[int, ...]:
        """The layers, ascending.

        Raises
        ------
        CheckpointError
            A key holds something else than the rule needs.
        """
        if self.enabled and config.get(self.enabled) is False:
            return ()
        if self.types and config.get(self.types) is not None:
            kinds = _each_layer(config, self.types, L, ("dense", "sparse"))
            return tuple(n for n in range(L) if kinds[n] == "sparse")
        if self.pattern:
            return _pattern(config, self.pattern, L)
        if self.only and config.get(self.only) is not None:
            named = frozenset(_layers(config, self.only))
            return tuple(n for n in range(L) if n in named)
        first = _count(config, self.first, 0, least=0)
        last = _count(config, self.last, -1, least=-1)
        step = _count(config, self.step, 1, least=1)
        excluded = frozenset(_layers(config, self.excluded) if self.excluded else ())
        if self.every and isinstance(config.get(self.every), list):
            flags = _each_layer(config, self.every, L, (0, 1))
        else:
            every = _count(config, self.every, 1, least=1)
            offset = _count(config, self.offset, 0, least=0)
            flags = [n % every == offset for n in range(L)]
        return tuple(
            n
            for n in range(first, L if last < 0 else min(last + 1, L))
            if flags[n] and (n + 1) % step == 0 and n not in excluded
        )


@dataclass(frozen=True, slots=True)
class Family:
    """A model family.

    Attributes
    ----------
    model_types : tuple of str
        As in ``config.json``; `model_type` is the first.
    letters : dict of str to Letter
    beneath : str or None
        The config's entry that holds the letters and rules, where the config has it; else the
        config itself does.
    moe_layers : MoeLayers
    blocks : tuple of str
        Templates of the module that holds router and experts; a checkpoint uses one.
    experts : str
        Template of the experts' prefix, with ``${block}``.
    layouts : tuple of Layout
    tensors : tuple of Tensor
        What else each such block has, the router above all.
    head : str or None
        The tensor that is not counted when ``tie_word_embeddings`` is true.
    about : dict of str to str or tuple of str
        What docs/families.md tells of it.
    transformers : str or None
        The model type under which Transformers builds the same language model, where that is
        another one.
    unsupported : str or None
        Why molae only inspects the family, where it does not convert it.
    description : dict or None
        As it was read, where it does not come with molae: a converted checkpoint keeps it.
    """

    model_types: tuple[str, ...]
    letters: Mapping[str, Letter]
    moe_layers: MoeLayers
    blocks: tuple[str, ...]
    experts: str
    layouts: tuple[Layout, ...]
    tensors: tuple[Tensor, ...]
    head: str | None
    beneath: str | None = None
    about: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    transformers: str | None = None
    unsupported: str | None = None
    description: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def model_type(self) -> str:
        """The first of `model_types`, by which messages call it."""
        return self.model_types[0]

    def settings(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of a config that holds the letters and rules.

        Raises
        ------
        CheckpointError
            It is no object.
        """
        part = config.get(self.beneath) if self.beneath else None
        if part is None:
            return config
        if not isinstance(part, Mapping):
            raise CheckpointError(
                f"config.json: {self.beneath!r} is {part!r}, expected an object; "
                f"copy or download the file again"
            )
        return part

    @property
    def has_biases(self) -> bool:
        """Whether the experts have biases."""
        return any(t.role == "down_proj_bias" for t in self.tensors)

    def check_convertible(self) -> None:
        """Refuse a family that is only inspected.

        Raises
        ------
        UnknownFamilyError
            The message says why.
        """
        if self.unsupported:
            raise UnknownFamilyError(
                f"family {self.model_type}: {self.unsupported}; molae inspects it, and does not "
                "convert it"
            )

    def find_layout(self, factored: Factored) -> Layout:
        """The layout that a converted checkpoint names.

        Raises
        ------
        CheckpointError
            There is no such one.
        """
        for layout in self.layouts:
            if layout.name == factored.layout:
                return layout
        raise CheckpointError(
            f"quantization_config.layout: {shorten(factored.layout)} is unknown for family "
            f"{self.model_type}; known are {', '.join(x.name for x in self.layouts)}"
        )

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the head is the embedding, by a bare config."""
        key = "tie_word_embeddings"
        own: Any = config.get(key)
        return (self.settings(config).get(key) if own is None else own) is True

    def read_letters(self, config: Mapping[str, Any]) -> dict[str, int]:
        """The sizes, from a bare config.

        Raises
        ------
        CheckpointError
            A size is missing or no positive whole number, or K > E.
        """
        part = self.settings(config)
        sizes = {letter: _letter(part, letter, where) for letter, where in self.letters.items()}
        if sizes["K"] > sizes["E"]:
            raise CheckpointError(
                f"config.json: K={sizes['K']} experts a token of only E={sizes['E']}; "
                f"copy or download the file again"
            )
        return sizes

    def read_moe_layers(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """The layers that have experts, from a bare config.

        Raises
        ------
        CheckpointError
            A size or a key of the rule is missing or makes no sense, or none has.
        """
        part = self.settings(config)
        L = _letter(part, "L", self.letters["L"])
        found = self.moe_layers.indices(part, L)
        if not found:
            raise CheckpointError(
                f"config.json: by its settings none of the L={L} layers has experts; "
                f"molae converts mixture-of-experts models only"
            )
        return found


def _count(config: Mapping[str, Any], key: str | None, default: int, *, least: int) -> int:
    value = config.get(key) if key else None
    if value is None:
        return default
    if not is_int(value) or value < least:
        raise CheckpointError(
            f"config.json: {key!r} is {shorten(value)}, expected a whole number of at least {least}"
        )
    return value


def _layers(config: Mapping[str, Any], key: str) -> list[int]:
    """A list of layers, or a text of their numbers with commas between."""
    value = config.get(key)
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", value):
        value = [int(x) for x in value.split(",")]
    value = [] if value is None else value
    if not isinstance(value, list) or not all(is_int(x) for x in value):
        raise CheckpointError(
            f"config.json: {key!r} is {shorten(value)}, expected a list of layers"
        )
    return value


def _each_layer(
    config: Mapping[str, Any], key: str, L: int, allowed: tuple[object, ...]
) -> list[Any]:
    """A list with an entry for each layer."""
    value = config[key]
    if not isinstance(value, list) or len(value) < L or not all(x in allowed for x in value):
        raise CheckpointError(
            f"config.json: {key!r} is {shorten(value)}, expected one of "
            f"{', '.join(map(repr, allowed))} for each of the L={L} layers"
        )
    return value


def _pattern(config: Mapping[str, Any], key: str, L: int) -> tuple[int, ...]:
    """The layers for which a text has an E."""
    value = config.get(key)
    if not isinstance(value, str) or len(value) != L:
        raise CheckpointError(
            f"config.json: {key!r} is {shorten(value)}, expected a text with a letter for each "
            f"of the L={L} layers"
        )
    return tuple(n for n in range(L) if value[n] == "E")


def _letter(config: Mapping[str, Any], letter: str, where: Letter) -> int:
    keys = where.keys
    key = next((k for k in keys if config.get(k) is not None), None)
    if key is None:
        if where.default is not None:
            return where.default
        raise CheckpointError(
            f"config.json: {letter} is missing: no {' and no '.join(map(repr, keys))}; "
            f"copy or download the file again"
        )
    value, least = config[key], 1 if where.default is None else 0
    if isinstance(value, list) and value and all(x == value[0] for x in value):
        value = value[0]  # some configs repeat a size for each layer
    if isinstance(value, list) and value and all(is_int(x) for x in value):
        raise CheckpointError(
            f"config.json: {letter} is {shorten(value)} (key {key!r}); "
            f"layers of different sizes are not supported, expected the same number for each"
        )
    if not is_int(value) or value < least:
        raise CheckpointError(
            f"config.json: {letter} is {shorten(value)} (key {key!r}), "
            f"expected a whole number of at least {least}"
        )
    if value > (most := _MOST.get(letter, _MOST_OF_OTHERS)):
        raise CheckpointError(
            f"config.json: {letter} is {shorten(value)} (key {key!r}), expected at most {most}; "
            f"copy or download the file again"
        )
    return value
