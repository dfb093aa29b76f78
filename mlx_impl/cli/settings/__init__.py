"""Flags and settings files, and the configurations that they make."""
