"""When two trainers agree on a random model: bounds that hold for every draw, also where all cancels.

A fixed case is chosen so that its gradients are far from zero. Of random ones some are zero but for rounding:
the queries' gradient where a row has one input, the keys' where only the first position counts. What rounding
costs there is measured, as everywhere, by moving every number to a neighbour, and added up over the whole:

    tolerance = 8 * max(noise, sqrt(k) * u * scale)

`noise` is the largest change among the reference's runs; one run alone can be lucky (of 300 random models,
five tensors lay outside of a bound from one run, at worst by a factor of 38; from four runs none used more
than a third). `scale` is, of a gradient, the norm of all gradients together: one that cancels was made of
numbers of that size. Of anything else it is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from tests.derived import EXACT, FACTOR, UNIT_ROUNDOFF, Verdict, judged, require, require_same_names
from tests.ladder.cases import Case
from tests.ladder.protocol import Arrays, Dialect
from tests.properties.strategies import Drawn
from tests.trainers.mlx_impl import MlxTrainer
from tests.trainers.reference import ReferenceTrainer, oracle

NUM_ROUNDINGS = 4
UNIT_ROUNDOFF_64 = 2.0**-53
REFERENCE_32 = oracle(Dialect(), torch.float32)
FACTOR_KINDS = ("lora_a", "lora_b", "magnitude")

Act = Callable[[MlxTrainer | ReferenceTrainer, Drawn], Arrays]


def require_agreement(case: Drawn, act: Act, updates: int = 1) -> Verdict:
    """In float32: the act's results on `mlx_impl` are within the derived bound of the reference's."""
    ours, expected = act(case.build(MlxTrainer), case), act(case.build(ReferenceTrainer), case)
    cases: list[Case] = [case, *(case.rounded_anew(seed) for seed in range(1, NUM_ROUNDINGS))]
    roundings = [act(rounded.build(REFERENCE_32), case) for rounded in cases]
    unit = np.sqrt(case.longest_sum * updates) * UNIT_ROUNDOFF
    return require("float32", verdicts(ours, expected, roundings, unit, 0.0))


def require_exact_agreement(case: Drawn, act: Act, updates: int = 1, promise: float = EXACT) -> Verdict:
    """In float64: within `promise` of the reference's, relative, or the derived bound where all cancels."""
    double = in_double(case)
    with MlxTrainer.exact():
        ours = act(double.build(MlxTrainer), double)
    expected = act(double.build(ReferenceTrainer), double)
    cases = [double.rounded_in_double(seed) for seed in range(1, NUM_ROUNDINGS)]
    roundings = [act(rounded.build(ReferenceTrainer), rounded) for rounded in cases]
    unit = np.sqrt(case.longest_sum * updates) * UNIT_ROUNDOFF_64
    return require("float64", verdicts(ours, expected, roundings, unit, promise))


def verdicts(
    ours: Arrays, expected: Arrays, roundings: list[Arrays], unit: float, promise: float
) -> list[Verdict]:
    require_same_names("results", ours, expected)
    together = float(np.sqrt(sum(np.linalg.norm(v) ** 2 for n, v in expected.items() if is_of_factor(n))))
    found = []
    for name, value in expected.items():
        noise = max(float(np.linalg.norm(rounding[name] - value)) for rounding in roundings)
        own = float(np.linalg.norm(value))
        floor = unit * (together if is_of_factor(name) else own)
        derived = FACTOR * max(noise, floor)
        words = f"{FACTOR:g} x max(noise {noise:.3g}, floor {floor:.3g}), or {promise:g} x |expected|"
        found.append(judged(name, ours[name], value, max(derived, promise * own), words))
    return found


def is_of_factor(name: str) -> bool:
    return name.endswith(FACTOR_KINDS)


def in_double(case: Drawn) -> Drawn:
    double = case.in_double()
    return replace(case, weights=double.weights, factors=double.factors)
