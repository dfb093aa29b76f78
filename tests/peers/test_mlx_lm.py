"""Where mlx-lm's own trainer differs from the reference: each difference alone, small, with its figures.

All of this is the behaviour of mlx-lm 0.32.2, much of it on purpose. The tests state it, so that a change is
noticed; test_departures.py finds the same differences with the ladder.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from math import log
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.trainer import default_loss, grad_checkpoint, iterate_batches

from mlx_impl.config import LoRAConfig, TrainConfig
from mlx_impl.data import Batch
from tests.derived import assert_within_rounding
from tests.peers.adapters.mlx_lm import MlxLmTrainer
from tests.peers.cases import (
    LLAMA,
    PLAIN,
    Arrays,
    Oracle,
    longest_sum,
    random_batch,
    random_factors,
    random_weights,
)

SGD = TrainConfig(iters=1, optimizer="sgd", learning_rate=1.0)  # an update is minus the gradient
FEW = random_batch(LLAMA, 5, (9, 4), (6, 3))  # 4 targets
MANY = random_batch(LLAMA, 6, (14, 12), (1, 2))  # 23 targets


def make_trainer(lora: LoRAConfig = PLAIN) -> MlxLmTrainer:
    return MlxLmTrainer(LLAMA, random_weights(LLAMA), lora, random_factors(LLAMA, lora))


def update(windows: list[list[Batch]], training: TrainConfig, lora: LoRAConfig = PLAIN) -> Arrays:
    """The change of the factors by training."""
    trainer = make_trainer(lora)
    before = trainer.factors()
    trainer.train(windows, training)
    return {name: value - before[name] for name, value in trainer.factors().items()}


def relative_difference(ours: Arrays, theirs: Arrays) -> float:
    """Over all tensors at once."""
    difference = sum(float(np.sum((ours[name] - theirs[name]) ** 2)) for name in theirs)
    return (difference / sum(float(np.sum(value**2)) for value in theirs.values())) ** 0.5


def test_one_pad_position_a_row_counts_as_a_target() -> None:
    """A model sure of three right tokens has loss 0, but with the pad as a fourth target ln(V) / 4."""
    (tokens_BS, lengths_B2), V = next(iterate_batches([([5, 6, 7, 8, 9], 2)], 1, 2048)), 61
    logits_BTV = 100.0 * mx.eye(V)[tokens_BS[:, 1:]] * (mx.arange(1, 33) < 5)[None, :, None]
    loss, num_targets = default_loss(lambda _: logits_BTV, tokens_BS, lengths_B2)
    assert num_targets.item() == 4
    assert loss.item() == pytest.approx(log(V) / 4)


def test_the_token_used_as_padding_changes_the_loss_and_the_gradient() -> None:
    """Only the token after the end of each row differs: 0, or 60."""
    batch = random_batch(LLAMA)
    mask_BT = batch.mask_BT
    end_B = mask_BT.shape[1] - np.argmax(mask_BT[:, ::-1], axis=1)
    is_pad_BT = np.arange(mask_BT.shape[1]) >= end_B[:, None]
    other = batch._replace(targets_BT=np.where(is_pad_BT, 60, batch.targets_BT))
    losses = [nats / count for nats, count in map(make_trainer().loss, (batch, other))]
    gradients = [make_trainer().gradients(given) for given in (batch, other)]
    difference = relative_difference(*gradients)
    print(f"pad 0: {losses[0]:.3f} nats, pad 60: {losses[1]:.3f}; gradients differ by {difference:.0%}")
    assert abs(losses[1] - losses[0]) > 0.1
    assert difference > 0.1


def test_with_the_pad_as_a_target_the_reference_has_mlx_lms_gradients() -> None:
    """So there is no other difference."""
    batch = random_batch(LLAMA)
    given = LLAMA, random_weights(LLAMA), PLAIN, random_factors(LLAMA, PLAIN)
    counted = batch._replace(mask_BT=with_next(batch.mask_BT))
    ref32, ref64 = (Oracle(*given, dtype).gradients(counted) for dtype in (torch.float32, torch.float64))
    assert_within_rounding(
        "mlx-lm, pad counted", make_trainer().gradients(batch), ref32, ref64, longest_sum(LLAMA, batch)
    )


def with_next(mask_BT: np.ndarray) -> np.ndarray:
    return mask_BT | np.pad(mask_BT, ((0, 0), (1, 0)))[:, :-1]


def test_accumulation_averages_the_means_of_micro_batches() -> None:
    """Batches of 5 and 25 targets weigh the same: the update is the mean of two means, not of 30 targets."""
    training = replace(SGD, grad_accumulation_steps=2)
    together = update([[FEW, MANY]], training)
    apart = [make_trainer().gradients(batch) for batch in (FEW, MANY)]
    counts = [make_trainer().loss(batch)[1] for batch in (FEW, MANY)]
    mean = {n: -(g + apart[1][n]) / 2 for n, g in apart[0].items()}
    by_targets = {n: -(counts[0] * g + counts[1] * apart[1][n]) / sum(counts) for n, g in apart[0].items()}
    difference = relative_difference(together, by_targets)
    print(f"targets {counts}: {difference:.0%} from the update by targets")
    assert relative_difference(together, mean) < 1e-5
    assert difference > 0.1


def test_an_incomplete_last_window_is_not_trained_on() -> None:
    """With two micro-batches per update, the third of three changes nothing."""
    training = replace(SGD, grad_accumulation_steps=2)
    one, other = update([[FEW, FEW], [MANY]], training), update([[FEW, FEW]], training)
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_adams_first_update_is_3_16_times_the_learning_rate() -> None:
    """Without bias correction it is 0.1 / sqrt(0.001) learning rates; with it, as in PyTorch, one."""
    steps = update([[random_batch(LLAMA)]], TrainConfig(iters=1, learning_rate=1e-3))
    largest = max(float(np.abs(value).max()) for value in steps.values()) / 1e-3
    print(f"largest step: {largest:.3f} learning rates")
    assert largest == pytest.approx(0.1 / 0.001**0.5, rel=1e-3)


def test_warmup_holds_the_peak_for_two_updates_and_the_decay_ends_one_update_late() -> None:
    """Linear, 10 updates with 4 of warmup: updates 4 and 5 have rate 1; the last has 1/3 instead of 1/6."""
    rates = make_trainer().learning_rates(
        TrainConfig(iters=10, learning_rate=1.0, lr_schedule="linear", warmup_steps=4)
    )
    sixths = [0, 1.5, 3, 4.5, 6, 6, 5, 4, 3, 2]
    assert rates == pytest.approx([sixth / 6 for sixth in sixths], abs=1e-6)


def test_an_incomplete_last_batch_is_dropped() -> None:
    """Of five examples in batches of two, four are used; three examples in batches of four are an error."""
    examples = [([1, 2, 3, 10 + n], 0) for n in range(5)]
    seen = {int(row[3]) for tokens, _ in iterate_batches(examples, 2, 2048) for row in tokens}
    assert seen == {10, 11, 12, 13}
    with pytest.raises(ValueError, match="at least batch_size=4"):
        next(iterate_batches(examples[:3], 4, 2048))


def test_validation_changes_the_order_of_training() -> None:
    """Both use NumPy's global random numbers, so the order after a validation is another one."""
    examples = [([1, 2, 3, n], 0) for n in range(40)]

    def second_epoch(validations: int) -> list[int]:
        np.random.seed(0)
        training = iterate_batches(examples, 1, 2048, loop=True)
        list(islice(training, 40))
        for _ in range(validations):
            list(iterate_batches(examples[:5], 1, 2048))
        return [int(tokens[0, 3]) for tokens, _ in islice(training, 40)]

    assert second_epoch(0) == second_epoch(0) != second_epoch(1)


def test_a_batch_without_targets_makes_every_factor_nan() -> None:
    """A prompt that fills its row leaves no target: the loss is 0 / 0."""
    empty = FEW._replace(mask_BT=np.zeros_like(FEW.mask_BT))
    steps = update([[empty]], SGD)
    assert all(np.isnan(value).all() for value in steps.values())


class AdaptedBlock(nn.Module):
    """A block of one adapted linear; its output is linear in lora_b."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = LoRALinear.from_base(nn.Linear(8, 4, bias=False), r=2, dropout=0.5, scale=1.0)
        self.proj.linear.weight = mx.zeros((4, 8))
        self.proj.lora_a, self.proj.lora_b = mx.ones((8, 2)), mx.ones((2, 4))
        self.proj.linear.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        return self.proj(x)


def test_checkpointing_with_dropout_differentiates_with_another_mask() -> None:
    """f is linear in B, so <B, df/dB> = f(B). All numbers are small integers: the sums are exact.

    The recomputation draws new random numbers. With a mask m of 64 inputs, f = 2 * 2 * 4 * sum(m).
    """

    def value_and_inner_product(block: AdaptedBlock) -> tuple[float, float]:
        mx.random.seed(1)
        value, gradient = nn.value_and_grad(block, lambda model, x: model(x).sum())(block, mx.ones((8, 8)))
        return value.item(), (gradient["proj"]["lora_b"] * block.proj.lora_b).sum().item()

    plain = value_and_inner_product(AdaptedBlock())
    block_type: Any = AdaptedBlock
    original = block_type.__call__
    try:
        grad_checkpoint(AdaptedBlock())
        checkpointed = value_and_inner_product(AdaptedBlock())
    finally:
        block_type.__call__ = original
    print(f"f and <B, df/dB>: plain {plain}, checkpointed {checkpointed}")
    assert plain[0] == plain[1]
    assert checkpointed[0] == plain[0]
    assert checkpointed[1] != checkpointed[0]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_a_training_update_if_and_only_if_there_is_dropout(
    dropout: float,
) -> None:
    lora = replace(PLAIN, dropout=dropout)
    batch, updates, losses = random_batch(LLAMA), [], []
    for name in ("train", "train_checkpointed"):
        trainer = make_trainer(lora)
        before = trainer.factors()
        losses += getattr(trainer, name)([[batch]], SGD)
        updates.append({n: value - before[n] for n, value in trainer.factors().items()})
    difference = relative_difference(updates[1], updates[0])
    print(f"dropout {dropout}: losses {losses}, the updates differ by {difference:.2%}")
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert difference > 0.1 if dropout else difference < 1e-5
