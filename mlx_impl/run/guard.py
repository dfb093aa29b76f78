"""The finite guard: when the numbers end, back to the last state known to be sound, and a word on why.

A finite loss and gradient say of the adapter that they were computed with that it is sound, which the update
that made it could not know. So two states are kept. MLX never changes an array: that costs references, and
memory for two copies of what trains.
"""

from __future__ import annotations

import math

from ..data import Window
from ..model import CausalLM
from ..optim import LoRAOptimizer
from .state import restore, snapshot


class NotFinite(ValueError):
    """Loss, gradient or adapter is no number any more; the model is as it was when all of them last were."""

    def __init__(self, message: str, updates_done: int) -> None:
        super().__init__(message)
        self.updates_done = updates_done  # in the state that the model is in now


class FiniteGuard:
    """Knows two states: that of now, and the last whose loss was finite."""

    def __init__(self, model: CausalLM, optimizer: LoRAOptimizer, updates_done: int) -> None:
        self.model, self.optimizer, self.updates_done = model, optimizer, updates_done
        self.now = snapshot(optimizer)
        self.sound = (updates_done, self.now)

    def check(self, window: Window, loss_nats: float, norm: float, is_finite: bool) -> None:
        """After each update; NotFinite, with the last sound state restored, unless all of it is finite."""
        was_sound = math.isfinite(loss_nats) and math.isfinite(norm)
        if was_sound:
            self.sound = (self.updates_done, self.now)
        step = self.updates_done + 1
        if not is_finite:
            what = "updated adapter" if was_sound else "gradient" if math.isfinite(loss_nats) else "loss"
            numbers = ", ".join(str(number + 1) for batch in window for number in batch.numbers)
            self.go_back(f"the {what} is not finite at step {step}, on the examples {numbers or 'given'}")
        self.updates_done, self.now = step, snapshot(self.optimizer)

    def confirm(self, loss_nats: float) -> None:
        """After a loss that was computed between two updates; NotFinite as above."""
        if not math.isfinite(loss_nats):
            self.go_back(f"the loss after step {self.updates_done} is not finite")
        self.sound = (self.updates_done, self.now)

    def go_back(self, reason: str) -> None:
        self.updates_done, self.now = self.sound
        restore(self.model, self.optimizer, self.now)
        raise NotFinite(
            f"{reason}; the adapter is as it was after step {self.updates_done}, the last known to be sound: "
            f"begin again from it or from none, with a lower learning rate",
            self.updates_done,
        )
