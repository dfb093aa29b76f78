"""TRL 1.16.0's SFTTrainer with PEFT 0.21.2 and transformers 5.23.0.

Nothing in them is patched. The trainer runs as `SFTTrainer(...).train()`, with a data loader that hands over
the ladder's batches in their order; a callback stops it after the last of them. TRL's defaults that are not
the ladder's subject are set: float32 instead of bfloat16, and checkpointing only if it is asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import tokenizers
import torch
import transformers
from trl import SFTConfig, SFTTrainer

from tests.lora_ladder.protocol import Arrays, Batch, TrainConfig
from tests.peers.adapters.peft import PeftTrainer

# What SFTTrainer prepares before the batches are handed over: it needs a data set and a tokenizer.
ROWS = datasets.Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]})
SETTINGS = {"bf16": False, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
OPTIMIZERS = {"adamw": "adamw_torch", "sgd": "sgd"}
datasets.disable_progress_bars()


def tokenizer() -> Any:
    words = tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="<pad>", eos_token="<eos>"
    )


class StopsAfter(transformers.TrainerCallback):
    """A run may be longer than what is trained of it now."""

    def __init__(self, num_updates: int) -> None:
        self.num_updates = num_updates

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step >= self.num_updates


class FedTrainer(SFTTrainer):
    """Takes the batches that it is given."""

    batches: Any  # a list of dicts of tensors

    def get_train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.batches, batch_size=None)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return torch.utils.data.DataLoader(self.batches, batch_size=None)


class TrlTrainer(PeftTrainer):
    optimizer_from = "TRL, through transformers' Trainer"
    schedule_from = "TRL, through transformers' Trainer"
    merge = unmerge = save_adapter = load_adapter = greedy = None  # type: ignore[assignment]  # PEFT's

    def trainer(self, batches: Sequence[Batch], **settings: Any) -> FedTrainer:
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = FedTrainer(
                model=self.model,
                args=SFTConfig(folder, **{"gradient_checkpointing": False, **SETTINGS, **settings}),
                train_dataset=ROWS,
                processing_class=tokenizer(),
            )
        trainer.batches = [self.inputs(batch) for batch in batches]
        return trainer

    def loss(self, batch: Batch) -> tuple[float, int]:
        count = int(batch.mask_BT.sum())
        trainer = self.trainer([batch])
        self.model.eval()
        with torch.no_grad():
            return trainer.compute_loss(self.model, trainer.batches[0]).item() * count, count

    def gradients(self, batch: Batch) -> Arrays:
        trainer = self.trainer([batch])
        self.model.eval().zero_grad()
        trainer.compute_loss(self.model, trainer.batches[0]).backward()
        return self.grads()

    def evaluate(self, batches: Sequence[Batch]) -> float:
        trainer = self.trainer(batches)
        with redirect_stdout(StringIO()):
            return trainer.evaluate(ROWS)["eval_loss"]

    def history(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[dict[str, float]]:
        """What the trainer logs of each update."""
        size = max(len(window) for window in windows)
        if any(len(window) != size for window in windows[:-1]):
            raise NotImplementedError("each window but the last must have as many micro-batches")
        batches = [batch for window in windows for batch in window]
        trainer = self.trainer(batches, gradient_accumulation_steps=size, **settings_of(training))
        trainer.add_callback(StopsAfter(len(windows)))
        with redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()
        self.checkpoint(is_on=False)
        return [logged for logged in trainer.state.log_history if "loss" in logged]

    def train(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[float]:
        return [logged["loss"] for logged in self.history(windows, training)]

    def gradient_norms(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[float]:
        return [logged["grad_norm"] for logged in self.history(windows, training)]

    def made(self, training: TrainConfig) -> tuple[Any, Any]:
        """The optimizer and its schedule, as the trainer makes them when it begins."""
        trainer = self.trainer([], **settings_of(training))
        trainer.create_optimizer_and_scheduler(training.iters)
        return trainer.optimizer, trainer.lr_scheduler


def settings_of(training: TrainConfig) -> dict[str, Any]:
    """Every option of the run, by its name in SFTConfig."""
    if training.loraplus_lr_ratio != 1:
        raise NotImplementedError("SFTConfig has no LoRA+")
    constant = training.lr_schedule == "constant"
    return {
        "max_steps": training.iters,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if constant else training.lr_schedule,
        "warmup_steps": training.warmup_steps,
        "optim": OPTIMIZERS[training.optimizer],
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "gradient_checkpointing": training.grad_checkpoint,
        "seed": training.seed,
        "logging_steps": 1,
    }
