"""How a run goes on, on standard error: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from molae.convert import Plan, Watcher
from molae.report.tables import plan_view
from molae.report.units import size_text

__all__ = ["RunWatcher"]

#: Seconds between plain lines.
PLAIN_EVERY = 10.0


class RunWatcher(Watcher):
    """Prints the plan on `out` and the progress on `err`; use as a context manager."""

    def __init__(self, out: Console | None, err: Console) -> None:
        self._out, self._err = out, err
        self._bars: Progress | None = None
        self._bar: TaskID | None = None
        self._printed = time.monotonic()

    def __enter__(self) -> RunWatcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def planned(self, plan: Plan) -> None:
        if self._out is not None:
            self._out.print(plan_view(plan))

    def resumed(self, shards: int) -> None:
        self._err.print(f"Going on: {shards} finished files are kept.", highlight=False)

    def advanced(self, done: int, total: int, what: str) -> None:
        if not self._err.is_terminal:
            self._plain(done, total, what)
            return
        if self._bars is None:
            self._bars = Progress(
                TextColumn("{task.description:24}"),
                BarColumn(),
                DownloadColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._err,
                transient=True,
            )
            self._bar = self._bars.add_task(what, total=total)
            self._bars.start()
        assert self._bar is not None
        self._bars.update(self._bar, completed=done, total=total, description=what)

    def _plain(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if now - self._printed >= PLAIN_EVERY:
            self._printed = now
            share = f"{done / total:4.0%} of {size_text(total)}" if total else ""
            self._err.print(f"{share}  {what}", highlight=False)
