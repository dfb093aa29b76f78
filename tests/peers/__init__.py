"""The oracle's oracle: `reference/` against transformers and PEFT, and the ladder on mlx-lm's own trainer."""
