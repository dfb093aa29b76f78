"""The PyTorch twin of a run: what factors, optimizer and logits should be after any sequence of acts.

The twin does only what an act means for the run: an update, or going back to a saved state. Merging and
unmerging must leave the run as it was, so the twin does nothing for them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mlx_impl.config import TrainConfig
from mlx_impl.data import Batch
from reference.lora import merge
from reference.model import load_arrays
from tests.lora_ladder.cases import UP_OR_DOWN
from tests.lora_ladder.protocol import Arrays, Dialect
from tests.properties.strategies import Drawn
from tests.trainers.reference import ReferenceTrainer, Run


@dataclass(frozen=True)
class TwinState:
    """The contents of a saved run."""

    factors: Arrays
    optimizer: dict[str, Any]
    schedule: dict[str, Any]


class Twin:
    """A run of the reference, in float64."""

    def __init__(self, case: Drawn, training: TrainConfig, masks: Arrays) -> None:
        self.trainer = case.build(ReferenceTrainer)
        self.trainer.set_dropout_masks(masks)
        self.run = Run(self.trainer.model, training, Dialect())

    def update(self, window: Sequence[Batch]) -> float:
        self.trainer.model.train()
        loss_nats, _ = self.run.update(self.trainer.model, [self.trainer.tensors(batch) for batch in window])
        return loss_nats

    def evaluate(self, batches: Sequence[Batch]) -> float:
        return self.trainer.evaluate(batches)

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        return self.trainer.logits(tokens_BT)

    def factors(self) -> Arrays:
        return self.trainer.factors()

    def state(self) -> TwinState:
        optimizer = copy.deepcopy(self.run.optimizer.state_dict())
        return TwinState(self.factors(), optimizer, copy.deepcopy(self.run.schedule.state_dict()))

    def go_back(self, state: TwinState) -> None:
        load_arrays(self.trainer.model, {**self.trainer.numpy(), **state.factors})
        self.run.optimizer.load_state_dict(copy.deepcopy(state.optimizer))
        self.run.schedule.load_state_dict(copy.deepcopy(state.schedule))

    @torch.no_grad()
    def merged(self, seed: int) -> Twin:
        """A merged copy, only to compare with; each merged weight is moved to a random nearby float32."""
        twin, rng = copy.copy(self), np.random.default_rng(seed)
        twin.trainer = copy.deepcopy(self.trainer)
        weights = [linear.linear.weight for linear in twin.trainer.adapted().values()]
        merge(twin.trainer.model)
        for weight in weights:
            rounded = weight.numpy().astype(np.float32)
            moved = np.nextafter(rounded, rounded * rng.choice(UP_OR_DOWN, rounded.shape))
            weight.copy_(torch.tensor(moved))
        return twin
