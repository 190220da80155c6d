"""The work of a conversion shared among processes, on one machine or several.

A Dask scheduler knows the processes that compute, its workers. Each reads the checkpoint and writes
the result itself, on a file system that all share; no weights go over the network. See
``docs/distributed.md``. Needs the extra [distributed].
"""

from molae.cluster.client import Workers

__all__ = ["Workers"]
