"""``python -m benchmarks.quality``: what every method costs at equal stored numbers."""
