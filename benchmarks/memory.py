"""Peak of anonymous memory, by sampling. Mapped pages of files are not in it."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from types import TracebackType

import molae

__all__ = ["Peak", "anonymous_bytes"]


def anonymous_bytes(pid: int | str = "self") -> int:
    """RssAnon of a process, in bytes; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


class Peak:
    """Watches a process inside a ``with`` block.

    Attributes
    ----------
    start, peak : int
        Bytes at the start of the block, and the most that a sample found.

    Notes
    -----
    A sample every `interval` seconds: what comes and goes between two is not seen. Memory that
    molae keeps for its next call is given back first, so that it counts where it is used.
    """

    def __init__(self, pid: int | str = "self", interval: float = 0.002) -> None:
        self._pid, self._interval = pid, interval
        self._stop = threading.Event()
        molae.ops.release_scratch()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.start = self.peak = anonymous_bytes(pid)

    @property
    def rise(self) -> int:
        return self.peak - self.start

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self.peak = max(self.peak, anonymous_bytes(self._pid))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes(self._pid))
