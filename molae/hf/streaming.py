"""Run a checkpoint one decoder layer at a time, its experts read where they lie in the files."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from molae import ops
from molae.arch import Model
from molae.config import TYPES
from molae.errors import CheckpointError, MolaeError, NonFiniteError
from molae.fit.reading import Biases, biases_for
from molae.hf.activation import activation_of, known_activation
from molae.hf.opening import check_harmless, first_line
from molae.io import Checkpoint

__all__ = ["LayerStream", "Light", "Projections", "StreamedExperts", "in_torch"]

#: Gate, up and down of a layer.
Projections = Mapping[str, ops.Projection]

#: What acts in the place of compressed experts, embeddings or narrow ones, and how many of a
#: token's they are.
Light = tuple[np.ndarray | ops.NarrowExperts, int]

#: Is told x (N, D), the experts (N, K), E for none, the routing weights, and the answers (N, D) of
#: what comes by.
Seen = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], object]

#: Tokens that go through the experts at once.
CHUNK = 2048

#: Tokens whose logits are held at once.
LOGITS = 256

#: What decoder layers of some families are handed by those before them besides hidden states.
HANDED_ON = "prev_topk_indices"


def in_torch(array: np.ndarray) -> torch.Tensor:
    """A copy in memory of torch's own, on whose alignment the last bits of its products depend."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).clone()


class StreamedExperts(nn.Module):
    """The experts of one layer as `molae.ops` computes them, of mapped arrays; no parameters."""

    def __init__(self, num_experts: int, act_fn: nn.Module) -> None:
        super().__init__()
        self.num_experts, self.act_fn = num_experts, act_fn
        self.projections: Projections | None = None
        self.biases: Biases | None = None
        self.light: Light | None = None
        self.seen: Seen | None = None

    @property
    def act(self) -> dict[str, Any]:
        """The activation as `molae.ops` takes it."""
        found = known_activation(self.act_fn)
        assert found is not None
        return dict(zip(("activation", "alpha", "limit"), found, strict=True))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        assert self.projections is not None
        shape = hidden_states.shape
        x = hidden_states.reshape(-1, shape[-1]).contiguous().numpy()
        index = top_k_index.clamp(max=self.num_experts).to(torch.int64).contiguous().numpy()
        weights = top_k_weights.to(torch.float32).contiguous().numpy()
        y = np.empty_like(x)
        gate, up, down = (self.projections[kind] for kind in TYPES)
        how = self.act | biases_for(self.biases, (gate, up, down), x.dtype)
        for at in range(0, len(x), CHUNK):
            some = slice(at, at + CHUNK)
            call = x[some], index[some], weights[some], gate, up, down
            if self.light is None:
                ops.latent_experts_forward(*call, **how, out=y[some])
            elif isinstance(self.light[0], ops.NarrowExperts):
                ops.narrow_experts_forward(*call, self.light[0], self.light[1], **how, out=y[some])
            else:
                ops.compressed_experts_forward(
                    *call, self.light[0], self.light[1], **how, out=y[some]
                )
        if self.seen is not None:
            self.seen(x, index, weights, y)
        return torch.from_numpy(y).reshape(shape)


class _Recorder(nn.Module):
    """Stands for a decoder layer: keeps what it was called with, and gives `instead` or that."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.hands_on = HANDED_ON in inspect.signature(layer.forward).parameters
        self.given: tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]] | None = None
        self.instead: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.given = hidden_states, args, kwargs
        out = hidden_states if self.instead is None else self.instead
        return (out, None) if self.hands_on else out


class LayerStream:
    """An ordinary checkpoint as its embedding, its decoder layers and its head, one by one.

    Parameters
    ----------
    checkpoint : Checkpoint
    model : Model
        What `molae.arch.describe` says of it.

    Raises
    ------
    CheckpointError
        Transformers does not know the model, or builds it of other parts than are in the files.

    Notes
    -----
    Arithmetic is float32. Of a layer everything but the experts is read and widened when it is
    its turn; the experts are computed from the mapped files, float16 ones widened.
    """

    def __init__(self, checkpoint: Checkpoint, model: Model) -> None:
        self._checkpoint, self._model = checkpoint, model
        try:
            check_harmless(checkpoint.config, checkpoint.path)
            config = AutoConfig.from_pretrained(
                checkpoint.path, local_files_only=True, trust_remote_code=False
            )
            with torch.device("meta"):
                net: Any = AutoModelForCausalLM.from_config(
                    config, dtype=torch.float32, trust_remote_code=False
                )
        except MolaeError:
            raise
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{checkpoint.path}: Transformers cannot build this model ({first_line(error)})"
            ) from error
        net.tie_weights()
        self._net = net.eval().requires_grad_(False)
        self._stored = _stored_names(net, checkpoint)
        self.vocab_size: int = config.get_text_config().vocab_size
        self.longest: int | None = getattr(
            config.get_text_config(), "max_position_embeddings", None
        )
        for layer in model.moe_layers:
            self._place_experts(layer)
        self._path, self._layers = self._find_layers()
        self._refuse_what_is_handed_on(config.get_text_config())
        self._recorders = [_Recorder(layer) for layer in self._layers]
        self._net.set_submodule(self._path, nn.ModuleList(self._recorders))
        self._fill_buffers()
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __len__(self) -> int:
        """Decoder layers."""
        return len(self._layers)

    # ---------------------------------------------------------------- both ends

    @torch.inference_mode()
    def embed(self, batches: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """What the first layer is given for each batch of tokens (n, T); all of one shape."""
        self._calls = []
        with self._loaded(self._net, ""):
            for tokens in batches:
                for recorder in self._recorders:
                    recorder.instead = None
                self._net(input_ids=tokens, use_cache=False, logits_to_keep=1)
                seen = [recorder.given for recorder in self._recorders]
                assert all(given is not None for given in seen)
                calls = [given[1:] for given in seen if given is not None]
                if self._calls and not _same(calls, self._calls):
                    raise CheckpointError(
                        f"{type(self._net).__name__}: its decoder layers are given what depends on "
                        "the tokens, and cannot be run one by one; convert without a text"
                    )
                self._calls = calls
                first = seen[0]
                assert first is not None
                yield first[0]
        self._forget()

    @torch.inference_mode()
    def divergences(
        self, tokens: torch.Tensor, base: torch.Tensor, others: Sequence[np.ndarray]
    ) -> list[float]:
        """How far the next-token distributions after `others` are from those after `base`.

        Parameters
        ----------
        tokens : (n, T) tensor
        base : (n, T, D) tensor
            What the last layer gave.
        others : sequence of (n, T, D) ndarray
            May be mapped: one at a time is in memory.

        Returns
        -------
        list of float
            Sums of the Kullback-Leibler divergence KL(base, other) over all places, in nats.
        """
        sums = [0.0] * len(others)
        with self._loaded(self._net, ""):
            for at in range(0, tokens.shape[1], LOGITS):
                keep = torch.arange(at, min(at + LOGITS, tokens.shape[1]))
                p = self._log_probabilities(tokens, base, keep)
                for i, other in enumerate(others):
                    q = self._log_probabilities(tokens, in_torch(other), keep)
                    sums[i] += float((p.exp() * (p - q)).double().sum())
        self._forget()
        return sums

    def _log_probabilities(
        self, tokens: torch.Tensor, hidden: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        self._recorders[-1].instead = hidden
        out = self._net(input_ids=tokens, use_cache=False, logits_to_keep=keep)
        return torch.log_softmax(out.logits.float(), dim=-1)

    def _forget(self) -> None:
        for recorder in self._recorders:
            recorder.given = recorder.instead = None

    # ------------------------------------------------------------------- layers

    @contextlib.contextmanager
    def layer(
        self,
        number: int,
        projections: Projections | None = None,
        light: Light | None = None,
    ) -> Iterator[Callable[..., torch.Tensor]]:
        """A decoder layer, ready to run on what comes before it.

        Parameters
        ----------
        number : int
        projections : mapping of str to Projection, optional
            Experts to run instead of the checkpoint's own.
        light : (ndarray or NarrowExperts, int), optional
            What acts in the place of compressed experts, and how many of a token's they are.

        Yields
        ------
        callable
            Of hidden states (n, T, D), with ``seen=`` told what the experts read, and
            ``projections=`` and ``light=`` other experts for this call.
        """
        module = self._layers[number]
        experts = next((m for m in module.modules() if isinstance(m, StreamedExperts)), None)
        own, biases = projections, None
        if experts is not None:
            own = self.experts(number) if own is None else own
            biases = self._model.biases(self._checkpoint, number)

        @torch.inference_mode()
        def run(
            hidden: torch.Tensor,
            *,
            seen: Seen | None = None,
            projections: Projections | None = None,
            light: Light | None = light,
        ) -> torch.Tensor:
            args, kwargs = self._calls[number]
            if experts is not None:
                experts.projections, experts.seen = projections or own, seen
                experts.light, experts.biases = light, biases
            out = module(hidden, *args, **kwargs)
            out = out[0] if isinstance(out, tuple) else out
            if not torch.isfinite(out).all():
                raise NonFiniteError(
                    f"layer {number}: its output has NaN or Inf in it; "
                    "check the source checkpoint and the text"
                )
            return out

        with self._loaded(module, f"{self._path}.{number}."):
            yield run
        if experts is not None:
            experts.projections = experts.seen = experts.light = experts.biases = None

    def how(self, layer: int) -> dict[str, Any]:
        """Activation and biases of a layer's experts, as `molae.fit.LayerInput` has them."""
        experts = next(m for m in self._layers[layer].modules() if isinstance(m, StreamedExperts))
        return experts.act | {"biases": self._model.biases(self._checkpoint, layer)}

    def experts(self, layer: int) -> Projections:
        """The checkpoint's own experts of a layer, each a dense group of its own."""
        return {
            kind: ops.Projection.separate(self._model.matrices(self._checkpoint, layer, kind))
            for kind in TYPES
        }

    # -------------------------------------------------------------------- parts

    def _find_layers(self) -> tuple[str, list[nn.Module]]:
        """Where the decoder layers are in the model, and they themselves."""
        for block in self._model.family.blocks:
            path = block.partition(".${layer}")[0]
            try:
                return path, list(self._net.get_submodule(path))
            except AttributeError:
                continue
        raise AssertionError("the experts were found in the layers")

    def _refuse_what_is_handed_on(self, config: Any) -> None:
        """A layer that needs more of those before it than hidden states cannot run alone."""
        needed = None
        if "shared" in (getattr(config, "indexer_types", None) or ()):
            needed = HANDED_ON
        elif getattr(config, "num_kv_shared_layers", 0):
            needed = "keys and values"
        if needed:
            raise CheckpointError(
                f"{type(self._net).__name__}: its decoder layers hand {needed} to those after "
                "them, and cannot be run one by one; convert without a text"
            )

    def _place_experts(self, layer: int) -> None:
        for block in self._model.family.blocks:
            path = self._model.family.experts.replace("${block}", block)
            path = path.replace("${layer}", str(layer))
            try:
                old: Any = self._net.get_submodule(path)
            except AttributeError:
                continue
            act_fn = activation_of(old)
            biased = isinstance(getattr(old, "down_proj_bias", None), nn.Parameter)
            if known_activation(act_fn) is None or biased != self._model.has_biases:
                break
            new = StreamedExperts(self._model.letters["E"], act_fn)
            self._net.set_submodule(path, new)
            return
        raise CheckpointError(
            f"{type(self._net).__name__}: the experts of layer {layer} cannot be run here; "
            "this version of Transformers builds them in another way, or with an activation "
            "that molae.ops does not have"
        )

    def _fill_buffers(self) -> None:
        """Buffers that are in no file, such as the frequencies of rotary embeddings."""
        for module in [*self._net.modules(), *(m for x in self._layers for m in x.modules())]:
            own = dict(module.named_buffers(recurse=False))
            if any(buffer.is_meta for buffer in own.values()):
                for name, buffer in own.items():
                    module._buffers[name] = torch.empty_like(buffer, device="cpu")
                self._net._init_weights(module)

    @contextlib.contextmanager
    def _loaded(self, module: nn.Module, prefix: str) -> Iterator[None]:
        """The module with its parameters in memory, which are let go at the end."""
        before: list[tuple[dict[str, Any], str, Any]] = []
        found: dict[int, Any] = {}
        try:
            for path, owner in module.named_modules():
                for table in (owner._parameters, owner._buffers):
                    for leaf, tensor in list(table.items()):
                        if tensor is None or leaf in owner._non_persistent_buffers_set:
                            continue
                        name = f"{prefix}{path}.{leaf}" if path else f"{prefix}{leaf}"
                        if id(tensor) not in found:
                            found[id(tensor)] = self._read(name, tensor)
                        before.append((table, leaf, tensor))
                        table[leaf] = found[id(tensor)]
            yield
        finally:
            for table, leaf, tensor in before:
                table[leaf] = tensor

    def _read(self, name: str, like: torch.Tensor) -> Any:
        stored = self._stored.get(name)
        array = None if stored is None else self._checkpoint.array(stored)
        if array is None or array.shape != tuple(like.shape):
            raise CheckpointError(
                f"{name}: Transformers builds it of shape {tuple(like.shape)}, and the checkpoint "
                f"has {'nothing of that name' if array is None else array.shape}; "
                "its layers cannot be run"
            )
        if like.is_floating_point():
            array = array.astype(np.float32)
        tensor = in_torch(array)
        if not like.is_floating_point():
            return tensor
        return (
            nn.Parameter(tensor, requires_grad=False) if isinstance(like, nn.Parameter) else tensor
        )


def _stored_names(net: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """What the parameters of a model are called in the files, as Transformers itself reads them."""
    renamings = [
        entry for entry in get_model_conversion_mapping(net) if isinstance(entry, WeightRenaming)
    ]
    own = net.state_dict()
    return {
        rename_source_key(name, renamings, [], net.base_model_prefix, own)[0]: name
        for name in checkpoint.tensors
    }


def _same(one: Any, other: Any) -> bool:
    """Whether two calls are given the same besides hidden states."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or torch.equal(one, other)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return type(one) is type(other)
