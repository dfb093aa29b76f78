"""The command line: one file a command, its flags and what it does; beneath them what `train` is made of.

A command module imports MLX only inside `run`, because an optimized BLAS must be loaded before.
"""
