"""MLX pitfalls for PyTorch habits, each reproduced beside the right form: see README.md."""
