"""Adapters of other people's trainers: `lora-ladder tests.peers.adapters.mlx_lm:MlxLmTrainer`."""
