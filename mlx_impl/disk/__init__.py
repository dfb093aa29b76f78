"""Atomic writes of files and folders, checked reads, and the choice of an output folder."""
