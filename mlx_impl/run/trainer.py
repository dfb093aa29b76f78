"""The trainer as a program calls it: model and configurations in, step records out, the adapter in place.

trainer = LoRATrainer(model, LoRAConfig(rank=8), TrainConfig(iters=60))
for record in trainer.fit(examples):
    print(record.step, record.loss_nats)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import LoRAConfig, TrainConfig
from ..data import Example, evaluation_batches, require_tokens, training_windows
from ..fast.pace import paced
from ..lora import add_lora, lora_layers, lora_parameters
from ..model import CausalLM
from ..optim import LoRAOptimizer
from ..train import StepRecord, evaluate, train
from .guard import FiniteGuard, NotFinite
from .state import Progress, Validation, digest_of_base, identify, load_state, restore, save_state, snapshot


class LoRATrainer:
    """LoRA factors in place, everything else frozen, an optimizer ready.

    A model that carries an adapter already, of this same configuration, keeps it and trains on.
    `compiled=None` compiles on a GPU; on a CPU each new shape would cost seconds for a few percent.
    Raises ValueError when anything but LoRA factors would be trained.
    """

    def __init__(
        self, model: CausalLM, lora: LoRAConfig, training: TrainConfig, compiled: bool | None = None
    ) -> None:
        mx.random.seed(training.seed)
        if not lora_layers(model):
            add_lora(model, lora)
        if model.lora != lora:
            raise ValueError(f"the model's adapter must be of the configuration given, and is {model.lora}")
        lora_parameters(model)  # raises if anything else is trainable
        self.model, self.lora, self.training = model, lora, training
        self.optimizer = LoRAOptimizer(training)
        self.optimizer.init(model.trainable_parameters())
        self.compiled = mx.default_device() == mx.gpu if compiled is None else compiled
        self.guard = FiniteGuard(model, self.optimizer, updates_done=0)
        self.validation: Validation = []
        self.belongs_to: dict[str, Any] = {}  # what else a saved run may not be resumed without

    @property
    def step(self) -> int:
        """Updates done."""
        return self.guard.updates_done

    def fit(self, examples: Sequence[Example]) -> Iterator[StepRecord]:
        """Train up to update `training.iters`; stop reading the iterator to stop earlier.

        Raises NotFinite, the last sound state restored, when the numbers end.
        """
        self.require_adapter()
        require_tokens(examples, self.model.config.vocab_size)
        windows = training_windows(examples, self.training, self.step)
        windows = paced(windows, self.model, self.training.grad_checkpoint)
        try:
            yield from train(self.model, self.optimizer, windows, self.training, self.compiled, self.guard)
        except NotFinite:
            self.forget_what_was_undone()
            raise

    def evaluate(self, examples: Sequence[Example]) -> float:
        """Nats per target over all the examples, dropout off; the same for every batch size."""
        require_tokens(examples, self.model.config.vocab_size)
        return evaluate(self.model, evaluation_batches(examples, self.training.batch_size))[0]

    def validate(self, examples: Sequence[Example]) -> float:
        """Evaluate, and remember the result for this step; raises NotFinite as `fit` does."""
        loss_nats = self.confirm(examples)
        self.validation.append((self.step, loss_nats))
        return loss_nats

    def confirm(self, examples: Sequence[Example]) -> float:
        """The loss, which shows whether the last update left a sound adapter; raises NotFinite if not."""
        loss_nats = self.evaluate(examples)
        try:
            self.guard.confirm(loss_nats)
        except NotFinite:
            self.forget_what_was_undone()
            raise
        return loss_nats

    def forget_what_was_undone(self) -> None:
        self.validation = [(step, loss_nats) for step, loss_nats in self.validation if step <= self.step]

    def validations_since_best(self) -> int:
        losses = [loss for _, loss in self.validation]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    def save(self, path: Path, examples: Sequence[Example]) -> None:
        """The whole training state into one file; `examples` are those it was trained on.

        Raises NotFinite, and saves nothing, when the last update has ruined the adapter.
        """
        self.require_adapter()
        self.confirm(examples[: self.training.batch_size])
        progress = Progress(self.step, self.validation, self.identity(examples))
        save_state(path, snapshot(self.optimizer), progress)

    def resume(self, path: Path, examples: Sequence[Example]) -> None:
        """Go on where the saved run was: `fit` then does what it would have done, to the bit."""
        self.require_adapter()
        expected = snapshot(self.optimizer)
        arrays, progress = load_state(path, self.identity(examples), expected)
        restore(self.model, self.optimizer, arrays)
        self.guard = FiniteGuard(self.model, self.optimizer, progress.step)
        self.validation = [(step, loss_nats) for step, loss_nats in progress.validation]

    def require_adapter(self) -> None:
        if not lora_layers(self.model):
            raise ValueError("the model must carry its adapter, and does not: unmerge a merged one first")

    def identity(self, examples: Sequence[Example]) -> dict[str, Any]:
        """What a saved run belongs to, by names that a refusal can use."""
        parts = identify(self.model, self.base_digest, examples, self.lora, self.training)
        return {**parts, "compiling": self.compiled, **self.belongs_to}

    @cached_property
    def base_digest(self) -> str:
        return digest_of_base(self.model)  # which is frozen
