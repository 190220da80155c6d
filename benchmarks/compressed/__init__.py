"""Fewer active experts: every form of what acts in their place, at what it costs."""
