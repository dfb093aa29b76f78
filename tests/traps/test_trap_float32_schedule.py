"""MLX's schedules compute in float32, so the learning rate is wrong at the end of a long decay.

`optim.cosine_decay` computes 1 + cos(x), which cancels for x near pi; `optim.linear_schedule` adds small
numbers to large ones. The last of 10,000 steps is off by a fifth (cosine) or by 8e-6 (linear); early in a run
this does not matter. `mlx_impl/optim.py` computes the closed form in Python's double precision and sets the
optimizer's learning rate to the result.
"""

import math

import mlx.core as mx
import mlx.optimizers as optim
import pytest

from mlx_impl.config import TrainConfig
from mlx_impl.optim import LoRAOptimizer, learning_rate_of

NUM_STEPS, PEAK = 10_000, 1e-3


def cosine(step: int) -> float:
    """In double precision, without the cancellation: 1 + cos(x) = 2 cos^2(x / 2)."""
    return PEAK * math.cos(math.pi * step / NUM_STEPS / 2) ** 2


def test_wrong_the_last_of_ten_thousand_cosine_steps_is_off_by_a_fifth() -> None:
    """1 + cos(x) is 4.9e-8. Near -1 float32 numbers are 6.0e-8 apart, so the nearest to it is 21% above.

    A cosine that is rounded less well makes it 0, which is off by more.
    """
    last = NUM_STEPS - 1
    found = optim.cosine_decay(PEAK, NUM_STEPS)(mx.array(last)).item()
    assert abs(found / cosine(last) - 1) > 0.2


def test_wrong_the_last_linear_step_is_off_by_more_than_rounding() -> None:
    last = NUM_STEPS - 1
    found = optim.linear_schedule(PEAK, 0.0, NUM_STEPS)(mx.array(last)).item()
    assert abs(found / (PEAK / NUM_STEPS) - 1) > 100 * 2.0**-24


@pytest.mark.parametrize("step", [0, 1, 5000, 9990, 9999])
def test_right_the_closed_form_is_rounded_once(step: int) -> None:
    """The optimizer holds the nearest float32; the error of the formula itself is 1e-16 of the peak."""
    config = TrainConfig(iters=NUM_STEPS, learning_rate=PEAK, lr_schedule="cosine")
    learning_rate = learning_rate_of(step, config)
    assert abs(learning_rate - cosine(step)) <= 4 * 2.0**-53 * PEAK
    optimizer = LoRAOptimizer(config)
    optimizer.set_learning_rate(learning_rate)
    for half in optimizer.optimizers:
        assert abs(half.learning_rate.item() - learning_rate) <= 2.0**-24 * learning_rate
