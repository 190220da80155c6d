"""Reads the description of a family; whatever makes no sense in one is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from typing import Any

from molae.arch.family import FUSED, SHAPES, Family, Layout, Letter, MoeLayers, Tensor
from molae.config import TYPES, is_int
from molae.errors import CheckpointError
from molae.io import parse_json

__all__ = ["NAMED_LAYOUTS", "parse_family", "read_family"]

_KEYS = ("model_type", "letters", "moe_layers", "blocks", "experts", "layouts", "tensors")
_LETTERS = ("L", "E", "K", "D", "F")
_FLAGS = ("optional", "transposed", "interleaved")
_EXTENT = re.compile(r"[1-9][0-9]*|(?:[1-9][0-9]*)?([A-Z]{1,2})")
_RULES = (
    "first", "last", "every", "offset", "step", "except", "only", "types", "pattern", "enabled",
)  # fmt: skip

NAMED_LAYOUTS = {
    "per_expert": Layout(
        "per_expert",
        tuple(Tensor(t, f"${{experts}}.${{expert}}.{t}.weight", SHAPES[t]) for t in TYPES),
    ),
    "fused": Layout(
        "fused",
        tuple(Tensor(t, f"${{experts}}.{t}", ("E", *SHAPES[t])) for t in (FUSED, "down_proj")),
    ),
}
"""Layouts that most families have, which a description names only."""


def parse_family(text: str, name: str) -> Family:
    """Read a family's description from JSON text; `name` is used in messages."""
    try:
        data = parse_json(text, repeats=False)
    except ValueError as e:
        raise CheckpointError(f"{name}: not valid JSON, or a key is there twice ({e})") from e
    return read_family(data, name)


def read_family(data: Any, name: str) -> Family:
    """The same of what JSON gave."""
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
        if not is_int(default) or default < 0:
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
            if data not in NAMED_LAYOUTS:
                raise self.error(
                    f"layouts: {data!r}, expected one of {', '.join(NAMED_LAYOUTS)}, or an object"
                )
            return NAMED_LAYOUTS[data]
        self.keys("layouts", data, ("name", "tensors"), ())
        name = self.string("layouts.name", data["name"])
        where = f"layout {name!r}"
        tensors = []
        for x in self.items(where, data["tensors"]):
            t = self.tensor(where, x, {"experts"}, letters, optional={"expert"}, flags=_FLAGS)
            if t.optional or t.others:
                raise self.error(f"{where}: {t.role} has one name, and is always there")
            if t.role not in SHAPES:
                raise self.error(f"{where}: role {t.role!r}, expected one of {', '.join(SHAPES)}")
            if t.interleaved and t.role != FUSED:
                raise self.error(f"{where}: {t.role} is interleaved, only {FUSED} can be")
            one = SHAPES[t.role][::-1] if t.transposed else SHAPES[t.role]
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
