"""Settings, as frozen dataclasses that go to JSON and come back.

Each field says what it means once, in ``metadata["help"]``; the docstring of
the class and the help of the command are built from that text.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import cleandoc
from typing import Any

from molae.errors import ArgumentError

__all__ = ["TYPES", "ConvertConfig", "HealConfig", "field_help", "is_int", "refuse_nonsense"]

#: The matrices of one expert, in the order in which they are worked on.
TYPES = ("gate_proj", "up_proj", "down_proj")

#: Raised by one when an old settings file can no longer be read.
SETTINGS_VERSION = 1

#: From this size on compressed experts have narrow ones in their place, which store an eighth of
#: what the experts do, where nothing else is asked for.
ROOM_FOR_NARROW = 0.7


def field_help(config: type, name: str) -> str:
    """The help text of one field of a settings class."""
    for entry in dataclasses.fields(config):
        if entry.name == name:
            return str(entry.metadata["help"])
    raise AttributeError(f"{config.__name__} has no field {name!r}")


def _document(config: type) -> type:
    """Put the fields and their help texts into the class's docstring, before the examples."""
    text, examples, rest = cleandoc(config.__doc__ or "").partition("Examples\n")
    lines = [text.rstrip(), "", "Parameters", "----------"]
    for entry in dataclasses.fields(config):
        lines += [f"{entry.name} : {entry.type}, default {entry.default!r}"]
        lines += [f"    {entry.metadata['help']}"]
    config.__doc__ = "\n".join([*lines, "", examples + rest])
    return config


def is_int(value: object) -> bool:
    """Whether it is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


@_document
@dataclass(frozen=True)
class ConvertConfig:
    """How a checkpoint is converted. A wrong value is refused with the value shown.

    Examples
    --------
    >>> import molae
    >>> molae.ConvertConfig(size=0.5, group_size={"down": 4}).group_size
    {'down_proj': 4}
    """

    method: str = field(
        default="latent",
        metadata={"help": "Name of the method: 'latent' (molae's own) or 'molae' (the paper's)."},
    )
    size: float | None = field(
        default=None,
        metadata={
            "help": "Share of the experts' numbers to keep, above 0 and at most 1. "
            "None means 0.75, or whatever `rank` and `group_size` give when both are set."
        },
    )
    group_size: int | str | Mapping[str, int] = field(
        default="auto",
        metadata={
            "help": "Experts that share one factor: a number, one number a type "
            "({'gate_proj': 8, 'down_proj': 4}; types left out are 'auto'), or 'auto'."
        },
    )
    rank: int | None = field(
        default=None,
        metadata={"help": "Latent rank, method 'molae' only. None means min(F, D)."},
    )
    flops: float | None = field(
        default=None,
        metadata={
            "help": "With a calibration text: share of the experts' operations a token to keep at "
            "most, above 0 and at most 1, beside `size` or, where that is None, instead of it."
        },
    )
    uniform: bool = field(
        default=False,
        metadata={
            "help": "With a calibration text: the same share of its numbers for each group, "
            "instead of spending the size where it does most good, and as many compressed experts "
            "in each layer."
        },
    )
    one_shot: bool = field(
        default=False,
        metadata={
            "help": "With a calibration text: fit every layer to what the original hands on, "
            "instead of what the layers converted before it do."
        },
    )

    drop_idle: bool = field(
        default=False,
        metadata={
            "help": "With a calibration text: experts that none of its tokens reach keep no "
            "numbers and answer nothing; their share goes to the others. Without it every expert "
            "keeps some, for texts of another kind."
        },
    )
    refit: bool = field(
        default=True,
        metadata={
            "help": "With a calibration text: fit up and down to the answers of the whole layer "
            "in the end; without it a conversion takes about half as long and loses more."
        },
    )

    heal: int = field(
        default=0,
        metadata={
            "help": "With a calibration text: in the end train all factors of each layer together, "
            "in so many passes over the text, to what the layer answered before."
        },
    )

    compressed_experts: int = field(
        default=0,
        metadata={
            "help": "With a calibration text: so many of a token's experts, the last by their "
            "routing weights, do not run; what acts in their place is fitted to what the layer "
            "answers. So many on average: layers in which the model misses them less have more "
            "(uniform: all the same)."
        },
    )
    light_module: str = field(
        default="auto",
        metadata={
            "help": "What acts in the place of compressed experts: narrow:UNITS or narrow:1/N (an "
            "expert of so many units, or of that share of them), additive (a vector an expert), "
            "vectors (that scale what the other experts read), or auto: narrow:1/8 where the size "
            "has room for it (0.7 and more), else additive."
        },
    )
    max_memory: int | str | None = field(
        default=None,
        metadata={
            "help": "With a calibration text: memory to stay within, about, such as '24GB' or a "
            "number of bytes. Where the second moments of a layer's experts do not fit they are "
            "gathered a few groups at a time, in more passes."
        },
    )

    def __post_init__(self) -> None:
        if not isinstance(self.method, str):
            raise ArgumentError(f"method: expected a name, got {self.method!r}")
        for name in ("size", "flops"):
            if (share := getattr(self, name)) is not None:
                object.__setattr__(self, name, _share(name, share))
        if self.flops is not None and self.uniform:
            raise ArgumentError("flops: the same share everywhere (uniform) knows no such budget")
        if self.rank is not None and not (is_int(self.rank) and self.rank >= 1):
            raise ArgumentError(f"rank: expected a whole number of at least 1, got {self.rank!r}")
        for name in ("uniform", "one_shot", "drop_idle", "refit"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        for name in ("compressed_experts", "heal"):
            if not (is_int(getattr(self, name)) and getattr(self, name) >= 0):
                raise ArgumentError(
                    f"{name}: expected a whole number of at least 0, got {getattr(self, name)!r}"
                )
        if not isinstance(self.light_module, str):
            raise ArgumentError(f"light_module: expected a text, got {self.light_module!r}")
        object.__setattr__(self, "group_size", _check_group_size(self.group_size))
        if self.max_memory is not None:
            object.__setattr__(self, "max_memory", _nbytes("max_memory", self.max_memory))

    @property
    def light_form(self) -> str:
        """`light_module`, or what 'auto' stands for."""
        if self.light_module != "auto":
            return self.light_module
        return "narrow:1/8" if (self.target_size or 1.0) >= ROOM_FOR_NARROW else "additive"

    @property
    def target_size(self) -> float | None:
        """The size to reach: as given, 0.75, or None where rank and group size decide; with
        `flops` alone nothing but that bounds it."""
        if self.size is None and self.flops is not None:
            return 1.0
        if self.size is None and not (
            self.rank and self.group_size_of("gate_proj") and self.group_size_of("up_proj")
        ):
            return 0.75
        return self.size

    def group_size_of(self, kind: str) -> int | None:
        """Group size asked for one matrix type; None means that it is chosen."""
        if isinstance(self.group_size, Mapping):
            return self.group_size.get(kind)
        return None if isinstance(self.group_size, str) else self.group_size

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, with a version stamp."""
        out: dict[str, Any] = {"settings_version": SETTINGS_VERSION}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            out[entry.name] = dict(value) if isinstance(value, Mapping) else value
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ConvertConfig:
        """The settings written by `to_dict`.

        Raises
        ------
        ArgumentError
            An unknown key, a version that this molae cannot read, or a bad value.
        """
        data = dict(data)
        version = data.pop("settings_version", SETTINGS_VERSION)
        if version != SETTINGS_VERSION:
            raise ArgumentError(
                f"settings_version: this molae reads version {SETTINGS_VERSION}, got {version!r}"
            )
        known = [entry.name for entry in dataclasses.fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise ArgumentError(f"unknown settings {unknown}; known are {known}")
        return cls(**data)


def refuse_nonsense(settings: Any, good: Mapping[str, bool]) -> None:
    """Raises ArgumentError of the first setting that is not good, with its value."""
    for name, fine in good.items():
        if not fine:
            raise ArgumentError(f"{name}: {getattr(settings, name)!r} makes no sense")


@dataclass(frozen=True)
class HealConfig:
    """How the layers of a converted checkpoint are trained to answer as the original's do.

    Raises
    ------
    ArgumentError
        A value that makes no sense, whatever the checkpoint; the message names the setting.

    Examples
    --------
    >>> import molae
    >>> molae.HealConfig(steps=300).rate
    0.01
    """

    passes: int = field(
        default=8,
        metadata={"help": "Over the text, for each layer, where `steps` does not say it."},
    )
    steps: int | None = field(
        default=None, metadata={"help": "Of at most 1,024 tokens, for each layer."}
    )
    rate: float = field(
        default=0.01,
        metadata={
            "help": "Of AdamW, in root mean squares of what each factor begins with; it rises over "
            "a twentieth of the steps, then falls on a cosine."
        },
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Of AdamW, decoupled."})
    max_norm: float | None = field(
        default=None, metadata={"help": "Gradients whose norm is above it are scaled down to it."}
    )
    anchored: bool = field(
        default=False,
        metadata={
            "help": "Train each layer towards what the original hands on at its place, so that it "
            "also makes up for what the layers before it have lost; without it, which does better "
            "but at the smallest sizes, towards what the original's experts answer to the same "
            "input."
        },
    )
    seed: int = field(default=0, metadata={"help": "Of the order in which tokens come."})

    def __post_init__(self) -> None:
        good = {
            "passes": is_int(self.passes) and self.passes >= 1,
            "steps": self.steps is None or (is_int(self.steps) and self.steps >= 1),
            "rate": _is_number(self.rate) and self.rate > 0,
            "weight_decay": _is_number(self.weight_decay) and self.weight_decay >= 0,
            "max_norm": self.max_norm is None or (_is_number(self.max_norm) and self.max_norm > 0),
            "anchored": isinstance(self.anchored, bool),
            "seed": is_int(self.seed) and self.seed >= 0,
        }
        refuse_nonsense(self, good)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, with a version stamp."""
        return {"settings_version": SETTINGS_VERSION, **dataclasses.asdict(self)}


def _share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentError(f"{name}: expected a number, got {value!r}")
    if not (math.isfinite(value) and 0 < value <= 1):
        raise ArgumentError(f"{name}: expected a share above 0 and at most 1, got {value!r}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _nbytes(name: str, value: Any) -> int:
    """A number of bytes, or a text such as 24GB or 1.5 GiB."""
    found = value
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([kmgt]?)(i?)b?", value.strip().lower())
        if match is not None:
            number, prefix, binary = match.groups()
            found = int(float(number) * (1024 if binary else 1000) ** "_kmgt".index(prefix or "_"))
    if not (is_int(found) and found >= 1):
        raise ArgumentError(f"{name}: expected bytes, or a text such as '24GB', got {value!r}")
    return int(found)


def _check_group_size(value: Any) -> int | str | dict[str, int]:
    if value == "auto" and isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        sizes: dict[str, int] = {}
        for name, size in value.items():
            kind = name if name in TYPES else f"{name}_proj"
            if kind not in TYPES:
                raise ArgumentError(f"group_size: unknown matrix type {name!r}; known are {TYPES}")
            if not (is_int(size) and size >= 1):
                raise ArgumentError(
                    f"group_size: expected a whole number of at least 1 for {name}, got {size!r}"
                )
            sizes[kind] = size
        return {kind: sizes[kind] for kind in TYPES if kind in sizes} or "auto"
    if is_int(value) and value >= 1:
        return int(value)
    raise ArgumentError(
        f"group_size: expected 'auto', a whole number of at least 1 or a mapping, got {value!r}"
    )
