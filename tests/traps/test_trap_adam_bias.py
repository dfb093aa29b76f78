"""`mlx.optimizers.Adam` and `AdamW` leave out Adam's bias correction unless asked for it.

PyTorch always corrects. With beta1 = 0.9, beta2 = 0.999 and a constant gradient g the averages
after t steps are m = (1 - 0.9**t) g and v = (1 - 0.999**t) g**2, so without correction the step
is (1 - 0.9**t) / sqrt(1 - 0.999**t) times PyTorch's: 0.1 / sqrt(0.001) = sqrt(10) = 3.16 at
the first step, 6.57 at the twelfth. The right form is `bias_correction=True`.

The oracle is the definition of Adam (Kingma and Ba, 2015, algorithm 1) in NumPy's float64.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
LEARNING_RATE = 2.0**-10
GRADIENT = 0.5
UNIT_ROUNDOFF = 2.0**-24


def adam_steps(corrected: bool, steps: int) -> np.ndarray:
    """The oracle: the first steps for a constant gradient, as multiples of the learning rate."""
    m = v = 0.0
    lengths = []
    for t in range(1, steps + 1):
        m = BETA1 * m + (1 - BETA1) * GRADIENT
        v = BETA2 * v + (1 - BETA2) * GRADIENT**2
        m_hat = m / (1 - BETA1**t) if corrected else m
        v_hat = v / (1 - BETA2**t) if corrected else v
        lengths.append(m_hat / (np.sqrt(v_hat) + EPS))
    return np.array(lengths)


def mlx_steps(optimizer: optim.Optimizer, steps: int) -> np.ndarray:
    """The same for an MLX optimizer. The parameter is reset to 0 before each step, so no digit is lost."""
    model: Any = nn.Module()
    lengths = []
    for _ in range(steps):
        model.w = mx.zeros(1)
        optimizer.update(model, {"w": mx.array([GRADIENT])})
        lengths.append(-model.w.item() / LEARNING_RATE)
    return np.array(lengths)


@pytest.mark.parametrize("adam", [optim.Adam, optim.AdamW])
def test_wrong_the_first_step_is_sqrt_10_times_as_long(adam: type[optim.Adam]) -> None:
    """For any gradient, PyTorch's first step is 1 learning rate long and MLX's is 3.16."""
    (length,) = mlx_steps(adam(learning_rate=LEARNING_RATE), steps=1)
    assert adam_steps(corrected=True, steps=1)[0] == pytest.approx(1, abs=2 * EPS / GRADIENT)
    assert round(length, 3) == round(np.sqrt(10), 3) == 3.162


@pytest.mark.parametrize("adam", [optim.Adam, optim.AdamW])
def test_wrong_the_twelfth_step_is_the_longest(adam: type[optim.Adam]) -> None:
    """The step grows to 6.57 learning rates at step 12, and only then gets shorter."""
    lengths = mlx_steps(adam(learning_rate=LEARNING_RATE), steps=40)
    assert lengths.argmax() + 1 == 12
    assert round(lengths.max(), 2) == 6.57


def test_wrong_every_step_is_that_of_adam_without_correction() -> None:
    """Within float32 rounding: by step t each average has been rounded at most 3 t times."""
    lengths = mlx_steps(optim.Adam(learning_rate=LEARNING_RATE), steps=40)
    expected = adam_steps(corrected=False, steps=40)
    bound = 8 * 3 * np.arange(1, 41) * UNIT_ROUNDOFF
    assert np.all(np.abs(lengths / expected - 1) <= bound)


@pytest.mark.parametrize("adam", [optim.Adam, optim.AdamW])
def test_right_with_bias_correction_the_steps_are_pytorchs(adam: type[optim.Adam]) -> None:
    """MLX computes 1 - beta2**t in float32, so the error is at most u / (1 - beta2) = 6e-5."""
    optimizer = adam(learning_rate=LEARNING_RATE, bias_correction=True)
    lengths = mlx_steps(optimizer, steps=40)
    bound = UNIT_ROUNDOFF / (1 - BETA2)
    assert np.all(np.abs(lengths / adam_steps(corrected=True, steps=40) - 1) <= bound)
