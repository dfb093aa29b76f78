"""The trainer as a program calls it: model and configurations in, step records out, the adapter in the model.

trainer = LoRATrainer(model, LoRAConfig(rank=8), TrainConfig(iters=60))
for record in trainer.fit(examples):
    print(record.step, record.loss_nats)
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import LoRAConfig, TrainConfig
from ..data import Batch, Example, Window, evaluation_batches, require_tokens, training_windows
from ..fast.forward import FAST
from ..fast.pace import paced, queued
from ..fast.rounded import rounded_once
from ..fast.vectors import VectorOptimizer, make_contiguous
from ..files.adapters import is_same_adapter
from ..lora import add_lora, lora_layers, lora_parameters
from ..machine.cuda import launch_kernels_one_by_one
from ..model import CausalLM
from ..optim import LoRAOptimizer
from ..train import PLAIN, Loss, StepRecord, add_up, evaluate, train
from .guard import FiniteGuard, NotFinite
from .interrupts import stopping_together
from .ranks import GIVEN, Ranks
from .state import (
    Progress,
    Validation,
    digest_of_arrays,
    digest_of_base,
    identify,
    load_arrays,
    load_state,
    save_state,
    state_arrays,
)

launch_kernels_one_by_one()  # MLX asks once, when it first computes on a GPU


class LoRATrainer:
    """LoRA factors in the model, everything else frozen, an optimizer ready.

    A model that carries an adapter of this same configuration keeps it and trains on.
    `compiled=None` compiles on a GPU; on a CPU each new shape would cost seconds for a few percent.
    `plain=True` trains by the pattern alone, without `fast/`: slower, the first thing to try when a run
    looks wrong. Each of the two resumes what the other saved.
    `ranks` are the processes that share out the micro-batches of each update (run/ranks.py); each must make
    the same calls, with the same model, examples and settings, and gets the results of a run of one rank.
    Raises ValueError when anything but LoRA factors would be trained.
    """

    def __init__(
        self,
        model: CausalLM,
        lora: LoRAConfig,
        training: TrainConfig,
        compiled: bool | None = None,
        plain: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        mx.random.seed(training.seed)
        if not lora_layers(model):
            add_lora(model, lora)
        if not is_same_adapter(model.lora, lora):
            raise ValueError(f"the model's adapter must have the given configuration, and has {model.lora}")
        lora_parameters(model)  # raises if anything else is trainable
        self.model, self.lora, self.training = model, lora, training
        self.optimizer: LoRAOptimizer = (LoRAOptimizer if plain else VectorOptimizer)(training)
        self.optimizer.init(model.trainable_parameters())
        self.plain, self.ranks = plain, ranks
        self.loss: Loss = PLAIN if plain else FAST
        self.compiled = mx.default_device() == mx.gpu if compiled is None else compiled
        self.guard = FiniteGuard(model, self.optimizer, updates_done=0)
        self.validation: Validation = []
        self.resume_identity: dict[str, Any] = {}  # what else must be the same when a saved run is resumed

    @property
    def step(self) -> int:
        """Updates done."""
        return self.guard.updates_done

    def fit(self, examples: Sequence[Example]) -> Iterator[StepRecord]:
        """Train up to update `training.iters`; stop reading the iterator to stop earlier.

        Factors that are put into the model meanwhile are lost in the next update.
        Raises NotFinite, rolled back to the last good state, on NaN or infinity; on several ranks
        KeyboardInterrupt on all of them after the same update, where Ctrl-C came to any (interrupts.py).
        """
        require_tokens(examples, self.model.config.vocab_size)
        if self.ranks:
            self.ranks.require_same(self.identity(examples))
        yield from self.fit_windows(training_windows(examples, self.training, self.step))

    def fit_windows(self, windows: Iterable[Window]) -> Iterator[StepRecord]:
        """`fit` on micro-batches of your own: one update a window, beginning at update `step`.

        Raises ValueError, before the update, for a window without a target.
        """
        self.require_adapter()
        self.optimizer.init(self.model.trainable_parameters())  # what the model holds now
        self.begin_on_ranks()
        self.guard.begin()
        checked = with_targets(windows)
        if not self.plain:
            checked = paced(checked, self.model, self.training.grad_checkpoint)
        records = self.step_records(checked)
        try:
            # closing: an exception would keep the windows, and the memory limit that they set
            with closing(checked), rounded_once(self.model, self.optimizer):
                yield from stopping_together(self.ranks, records) if self.ranks else records
        except NotFinite:
            self.drop_undone_validations()
            raise
        finally:
            make_contiguous(self.model)

    def begin_on_ranks(self) -> None:
        """ValueError where the ranks would begin with different factors or moments."""
        if self.ranks:
            trained = digest_of_arrays(state_arrays(self.model, self.optimizer))
            self.ranks.watchdog.begin_training()
            self.ranks.require_same({"the adapter or the optimizer's state": trained})

    def step_records(self, windows: Iterable[Window]) -> Iterator[StepRecord]:
        """`train.train` with all that this trainer holds."""
        return train(
            self.model,
            self.optimizer,
            windows,
            self.training,
            first_step=self.step,
            compiled=self.compiled,
            loss=self.loss,
            reduce=self.ranks.reduce if self.ranks else add_up if self.plain else queued(add_up),
            check=self.guard.check,
        )

    def evaluate(self, examples: Sequence[Example]) -> float:
        """Nats per target over all the examples, dropout off; the same for every batch size."""
        require_tokens(examples, self.model.config.vocab_size)
        return self.evaluate_batches(evaluation_batches(examples, self.training.batch_size))

    def evaluate_batches(self, batches: Iterable[Batch]) -> float:
        """`evaluate` on batches of your own."""
        if self.ranks:
            return evaluate(self.model, self.ranks.losses(self.model, batches, self.loss), GIVEN)[0]
        return evaluate(self.model, batches, self.loss)[0]

    def validate(self, examples: Sequence[Example]) -> float:
        """Evaluate, and remember the result for this step; raises NotFinite as `fit` does."""
        return self.add_validation(self.evaluate(examples))

    def add_validation(self, loss_nats: float) -> float:
        """Remember a loss from `evaluate_batches` for this step; raises NotFinite as `fit` does."""
        self.confirm_loss(loss_nats)
        self.validation.append((self.step, loss_nats))
        return loss_nats

    def confirm(self, examples: Sequence[Example]) -> float:
        """The loss, which shows whether the last update left a good adapter; raises NotFinite if not."""
        loss_nats = self.evaluate(examples)
        self.confirm_loss(loss_nats)
        return loss_nats

    def confirm_loss(self, loss_nats: float) -> None:
        try:
            self.guard.confirm(loss_nats)
        except NotFinite:
            self.drop_undone_validations()
            raise

    def drop_undone_validations(self) -> None:
        self.validation = [(step, loss_nats) for step, loss_nats in self.validation if step <= self.step]

    def validations_since_best(self) -> int:
        losses = [loss for _, loss in self.validation]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    def save(self, path: Path, examples: Sequence[Example]) -> None:
        """The whole training state into one file; `examples` are those it was trained on. Rank 0 writes it.

        Raises NotFinite, and saves nothing, when the last update has ruined the adapter.
        """
        self.require_adapter()
        with_target = (example for example in examples if any(example.is_target[1:]))
        self.confirm(list(islice(with_target, self.training.batch_size)))
        progress = Progress(self.step, self.validation, self.identity(examples))
        if self.ranks is None or self.ranks.rank == 0:
            save_state(path, state_arrays(self.model, self.optimizer), progress)
        if self.ranks:
            self.ranks.largest(0)  # nobody goes on before the file is written

    def resume(self, path: Path, examples: Sequence[Example]) -> None:
        """Load a saved state: `fit` then continues bit-exactly."""
        self.require_adapter()
        expected = state_arrays(self.model, self.optimizer)
        arrays, progress = load_state(path, self.identity(examples), expected)
        load_arrays(self.model, self.optimizer, arrays)
        self.guard = FiniteGuard(self.model, self.optimizer, progress.step)
        self.validation = [(step, loss_nats) for step, loss_nats in progress.validation]

    def require_adapter(self) -> None:
        if not lora_layers(self.model):
            raise ValueError("the model must carry its adapter, and does not: unmerge a merged one first")

    def identity(self, examples: Sequence[Example]) -> dict[str, Any]:
        """What a saved run belongs to, by names that an error message can use."""
        parts = identify(self.model, self.base_digest, examples, self.lora, self.training)
        return {**parts, "compiling": self.compiled, **self.resume_identity}

    @cached_property
    def base_digest(self) -> str:
        return digest_of_base(self.model)  # which is frozen


def with_targets(windows: Iterable[Window]) -> Generator[Window]:
    """The same windows; ValueError for one without a target, whose mean loss would be 0 / 0."""
    for window in windows:
        if not any(batch.mask_BT.any() for batch in window):
            raise ValueError("an update needs at least one target, and the given batches have none")
        yield window
