"""The side that plans: gives one file at a time to each worker, and keeps the journal."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from molae.cluster.worker import Answer, Order, Unfit, answer, describe_worker, write_shard
from molae.convert.destination import WORKERS, apart_name, sweep_apart
from molae.convert.executor import Divisible
from molae.convert.journal import Journal, differences
from molae.convert.pipeline import shard_bytes
from molae.convert.shards import Shard
from molae.errors import ClusterError, MissingExtraError
from molae.io import rename_durably, write_text_atomic

if TYPE_CHECKING:
    import distributed

__all__ = ["Workers", "hide_logs"]

#: Seconds to wait for the scheduler, and for a worker while there is none.
TIMEOUT = 60.0

#: Seconds between looks at who is there.
LOOK_EVERY = 0.5

#: Is imported first, by its name: a worker that lacks it would end of a function that it cannot
#: unpickle, and never say what is wrong with it.
MODULE = describe_worker.__module__

#: A file that so many workers were lost with is given up.
MOST_LOSSES = 3


@dataclass
class _Worker:
    """One process that computes.

    Attributes
    ----------
    address : str
    threads : int
    imported : bool
        Whether it has found what it is to run.
    facts : dict
        What `describe_worker` says of it; empty until it has answered.
    differs : list of str
        Where its build is not the client's.
    refused : str
        Why it gets no work; empty where it does.
    busy : Future, optional
        What it was asked for, and
    order : (int, Path), optional
        the shard's number and the file that it makes; None while it is looked at.
    asked : float
        When it was asked what it is.
    """

    address: str
    threads: int
    imported: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    differs: list[str] = field(default_factory=list)
    refused: str = ""
    busy: distributed.Future[Any] | None = None
    order: tuple[int, Path] | None = None
    asked: float = 0.0

    @property
    def title(self) -> str:
        host = self.facts.get("host")
        return f"{self.address} ({host})" if host else self.address


class Workers:
    """The workers of a Dask scheduler, as an executor for `molae.convert`.

    To be used as a context manager.

    Parameters
    ----------
    scheduler : str
        Its address, such as ``tcp://host:8786`` or ``tls://host:8786``, or the file that it writes
        with ``--scheduler-file``.
    threads : int, optional
        That each worker computes with; by default as many as Dask gives it (``--nthreads``).
    allow_mixed : bool
        Let workers compute whose BLAS, BLAS core, instruction set, NumPy or compiled extension is
        not this process's; the last bits may then differ from those that one machine gives. The
        report says so.
    timeout : float
        Seconds to wait for the scheduler, and for a worker while there is none.

    Raises
    ------
    MissingExtraError
        The extra [distributed] is not installed.
    ClusterError
        The scheduler does not answer in time.

    Notes
    -----
    Each worker has one file at a time, whatever the number of its threads. A worker that is lost,
    or a scheduler that is, costs no more than the files that were being computed.

    Examples
    --------
    >>> import molae
    >>> from molae.cluster import Workers
    >>> with Workers("tcp://head:8786") as workers:  # doctest: +SKIP
    ...     molae.convert("OLMoE-1B-7B-0924", "/shared/olmoe-075", executor=workers)
    """

    def __init__(
        self,
        scheduler: str,
        *,
        threads: int | None = None,
        allow_mixed: bool = False,
        timeout: float = TIMEOUT,
    ) -> None:
        self._scheduler, self._threads = scheduler, threads
        self._allow_mixed, self._timeout = allow_mixed, timeout
        self._client = _connect(scheduler, timeout)
        self._workers: dict[str, _Worker] = {}
        self._mine: dict[str, Any] = {}
        self._run: _Run | None = None
        self._alone_since: float | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the scheduler go; it and the workers stay."""
        self._client.close(timeout=2)

    # ------------------------------------------------------------ as an executor

    def begin(self, work: Divisible) -> None:
        """Look at the workers that are there.

        Raises
        ------
        ClusterError
            One of them cannot take part, or none comes in time; the message says which and why.
        ArgumentError
            Jobs depend on each other.
        """
        work.recipe()
        source = str(work.checkpoint.path.resolve())
        self._mine = describe_worker(source, None) | {"source": work.checkpoint.fingerprint()}
        self._workers, self._run, self._alone_since = {}, None, None
        while not any(worker.facts for worker in self._workers.values()) or self._busy:
            self._look(source, None)
            self._wait()
            for worker in self._done():
                self._judge(worker)
            refused = [worker for worker in self._workers.values() if worker.refused]
            if refused and not self._busy:
                raise ClusterError(_refusal(refused, len(self._workers), self._allow_mixed))

    def run(
        self,
        work: Divisible,
        dst: Path,
        journal: Journal,
        progress: Callable[[int, int, str], None],
    ) -> None:
        """Write every shard that the journal does not have yet, on the workers.

        Raises
        ------
        ClusterError
            No worker is left, or a file was lost with several.
        """
        run = self._run = _Run(work, dst.resolve(), journal, progress)
        for worker in self._workers.values():
            worker.facts = {}  # whether it sees the destination is still to be seen
        write_text_atomic(run.dst / WORKERS, run.name + "\n")
        try:
            while run.pending or self._busy:
                self._look(run.source, run.dst)
                self._hand_out(run)
                if not run.stage_ahead(len(self._workers)):
                    self._wait()
                for worker in self._done():
                    if worker.order is None:
                        self._judge(worker)
                        if worker.refused:
                            self._check_any(run)
                            run.tell(f"{worker.title} gets no work: {worker.refused}")
                    else:
                        self._take(run, worker)
        finally:
            # In this order: from here on workers remove what they have written themselves, and
            # what they have written before goes here.
            (run.dst / WORKERS).unlink(missing_ok=True)
            self._cancel()
            sweep_apart(run.dst)
            self._run = None

    # ------------------------------------------------------------------ the loop

    @property
    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers.values() if worker.busy is not None]

    def _look(self, source: str, folder: Path | None) -> None:
        """Take note of workers that have come or gone; have those that have come looked at."""
        present = self._present()
        for address in [address for address in self._workers if address not in present]:
            self._lose(self._workers.pop(address))
        for address, threads in present.items():
            worker = self._workers.setdefault(address, _Worker(address, threads))
            if not worker.facts and not worker.refused and worker.busy is None:
                place = None if folder is None else str(folder)
                if worker.imported:
                    worker.busy = self._submit(worker, answer, describe_worker, source, place)
                else:
                    worker.busy = self._submit(worker, import_module, MODULE)
                worker.asked = time.monotonic()
            elif self._is_silent(worker):
                worker.busy, worker.refused = None, f"says nothing for {self._timeout:g} s"
        if any(not worker.refused for worker in self._workers.values()):
            self._alone_since = None
            return
        now = time.monotonic()
        self._alone_since = self._alone_since or now
        if now - self._alone_since > self._timeout:
            raise ClusterError(
                f"{self._scheduler}: no worker that can take part for {self._timeout:g} s; "
                f"start some: dask worker {self._scheduler} --nthreads 8 --memory-limit 0"
                + (". Finished files are kept: then run the same command again" if folder else "")
                + "".join(f"\n  {w.title}: {w.refused}" for w in self._workers.values())
            )

    def _is_silent(self, worker: _Worker) -> bool:
        waiting = worker.busy is not None and worker.order is None
        return waiting and time.monotonic() - worker.asked > self._timeout

    def _present(self) -> Mapping[str, int]:
        with self._connection():
            if self._client.status != "running":
                raise OSError("the connection is closed")
            found: Mapping[str, int] = self._client.nthreads()
            return found

    def _submit(
        self, worker: _Worker, function: Callable[..., Any], *args: Any
    ) -> distributed.Future[Any]:
        with self._connection():
            return self._client.submit(
                function, *args, key=f"molae-{uuid.uuid4().hex}", workers=[worker.address],
                allow_other_workers=False, pure=False, retries=0,
            )  # fmt: skip

    @contextlib.contextmanager
    def _connection(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # time-outs are of that kind, too
            raise ClusterError(
                f"{self._scheduler}: the scheduler is gone ({error or type(error).__name__}); "
                "finished files are kept: start it again, or leave it out, and run the same "
                "command again"
            ) from error

    def _wait(self) -> None:
        """Until a worker has answered, or a while."""
        from distributed import CancelledError, wait

        busy = [worker.busy for worker in self._busy]
        if not busy:
            time.sleep(LOOK_EVERY)
            return
        # Of those that are cancelled, the scheduler being gone, each tells itself.
        with contextlib.suppress(TimeoutError, CancelledError), self._client.as_current():
            wait(busy, timeout=LOOK_EVERY, return_when="FIRST_COMPLETED")

    def _done(self) -> Iterable[_Worker]:
        for worker in self._busy:
            assert worker.busy is not None
            if worker.busy.status in ("cancelled", "lost"):
                self._lose(self._workers.pop(worker.address))
            elif worker.busy.done():
                yield worker

    def _judge(self, worker: _Worker) -> None:
        """What a worker has said of itself: may it take part?"""
        assert worker.busy is not None
        busy, worker.busy = worker.busy, None
        if not worker.imported and busy.status == "finished":
            worker.imported = True  # the module itself stays there
            return
        found = _answer(busy)
        if (error := found.error) is not None:
            if _is_loss(error):
                self._workers.pop(worker.address, None)
                return
            worker.refused = (
                f"cannot run this molae ({type(error).__name__}: {error}); install molae "
                f"{self._mine['molae']} there"
            )
            return
        worker.facts = found.value
        worker.differs = differences(
            self._mine["build"], worker.facts["build"], words=("here", "there")
        )
        run = None if self._run is None else (self._run.dst, self._run.name)
        worker.refused = _why_unfit(self._mine, worker, run, self._allow_mixed)

    def _check_any(self, run: _Run) -> None:
        """That not all are refused at once: then there is nothing to wait for."""
        refused = [worker for worker in self._workers.values() if worker.refused]
        if not run.tries and len(refused) == len(self._workers):
            raise ClusterError(_refusal(refused, len(refused), self._allow_mixed))

    def _hand_out(self, run: _Run) -> None:
        for worker in self._workers.values():
            if not run.pending:
                return
            if worker.facts and not worker.refused and worker.busy is None:
                number = run.pending.popleft()
                order = run.order(number, worker, self._threads or worker.threads)
                worker.order = number, Path(order.path)
                worker.busy = self._submit(worker, answer, write_shard, order)

    def _take(self, run: _Run, worker: _Worker) -> None:
        """What a worker has computed."""
        assert worker.busy is not None
        assert worker.order is not None
        (number, path), found = worker.order, _answer(worker.busy)
        if (error := found.error) is not None:
            if _is_loss(error):
                self._lose(self._workers.pop(worker.address))
                return
            worker.busy = worker.order = None
            if isinstance(error, Unfit):
                worker.refused = str(error)
                run.pending.appendleft(number)
                run.tell(f"{worker.title} gets no work: {error}")
                return
            error.add_note(f"on worker {worker.title}")
            raise error
        worker.busy = worker.order = None
        run.take(number, path, found.value, worker, self._threads or worker.threads)

    def _lose(self, worker: _Worker) -> None:
        """A worker is gone; what it was at is somebody else's now."""
        if worker.busy is None or worker.order is None or self._run is None:
            return
        with contextlib.suppress(Exception):  # a courtesy to a scheduler that may be gone as well
            worker.busy.cancel()
        self._run.lost(worker)

    def _cancel(self) -> None:
        busy = [worker.busy for worker in self._busy]
        for worker in self._busy:
            worker.busy = worker.order = None
        with contextlib.suppress(Exception):  # as above
            self._client.cancel(busy)


class _Run:
    """One result that is being written."""

    def __init__(
        self,
        work: Divisible,
        dst: Path,
        journal: Journal,
        progress: Callable[[int, int, str], None],
    ) -> None:
        self.name = uuid.uuid4().hex[:12]
        self.dst = dst
        self.source = str(work.checkpoint.path.resolve())
        self._work, self._recipe = work, work.recipe()
        #: Files with what shards need besides; None for one that needs nothing.
        self._staged: dict[int, Path | None] = {}
        self._shards: Sequence[Shard] = work.shards
        self._journal, self._progress = journal, progress
        self.tries = 0
        self._losses: Counter[int] = Counter()
        self.pending = deque(
            number for number, shard in enumerate(work.shards) if shard.file not in journal.shards
        )
        self._bytes = {number: shard_bytes(work, work.shards[number]) for number in self.pending}
        self._total = work.checkpoint.stored_nbytes
        self._done = self._total - sum(self._bytes.values())
        self._left = len(self.pending)
        self.tell(f"{self._left} files")

    def tell(self, what: str) -> None:
        self._progress(self._done, self._total, what)

    def order(self, number: int, worker: _Worker, threads: int) -> Order:
        self.tries += 1
        file = self._shards[number].file
        path = self.dst / apart_name(file, self.name, self.tries)
        staged = self._stage(number)
        return Order(
            run=self.name,
            source=self.source,
            facts=worker.facts,
            recipe=self._recipe,
            number=number,
            file=file,
            path=str(path),
            staged=None if staged is None else str(staged),
            threads=threads,
        )

    def stage_ahead(self, count: int) -> bool:
        """Stage the first of the next shards that is not yet, so that nobody waits for it; False
        where there is none. No more are held than there are workers."""
        for number in list(self.pending)[:count]:
            if number not in self._staged:
                return self._stage(number) is not None
        return False

    def _stage(self, number: int) -> Path | None:
        if number not in self._staged:
            path = self.dst / apart_name(self._shards[number].file, self.name, 0)
            self._staged[number] = path if self._work.stage(number, path) else None
        return self._staged[number]

    def take(
        self, number: int, path: Path, entry: dict[str, Any], worker: _Worker, threads: int
    ) -> None:
        """Give a file its name, and record it."""
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            raise ClusterError(
                f"{worker.title}: has written {entry['bytes']} bytes to {path}, and here there "
                f"are {size}; let all machines see the same folder"
            )
        rename_durably(path, self.dst / entry["file"])
        if (staged := self._staged.get(number)) is not None:
            staged.unlink()
        facts = {
            "address": worker.address,
            "host": worker.facts["host"],
            "threads": threads,
            "build": worker.facts["build"],
            "differs": worker.differs,
        }
        self._journal.add(entry | {"worker": facts})
        self._done += self._bytes[number]
        self._left -= 1
        self.tell(f"{entry['file']} by {worker.title}, {self._left} files left")

    def lost(self, worker: _Worker) -> None:
        assert worker.order is not None
        number, path = worker.order
        for left in (path, path.with_name(path.name + ".part")):
            left.unlink(missing_ok=True)
        self._losses[number] += 1
        file = self._shards[number].file
        if self._losses[number] >= MOST_LOSSES:
            raise ClusterError(
                f"{file}: {MOST_LOSSES} workers were lost while they computed it, the last "
                f"{worker.title}; see its log: most often its memory was used up, or limited "
                "(--memory-limit 0 lifts Dask's own limit)"
            )
        self.pending.appendleft(number)
        self.tell(f"{worker.title} is lost; {file} is computed again")


def hide_logs() -> None:
    """Let Dask write no log: what goes wrong is said by molae, once, and without a traceback.

    Raises
    ------
    MissingExtraError
        The extra [distributed] is not installed.
    """
    _dask()  # whose import sets levels of its own
    for name in ("distributed", "distributed.client", "tornado", "tornado.application", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _dask() -> ModuleType:
    try:
        import distributed
    except ImportError:
        raise MissingExtraError(
            "scheduler: needs Dask, which is not installed; run: pip install 'molae[distributed]'"
        ) from None
    return distributed


def _connect(scheduler: str, timeout: float) -> distributed.Client:
    if scheduler.startswith("tls://"):
        security = _dask().Security()
        if not (security.tls_ca_file and security.tls_client_cert):
            raise ClusterError(
                f"{scheduler}: needs certificates; name their files in "
                "DASK_DISTRIBUTED__COMM__TLS__CA_FILE, DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT "
                "and DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY"
            )
    where = {"address": scheduler}
    if "://" not in scheduler and scheduler.endswith(".json"):
        where = {"scheduler_file": scheduler}
        until = time.monotonic() + timeout
        while not Path(scheduler).exists():  # Dask would wait for ever
            if time.monotonic() > until:
                raise ClusterError(
                    f"{scheduler}: no such file for {timeout:g} s; start a scheduler that writes "
                    f"it: dask scheduler --scheduler-file {scheduler}"
                )
            time.sleep(0.05)
    try:
        return _dask().Client(**where, timeout=timeout, set_as_default=False, name="molae")
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"{scheduler}: no scheduler answers within {timeout:g} s "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); start one "
            "with: dask scheduler --port 8786, and give its address, such as tcp://HOST:8786"
        ) from error


def _answer(future: distributed.Future[Any]) -> Answer:
    """Of a future that is done. What Dask itself says of a failure counts as an answer too."""
    if future.status == "error":
        error = future.exception()
        return Answer(error=error if isinstance(error, Exception) else RuntimeError(str(error)))
    found: Answer = future.result()
    return found


def _is_loss(error: Exception) -> bool:
    from distributed import CancelledError, KilledWorker

    return isinstance(error, (KilledWorker, CancelledError))


def _why_unfit(
    mine: Mapping[str, Any], worker: _Worker, run: tuple[Path, str] | None, allow_mixed: bool
) -> str:
    """Why a worker gets no work; empty where it does."""
    facts = worker.facts
    if facts["molae"] != mine["molae"]:
        return f"has molae {facts['molae']}, not {mine['molae']}; install that there"
    if facts["code"] != mine["code"]:
        return f"has another working copy of molae {mine['molae']}; install the same there"
    if isinstance(facts["source"], str):
        return f"cannot read the source ({facts['source']}); mount it there at the same path"
    if facts["source"] != mine["source"]:
        found = differences(mine["source"], facts["source"], "source.", ("here", "there"))
        return f"sees another source: {'; '.join(found[:3])}; let all see the same files"
    if worker.differs and not allow_mixed:
        return f"would give other last bits: {'; '.join(worker.differs)}"
    if run is not None and facts["run"] != run[1]:
        return f"does not see the destination {run[0]}; mount it there at the same path"
    return ""


def _refusal(refused: Sequence[_Worker], count: int, allow_mixed: bool) -> str:
    lines = [f"\n  {worker.title} {worker.refused}" for worker in refused]
    text = f"{len(refused)} of {count} workers cannot take part; mend them, or take them away:"
    text += "".join(lines)
    if not allow_mixed and any("last bits" in worker.refused for worker in refused):
        text += (
            "\nTo let machines of several kinds compute all the same: --allow-mixed-workers "
            "(allow_mixed=True); the report then says so"
        )
    return text
