"""Flags and the settings file, and how they become configurations."""
