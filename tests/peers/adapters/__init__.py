"""Adapters of other people's trainers: `lora-ladder tests.peers.adapters.trl:TrlTrainer`."""
