"""Which method loses least at equal size: ``python -m benchmarks.quality``."""
