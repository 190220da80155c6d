"""A draft of a family's description, from the names and shapes of a checkpoint's tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from molae.arch.description import NAMED_LAYOUTS
from molae.arch.family import MoeLayers
from molae.config import is_int
from molae.errors import CheckpointError
from molae.factored import QUANT_METHOD
from molae.io import TensorInfo

__all__ = ["Draft", "draft_family"]

#: Stands where nothing was found; reading a checkpoint by such a draft is refused.
OPEN = "FILL IN"

_KEYS = {
    "L": ("num_hidden_layers", "num_layers", "n_layers", "n_layer"),
    "E": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "n_experts"),
    "K": (
        "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k_experts",
        "moe_topk", "moe_top_k", "moe_k", "num_selected_experts", "top_k",
    ),
    "D": ("hidden_size", "d_model", "n_embd", "dim"),
    "F": (
        "moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size",
        "intermediate_size", "ffn_dim",
    ),
}  # fmt: skip

_RULES = {
    "first": ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"),
    "last": ("moe_layer_end_index",),
    "every": ("moe_layer_freq",),
    "step": ("decoder_sparse_step", "moe_layer_interval", "interleave_moe_layer_step"),
    "except": ("mlp_only_layers",),
    "only": ("moe_layers", "moe_layers_enum"),
    "types": ("mlp_layer_types",),
    "pattern": ("hybrid_override_pattern",),
}

_GATE = ("gate_proj", "w1", "gate", "wi_0", "linear_1")
_UP = ("up_proj", "w3", "up", "wi_1", "linear_v")
_DOWN = ("down_proj", "w2", "down", "wo", "linear_2")


@dataclass(frozen=True)
class Draft:
    """A description, and what was found.

    Attributes
    ----------
    description : dict
        As in a JSON file of a family.
    found : tuple of str
        What was recognized, and what was taken for granted.
    missing : tuple of str
        What could not be determined, and has to be filled in.
    """

    description: dict[str, Any]
    found: tuple[str, ...]
    missing: tuple[str, ...]


def draft_family(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Draft:
    """Draft the description of a checkpoint's family.

    Parameters
    ----------
    config : mapping
        As in ``config.json``.
    tensors : mapping of str to TensorInfo
        What the checkpoint holds.

    Returns
    -------
    Draft
        To be read over: which of two equal shapes is gate and which half of a fused tensor, only
        names can tell.

    Raises
    ------
    CheckpointError
        Nothing there looks like experts.
    """
    return _Drafter(config, tensors).draft()


@dataclass
class _Experts:
    """Tensors of one module of experts, by what follows its name."""

    prefix: str
    module: str
    per_expert: bool
    E: int
    layers: tuple[int, ...]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def numbers(self) -> int:
        return sum(rows * cols for rows, cols in self.matrices.values()) * len(self.layers) * self.E

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        return {leaf: (shape[-2], shape[-1]) for leaf, shape in self.shapes.items()}


class _Drafter:
    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
        self.config, self.tensors = config, tensors
        self.found: list[str] = []
        self.missing: list[str] = []

    def draft(self) -> Draft:
        quant = self.config.get("quantization_config")
        if isinstance(quant, Mapping) and quant.get("quant_method") == QUANT_METHOD:
            raise CheckpointError(
                "config.json: the checkpoint was converted by molae; draft from the original"
            )
        experts = self._experts()
        self._width = self._model_width()
        roles, sizes = self._roles(experts)
        block, inner = _split_module(experts)
        part, beneath = self._part(experts, sizes)
        letters, L = self._letters(part, experts, sizes)
        description: dict[str, Any] = {"model_type": self._model_type()}
        if beneath:
            description["beneath"] = beneath
        description |= {
            "letters": letters,
            "moe_layers": self._moe_layers(part, experts, L),
            "blocks": [block],
            "experts": inner,
            "layouts": [_layout(roles)],
            "tensors": self._tensors(experts, block, sizes),
        }
        if {role["role"] for role in roles} == {"up_proj", "down_proj"}:
            description["unsupported"] = "its experts have no gate"
            self.missing.append("The experts have no gate; molae only inspects such families.")
        if head := self._head():
            description["head"] = head
        self._tell_shared(experts)
        return Draft(description, tuple(self.found), tuple(self.missing))

    def _model_type(self) -> str:
        value = self.config.get("model_type")
        if isinstance(value, str) and value:
            return value
        self.missing.append("config.json names no model_type.")
        return OPEN

    # ---------------------------------------------------------------- the experts

    def _experts(self) -> _Experts:
        candidates = [*self._per_expert(), *self._fused()]
        complete = [own for own in candidates if 2 <= len(own.shapes) <= 3]
        if not complete:
            like = [name for name in self.tensors if "expert" in name][:3]
            hint = f"; the names are like {', '.join(like)}" if like else ""
            raise CheckpointError(
                "no experts found: neither tensors numbered by layer and expert, nor tensors of "
                f"three axes that hold all experts of a layer{hint}; write the description by "
                "hand, see docs/formats.md"
            )
        best = max(complete, key=lambda own: own.numbers)
        form = "one tensor an expert" if best.per_expert else "all experts of a layer in one tensor"
        self.found.append(f"{best.E} experts in {best.prefix}.N.{best.module}, {form}.")
        return best

    def _per_expert(self) -> list[_Experts]:
        seen: dict[tuple[str, str], dict[str, dict[int, dict[int, tuple[int, ...]]]]] = {}
        for name, info in self.tensors.items():
            parts = name.split(".")
            numbered = [i for i, part in enumerate(parts) if part.isdecimal()]
            if len(numbered) != 2 or len(info.shape) != 2 or numbered[1] == len(parts) - 1:
                continue
            i, j = numbered
            if j == i + 1:
                continue
            key = ".".join(parts[:i]), ".".join(parts[i + 1 : j])
            module = seen.setdefault(key, defaultdict(lambda: defaultdict(dict)))
            module[".".join(parts[j + 1 :])][int(parts[i])][int(parts[j])] = info.shape
        found = []
        for (prefix, path), leaves in seen.items():
            counts = {len(own) for by_layer in leaves.values() for own in by_layer.values()}
            E = max(counts)
            if E < 2:
                continue
            own = _Experts(prefix, path, True, E, tuple(sorted(next(iter(leaves.values())))))
            for leaf, by_layer in leaves.items():
                shapes = {shape for experts in by_layer.values() for shape in experts.values()}
                if len(shapes) == 1 and all(set(e) == set(range(E)) for e in by_layer.values()):
                    own.shapes[leaf] = shapes.pop()
            found.append(own)
        return found

    def _fused(self) -> list[_Experts]:
        seen: dict[tuple[str, str, int], dict[str, dict[int, tuple[int, ...]]]] = {}
        for name, info in self.tensors.items():
            parts = name.split(".")
            numbered = [i for i, part in enumerate(parts) if part.isdecimal()]
            if len(numbered) != 1 or len(info.shape) != 3 or min(info.shape) < 2:
                continue
            at = numbered[0]
            inner = parts[at + 1 :]
            last = inner[-2:] if inner[-1] == "weight" else inner[-1:]
            module = ".".join(inner[: len(inner) - len(last)])
            key = ".".join(parts[:at]), module, info.shape[0]
            own = seen.setdefault(key, defaultdict(dict))
            own[".".join(last)][int(parts[at])] = info.shape
        found = []
        for (prefix, module, E), leaves in seen.items():
            experts = _Experts(prefix, module, False, E, tuple(sorted(next(iter(leaves.values())))))
            for leaf, by_layer in leaves.items():
                if len(set(by_layer.values())) == 1 and tuple(sorted(by_layer)) == experts.layers:
                    experts.shapes[leaf] = next(iter(by_layer.values()))
            found.append(experts)
        return found

    def _model_width(self) -> int | None:
        for name, info in self.tensors.items():
            outside = not any(part.isdecimal() for part in name.split("."))
            if outside and len(info.shape) == 2 and ("embed" in name or "wte" in name):
                return info.shape[1]
        return None

    def _roles(self, experts: _Experts) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """The experts' tensors as a description has them, and D and F."""
        leaves = experts.matrices
        if len(leaves) == 2:
            return self._pair(experts, leaves)
        shapes = list(leaves.values())
        alone = [leaf for leaf, shape in leaves.items() if shapes.count(shape) == 1]
        if len(set(shapes)) == 2 and len(alone) == 1:
            down = alone[0]
        else:
            down = self._named(leaves, _DOWN, "down")
        gate, up = self._gate_and_up([leaf for leaf in leaves if leaf != down])
        rows, cols = leaves[gate]
        transposed = self._width is not None and cols != self._width and rows == self._width
        F, D = (cols, rows) if transposed else (rows, cols)
        if leaves[up] != (rows, cols) or leaves[down] != (cols, rows):
            raise CheckpointError(
                f"experts of {experts.prefix}.N.{experts.module}: shapes {leaves} are not those of "
                "gate, up and down; write the description by hand, see docs/formats.md"
            )
        own = {gate: "gate_proj", up: "up_proj", down: "down_proj"}
        return [_role(experts, leaf, role, transposed=transposed) for leaf, role in own.items()], {
            "F": F,
            "D": D,
        }

    def _pair(
        self, experts: _Experts, leaves: Mapping[str, tuple[int, int]]
    ) -> tuple[list[dict[str, Any]], dict[str, int]]:
        names = list(leaves)
        for first, second in (names, names[::-1]):
            (m, n), (p, q) = leaves[first], leaves[second]
            plain, transposed = (n == p and m == 2 * q), (m == q and n == 2 * p)
            if not plain and not transposed:
                continue
            D, F = (n, q) if plain else (m, p)
            half = "rows" if plain else "columns"
            self.found.append(
                f"{first} holds gate and up: the first F {half} are taken for gate. Where they "
                'take turns instead, add "interleaved": true.'
            )
            return [
                _role(experts, first, "gate_up_proj", transposed=transposed),
                _role(experts, second, "down_proj", transposed=transposed),
            ], {"F": F, "D": D}
        (m, n), (p, q) = leaves[names[0]], leaves[names[1]]
        if (m, n) == (q, p):
            down = self._named(leaves, _DOWN, "down")
            up = next(leaf for leaf in leaves if leaf != down)
            F, D = leaves[up]
            return [_role(experts, up, "up_proj"), _role(experts, down, "down_proj")], {
                "F": F, "D": D
            }  # fmt: skip
        raise CheckpointError(
            f"experts of {experts.prefix}.N.{experts.module}: shapes {dict(leaves)} are not those "
            "of gate, up and down; write the description by hand, see docs/formats.md"
        )

    def _named(self, leaves: Iterable[str], known: tuple[str, ...], what: str) -> str:
        leaves = list(leaves)
        for leaf in leaves:
            if leaf.removesuffix(".weight") in known:
                return leaf
        self.missing.append(
            f"Which of {', '.join(leaves)} is {what} is not told by name; {leaves[-1]} is taken."
        )
        return leaves[-1]

    def _gate_and_up(self, pair: list[str]) -> tuple[str, str]:
        plain = [leaf.removesuffix(".weight") for leaf in pair]
        for one, other in ((0, 1), (1, 0)):
            if plain[one] in _GATE or plain[other] in _UP:
                return pair[one], pair[other]
        self.missing.append(
            f"Which of {pair[0]} and {pair[1]} is gate is not told by name; {pair[0]} is taken."
        )
        return pair[0], pair[1]

    # ---------------------------------------------------------------- the config

    def _part(
        self, experts: _Experts, sizes: Mapping[str, int]
    ) -> tuple[Mapping[str, Any], str | None]:
        """The part of the config that has most of the sizes, and its key."""
        wanted = {"E": experts.E, **sizes}
        parts = [(self.config, None)] + [
            (value, key) for key, value in self.config.items() if isinstance(value, Mapping)
        ]

        def score(part: Mapping[str, Any]) -> int:
            known = sum(_keys_of(part, letter, size)[0] != [] for letter, size in wanted.items())
            return 2 * known + any(key in part for key in _KEYS["K"])

        part, key = max(parts, key=lambda own: score(own[0]))
        if key is not None:
            self.found.append(f"The sizes are in {key}.")
        return part, key

    def _letters(
        self, part: Mapping[str, Any], experts: _Experts, sizes: Mapping[str, int]
    ) -> tuple[dict[str, str], int]:
        letters = {}
        most = 1 + max(
            int(rest[0])
            for name in self.tensors
            if name.startswith(experts.prefix + ".")
            and (rest := name[len(experts.prefix) + 1 :].split("."))[0].isdecimal()
        )
        told = [part[key] for key in _KEYS["L"] if _is_count(part.get(key))]
        L = next((count for count in told if count <= most), most)
        if most > L:
            self.found.append(
                f"Layers {L} to {most - 1} are past the last by the config: next-token heads, "
                "which are copied."
            )
        for letter, size in (("L", L), ("E", experts.E), *sizes.items()):
            known, others = _keys_of(part, letter, size)
            if known:
                letters[letter] = known[0]
            elif len(others) == 1:
                letters[letter] = others[0]
                self.found.append(f"{letter}={size}: {others[0]} is taken by its value alone.")
            else:
                letters[letter] = OPEN
                why = f"{', '.join(others)} have that value" if others else "no key has that value"
                self.missing.append(f"letters.{letter}: the files say {letter}={size}, {why}.")
        letters["K"] = self._top_k(part, experts.E)
        return {letter: letters[letter] for letter in "LEKDF"}, L

    def _top_k(self, part: Mapping[str, Any], E: int) -> str:
        for key in _KEYS["K"]:
            value = part.get(key)
            first = value[0] if isinstance(value, list) and value else value
            if isinstance(first, int) and 0 < first <= E:
                return key
        like = [key for key, value in part.items() if _is_count(value) and "top" in key.lower()]
        told = f"; it may be {', '.join(like)}" if like else ""
        self.missing.append(f"letters.K: no tensor tells how many experts a token has{told}.")
        return OPEN

    def _moe_layers(self, part: Mapping[str, Any], experts: _Experts, L: int) -> dict[str, str]:
        wanted = tuple(n for n in experts.layers if n < L)
        present = {
            rule: next(key for key in keys if part.get(key) is not None)
            for rule, keys in _RULES.items()
            if any(part.get(key) is not None for key in keys)
        }
        tries = [
            dict(some)
            for count in range(len(present), -1, -1)
            for some in combinations(present.items(), count)
        ]
        others = [
            {rule: key}
            for key, value in part.items()
            for rule in ("first", "step", "every", "except", "only", "types", "pattern")
            if (isinstance(value, int | list | str) and "layer" in key.lower()) or "dense" in key
        ]
        for rules in [*tries, *others]:
            if _gives(rules, part, L, wanted):
                told = ", ".join(f"{rule} {key}" for rule, key in rules.items())
                self.found.append(
                    f"Layers with experts: {len(wanted)} of {L}"
                    + (f", by {told}." if told else ".")
                )
                return rules
        self.missing.append(
            f"moe_layers: no key of the config gives the layers with experts, {list(wanted)}; add "
            f'a list of them to config.json and name its key under "only".'
        )
        return {}

    # ---------------------------------------------------------------- the rest of a block

    def _tensors(
        self, experts: _Experts, block: str, sizes: Mapping[str, int]
    ) -> list[dict[str, Any]]:
        """Routers, and what else has something for each expert."""
        E, D, F = experts.E, sizes["D"], sizes["F"]
        outer: dict[tuple[int, ...], list[str]] = {
            (E, D): ["E", "D"],
            (D, E): ["D", "E"],
            (E,): ["E"],
            (1, E): ["1", "E"],
        }
        inner: dict[tuple[int, ...], list[str]] = {
            (E, F): ["E", "F"],
            (E, 2 * F): ["E", "2F"],
            (E, D): ["E", "D"],
        }
        layer = f"{experts.prefix}.{experts.layers[0]}."
        root = block.replace("${layer}", str(experts.layers[0])) + "."
        module = layer + experts.module + "." if "expert" in experts.module else None
        found: list[dict[str, Any]] = []
        routers = []
        for name, info in self.tensors.items():
            beneath = module is not None and name.startswith(module)
            letters = (inner if beneath else outer).get(info.shape)
            if beneath and experts.per_expert:  # an expert's own
                continue
            if letters is None or not name.startswith(layer) or "shared" in name:
                continue
            if not name.startswith(root):
                self.found.append(f"{name} is not in the experts' block, and is copied.")
                continue
            rest = name.removeprefix(root)
            role = rest.removesuffix(".weight").replace(".", "_")
            if not beneath and len(info.shape) == 2 and 1 not in info.shape:
                routers.append(name)
                role = "router" if len(routers) == 1 else role
            if self._in_all(name, experts):
                found.append({"role": role, "name": "${block}." + rest, "shape": letters})
        if routers:
            self.found.append(f"Router: {', '.join(routers)}.")
        else:
            self.missing.append(
                f"tensors: no router found, of shape ({E}, {D}); molae does not need it to convert."
            )
        return found

    def _in_all(self, name: str, experts: _Experts) -> bool:
        start = f"{experts.prefix}.{experts.layers[0]}."
        rest = name.removeprefix(start)
        return all(f"{experts.prefix}.{n}.{rest}" in self.tensors for n in experts.layers)

    def _head(self) -> str | None:
        for name in ("lm_head.weight", "language_model.lm_head.weight", "output.weight"):
            if name in self.tensors:
                return name
        named = [name for name in self.tensors if name.endswith("head.weight")]
        return named[0] if len(named) == 1 else None

    def _tell_shared(self, experts: _Experts) -> None:
        start = f"{experts.prefix}.{experts.layers[0]}."
        shared = [name for name in self.tensors if name.startswith(start) and "share" in name]
        if shared:
            self.found.append(f"Shared experts, which are copied: {', '.join(shared)}.")


def _split_module(experts: _Experts) -> tuple[str, str]:
    """Templates of the block and of the experts' prefix."""
    path, _, last = experts.module.rpartition(".")
    if "expert" not in last:
        module = f".{experts.module}" if experts.module else ""
        return f"{experts.prefix}.${{layer}}{module}", "${block}.experts"
    module = f".{path}" if path else ""
    return f"{experts.prefix}.${{layer}}{module}", f"${{block}}.{last}"


def _role(experts: _Experts, leaf: str, role: str, *, transposed: bool = False) -> dict[str, Any]:
    shape = ["D", "F"] if role == "down_proj" else ["2F" if role == "gate_up_proj" else "F", "D"]
    if transposed:
        shape = shape[::-1]
    root = "${experts}." if "expert" in experts.module.rpartition(".")[2] else "${block}."
    name = root + ("${expert}." if experts.per_expert else "") + leaf
    out: dict[str, Any] = {"role": role, "name": name}
    out["shape"] = shape if experts.per_expert else ["E", *shape]
    return out | ({"transposed": True} if transposed else {})


def _layout(roles: list[dict[str, Any]]) -> Any:
    """Its name where it is one that most families have."""
    named = [(own["role"], own["name"]) for own in roles]
    if not any("transposed" in own for own in roles):
        for name, usual in NAMED_LAYOUTS.items():
            if named == [(tensor.role, tensor.name) for tensor in usual.tensors]:
                return name
    return {"name": "own", "tensors": roles}


def _keys_of(part: Mapping[str, Any], letter: str, size: int) -> tuple[list[str], list[str]]:
    """Keys that hold a size: those known by name, and all others."""

    def holds(value: Any) -> bool:
        if isinstance(value, list):
            return bool(value) and all(_is_count(x) and x == size for x in value)
        return _is_count(value) and value == size

    found = [key for key, value in part.items() if holds(value)]
    known = [key for key in _KEYS[letter] if key in found]
    of_another = {key for keys in _KEYS.values() for key in keys}
    return known, [key for key in found if key not in of_another]


def _gives(rules: Mapping[str, str], part: Mapping[str, Any], L: int, wanted: Any) -> bool:
    named = dict(rules)
    excluded = named.pop("except", None)
    try:
        return MoeLayers(excluded=excluded, **named).indices(part, L) == wanted
    except CheckpointError:
        return False


def _is_count(value: Any) -> bool:
    return is_int(value) and value > 0
