"""The finite guard: on NaN or infinity, roll back to the last good state and raise with the cause.

Whether an update was good shows only in the next loss and gradient. So two states are kept: the present one,
and the last one that is known to be good. An update makes new arrays and changes none: a snapshot is
references, and costs the memory of the old factors and moments only.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..data import Window
from ..fast.vectors import VectorOptimizer, all_finite
from ..model import CausalLM
from ..optim import LoRAOptimizer
from ..train import StepRecord

Snapshot = dict[str, mx.array]


def snapshot(model: CausalLM, optimizer: LoRAOptimizer) -> Snapshot:
    """Every array that an update changes, by name; the factors of a `VectorOptimizer` as its vectors.

    What it rounds follows from them.
    """
    if isinstance(optimizer, VectorOptimizer):
        return dict(tree_flatten({**optimizer.state, "rounded": {}}))
    return dict(tree_flatten({"factors": model.trainable_parameters(), **optimizer.state}))


def restore(model: CausalLM, optimizer: LoRAOptimizer, before: Snapshot) -> None:
    """In place: a compiled step captured these dictionaries, and would not notice others."""
    state = tree_unflatten(list(before.items()))
    if not isinstance(optimizer, VectorOptimizer):
        model.update(state.pop("factors"))
    put_back(optimizer.state, state)
    if isinstance(optimizer, VectorOptimizer):
        optimizer.round()
        optimizer.write_back(model)


def put_back(now: Any, before: Any) -> None:
    """What is in both."""
    both = now.keys() & before.keys() if isinstance(now, dict) else range(len(now))
    for key in both:
        if isinstance(now[key], (dict, list)):
            put_back(now[key], before[key])
        else:
            now[key] = before[key]


class NotFinite(ValueError):
    """Loss, gradient or adapter is NaN or infinite; the model is rolled back to the last good state."""

    def __init__(self, message: str, updates_done: int) -> None:
        super().__init__(message)
        self.updates_done = updates_done  # in the state that the model is in now


class FiniteGuard:
    """Keeps two states: the present one, and the last one whose loss was finite."""

    def __init__(self, model: CausalLM, optimizer: LoRAOptimizer, updates_done: int) -> None:
        self.model, self.optimizer, self.updates_done = model, optimizer, updates_done
        self.now = snapshot(model, optimizer)
        self.good = (updates_done, self.now)

    def begin(self) -> None:
        """Take in factors that were put into the model since: those that they replaced are discarded.

        A run that was only interrupted still goes back to the state that is known to be good.
        """
        held = snapshot(self.model, self.optimizer)
        if not have_same_factors(held, self.now):
            self.now = held
            self.good = (self.updates_done, held)

    def check(self, window: Window, record: StepRecord) -> None:
        """After each update: roll back and raise NotFinite unless all of it is finite."""
        loss_is_finite = math.isfinite(record.loss_nats)
        was_good = loss_is_finite and math.isfinite(record.grad_norm)
        if was_good:
            self.good = (self.updates_done, self.now)
        after = snapshot(self.model, self.optimizer)
        if not (was_good and are_finite(after)):
            what = "updated adapter" if was_good else "gradient" if loss_is_finite else "loss"
            numbers = ", ".join(str(number + 1) for batch in window for number in batch.numbers)
            self.roll_back(
                f"the {what} is not finite at step {record.step}, on the examples {numbers or 'given'}"
            )
        self.updates_done, self.now = record.step, after

    def confirm(self, loss_nats: float) -> None:
        """After a loss computed between two updates: roll back and raise NotFinite unless it is finite."""
        if not math.isfinite(loss_nats):
            self.roll_back(f"the loss after step {self.updates_done} is not finite")
        self.good = (self.updates_done, self.now)

    def roll_back(self, reason: str) -> None:
        self.updates_done, self.now = self.good
        restore(self.model, self.optimizer, self.now)
        raise NotFinite(
            f"{reason}; the adapter is back at step {self.updates_done}, the last good one: restart from it "
            f"or from scratch with a lower learning rate",
            self.updates_done,
        )


def have_same_factors(one: Snapshot, other: Snapshot) -> bool:
    names = [name for name in one if name.startswith("factors.")]
    return all(mx.array_equal(one[name], other[name], equal_nan=True).item() for name in names)


def are_finite(state: Snapshot) -> bool:
    """Whether all factors are; a `VectorOptimizer` has found out within the update."""
    if "flags.finite" in state:
        return bool(state["flags.finite"].item())
    factors = {name: array for name, array in state.items() if name.startswith("factors.")}
    return bool(all_finite(factors).item())
