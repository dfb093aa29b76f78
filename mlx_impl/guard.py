"""The finite guard: when the numbers end, back to the last state known to be sound, and a word on why.

A finite loss and gradient say of the adapter that they were computed with that it is sound, which the update
that made it could not know. So two states are kept. MLX never changes an array: that costs references, and
memory for two copies of what trains.
"""

from __future__ import annotations

import math

from .data import Window
from .model import CausalLM
from .optim import LoRAOptimizer
from .state import restore, snapshot


class NotFinite(ValueError):
    """Loss, gradient or adapter is no number any more; the model is as it was when all of them last were."""

    def __init__(self, message: str, updates_done: int) -> None:
        super().__init__(message)
        self.updates_done = updates_done  # in the state that the model is in now


class FiniteGuard:
    def __init__(self, model: CausalLM, optimizer: LoRAOptimizer, updates_done: int) -> None:
        self.model, self.optimizer = model, optimizer
        self.entered = self.sound = (updates_done, snapshot(model, optimizer))

    def check(self, window: Window, loss_nats: float, norm: float, is_finite: bool) -> None:
        """After each update; NotFinite, with the last sound state restored, unless all of it is finite."""
        is_entered_sound = math.isfinite(loss_nats) and math.isfinite(norm)
        if is_entered_sound:
            self.sound = self.entered
        step = self.entered[0] + 1
        if is_finite:
            self.entered = (step, snapshot(self.model, self.optimizer))
            return
        what = "updated adapter" if is_entered_sound else "gradient" if math.isfinite(loss_nats) else "loss"
        updates_done, arrays = self.sound
        restore(self.model, self.optimizer, arrays)
        numbers = ", ".join(str(number + 1) for batch in window for number in batch.numbers)
        raise NotFinite(
            f"the {what} is not finite at step {step}, on the examples {numbers or 'given'}; the adapter is "
            f"as it was after step {updates_done}, the last known to be sound: lower the learning rate",
            updates_done,
        )
