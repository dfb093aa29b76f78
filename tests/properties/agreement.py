"""When two trainers agree on a random model: a tolerance for every draw, even if a gradient cancels to zero.

The fixed cases of the ladder have gradients far from zero. A random case may have gradients that are zero
except for rounding: that of the queries if a row has one input, that of the keys if only the first position
counts. So

    tolerance = 8 * max(noise, sqrt(k) * u * scale)

with the noise of `tests/derived.py`. For a gradient, `scale` is the norm of all gradients together, because a
gradient that cancels is a difference of numbers of that size. For any other result, it is the result's own
norm. In float64, u is 2**-53.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from tests.derived import (
    EXACT,
    FACTOR,
    NUM_DRAWS,
    UNIT_ROUNDOFF,
    Verdict,
    judged,
    noise_of,
    require,
    require_same_names,
)
from tests.lora_ladder.protocol import Arrays
from tests.properties.strategies import Drawn
from tests.trainers.mlx_impl import MlxTrainer
from tests.trainers.reference import ReferenceTrainer

UNIT_ROUNDOFF_64 = 2.0**-53
FACTOR_KINDS = ("lora_a", "lora_b", "magnitude")

Act = Callable[[MlxTrainer | ReferenceTrainer, Drawn], Arrays]


def require_agreement(case: Drawn, act: Act, updates: int = 1) -> Verdict:
    """In float32, the act's results on `mlx_impl` equal the reference's within the derived tolerance."""
    ours, expected = act(case.build(MlxTrainer), case), act(case.build(ReferenceTrainer), case)
    noise = noise_of(
        (act(case.moved(seed).build(ReferenceTrainer), case) for seed in range(NUM_DRAWS)), expected
    )
    unit = np.sqrt(case.longest_sum * updates) * UNIT_ROUNDOFF
    return require("float32", verdicts(ours, expected, noise, unit, 0.0))


def require_exact_agreement(case: Drawn, act: Act, updates: int = 1, promise: float = EXACT) -> Verdict:
    """In float64, within `promise` of the reference (relative), or within the derived tolerance."""
    double = in_double(case)
    with MlxTrainer.exact():
        ours = act(double.build(MlxTrainer), double)
    expected = act(double.build(ReferenceTrainer), double)
    cases = [double.moved(seed, UNIT_ROUNDOFF_64) for seed in range(NUM_DRAWS)]
    noise = noise_of((act(moved.build(ReferenceTrainer), moved) for moved in cases), expected)
    unit = np.sqrt(case.longest_sum * updates) * UNIT_ROUNDOFF_64
    return require("float64", verdicts(ours, expected, noise, unit, promise))


def verdicts(
    ours: Arrays, expected: Arrays, noise: Mapping[str, float], unit: float, promise: float
) -> list[Verdict]:
    require_same_names("results", ours, expected)
    together = float(np.sqrt(sum(np.linalg.norm(v) ** 2 for n, v in expected.items() if is_of_factor(n))))
    found = []
    for name, value in expected.items():
        own = float(np.linalg.norm(value))
        floor = unit * (together if is_of_factor(name) else own)
        derived = FACTOR * max(noise[name], floor)
        words = f"{FACTOR:g} x max(noise {noise[name]:.3g}, floor {floor:.3g}), or {promise:g} x |expected|"
        found.append(judged(name, ours[name], value, max(derived, promise * own), words))
    return found


def is_of_factor(name: str) -> bool:
    return name.endswith(FACTOR_KINDS)


def in_double(case: Drawn) -> Drawn:
    double = case.in_double()
    return replace(case, weights=double.weights, factors=double.factors)
