"""The trainer again, in plain PyTorch: the oracle that `mlx_impl` is checked against.

Read each file beside the one of the same name in `mlx_impl/`. Nothing here is fast; everything runs in
float32 and float64. It shares no logic with `mlx_impl` (only `mlx_impl.config`, which is data) and never
imports MLX: an oracle that shares code with its subject cannot see the bug.

Shapes live in names, one letter an axis; `mlx_impl/__init__.py` says what each letter means. Without a cache
the keys are as many as the queries, so T stands for both.
"""
