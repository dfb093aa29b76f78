"""Step time and memory, side by side with peers, in one run.

Read in this order: gate, interleave, cases, contestants, worker, flops, memory, measure. README.md has the
method and the figures. Nothing here imports a framework at the top but `contestants/` and what runs in a
process of its own, because an optimized BLAS must be loaded before MLX is.
"""
