"""Mutated copies of valid files: each loads or is refused in one sentence; run by tests/units/test_fuzz.py."""
