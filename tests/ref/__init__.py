"""References in float64 NumPy: the plain mathematics, nothing of molae."""
