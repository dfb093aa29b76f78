"""Compare `reference/` with transformers and PEFT, and run the ladder on mlx-lm's own trainer."""
