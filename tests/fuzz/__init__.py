"""Damaged copies of valid files, and what reads them; run by tests/units/test_fuzz.py."""
