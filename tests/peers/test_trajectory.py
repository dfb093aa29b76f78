"""Twenty updates of `reference.train` equal a plain loop over transformers, PEFT and torch.optim.

The loop uses transformers' loss (sum / num_items over the whole window) and schedules, torch's clipping and
PEFT's LoRA+ groups. Losses, norms, learning rates and factors agree to 1e-12 relative in float64, and
within the derived tolerance in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

import numpy as np
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from mlx_impl.config import LoRAConfig, TrainConfig
from mlx_impl.data import Batch
from reference.train import train
from tests.derived import assert_within_rounding
from tests.peers.cases import (
    ADAPTERS,
    LLAMA,
    PLAIN,
    Arrays,
    Oracle,
    longest_sum,
    random_batch,
    random_factors,
    random_weights,
    to_tensors,
)
from tests.peers.test_oracle import assert_promise
from tests.peers.twin import PeftTwin

UPDATES = 20
STEADY = TrainConfig(iters=UPDATES, learning_rate=5e-3)
RUNS = {
    "constant": STEADY,
    "weight-decay": replace(STEADY, weight_decay=0.1),
    "clipped": replace(STEADY, max_grad_norm=0.5),
    "accumulated": replace(STEADY, grad_accumulation_steps=3, max_grad_norm=1.0),
    "constant-warmup": replace(STEADY, warmup_steps=6),
    "linear": replace(STEADY, lr_schedule="linear"),
    "linear-warmup": replace(STEADY, lr_schedule="linear", warmup_steps=5, weight_decay=0.1),
    "cosine": replace(STEADY, lr_schedule="cosine"),
    "cosine-warmup": replace(STEADY, lr_schedule="cosine", warmup_steps=4, grad_accumulation_steps=2),
    "all-warmup": replace(STEADY, lr_schedule="cosine", warmup_steps=UPDATES),
    "loraplus": replace(STEADY, loraplus_lr_ratio=16.0, learning_rate=5e-4),
    "everything": replace(
        STEADY,
        lr_schedule="cosine",
        warmup_steps=3,
        loraplus_lr_ratio=4.0,
        learning_rate=2e-3,
        weight_decay=0.05,
        max_grad_norm=0.7,
        grad_accumulation_steps=3,
    ),
}
CASES = [
    *(pytest.param(PLAIN, run, id=name) for name, run in RUNS.items()),
    *(
        pytest.param(ADAPTERS[name], RUNS["everything"], id=f"everything-{name}")
        for name in ("dora", "patterns")
    ),
]
Windows = Sequence[Sequence[Batch]]


@dataclass
class Run:
    losses: list[float]
    norms: list[float]
    learning_rates: list[float]
    factors: Arrays

    def arrays(self) -> Arrays:
        lists = {"losses": self.losses, "norms": self.norms, "learning rates": self.learning_rates}
        return {name: np.array(values) for name, values in lists.items()} | self.factors


def make_windows(training: TrainConfig) -> Windows:
    """Windows of up to three micro-batches, of 14, 8 and 21 targets; the last window has at most two."""
    sizes = [((14, 6, 11), (5, 3, 9)), ((7, 9), (5, 3)), ((12, 13, 5, 8), (9, 6, 1, 1))]
    count = training.grad_accumulation_steps
    windows = [
        [random_batch(LLAMA, 100 + 10 * update + k, *sizes[k]) for k in range(count)]
        for update in range(UPDATES)
    ]
    windows[-1] = windows[-1][:2]
    return windows


def peft_optimizer(model: torch.nn.Module, training: TrainConfig) -> Optimizer:
    if training.loraplus_lr_ratio == 1:
        trained = [p for p in model.parameters() if p.requires_grad]
        return AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay)
    return create_loraplus_optimizer(
        model,
        AdamW,
        lr=training.learning_rate,
        loraplus_lr_ratio=training.loraplus_lr_ratio,
        loraplus_weight_decay=training.weight_decay,
    )


def hugging_face_schedule(optimizer: Optimizer, training: TrainConfig) -> LRScheduler:
    if training.lr_schedule == "constant":
        return get_constant_schedule_with_warmup(optimizer, training.warmup_steps)
    decay = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}
    return decay[training.lr_schedule](optimizer, training.warmup_steps, training.iters)


def train_peft(twin: PeftTwin, windows: Windows, training: TrainConfig) -> Run:
    model, run = twin.model.train(), Run([], [], [], {})
    optimizer = peft_optimizer(model, training)
    schedule = hugging_face_schedule(optimizer, training)
    trained = [p for p in model.parameters() if p.requires_grad]
    for window in windows:
        num_items = sum(int(batch.mask_BT.sum()) for batch in window)
        optimizer.zero_grad()
        losses = [twin.mean_nats(batch, num_items) for batch in window]
        for loss in losses:
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, training.max_grad_norm or inf)
        run.losses.append(sum(loss.item() for loss in losses))
        run.norms.append(norm.item())
        run.learning_rates.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return replace(run, factors=twin.factors())


def train_reference(oracle: Oracle, windows: Windows, training: TrainConfig) -> Run:
    records = list(train(oracle.model, [[to_tensors(batch) for batch in w] for w in windows], training))
    return Run(
        [record.loss_nats for record in records],
        [record.grad_norm for record in records],
        [record.learning_rate for record in records],
        oracle.factors(),
    )


def theirs_and_ours(lora: LoRAConfig, training: TrainConfig, dtype: torch.dtype) -> tuple[Run, Run]:
    given = LLAMA, random_weights(LLAMA), lora, random_factors(LLAMA, lora), dtype
    windows = make_windows(training)
    return (
        train_peft(PeftTwin(*given), windows, training),
        train_reference(Oracle(*given), windows, training),
    )


@pytest.mark.parametrize(("lora", "training"), CASES)
def test_twenty_updates_in_float64_equal_pefts_to_1e_12(lora: LoRAConfig, training: TrainConfig) -> None:
    theirs, ours = theirs_and_ours(lora, training, torch.float64)
    assert len(theirs.losses) == UPDATES
    assert ours.losses[-1] != ours.losses[0]
    assert_promise("trajectory, float64", ours.arrays(), theirs.arrays())


@pytest.mark.parametrize(("lora", "training"), CASES)
def test_twenty_updates_in_float32_equal_pefts_within_rounding(
    lora: LoRAConfig, training: TrainConfig
) -> None:
    theirs32, ours32 = theirs_and_ours(lora, training, torch.float32)
    _, ours64 = theirs_and_ours(lora, training, torch.float64)
    k = longest_sum(LLAMA, make_windows(training)[0][-1])
    assert_within_rounding("trajectory, float32", theirs32.arrays(), ours32.arrays(), ours64.arrays(), k)


def test_every_update_of_the_clipped_run_is_clipped_and_windows_are_unequal() -> None:
    """Otherwise the tests above would prove less than they claim."""
    theirs, _ = theirs_and_ours(PLAIN, RUNS["clipped"], torch.float64)
    assert min(theirs.norms) > RUNS["clipped"].max_grad_norm
    windows = make_windows(RUNS["accumulated"])
    assert [[int(b.mask_BT.sum()) for b in w] for w in (windows[0], windows[-1])] == [[14, 8, 21], [14, 8]]
