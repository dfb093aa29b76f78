"""Fuzzing: damage valid files and read them. Run by tests/units/test_fuzz.py."""
