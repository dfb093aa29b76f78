"""Adapters: each wraps a trainer in the ladder's NumPy interface, so the ladder needs no framework."""
