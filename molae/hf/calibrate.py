"""A text run through a checkpoint layer by layer, for fits that know what the experts read."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from molae.arch import Family, describe
from molae.errors import ArgumentError, CheckpointError
from molae.fit import LayerInput
from molae.hf.opening import open_tokenizer
from molae.hf.streaming import LayerStream, Light, Projections, in_torch
from molae.hf.windows import decoded, json_lines, read_text, tokenize
from molae.io import open_checkpoint
from molae.io.scratch import scratch_array, scratch_folder
from molae.threads import get_num_threads

__all__ = ["Calibration", "read_calibration_text"]

#: Fewer tokens than this are no text.
LEAST_TOKENS = 64

#: Tokens that the trials of single layers are carried through.
TRIAL_TOKENS = 2048

Trials = Callable[[int, LayerInput, Projections], Iterable[tuple[str, Projections, Light | None]]]


def read_calibration_text(path: str | os.PathLike[str]) -> str:
    """A text file; or a .jsonl file, of whose lines all strings count.

    Parameters
    ----------
    path : str or path

    Returns
    -------
    str

    Raises
    ------
    molae.errors.ArgumentError
        It cannot be read, is empty, not UTF-8, or a line of a .jsonl file is no JSON object.

    Examples
    --------
    >>> import json, pathlib, tempfile
    >>> from molae.hf.calibrate import read_calibration_text
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "text.jsonl")
    ...     entries = [{"question": "1 + 1?", "answer": "2", "level": 1}, {"text": "An end."}]
    ...     _ = file.write_text("\\n".join(map(json.dumps, entries)))
    ...     read_calibration_text(file)
    '1 + 1?\\n2\\n\\nAn end.'
    """
    text = read_text(Path(path))
    if Path(path).suffix != ".jsonl":
        return text
    parts = []
    for where, entry in json_lines(path, text):
        if not isinstance(entry, dict):
            raise ArgumentError(f"{where} is no JSON object")
        parts.append("\n".join(value for value in entry.values() if isinstance(value, str)))
    return decoded("\n\n".join(parts))


class Calibration:
    """What a checkpoint's experts read in a text, one decoder layer after the other.

    Hidden states lie in a mapped file, and of the model one layer is in memory at a time; the
    experts are computed from the checkpoint's mapped files. To be used as a context manager.

    Parameters
    ----------
    src : str or path
        Folder of an ordinary checkpoint with its tokenizer, or a hub id.
    text : str or (count,) array_like of int
        Or its tokens, for which no tokenizer is needed.
    name : str
        What the text is called in reports.
    sequences, length : int
        At most so many sequences of so many tokens. A shorter text gives fewer; the model's own
        limit gives shorter ones.
    family : Family, optional
        As in `molae.convert`.
    folder : path, optional
        Where the hidden states lie meanwhile, ``tokens · hidden_size · 4`` bytes, up to five
        times, and what a fit keeps (`molae.fit.LayerInput.room`); by default the system's folder
        for temporary files.
    progress : callable, optional
        Is told layers done, layers in all, and what is under way.

    Attributes
    ----------
    facts : dict
        The text's name, what its tokens are, torch's threads: what the moments depend on.

    Raises
    ------
    molae.errors.ArgumentError
        The text is too short, or a size makes no sense.
    molae.errors.CheckpointError
        There is no tokenizer, or one with more tokens than the model has, or the layers cannot
        be run.

    Examples
    --------
    >>> import molae.demo
    >>> from molae.hf.calibrate import Calibration
    >>> text = "The experts of a layer read what the router sends them. " * 50
    >>> with Calibration(molae.demo.CHECKPOINT, text, length=128) as calibration:
    ...     given = calibration.reading(0).given
    ...     given.x.shape == (calibration.tokens, 128), given.index.shape[1], given.activation
    (True, 4, 'silu')
    """

    def __init__(
        self,
        src: str | os.PathLike[str],
        text: str | npt.ArrayLike,
        *,
        name: str = "text",
        sequences: int = 128,
        length: int = 2048,
        family: Family | None = None,
        folder: str | os.PathLike[str] | None = None,
        progress: Callable[[int, int, str], object] | None = None,
    ) -> None:
        if sequences < 1 or length < 2:
            raise ArgumentError(
                f"expected at least 1 sequence of 2 tokens, got {sequences} of {length}"
            )
        self._progress = progress or (lambda done, total, what: None)
        self._held = contextlib.ExitStack()
        with contextlib.ExitStack() as held:  # all is let go again if this does not work out
            checkpoint = held.enter_context(open_checkpoint(src))
            self._model = describe(checkpoint, family=family)
            self._stream = LayerStream(checkpoint, self._model)
            tokens = (
                tokenize(open_tokenizer(checkpoint.path), text)
                if isinstance(text, str)
                else torch.from_numpy(np.array(text, dtype=np.int64).reshape(-1))
            )
            self._tokens = self._cut(tokens, sequences, length)
            self._place = held.enter_context(scratch_folder("molae-calibration-", folder))
            self._maps: dict[str, np.memmap[Any, np.dtype[np.float32]]] = {}
            self._walk = self._new_walk("hidden")
            self._original: _Walk | None = None
            #: What the original's last layer gives for the last sequences.
            self._last: np.ndarray | None = None
            self._threads = get_num_threads()
            self._held = held.pop_all()
        self.facts: dict[str, Any] = {
            "text": name,
            "tokens_sha256": hashlib.sha256(self._tokens.numpy().tobytes()).hexdigest(),
            "sequences": self._tokens.shape[0],
            "length": self._tokens.shape[1],
            "torch": str(torch.__version__),
            "torch_threads": self._threads,
        }

    def __enter__(self) -> Calibration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def tokens(self) -> int:
        """How many are read."""
        return self._tokens.numel()

    @property
    def sequences(self) -> np.ndarray:
        """(S, T) what they are."""
        return self._tokens.numpy().copy()

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have experts."""
        return tuple(self._model.moe_layers)

    def close(self) -> None:
        """Let the files go."""
        self._held.close()

    # ------------------------------------------------------------------ the text

    def _cut(self, tokens: torch.Tensor, sequences: int, length: int) -> torch.Tensor:
        """(S, T) tokens, spread evenly over the text where there are more."""
        top = int(tokens.max()) if len(tokens) else 0
        if top >= self._stream.vocab_size:
            raise CheckpointError(
                f"the tokenizer gives token {top}, and the model has {self._stream.vocab_size}; "
                "tokenizer and weights do not belong together"
            )
        if len(tokens) < LEAST_TOKENS:
            raise ArgumentError(
                f"the calibration text is too short: {len(tokens)} tokens, at least "
                f"{LEAST_TOKENS} are needed; give more text"
            )
        length = min(length, self._stream.longest or length, len(tokens))
        whole = len(tokens) // length
        count = min(sequences, whole)
        starts = [i * whole // count * length for i in range(count)]
        return torch.stack([tokens[start : start + length] for start in starts])

    # ---------------------------------------------------------------- the passes

    def measure(self, trials: Trials) -> dict[tuple[int, str], float]:
        """Run the original from end to end; how the model takes a change of a single layer.

        Parameters
        ----------
        trials : callable
            Of each MoE layer's number, `molae.fit.LayerInput` and own experts; gives, one after
            the other, names, other experts for that layer alone, and what acts in the place of
            its compressed ones or None. The input is for the call only.

        Returns
        -------
        dict of (int, str) to float
            By layer and name of a trial: the mean Kullback-Leibler divergence, in nats a token,
            of the next-token distributions from the original's.
        """
        with self._fixed_threads():
            walk = self._walk
            walk.start()
            some = self._tried
            variants: dict[tuple[int, str], np.ndarray] = {}
            for number in range(len(self._stream)):
                self._progress(number, len(self._stream), f"measuring layer {number}")
                moe = number in self._model.moe_layers
                taken = self._taken() if moe else None
                before = in_torch(walk.states[:some])
                with self._stream.layer(number) as run:
                    for i in range(len(walk.states)):
                        walk.states[i] = run(walk.hidden(i), seen=taken and taken.add)[0].numpy()
                    for hidden in variants.values():
                        _all(run, in_torch(hidden), hidden)
                    if taken is not None:
                        own = self._stream.experts(number)
                        given = taken.given(self._stream.how(number))
                        for name, other, light in trials(number, given, own):
                            hidden = self._mapped(f"trial {number} {name}", tuple(before.shape))
                            _all(run, before, hidden, projections={**own, **other}, light=light)
                            variants[number, name] = hidden
            found = self._divergences(variants, some)
            for number, name in variants:
                self._let_go(f"trial {number} {name}")
            self._progress(len(self._stream), len(self._stream), "measured")
            walk.next = None
            return found

    def compare(
        self, layer: int, variants: Sequence[tuple[Projections, Light | None]]
    ) -> list[float]:
        """How the model takes other experts in a layer, after all that `advance` has changed.

        Parameters
        ----------
        layer : int
        variants : sequence of (mapping of str to Projection, (ndarray or NarrowExperts, int))
            As `advance` takes them.

        Returns
        -------
        list of float
            For each the mean Kullback-Leibler divergence, in nats a token, of the next-token
            distributions from the original's, on the last tokens of the text: a fit to the first
            ones has not seen them. Behind the layer the checkpoint's own layers run.
        """
        with self._fixed_threads():
            self._walk.up_to(layer, self._tell)
            some = self._tried
            tokens = self._tokens[-some:]
            if self._last is None:
                rows = (tokens[i : i + 1] for i in range(some))
                self._last = torch.cat(list(self._stream.embed(rows))).numpy()
                self._through(0, [self._last])
            found = []
            own = self._stream.experts(layer)
            for projections, light in variants:
                hidden = np.array(self._walk.states[-some:])
                with self._stream.layer(layer, {**own, **projections}, light) as run:
                    _all(run, in_torch(hidden), hidden)
                found.append(hidden)
            self._through(layer + 1, found)
            sums = [0.0] * len(found)
            for i in range(some):
                rest = [hidden[i : i + 1] for hidden in found]
                base = in_torch(self._last[i : i + 1])
                values = self._stream.divergences(tokens[i : i + 1], base, rest)
                sums = [total + value for total, value in zip(sums, values, strict=True)]
            return [total / (some * self._tokens.shape[1]) for total in sums]

    def _through(self, first: int, several: Sequence[np.ndarray]) -> None:
        """Hidden states (n, T, D), from before a layer to behind the last, as the checkpoint has
        them; in place."""
        for number in range(first, len(self._stream)):
            with self._stream.layer(number) as run:
                for hidden in several:
                    _all(run, in_torch(hidden), hidden)

    @property
    def _tried(self) -> int:
        """Sequences that trials see."""
        return max(1, min(len(self._tokens), -(-TRIAL_TOKENS // self._tokens.shape[1])))

    def _divergences(
        self, variants: Mapping[tuple[int, str], np.ndarray], some: int
    ) -> dict[tuple[int, str], float]:
        """Of what the last layer gave for the first sequences, from what is in the store."""
        sums = dict.fromkeys(variants, 0.0)
        for i in range(some):
            own = self._stream.divergences(
                self._tokens[i : i + 1],
                self._walk.hidden(i),
                [hidden[i : i + 1] for hidden in variants.values()],
            )
            for key, value in zip(variants, own, strict=True):
                sums[key] += value
        return {key: value / (some * self._tokens.shape[1]) for key, value in sums.items()}

    def reading(self, layer: int, *, anchored: bool = False) -> LayerInput:
        """What the experts of a layer read, after all that `advance` has changed before it.

        The layers before it that were not advanced run as the checkpoint has them.

        Parameters
        ----------
        layer : int
        anchored : bool
            Follow the original beside it, so that ``lost`` says what the layers before have
            changed; as many hidden states again.

        Returns
        -------
        LayerInput
            In mapped files, which the next call writes anew.

        Raises
        ------
        molae.errors.NonFiniteError
            NaN or infinity in the hidden states; the layer is named.
        """
        if layer not in self._model.moe_layers:
            raise ArgumentError(f"layer: {layer} has no experts")
        with self._fixed_threads():
            self._walk.up_to(layer, self._tell)
            lost = None
            if anchored and self._walk.changed:
                if self._original is None:
                    self._original = self._new_walk("original")
                self._original.up_to(layer + 1, self._tell)
                lost = self._mapped("lost", self._walk.states.shape)
            taken = self._taken()
            with self._stream.layer(layer) as run:
                for i in range(len(self._walk.states)):
                    out = run(self._walk.hidden(i), seen=taken.add)[0].numpy()
                    if lost is not None:
                        assert self._original is not None
                        np.subtract(self._original.states[i], out, out=lost[i])
            return taken.given(self._stream.how(layer), lost)

    def experts(self, layer: int) -> Projections:
        """The checkpoint's own experts of a layer."""
        return self._stream.experts(layer)

    def advance(
        self,
        layer: int,
        projections: Projections | None = None,
        light: Light | None = None,
    ) -> None:
        """Go on behind a layer, with other experts in it.

        Parameters
        ----------
        layer : int
        projections : mapping of str to Projection, optional
            For each of gate_proj, up_proj and down_proj that is not the checkpoint's own.
        light : (ndarray or NarrowExperts, int), optional
            What acts in the place of compressed experts, and how many of a token's they are.
        """
        with self._fixed_threads():
            self._walk.up_to(layer, self._tell)
            other = None
            if projections or light:
                other = {**self._stream.experts(layer), **(projections or {})}
            self._walk.over(layer, other, light)

    def scratch_bytes(self, *, trials: int, kept: int, anchored: bool) -> int:
        """How large its temporary files become.

        Parameters
        ----------
        trials : int
            That `measure` is given, of all layers.
        kept : int
            Bytes that are asked for by way of `molae.fit.LayerInput.room`.
        anchored : bool
            As `reading` is.
        """
        row = 4 * self._model.letters["D"]
        measured = 3 * self.tokens + trials * self._tried * self._tokens.shape[1]
        fitted = (5 if anchored else 3) * self.tokens
        return max(measured * row, fitted * row + kept)

    def _tell(self, layer: int, what: str) -> None:
        self._progress(layer, len(self._stream), what)

    def _mapped(self, name: str, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[np.float32]]:
        """One file a name, mapped once: what holds on to it sees it written anew. For a larger
        shape it is made anew."""
        size = math.prod(shape)
        if name not in self._maps or self._maps[name].size < size:
            self._maps[name] = scratch_array(self._place / name, (size,))
        return self._maps[name][:size].reshape(shape)  # type: ignore[return-value]

    def _let_go(self, name: str) -> None:
        del self._maps[name]
        (self._place / name).unlink()

    def _new_walk(self, name: str) -> _Walk:
        shape = (*self._tokens.shape, self._model.letters["D"])
        return _Walk(self._stream, self._tokens, self._mapped(name, shape))

    def _taken(self) -> _Taken:
        shape = self._tokens.numel(), self._model.letters["D"]
        return _Taken(self._mapped("input", shape), self._mapped("answers", shape), self._mapped)

    @contextlib.contextmanager
    def _fixed_threads(self) -> Iterator[None]:
        """The last bits of torch's sums depend on its threads: always as many."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


class _Walk:
    """The hidden states of a text, on their way through the layers."""

    def __init__(self, stream: LayerStream, tokens: torch.Tensor, states: np.memmap) -> None:
        self._stream, self._tokens = stream, tokens
        self.states = states
        #: The layer that they are before; None where they are of no use.
        self.next: int | None = None
        #: Whether other experts than the checkpoint's own have worked on them.
        self.changed = False

    def hidden(self, i: int) -> torch.Tensor:
        """Of one sequence, (1, T, D)."""
        return in_torch(self.states[i : i + 1])

    def start(self) -> None:
        rows = iter(self._tokens[i : i + 1] for i in range(len(self._tokens)))
        for i, hidden in enumerate(self._stream.embed(rows)):
            self.states[i] = hidden[0].numpy()
        self.next, self.changed = 0, False

    def up_to(self, layer: int, tell: Callable[[int, str], object]) -> None:
        """To before a layer; from the embedding where they are past it."""
        if self.next is None or self.next > layer:
            self.start()
        assert self.next is not None
        for number in range(self.next, layer):
            tell(number, f"running layer {number}")
            self.over(number)
        tell(min(layer, len(self._stream)), f"layer {layer}")

    def over(
        self,
        number: int,
        projections: Projections | None = None,
        light: Light | None = None,
    ) -> None:
        """From before a layer to behind it."""
        with self._stream.layer(number, projections, light) as run:
            for i in range(len(self.states)):
                self.states[i] = run(self.hidden(i))[0].numpy()
        self.next = number + 1
        self.changed |= projections is not None


class _Taken:
    """Keeps what the experts of one layer are given."""

    def __init__(
        self,
        x: np.memmap,
        answers: np.memmap,
        room: Callable[[str, tuple[int, ...]], np.ndarray],
    ) -> None:
        self._x, self._answers, self._room, self._at = x, answers, room, 0
        self._index: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []

    def add(
        self, x: np.ndarray, index: np.ndarray, weights: np.ndarray, answers: np.ndarray
    ) -> None:
        self._x[self._at : self._at + len(x)] = x
        self._answers[self._at : self._at + len(x)] = answers
        self._at += len(x)
        self._index.append(index.copy())
        self._weights.append(weights.copy())

    def given(self, how: Mapping[str, Any], lost: np.ndarray | None = None) -> LayerInput:
        return LayerInput(
            self._x,
            np.concatenate(self._index),
            np.concatenate(self._weights),
            lost=None if lost is None else lost.reshape(self._x.shape),
            answers=self._answers,
            room=self._room,
            **how,
        )


def _all(run: Any, hidden: torch.Tensor, out: np.ndarray, **options: Any) -> None:
    """A layer on several sequences, one at a time."""
    for i in range(len(hidden)):
        out[i] = run(hidden[i : i + 1], **options)[0].numpy()
