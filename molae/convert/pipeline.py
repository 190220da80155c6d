"""Work through the shards: read ahead, compute, write behind, in bounded memory.

The main thread computes one job at a time (the kernels release the GIL and use all
threads they may). One reader thread hashes the next job's source tensors, which also
brings them into the page cache. One writer thread writes what is computed, finishes
the shards and records them in the journal.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from molae.convert.journal import Journal
from molae.convert.layer_state import STATE
from molae.convert.shards import Job, Shard
from molae.io import Checkpoint, ShardWriter

__all__ = ["Data", "Work", "run", "shard_bytes", "write_one"]

#: A tensor to write: whole, as the pieces of its first axis, or still to be computed.
Data = np.ndarray | Sequence[np.ndarray] | Callable[[], np.ndarray]


class Work(Protocol):
    """What is to be done with each job; the rest is the same for all kinds of runs."""

    checkpoint: Checkpoint
    shards: tuple[Shard, ...]
    #: Bytes of results that may wait to be written while the next are computed.
    room: int

    def resume(
        self, finished: Mapping[str, Path], state: Path, tell: Callable[[str], None]
    ) -> None:
        """Called before any work: shards that an earlier run has left, by name; where the state
        of what takes long within a job may be kept, and how to say what is under way."""

    def source(self, job: Job) -> Sequence[np.ndarray | memoryview]:
        """What a job reads, views of mapped files."""

    def compute(self, job: Job) -> tuple[dict[str, Data], list[dict[str, Any]]]:
        """The job's tensors by name, and rows for the report."""


def run(
    work: Work,
    dst: Path,
    journal: Journal,
    progress: Callable[[int, int, str], None],
) -> None:
    """Write every shard that the journal does not have yet.

    Parameters
    ----------
    work : Work
    dst : Path
    journal : Journal
        Gets a line for each finished shard.
    progress : callable
        Called with bytes of the source that are done, bytes in all, and what is next.

    Notes
    -----
    When it is interrupted or fails, what is being written is waited for, unfinished files
    are removed, and the journal keeps the finished shards.
    """
    missing = [shard for shard in work.shards if shard.file not in journal.shards]
    pipeline = _Pipeline(work, missing, journal.add, progress)
    finished = {file: dst / file for file in journal.shards}
    work.resume(finished, dst / STATE, pipeline.tell)
    pipeline.write({shard.file: dst / shard.file for shard in missing})
    (dst / STATE).unlink(missing_ok=True)


def write_one(work: Work, shard: Shard, path: Path, wanted: Callable[[], None]) -> dict[str, Any]:
    """Write a single shard, whatever became of the others.

    Parameters
    ----------
    work : Work
        One whose jobs do not depend on each other.
    shard : Shard
    path : Path
        The file to make.
    wanted : callable
        Called before each job; may raise where nobody waits for the shard any longer.

    Returns
    -------
    dict
        The shard's line for a journal.
    """
    entries: list[dict[str, Any]] = []
    pipeline = _Pipeline(work, [shard], entries.append, lambda done, total, what: wanted())
    pipeline.write({shard.file: path})
    (entry,) = entries
    return entry


def shard_bytes(work: Work, shard: Shard) -> int:
    """Bytes of the source that go into a shard."""
    return _copied_bytes(work, shard) + sum(_job_bytes(work, job) for job in shard.jobs)


def _job_bytes(work: Work, job: Job) -> int:
    return sum(piece.nbytes for piece in work.source(job))


def _copied_bytes(work: Work, shard: Shard) -> int:
    return sum(work.checkpoint.stored_size(spec.name) for spec in shard.copied)


class _Pipeline:
    def __init__(
        self,
        work: Work,
        shards: Sequence[Shard],
        record: Callable[[dict[str, Any]], object],
        progress: Callable[[int, int, str], None],
    ) -> None:
        self._work, self._shards, self._record, self._progress = work, shards, record, progress
        self._reader = ThreadPoolExecutor(1, "molae-reader")
        self._writer = ThreadPoolExecutor(1, "molae-writer")
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._open: list[ShardWriter] = []
        self._jobs = [job for shard in shards for job in shard.jobs]
        self._hashes: dict[int, Future[str]] = {}
        self._total = work.checkpoint.stored_nbytes
        self._done = self._total - sum(shard_bytes(work, shard) for shard in shards)

    def write(self, paths: Mapping[str, Path]) -> None:
        """All shards, to the files that `paths` has by their names."""
        try:
            for shard in self._shards:
                self._work_through(shard, paths[shard.file])
            self._drain()
        finally:
            self._close()

    def _work_through(self, shard: Shard, path: Path) -> None:
        out = ShardWriter(path, shard.specs)
        self._open.append(out)
        self._progress(self._done, self._total, shard.file)
        checkpoint = self._work.checkpoint
        copied = [piece for spec in shard.copied for piece in checkpoint.stored(spec.name)]
        inputs = {"copied": self._reader.submit(_sha256, copied)}
        self._put(0, self._copy, out, shard)
        rows: list[dict[str, Any]] = []
        for job in shard.jobs:
            self._progress(self._done, self._total, job.title)
            inputs[job.title] = self._hash_ahead(job)
            rows += self._compute(out, job)
            self._done += _job_bytes(self._work, job)
        self._done += _copied_bytes(self._work, shard)
        self._put(0, self._finish, out, shard, rows, inputs)
        self._progress(self._done, self._total, shard.file)

    def tell(self, what: str) -> None:
        """What is under way within a job."""
        self._progress(self._done, self._total, what)

    def _drain(self) -> None:
        while self._pending:
            self._wait()

    def _close(self) -> None:
        """Let the threads end what they are at, and remove files that are not whole."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._writer.shutdown(wait=True, cancel_futures=True)
        for out in self._open:
            out.abort()

    def _compute(self, out: ShardWriter, job: Job) -> list[dict[str, Any]]:
        nbytes = sum(spec.nbytes for spec in job.specs)
        self._make_room(nbytes)
        tensors, rows = self._work.compute(job)
        self._put(nbytes, self._write, out, tensors)
        return rows

    def _hash_ahead(self, job: Job) -> Future[str]:
        """The hash of a job's source; the next job's is begun as well."""
        at = self._jobs.index(job)
        for near in range(at, min(at + 2, len(self._jobs))):
            if near not in self._hashes:
                source = self._work.source(self._jobs[near])
                self._hashes[near] = self._reader.submit(_sha256, source)
        return self._hashes.pop(at)

    # ------------------------------------------------------- the writer's side

    def _put(self, nbytes: int, function: Callable[..., None], *args: Any) -> None:
        self._pending.append((self._writer.submit(function, *args), nbytes))
        while self._pending and self._pending[0][0].done():
            self._wait()

    def _make_room(self, nbytes: int) -> None:
        while self._pending and nbytes + sum(n for _, n in self._pending) > self._work.room:
            self._wait()

    def _wait(self) -> None:
        """Wait for the oldest piece of writing; its error, if any, is raised here."""
        future, _ = self._pending[0]
        future.result()
        self._pending.popleft()

    def _copy(self, out: ShardWriter, shard: Shard) -> None:
        checkpoint = self._work.checkpoint
        for spec in shard.copied:
            if not checkpoint.is_encoded(spec.name):
                out.write(spec.name, checkpoint.raw(spec.name))
            elif len(spec.shape) == 2:
                out.write(spec.name, checkpoint.array(spec.name))
            else:  # one expert at a time
                out.write_stack(spec.name, checkpoint.slices(spec.name))

    def _write(self, out: ShardWriter, tensors: dict[str, Data]) -> None:
        while tensors:  # each is let go as soon as it is written
            name, data = tensors.popitem()
            if callable(data):
                data = data()
            if isinstance(data, np.ndarray):
                out.write(name, data)
            else:
                out.write_stack(name, data)

    def _finish(
        self,
        out: ShardWriter,
        shard: Shard,
        rows: Sequence[dict[str, Any]],
        inputs: dict[str, Future[str]],
    ) -> None:
        entry = {
            "file": shard.file,
            "bytes": out.nbytes,
            "inputs": {title: sha256.result() for title, sha256 in inputs.items()},
            "rows": rows,
        }
        self._record(entry | {"sha256": out.finish()})
        self._open.remove(out)


def _sha256(pieces: Sequence[np.ndarray | memoryview]) -> str:
    sha256 = hashlib.sha256()
    for piece in pieces:
        if isinstance(piece, np.ndarray):
            piece = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
        sha256.update(piece)
    return sha256.hexdigest()
