"""Model families as data: which tensors they have, of which shapes, under which names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from molae.config import TYPES
from molae.errors import CheckpointError, UnknownFamilyError, shorten
from molae.factored import QUANT_METHOD
from molae.io import parse_json

__all__ = [
    "Family",
    "Layout",
    "Letter",
    "MoeLayers",
    "Tensor",
    "families",
    "find_family",
    "load_family",
]

FUSED = "gate_up_proj"
"""Role of a tensor whose first F rows are gate, and its last F rows up."""

_KEYS = ("model_type", "letters", "moe_layers", "blocks", "experts", "layouts", "tensors")
_LETTERS = ("L", "E", "K", "D", "F")
# Far above any model's; a config may say anything, and layers are counted one by one.
_MOST = {"L": 1 << 16}
_MOST_OF_OTHERS = (1 << 31) - 1
_SHAPES = {
    "gate_proj": ("F", "D"),
    "up_proj": ("F", "D"),
    "down_proj": ("D", "F"),
    FUSED: ("2F", "D"),
}
_FLAGS = ("optional", "transposed", "interleaved")
_EXTENT = re.compile(r"[1-9][0-9]*|(?:[1-9][0-9]*)?([A-Z]{1,2})")
_RULES = (
    "first", "last", "every", "offset", "step", "except", "only", "types", "pattern", "enabled",
)  # fmt: skip


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


_SHARED_LAYOUTS = {
    "per_expert": Layout(
        "per_expert",
        tuple(Tensor(t, f"${{experts}}.${{expert}}.{t}.weight", _SHAPES[t]) for t in TYPES),
    ),
    "fused": Layout(
        "fused",
        tuple(Tensor(t, f"${{experts}}.{t}", ("E", *_SHAPES[t])) for t in (FUSED, "down_proj")),
    ),
}
"""Layouts that most families have, which a description names only."""


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
        """The layers that have experts, from a bare config."""
        part = self.settings(config)
        return self.moe_layers.indices(part, _letter(part, "L", self.letters["L"]))


@cache
def families() -> Mapping[str, Family]:
    """The families that molae ships, by model type."""
    found: dict[str, Family] = {}
    for entry in sorted(resources.files("molae.arch").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".json") and entry.name != "family.schema.json":
            family = parse_family(entry.read_text("utf-8"), entry.name)
            found |= dict.fromkeys(family.model_types, family)
    return found


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a config: the one that a converted checkpoint describes itself, else by
    ``model_type``.

    Raises
    ------
    UnknownFamilyError
        molae has none for its ``model_type``; those that it converts are listed.
    CheckpointError
        A converted checkpoint's description makes no sense.
    """
    if (own := own_family(config)) is not None:
        return own
    model_type = config.get("model_type")
    known = families()
    if not isinstance(model_type, str) or model_type not in known:
        raise UnknownFamilyError(
            f"config.json: model_type {shorten(model_type)} is unknown; "
            f"known are {known_families()}; "
            f"describe the family in a JSON file and give it with --arch FILE "
            f"('molae inspect CHECKPOINT --draft FILE' drafts one, see docs/formats.md)"
        )
    return known[model_type]


def known_families() -> str:
    """The model types that molae converts, for messages."""
    return ", ".join(name for name, family in families().items() if family.unsupported is None)


def own_family(config: Mapping[str, Any]) -> Family | None:
    """The family that a converted checkpoint describes itself; None where it does not.

    Raises
    ------
    CheckpointError
        The description makes no sense.
    """
    quant = config.get("quantization_config")
    if not isinstance(quant, Mapping) or quant.get("quant_method") != QUANT_METHOD:
        return None
    data = quant.get("arch")
    if data is None:
        return None
    return replace(_Reader("quantization_config.arch").family(data), description=data)


def load_family(path: str | os.PathLike[str]) -> Family:
    """Read a family's description from a JSON file.

    Parameters
    ----------
    path : path
        A file as described in ``family.schema.json`` and docs/formats.md.

    Returns
    -------
    Family

    Raises
    ------
    CheckpointError
        The file cannot be read, is no JSON, or holds an unknown key, a missing one, a name
        twice, or a shape that is not supported.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{path}: cannot be read: {e}") from e
    family = parse_family(text, path.name)
    data = {key: value for key, value in parse_json(text).items() if key != "$schema"}
    return replace(family, description=data)


def parse_family(text: str, name: str) -> Family:
    """Read a family's description from JSON text; `name` is used in messages."""
    try:
        data = parse_json(text, repeats=False)
    except ValueError as e:
        raise CheckpointError(f"{name}: not valid JSON, or a key is there twice ({e})") from e
    return _Reader(name).family(data)


class _Reader:
    """Checks a description while it is read; every message starts with the file's name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def family(self, data: Any) -> Family:
        self.keys(
            "the description",
            data,
            _KEYS,
            ("$schema", "head", "beneath", "about", "transformers", "unsupported"),
        )
        model_types = self.one_or_more("model_type", data["model_type"])
        self.unique("model_type", model_types)
        letters = self.letters(data["letters"])
        blocks = self.strings("blocks", data["blocks"])
        self.unique("blocks", blocks)
        for block in blocks:
            self.placeholders("blocks", block, {"layer"})
        experts = self.string("experts", data["experts"])
        self.placeholders("experts", experts, {"block"})
        unsupported = self.optional("unsupported", data)
        layouts = tuple(
            self.layout(x, letters, whole=unsupported is None)
            for x in self.items("layouts", data["layouts"])
        )
        self.unique("layouts", [x.name for x in layouts])
        tensors = tuple(
            self.tensor("tensors", x, {"block"}, letters)
            for x in self.items("tensors", data["tensors"], least=0)
        )
        for layout in layouts:
            both = (*layout.tensors, *tensors)
            self.unique("roles", [t.role for t in both])
            names = [name for t in both for name in (t.name, *t.others)]
            self.unique("names", [name.replace("${experts}", experts) for name in names])
        return Family(
            model_types,
            letters,
            self.moe_layers(data["moe_layers"]),
            blocks,
            experts,
            layouts,
            tensors,
            self.optional("head", data),
            self.optional("beneath", data),
            self.about(data.get("about", {})),
            self.optional("transformers", data),
            unsupported,
        )

    def about(self, data: Any) -> dict[str, str | tuple[str, ...]]:
        self.keys("about", data, (), ("router", "shared", "notes", "released"))
        return {
            k: self.strings(f"about.{k}", v) if k == "released" else self.string(f"about.{k}", v)
            for k, v in data.items()
        }

    def letters(self, data: Any) -> dict[str, Letter]:
        if not isinstance(data, dict):
            raise self.error("letters: expected an object")
        for letter in data:
            if not re.fullmatch("[A-Z]", letter):
                raise self.error(f"letters: {letter!r} is not one capital letter")
        missing = [x for x in _LETTERS if x not in data]
        if missing:
            raise self.error(f"letters: {', '.join(missing)} missing")
        return {k: self.letter(f"letters.{k}", v) for k, v in data.items()}

    def letter(self, where: str, data: Any) -> Letter:
        if not isinstance(data, dict):
            return Letter(self.one_or_more(where, data))
        self.keys(where, data, ("keys", "default"), ())
        default = data["default"]
        if not _is_int(default) or default < 0:
            raise self.error(f"{where}.default: expected 0 or more, got {default!r}")
        if where.removeprefix("letters.") in _LETTERS:
            raise self.error(f"{where}: this letter has no default")
        return Letter(self.one_or_more(f"{where}.keys", data["keys"]), default)

    def moe_layers(self, data: Any) -> MoeLayers:
        self.keys("moe_layers", data, (), _RULES)
        named = {k: self.string(f"moe_layers.{k}", v) for k, v in data.items()}
        return MoeLayers(excluded=named.pop("except", None), **named)

    def layout(self, data: Any, letters: Mapping[str, Any], *, whole: bool) -> Layout:
        if isinstance(data, str):
            if data not in _SHARED_LAYOUTS:
                raise self.error(
                    f"layouts: {data!r}, expected one of {', '.join(_SHARED_LAYOUTS)}, or an object"
                )
            return _SHARED_LAYOUTS[data]
        self.keys("layouts", data, ("name", "tensors"), ())
        name = self.string("layouts.name", data["name"])
        where = f"layout {name!r}"
        tensors = []
        for x in self.items(where, data["tensors"]):
            t = self.tensor(where, x, {"experts"}, letters, optional={"expert"}, flags=_FLAGS)
            if t.optional or t.others:
                raise self.error(f"{where}: {t.role} has one name, and is always there")
            if t.role not in _SHAPES:
                raise self.error(f"{where}: role {t.role!r}, expected one of {', '.join(_SHAPES)}")
            if t.interleaved and t.role != FUSED:
                raise self.error(f"{where}: {t.role} is interleaved, only {FUSED} can be")
            one = _SHAPES[t.role][::-1] if t.transposed else _SHAPES[t.role]
            wanted = one if t.per_expert else ("E", *one)
            if t.shape != wanted:
                raise self.error(
                    f"{where}: {t.role} has shape {list(t.shape)}, molae reads {list(wanted)} only"
                )
            tensors.append(t)
        held = sorted(kind for t in tensors for kind in t.types)
        if held != sorted(TYPES) and (whole or held != ["down_proj", "up_proj"]):
            raise self.error(f"{where}: must hold each of {', '.join(TYPES)} once, holds {held}")
        return Layout(name, tuple(tensors))

    def tensor(
        self,
        where: str,
        data: Any,
        needed: Set[str],
        letters: Mapping[str, Any],
        optional: Set[str] = frozenset(),
        flags: tuple[str, ...] = _FLAGS[:1],
    ) -> Tensor:
        self.keys(where, data, ("role", "name", "shape"), flags)
        names = self.one_or_more(f"{where}.name", data["name"])
        for name in names:
            # Some layouts name the experts' tensors beneath the block itself.
            of_block = "experts" in needed and "${block}" in name
            self.placeholders(where, name, {"block"} if of_block else needed, optional)
        shape = self.strings(f"{where}.shape", data["shape"])
        for extent in shape:
            match = _EXTENT.fullmatch(extent)
            if not match or not all(x in letters for x in match[1] or ""):
                raise self.error(f"{where}: {extent!r} in a shape, expected such as 'F' or '2F'")
        role = self.string(f"{where}.role", data["role"])
        is_optional, transposed, interleaved = (self.flag(where, data, x) for x in _FLAGS)
        return Tensor(role, names[0], shape, names[1:], is_optional, transposed, interleaved)

    def flag(self, where: str, data: Any, name: str) -> bool:
        value = data.get(name, False)
        if not isinstance(value, bool):
            raise self.error(f"{where}.{name}: expected true or false, got {value!r}")
        return value

    def placeholders(
        self, where: str, text: str, needed: Set[str], optional: Set[str] = frozenset()
    ) -> None:
        found = re.findall(r"\$\{(\w*)\}", text)
        if "$" in re.sub(r"\$\{\w*\}", "", text) or not (
            needed <= set(found) <= needed | optional and len(set(found)) == len(found)
        ):
            wanted = " and ".join(f"${{{x}}}" for x in sorted(needed))
            raise self.error(f"{where}: {text!r}, expected a name with {wanted}")

    def keys(
        self, where: str, data: Any, required: tuple[str, ...], optional: tuple[str, ...]
    ) -> None:
        if not isinstance(data, dict):
            raise self.error(f"{where}: expected an object, got {type(data).__name__}")
        for key in data:
            if key not in required + optional:
                raise self.error(f"{where}: unknown key {key!r}")
        for key in required:
            if key not in data:
                raise self.error(f"{where}: key {key!r} is missing")

    def string(self, where: str, value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise self.error(f"{where}: expected a text, got {value!r}")
        return value

    def optional(self, key: str, data: Mapping[str, Any]) -> str | None:
        return self.string(key, data[key]) if key in data else None

    def one_or_more(self, where: str, value: Any) -> tuple[str, ...]:
        if isinstance(value, str):
            return (self.string(where, value),)
        return self.strings(where, value)

    def strings(self, where: str, value: Any) -> tuple[str, ...]:
        return tuple(self.string(where, x) for x in self.items(where, value))

    def items(self, where: str, value: Any, least: int = 1) -> list[Any]:
        if not isinstance(value, list) or len(value) < least:
            raise self.error(f"{where}: expected a list of at least {least}, got {value!r}")
        return value

    def unique(self, where: str, values: Any) -> None:
        seen = set()
        for value in values:
            if value in seen:
                raise self.error(f"{where}: {value!r} is there twice")
            seen.add(value)

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: {text}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(config: Mapping[str, Any], key: str | None, default: int, *, least: int) -> int:
    value = config.get(key) if key else None
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
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
    if not isinstance(value, list) or not all(_is_int(x) for x in value):
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
    if isinstance(value, list) and value and all(_is_int(x) for x in value):
        raise CheckpointError(
            f"config.json: {letter} is {shorten(value)} (key {key!r}); "
            f"layers of different sizes are not supported, expected the same number for each"
        )
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
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
