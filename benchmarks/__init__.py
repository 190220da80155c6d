"""Measurements of molae against what one would use without it: ``python -m benchmarks``.

The installed molae is measured: the folder that ``python -m`` puts in front of the search
path holds sources that may not be built.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

if sys.path and sys.path[0] and Path(sys.path[0]).resolve() == ROOT:
    del sys.path[0]
