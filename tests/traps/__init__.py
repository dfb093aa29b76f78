"""Every MLX pitfall of the rewrite plan, reproduced, beside the right way: see README.md."""
