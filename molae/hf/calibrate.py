"""A text run through a checkpoint layer by layer, for fits that know what the experts read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from molae.arch import Family, describe
from molae.errors import ArgumentError, CheckpointError, NonFiniteError
from molae.fit import LayerMoments, SecondMoments, second_moments
from molae.hf.opening import open_tokenizer
from molae.hf.streaming import LayerStream, Projections, Rows, in_torch
from molae.hf.windows import decoded, read_text, tokenize
from molae.io import open_checkpoint
from molae.threads import get_num_threads

__all__ = ["Calibration", "read_calibration_text"]

#: Fewer tokens than this are no text.
LEAST_TOKENS = 64

#: Tokens that the trials of single layers are carried through.
TRIAL_TOKENS = 2048

Trials = Callable[[int, LayerMoments], Mapping[str, Projections]]


def read_calibration_text(path: str | os.PathLike[str]) -> str:
    """A text file; or a .jsonl file, of whose lines all strings count.

    Raises
    ------
    molae.errors.ArgumentError
        It cannot be read, is empty, not UTF-8, or a line of a .jsonl file is no JSON object.
    """
    text = read_text(Path(path))
    if Path(path).suffix != ".jsonl":
        return text
    parts = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ArgumentError(f"{path}: line {number} is no JSON: {error}") from error
        if not isinstance(entry, dict):
            raise ArgumentError(f"{path}: line {number} is no JSON object")
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
        Where the hidden states lie meanwhile, ``tokens · hidden_size · 4`` bytes; by default
        the system's folder for temporary files.
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
    ...     moments = calibration.moments(0)
    >>> moments.x.moment.shape
    (32, 128, 128)
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
            place = held.enter_context(
                tempfile.TemporaryDirectory(prefix="molae-calibration-", dir=folder)
            )
            shape = (*self._tokens.shape, self._model.letters["D"])
            self._store = _memory_map(Path(place) / "hidden", shape)
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
        self._next: int | None = None

    def __enter__(self) -> Calibration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

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
            Of each MoE layer's number and `LayerMoments`; gives by name other experts for that
            layer alone. The moments are for the call only.

        Returns
        -------
        dict of (int, str) to float
            By layer and name of a trial: the mean Kullback-Leibler divergence, in nats a token,
            of the next-token distributions from the original's.
        """
        with self._fixed_threads():
            self._start()
            some = max(1, min(len(self._tokens), -(-TRIAL_TOKENS // self._tokens.shape[1])))
            variants: dict[tuple[int, str], torch.Tensor] = {}
            for number in range(len(self._stream)):
                self._progress(number, len(self._stream), f"measuring layer {number}")
                gathered = self._gatherer(number)
                before = in_torch(self._store[:some])
                with self._stream.layer(number) as run:
                    for i in range(len(self._store)):
                        hidden = run(self._hidden(i), seen=gathered and gathered.add)
                        self._store[i] = hidden[0].numpy()
                    for key, hidden in variants.items():
                        variants[key] = _all(run, hidden)
                    if gathered is not None:
                        own = self._stream.experts(number)
                        for name, other in trials(number, gathered.moments()).items():
                            variants[number, name] = _all(run, before, projections={**own, **other})
            found = self._divergences(variants, some)
            self._progress(len(self._stream), len(self._stream), "measured")
            self._next = None
            return found

    def _divergences(
        self, variants: Mapping[tuple[int, str], torch.Tensor], some: int
    ) -> dict[tuple[int, str], float]:
        """Of what the last layer gave for the first sequences, from what is in the store."""
        sums = dict.fromkeys(variants, 0.0)
        for i in range(some):
            own = self._stream.divergences(
                self._tokens[i : i + 1],
                self._hidden(i),
                [hidden[i : i + 1] for hidden in variants.values()],
            )
            for key, value in zip(variants, own, strict=True):
                sums[key] += value
        return {key: value / (some * self._tokens.shape[1]) for key, value in sums.items()}

    def moments(self, layer: int) -> LayerMoments:
        """What the experts of a layer read, after all that `advance` has changed before it.

        The layers before it that were not advanced run as the checkpoint has them.

        Raises
        ------
        molae.errors.NonFiniteError
            NaN or infinity in the hidden states; the layer is named.
        """
        with self._fixed_threads():
            self._run_up_to(layer)
            gathered = self._gatherer(layer)
            if gathered is None:
                raise ArgumentError(f"layer: {layer} has no experts")
            with self._stream.layer(layer) as run:
                for i in range(len(self._store)):
                    run(self._hidden(i), seen=gathered.add)
            return gathered.moments()

    def advance(self, layer: int, projections: Projections | None = None) -> None:
        """Go on behind a layer, with other experts in it.

        Parameters
        ----------
        layer : int
        projections : mapping of str to Projection, optional
            For each of gate_proj, up_proj and down_proj that is not the checkpoint's own.
        """
        with self._fixed_threads():
            self._run_up_to(layer)
            other = None
            if projections:
                other = {**self._stream.experts(layer), **projections}
            self._pass(layer, other)

    def _start(self) -> None:
        rows = iter(self._tokens[i : i + 1] for i in range(len(self._tokens)))
        for i, hidden in enumerate(self._stream.embed(rows)):
            self._store[i] = hidden[0].numpy()
        self._next = 0

    def _run_up_to(self, layer: int) -> None:
        if self._next is None or self._next > layer:
            self._start()
        assert self._next is not None
        for number in range(self._next, layer):
            self._progress(number, len(self._stream), f"running layer {number}")
            self._pass(number)
        self._progress(layer, len(self._stream), f"layer {layer}")

    def _pass(self, number: int, projections: Projections | None = None) -> None:
        """Hidden states from before a layer to behind it."""
        with self._stream.layer(number, projections) as run:
            for i in range(len(self._store)):
                self._store[i] = run(self._hidden(i))[0].numpy()
        self._next = number + 1

    def _hidden(self, i: int) -> torch.Tensor:
        return in_torch(self._store[i : i + 1])

    def _gatherer(self, layer: int) -> _Gatherer | None:
        if layer not in self._model.moe_layers:
            return None
        down = [p[0] for p in self._stream.experts(layer)["down_proj"].private if p is not None]
        return _Gatherer(layer, self._model.letters, down)

    @contextlib.contextmanager
    def _fixed_threads(self) -> Iterator[None]:
        """The last bits of torch's sums depend on its threads: always as many."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


class _Gatherer:
    """Adds up the moments of one layer."""

    def __init__(self, layer: int, letters: Mapping[str, int], down: list[np.ndarray]) -> None:
        E, D, F = (letters[x] for x in "EDF")
        self._layer, self._E, self._down = layer, E, down
        self._x, self._hidden = _nothing(E, D), _nothing(E, F)
        self._felt = {kind: _nothing(E, F) for kind in ("gate_proj", "up_proj")}

    def add(self, rows: Rows) -> None:
        value, slope = _activation(rows)
        up = rows.up.numpy()
        try:
            second_moments(rows.x, rows.index, rows.weights, self._E, out=self._x)
            self._add(rows, value * up, self._hidden)
            self._add(rows, slope * up, self._felt["gate_proj"])
            self._add(rows, value, self._felt["up_proj"])
        except NonFiniteError as error:
            raise NonFiniteError(
                f"layer {self._layer}: NaN or Inf in what its experts read; "
                "check the source checkpoint and the text"
            ) from error

    def _add(self, rows: Rows, of_rows: np.ndarray, to: SecondMoments) -> None:
        (N, K), routing = rows.index.shape, rows.routing
        slots = np.zeros((N * K, of_rows.shape[1]), dtype=np.float32)
        slots[routing.token * K + routing.slot] = of_rows
        second_moments(slots.reshape(N, K, -1), rows.index, rows.weights, self._E, out=to)

    def moments(self) -> LayerMoments:
        mass = self._x.mass
        for felt in self._felt.values():
            means = felt.moment
            means /= np.where(mass > 0, mass, 1)[:, None, None].astype(np.float32)
            usual = 1.0
            if mass.any():
                usual = means[mass > 0].trace(axis1=1, axis2=2).mean() / means.shape[1]
            means[mass == 0] = np.float32(usual)  # of an expert that nothing reached
            for S, W in zip(means, self._down, strict=True):
                W = W.astype(np.float32)
                S *= W.T @ W
        metric = {kind: felt.moment for kind, felt in self._felt.items()}
        return LayerMoments(self._x, self._hidden, metric)


def _nothing(E: int, W: int) -> SecondMoments:
    moment = np.zeros((E, W, W), dtype=np.float32)
    return SecondMoments(moment, np.zeros(E), np.zeros(E, dtype=np.int64))


def _activation(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """act(gate) and its derivative."""
    with torch.inference_mode(False), torch.enable_grad():
        gate = rows.gate.clone().requires_grad_()
        value = rows.act_fn(gate)
        (slope,) = torch.autograd.grad(value.sum(), gate)
    return value.detach().numpy(), slope.numpy()


def _all(run: Any, hidden: torch.Tensor, **options: Any) -> torch.Tensor:
    """A layer on several sequences, one at a time."""
    return torch.cat([run(hidden[i : i + 1], **options) for i in range(len(hidden))])


def _memory_map(path: Path, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[np.float32]]:
    nbytes = 4 * int(np.prod(shape))
    try:
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
    except OSError as error:
        raise ArgumentError(
            f"no room for {nbytes / 1e9:.1f} GB of hidden states in {path.parent.parent}: "
            f"{error.strerror}; name another folder, or take fewer sequences"
        ) from error
    return np.memmap(path, dtype=np.float32, mode="r+", shape=shape)
