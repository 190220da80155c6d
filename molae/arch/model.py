"""Match a checkpoint's tensors with its family: what is an expert's matrix, and where."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np

from molae.arch.counts import active_numbers
from molae.arch.family import Family, Layout, Tensor
from molae.arch.registry import find_family, known_families, own_family
from molae.config import TYPES
from molae.errors import ArgumentError, CheckpointError, UnknownFamilyError, shorten
from molae.factored import Factored
from molae.io import COMPUTABLE, ENCODINGS, Checkpoint, LazyArrays, TensorInfo
from molae.io.dtypes import FLOATING

__all__ = ["Counts", "Model", "describe"]

#: Experts of a layer that may lie in one tensor, with room: released models have up to 512.
NAMES_A_TENSOR = 4096


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of a model: all, those of its routed experts, and those one token meets."""

    total_parameters: int
    expert_parameters: int
    active_parameters: int


@dataclass(frozen=True)
class Model:
    """A checkpoint's tensors, understood. Made by `describe`.

    Attributes
    ----------
    family : Family
    letters : dict of str to int
        L layers, E experts, K experts a token, D model width, F expert width, and what else
        the family names.
    moe_layers : tuple of int
        Layers with experts, ascending.
    layout : str
        Name of the family's layout that the checkpoint uses.
    dtype : str
        The experts' type, in the format's words (``"BF16"``).
    factored : Factored or None
        What a converted checkpoint says about itself; None for an ordinary one.
    """

    family: Family
    letters: Mapping[str, int]
    moe_layers: tuple[int, ...]
    layout: str
    dtype: str
    factored: Factored | None
    _block: str = field(repr=False)
    _layout: Layout = field(repr=False)
    _tensors: Mapping[str, TensorInfo] = field(repr=False)
    _tied: bool = field(repr=False)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All that the checkpoint holds, or would hold."""
        return self._tensors

    @property
    def kinds(self) -> tuple[str, ...]:
        """The matrix types of an expert; a family that molae only inspects may lack gate."""
        return tuple(kind for kind in TYPES if any(kind in t.types for t in self._layout.tensors))

    def experts_prefix(self, layer: int) -> str:
        """Prefix of the names of a layer's experts, such as ``model.layers.3.mlp.experts``."""
        return _fill(self.family.experts, self._block, layer)

    def expert_tensors(self, layer: int, kind: str) -> tuple[str, ...]:
        """Names of the tensors that hold one matrix type of a layer, in the experts' order.

        One name where the layout holds all experts in one tensor; gate and up have the same
        name where it fuses the two. In a converted checkpoint: the names the original had.
        """
        self._check_layer(layer)
        return self._names(self._tensor(kind), layer)

    def stored_together(self, kind: str) -> tuple[str, ...]:
        """The matrix types that lie in the same tensors as `kind`, itself included."""
        return self._tensor(kind).types

    def matrices(self, checkpoint: Checkpoint, layer: int, kind: str) -> Sequence[np.ndarray]:
        """The experts' matrices of one type.

        Parameters
        ----------
        checkpoint : Checkpoint
        layer : int
            One of `moe_layers`.
        kind : {'gate_proj', 'up_proj', 'down_proj'}

        Returns
        -------
        sequence of E ndarrays, each of `shape(kind)`
            C-contiguous. Read-only views of the mapped files where `is_mapped`; else each is
            made when it is asked for, by decoding or as a copy in the order that kernels read.
        """
        stored, tensor = self._stored(checkpoint, layer, kind), self._tensor(kind)
        if self.is_mapped(checkpoint.encoding):
            return [tensor.view(own, kind) for own in stored]
        return LazyArrays(len(stored), lambda e: np.ascontiguousarray(tensor.view(stored[e], kind)))

    def is_mapped(self, encoding: str | None) -> bool:
        """Whether `matrices` are views of files with this encoding, which take no memory of the
        process."""
        return encoding is None and all(t.as_matrices for t in self._layout.tensors)

    def sources(
        self, checkpoint: Checkpoint, layer: int, kind: str
    ) -> Sequence[np.ndarray | memoryview]:
        """What the files hold of `matrices`, views without copies: bytes where it is encoded."""
        names, tensor = self.expert_tensors(layer, kind), self._tensor(kind)
        if any(checkpoint.is_encoded(name) for name in names):
            return [piece for name in names for piece in checkpoint.stored(name)]
        return [tensor.view(own, kind) for own in self._stored(checkpoint, layer, kind)]

    def _stored(self, checkpoint: Checkpoint, layer: int, kind: str) -> Sequence[np.ndarray]:
        """Each expert's part of the tensors that hold a type."""
        names = self.expert_tensors(layer, kind)
        if not self._tensor(kind).per_expert:
            return checkpoint.slices(names[0])
        if any(checkpoint.is_encoded(name) for name in names):
            return LazyArrays(len(names), lambda e: checkpoint.array(names[e]))
        return [checkpoint.array(name) for name in names]

    def put(self, kind: str, matrices: Sequence[np.ndarray]) -> np.ndarray:
        """One expert's part of the tensors that hold a type, from the matrices of all types that
        are stored together with it; the way back from `matrices`."""
        tensor = self._tensor(kind)
        if len(matrices) == 1 and tensor.as_matrices:
            return matrices[0]
        shape = self.part_shape(kind)
        part = np.empty(shape, matrices[0].dtype)
        tensor.joined(matrices, part)
        return part

    def part_shape(self, kind: str) -> tuple[int, int]:
        """Shape of one expert's part of the tensors that hold a type."""
        rows, cols = self.shape(kind)
        tensor = self._tensor(kind)
        rows *= len(tensor.types)
        return (cols, rows) if tensor.transposed else (rows, cols)

    @property
    def has_biases(self) -> bool:
        """Whether the experts have biases."""
        return self.family.has_biases

    def biases(
        self, checkpoint: Checkpoint, layer: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Of gate (E, F), up (E, F) and down (E, D), copies; None where experts have none."""
        if not self.has_biases:
            return None
        names = self.roles(layer)
        both = checkpoint.array(names["gate_up_proj_bias"])
        F = self.letters["F"]
        gate, up = (
            (both[:, ::2], both[:, 1::2])
            if self._tensor("gate_proj").interleaved
            else (both[:, :F], both[:, F:])
        )
        down = np.array(checkpoint.array(names["down_proj_bias"]))
        return np.ascontiguousarray(gate), np.ascontiguousarray(up), down

    def shape(self, kind: str) -> tuple[int, int]:
        """(rows, cols) of a type's matrices: (F, D) for gate and up, (D, F) for down."""
        self._tensor(kind)
        F, D = self.letters["F"], self.letters["D"]
        return (D, F) if kind == "down_proj" else (F, D)

    def side(self, kind: str) -> Literal["input", "output"]:
        """The side on which a type's experts can share a factor: ``"input"`` or ``"output"``."""
        self._tensor(kind)
        return "output" if kind == "down_proj" else "input"

    def layer_of(self, name: str) -> int | None:
        """The decoder layer a tensor belongs to by its name, None outside the layers.

        Layers past the last (next-token heads) have numbers too.
        """
        match = _layer_pattern(self._block).match(name)
        return int(match[1]) if match else None

    def roles(self, layer: int) -> dict[str, str]:
        """Names of a layer's other MoE tensors by role, such as ``router``."""
        self._check_layer(layer)
        found = {t.role: self._present(t, layer) for t in self.family.tensors}
        return {role: name for role, name in found.items() if name is not None}

    def _present(self, tensor: Tensor, layer: int) -> str | None:
        """The name under which the checkpoint has one of the family's other tensors, if it does."""
        names = (_fill(name, self._block, layer) for name in (tensor.name, *tensor.others))
        return next((name for name in names if name in self._tensors), None)

    def counts(self) -> Counts:
        """Count the model's numbers.

        Returns
        -------
        Counts
            ``total_parameters``: the numbers of a floating type in the checkpoint, tied
            embeddings once. ``expert_parameters``: those of the routed experts in
            `moe_layers`, their matrices. ``active_parameters``: all others, of the experts'
            biases K/E, and `active_experts`.
        """
        skip = self.family.head if self._tied else None
        sizes = {n: t.size for n, t in self._tensors.items() if t.dtype in FLOATING and n != skip}
        total, own, factors = sum(sizes.values()), _expected(self), _factor_prefixes(self)
        experts = sum(size for n, size in sizes.items() if n in own or n.startswith(factors))
        idle = sum(self._idle_vectors(layer) for layer in self.moe_layers)
        return Counts(total, experts, total - experts - round(idle) + self.active_experts())

    def active_experts(self) -> int:
        """Numbers of the experts that a token meets: K/E of them.

        In a converted checkpoint the shared factors count by the chance that a token needs them
        (see `molae.arch.counts.active_numbers`), rounded; of a token's compressed experts what
        acts in their place alone.
        """
        met = sum(self._active(layer, kind) for layer in self.moe_layers for kind in self.kinds)
        return round(met) + sum(self._active_light(layer) for layer in self.moe_layers)

    def _active(self, layer: int, kind: str) -> float:
        K, F, D = (self.letters[x] for x in "KFD")
        K -= self.num_compressed(layer)
        split = self.factored.layers.get(layer, {}).get(kind) if self.factored else None
        if self.factored is None or split is None:
            return K * F * D
        groups = [len(g) for g in split.groups]
        return active_numbers(groups, split.ranks, form=self.factored.form, K=K, F=F, D=D)

    def _idle_vectors(self, layer: int) -> float:
        """Numbers of what each expert has besides its matrices, of those a token does not meet."""
        E, K = self.letters["E"], self.letters["K"] - self.num_compressed(layer)
        prefix = self.experts_prefix(layer) + "."
        names = [
            _fill(tensor.name, self._block, layer)
            for tensor in self.family.tensors
            if tensor.shape[0] == "E"
        ]
        sizes = [
            self._tensors[n].size for n in names if n.startswith(prefix) and n in self._tensors
        ]
        return sum(sizes) * (E - K) / E

    def _active_light(self, layer: int) -> int:
        if self.factored is None:
            return 0
        F, D = self.letters["F"], self.letters["D"]
        return self.num_compressed(layer) * self.factored.light.numbers(F=F, D=D)

    def num_compressed(self, layer: int) -> int:
        """How many of a token's experts are compressed in a layer."""
        return self.factored.compressed.get(layer, 0) if self.factored else 0

    def _tensor(self, kind: str) -> Tensor:
        if kind not in TYPES:
            raise ArgumentError(f"kind: expected one of {', '.join(TYPES)}, got {kind!r}")
        return self._layout.of_type(kind)

    def _names(self, tensor: Tensor, layer: int) -> tuple[str, ...]:
        name = _fill(tensor.name, self._block, layer, self.family.experts)
        if not tensor.per_expert:
            return (name,)
        return tuple(name.replace("${expert}", str(e)) for e in range(self.letters["E"]))

    def _check_layer(self, layer: int) -> None:
        if layer not in self.moe_layers:
            raise ArgumentError(f"layer: {layer} has no experts; those that do: {self.moe_layers}")


def describe(
    source: Checkpoint | Mapping[str, Any],
    tensors: Mapping[str, TensorInfo] | None = None,
    *,
    family: Family | None = None,
    converted: bool = False,
) -> Model:
    """Match a checkpoint with its family and check every tensor of its MoE blocks.

    Parameters
    ----------
    source : Checkpoint or dict
        An open checkpoint, or its config.
    tensors : dict of str to TensorInfo, optional
        With a config: what the checkpoint holds.
    family : Family, optional
        The family to use instead of the one named by ``model_type``.
    converted : bool
        Accept a checkpoint that molae has converted as well. Its factors are not checked here.

    Returns
    -------
    Model

    Raises
    ------
    UnknownFamilyError
        No such family (the known ones are listed), or the names do not match it (some of
        them are shown).
    CheckpointError
        A size missing in the config, an absent tensor, one of unexpected shape, experts of
        an unsupported type or of several types, a quantized or already converted source.
    """
    config = source.config if isinstance(source, Checkpoint) else source
    if tensors is None:
        if not isinstance(source, Checkpoint):
            raise ArgumentError("tensors: needed where source is a config")
        tensors = source.tensors
    if family is None:
        family = _find(config, tensors)
    elif own_family(config) not in (None, family):
        raise CheckpointError(
            "config.json: the checkpoint was converted with another description of its family, "
            "which it holds; leave --arch out"
        )
    if not converted:
        family.check_convertible()
    _check_quantization(config, converted)
    letters = family.read_letters(config)
    layers = family.read_moe_layers(config)
    quant = config.get("quantization_config")
    method = quant.get("quant_method") if quant else None
    factored = Factored.from_dict(quant, letters) if quant and method not in ENCODINGS else None
    tied = family.is_tied(config)
    layouts = family.layouts if factored is None else (family.find_layout(factored),)
    candidates = [
        Model(family, letters, layers, layout.name, "", factored, block, layout, tensors, tied)
        for block in family.blocks
        for layout in layouts
    ]
    _check_extent(letters, layers, tensors)
    model = _best(candidates)
    _check_blocks(model)
    dtype = _check_experts(model)
    return Model(
        family, letters, layers, model.layout, dtype, factored, model._block, model._layout,
        tensors, tied,
    )  # fmt: skip


def _find(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Family:
    try:
        return find_family(config)
    except UnknownFamilyError as e:
        experts = [n for n in tensors if "expert" in n]
        if experts:
            hint = f"its experts' tensors are named like {_some(experts)}"
        else:
            hint = f"no tensor is named like an expert's, the names are like {_some(tensors)}"
        raise UnknownFamilyError(f"{e}; {hint}") from None


def _check_quantization(config: Mapping[str, Any], converted: bool) -> None:
    quant = config.get("quantization_config")
    if not quant:
        return
    method = quant.get("quant_method") if isinstance(quant, dict) else None
    if isinstance(method, str) and method in ENCODINGS:
        return
    if method != "molae":
        raise CheckpointError(
            f"config.json: the checkpoint is quantized (quant_method {shorten(method)}); "
            f"{' and '.join(ENCODINGS)} are read; "
            f"dequantize it to BF16 first, or take the unquantized release"
        )
    if not converted:
        raise CheckpointError(
            "config.json: the checkpoint was already converted by molae; "
            "convert the original, or run 'molae materialize' on this one first"
        )


def _check_extent(
    letters: Mapping[str, int], layers: tuple[int, ...], tensors: Mapping[str, TensorInfo]
) -> None:
    """Refuse sizes that no folder with so few tensors has, before names are made for all."""
    if len(layers) * letters["E"] > NAMES_A_TENSOR * (len(tensors) + 1):
        raise CheckpointError(
            f"config.json: E={letters['E']} experts in {len(layers)} layers, and the checkpoint "
            f"has {len(tensors)} tensors; config and weights do not belong together"
        )


def _best(candidates: list[Model]) -> Model:
    """The block and layout that most names speak for; of equals, the one of which shapes do."""
    best, most = candidates[0], (0, 0)
    for model in candidates:
        expected = {n: own for n, own in _expected(model).items() if n in model._tensors}
        factors = _factor_prefixes(model)
        score = len(expected) + sum(n.startswith(factors) for n in model._tensors)
        fitting = sum(
            model._tensors[n].shape == _wanted_shape(model, tensor)
            for n, (tensor, _, _) in expected.items()
        )
        if (score, fitting) > most:
            best, most = model, (score, fitting)
    if most[0] == 0:
        wanted = [next(iter(_expected(m)), m.experts_prefix(m.moe_layers[0])) for m in candidates]
        found = [n for n in best._tensors if "expert" in n] or list(best._tensors)
        raise UnknownFamilyError(
            f"family {best.family.model_type}: no tensor has a name it knows, such as "
            f"{_some(wanted)}; the checkpoint has {_some(found)}; known families are "
            f"{known_families()}"
        )
    return best


def _expected(model: Model) -> dict[str, tuple[Tensor, int, int | None]]:
    """The experts' tensors in the source's form: name to (tensor, layer, expert)."""
    names: dict[str, tuple[Tensor, int, int | None]] = {}
    for layer in model.moe_layers:
        touched = model.factored.layers.get(layer, {}) if model.factored else {}
        for tensor in model._layout.tensors:
            if not any(kind in touched for kind in tensor.types):
                for e, name in enumerate(model._names(tensor, layer)):
                    names[name] = (tensor, layer, e if tensor.per_expert else None)
    return names


def _factor_prefixes(model: Model) -> tuple[str, ...]:
    """How names of what molae added to a converted checkpoint begin; empty for an ordinary one."""
    if model.factored is None:
        return ()
    layers, compressed = model.factored.layers, model.factored.compressed
    return tuple(
        f"{model.experts_prefix(layer)}.{name}"
        for layer in model.moe_layers
        for name in (
            *(f"{kind}." for kind in layers.get(layer, {})),
            *(["compressed", "light."] if layer in compressed else []),
        )
    )


def _check_blocks(model: Model) -> None:
    """The router is there, and nothing under the experts' prefix is unaccounted for."""
    family, tensors = model.family, model._tensors
    known = set(_expected(model))
    for layer in model.moe_layers:
        for tensor in family.tensors:
            name = model._present(tensor, layer)
            if name is not None:
                known.add(name)
                _check_shape(model, tensor, tensors[name])
            elif not tensor.optional and all(_extent(x, model.letters) for x in tensor.shape):
                name = _fill(tensor.name, model._block, layer)
                raise CheckpointError(
                    f"{name}: absent from the checkpoint ({tensor.role} of layer {layer}); "
                    f"download it again"
                )
    strange = [n for n in tensors if n not in known and _is_strange(model, n)]
    if strange:
        where = model.layer_of(strange[0])
        E = model.letters["E"]
        raise UnknownFamilyError(
            f"family {family.model_type}: {len(strange)} tensors that it does not know, such as "
            f"{_some(strange)}; config.json says E={E} and that layer {where} has "
            f"{'' if where in model.moe_layers else 'no '}experts; known families are "
            f"{known_families()}"
        )


def _is_strange(model: Model, name: str) -> bool:
    layer = model.layer_of(name)
    if layer is None or layer >= model.letters["L"]:  # past the last: next-token heads, copied
        return False
    prefixes = (_fill(model.family.experts, b, layer) + "." for b in model.family.blocks)
    return name.startswith(tuple(prefixes)) and not name.startswith(_factor_prefixes(model))


def _check_experts(model: Model) -> str:
    """Every expert's tensor is there, of the right shape and of one type; that type."""
    expected, tensors = _expected(model), model._tensors
    missing = [n for n in expected if n not in tensors]
    if missing:
        _, layer, expert = expected[missing[0]]
        who = f"layer {layer}" if expert is None else f"expert {expert} of layer {layer}"
        raise CheckpointError(
            f"{missing[0]}: absent from the checkpoint ({who}); {len(missing)} of "
            f"{len(expected)} expert tensors are missing; download it again"
        )
    first = None
    for name, (tensor, _, _) in expected.items():
        info = tensors[name]
        _check_shape(model, tensor, info)
        if info.dtype not in COMPUTABLE:
            raise CheckpointError(
                f"{name}: type {info.dtype}, experts must be {', '.join(COMPUTABLE)}; "
                f"dequantize or cast the checkpoint first"
            )
        first = first or info
        if info.dtype != first.dtype:
            raise CheckpointError(
                f"{name}: type {info.dtype}, but {first.name} is {first.dtype}; "
                f"cast all experts to one type first"
            )
    return first.dtype if first else _factor_dtype(model)


def _factor_dtype(model: Model) -> str:
    """The type of a converted checkpoint of which no expert kept its form."""
    factors = _factor_prefixes(model)
    for name, info in model._tensors.items():
        if name.startswith(factors) and info.dtype in COMPUTABLE:
            return info.dtype
    raise CheckpointError(
        f"{factors[0]}*: no tensor of a floating type; convert the original again"
    )


def _wanted_shape(model: Model, tensor: Tensor) -> tuple[int, ...]:
    return tuple(_extent(x, model.letters) for x in tensor.shape)


def _check_shape(model: Model, tensor: Tensor, info: TensorInfo) -> None:
    wanted = _wanted_shape(model, tensor)
    if info.shape != wanted:
        pairs = zip(tensor.shape, wanted, strict=True)
        text = ", ".join(x if x == str(n) else f"{x}={n}" for x, n in pairs)
        swapped = info.shape[:-2] + info.shape[-2:][::-1]
        hint = "; transposed?" if swapped == wanted else ""
        raise CheckpointError(
            f"{info.name}: expected shape ({text}) by config.json, got {info.shape}{hint}; "
            f"config and weights do not belong together, or the layout is not supported"
        )


def _extent(text: str, letters: Mapping[str, int]) -> int:
    number = text.rstrip(string.ascii_uppercase)
    return math.prod((letters[x] for x in text[len(number) :]), start=int(number or 1))


def _fill(template: str, block: str, layer: int, experts: str = "") -> str:
    name = template.replace("${experts}", experts).replace("${block}", block)
    return name.replace("${layer}", str(layer))


@cache
def _layer_pattern(block: str) -> re.Pattern[str]:
    return re.compile(re.escape(block.partition("${layer}")[0]) + r"([0-9]{1,9})\.")


def _some(names: Iterable[str]) -> str:
    shown = list(dict.fromkeys(names))
    more = "" if len(shown) <= 3 else f" and {len(shown) - 3} more"
    return (", ".join(shown[:3]) or "none") + more
