"""bfloat16 in NumPy, which does not have it: the numbers of float32 whose last 16 bits are 0.

How far a right trainer's loss and gradients may be from float64 is derived as in tests/derived.py: 8 times
the noise of weights and factors that are moved at random, here by up to 2**-8 of themselves, bfloat16's unit
roundoff. In each draw every product is then rounded once, as by a matmul that adds in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from tests.derived import BFLOAT16_ROUNDOFF, NUM_DRAWS, noise_of
from tests.lora_ladder.cases import Case, named_case
from tests.lora_ladder.protocol import Arrays

BITS = 16  # of float32 that bfloat16 does not have


def rounded(x: np.ndarray) -> np.ndarray:
    """The nearest number of bfloat16; of two equally near ones the one whose last bit is 0."""
    bits = x.astype(np.float32).view(np.uint32)
    half = np.uint32(2 ** (BITS - 1) - 1) + ((bits >> BITS) & 1)
    return ((bits + half) >> BITS << BITS).astype(np.uint32).view(np.float32)


def with_other_digits(arrays: Arrays) -> list[str]:
    """The names of those arrays that bfloat16 does not hold."""
    return [name for name, x in arrays.items() if not np.array_equal(x, rounded(x))]


def bfloat16_case(name: str) -> Case:
    """With base weights that bfloat16 holds, so that only what is computed is rounded."""
    case = named_case(name)
    return replace(case, weights={n: rounded(weight) for n, weight in case.weights.items()})


def expected(case: Case, act: Callable[[Any], Arrays], oracle64: Any) -> tuple[Arrays, dict[str, float]]:
    """The act's results on the float64 reference, and the noise of bfloat16."""
    unit = BFLOAT16_ROUNDOFF / np.sqrt(case.longest_sum / 2)  # `moved` is for sums of rounded terms
    exact = act(case.build(oracle64))
    return exact, noise_of((act(case.moved(seed, unit).build(oracle64)) for seed in range(NUM_DRAWS)), exact)
