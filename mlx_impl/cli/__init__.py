"""The command line: one module per command, with its flags and its `run`.

An optimized BLAS must be loaded before MLX, so a command module imports MLX only inside `run`.
"""
