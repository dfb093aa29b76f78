"""Step time and memory, side by side with peers, in one run.

Read in this order: gate, interleave, cases, contestants, worker, flops, memory, measure. README.md has the
method and the figures. An optimized BLAS must be loaded before MLX, so only `contestants/` and modules that
run in their own process import a framework at the top.
"""
