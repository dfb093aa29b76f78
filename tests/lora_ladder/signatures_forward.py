"""Known bugs of the adapter: its scale, its factors, the linears it is on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from mlx_impl.config import LoRAConfig
from reference import lora
from reference.lora import LoRALinear
from reference.targets import of_pattern, rank_and_scale
from tests.lora_ladder.cases import Case
from tests.lora_ladder.signatures import Hypothesis, Signature, of_case, of_dialect, patched

# A fixed scale that a trainer may have beside the user's alpha: none, and defaults of other trainers.
FIXED_SCALES = (1.0, 2.0, 10.0, 16.0, 20.0)


def scaled(scale: Callable[[str, LoRAConfig, int], float]) -> Hypothesis:
    """The update times another number, from the linear's name, the configuration and its rank."""

    def broken(name: str, config: LoRAConfig) -> tuple[int, float]:
        rank, _ = rank_and_scale(name, config)
        return rank, scale(name, config, rank)

    return patched((lora, {"rank_and_scale": broken}))


def alpha_of(name: str, config: LoRAConfig) -> float:
    return of_pattern(name, config.alpha_pattern, config.alpha)


def like(**settings: Any) -> Hypothesis:
    """The scale as if the configuration had these settings; ranks are those of the factors."""
    return scaled(lambda name, config, rank: rank_and_scale(name, replace(config, **settings))[1])


def of_factors(change: Callable[[str, np.ndarray], np.ndarray]) -> Hypothesis:
    return of_case(
        lambda case: replace(case, factors={name: change(name, x) for name, x in case.factors.items()})
    )


def reread(x: np.ndarray) -> np.ndarray:
    """The numbers of a matrix in memory, read as those of its transpose."""
    return x.reshape(x.shape[::-1]).T


def without(is_lost: Callable[[str, Case], bool]) -> Hypothesis:
    """Some linears, by name, compute without their adapter: B is 0, and DoRA's magnitude the length of W."""

    def change(case: Case) -> Case:
        factors = dict(case.factors)
        for name, x in case.factors.items():
            linear, _, kind = name.rpartition(".")
            if is_lost(linear, case) and kind == "lora_b":
                factors[name] = 0 * x
            if is_lost(linear, case) and kind == "magnitude":
                factors[name] = np.linalg.norm(case.weights[f"{linear}.weight"], axis=1)
        return replace(case, factors=factors)

    return of_case(change)


def adapter(forward: Callable[[Any, Tensor], Tensor]) -> Hypothesis:
    return patched((LoRALinear, {"forward": forward}))


def without_bias(self: Any, x_BTI: Tensor) -> Tensor:
    return x_BTI @ self.linear.weight.T + self.scale * (self.dropout(x_BTI) @ self.lora_a @ self.lora_b)


def is_last(name: str, case: Case) -> bool:
    """The last in the order of the model, of those with an adapter."""
    return name == list(case.factors)[-1].rpartition(".")[0]


PLACES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

SIGNATURES = [
    Signature(
        "scale is alpha",
        2,
        "the update is scaled by alpha, not by alpha / rank",
        of_dialect(scale="alpha"),
        "mlx-vlm#841",
        "scale = 'alpha'",
    ),
    *(
        Signature(
            f"scale is {scale:g}",
            2,
            f"the update is scaled by {scale:g}, and alpha is not read",
            scaled(lambda name, config, rank, scale=scale: scale),  # type: ignore[misc]
            "mlx-examples#982",
        )
        for scale in FIXED_SCALES
    ),
    Signature(
        "rsLoRA ignored",
        2,
        "with rsLoRA the scale is alpha / rank, not alpha / sqrt(rank)",
        like(use_rslora=False),
        "peft#2733",
    ),
    Signature(
        "rsLoRA always",
        2,
        "the scale is alpha / sqrt(rank), also without rsLoRA",
        like(use_rslora=True),
        "Kalajdzievski 2023",
    ),
    Signature(
        "scale divided twice",
        2,
        "the scale is alpha / rank^2: alpha / rank is divided by the rank again",
        scaled(lambda name, config, rank: rank_and_scale(name, config)[1] / rank),
    ),
    Signature(
        "common rank in the scale",
        2,
        "a linear with a rank of its own (rank_pattern) is scaled by the common rank",
        like(rank_pattern={}),
        "peft#1930",
    ),
    Signature(
        "alpha_pattern ignored",
        2,
        "alpha_pattern is ignored in the scale",
        like(alpha_pattern={}),
        "peft#2195",
    ),
    Signature(
        "A read as its transpose",
        2,
        "A is read as its transpose: the right size, the numbers in another order",
        of_factors(lambda name, x: reread(x) if name.endswith("lora_a") else x),
        "vmlx-swift#320",
    ),
    Signature(
        "B read as its transpose",
        2,
        "B is read as its transpose: the right size, the numbers in another order",
        of_factors(lambda name, x: reread(x) if name.endswith("lora_b") else x),
        "vmlx-swift#320",
    ),
    Signature(
        "adapter not used",
        2,
        "the forward pass uses no adapter",
        of_case(lambda case: case.bare()),
        "Soup#392",
    ),
    *(
        Signature(
            f"adapter of {place} not used",
            2,
            f"the adapter of every {place} is not used in the forward pass",
            without(lambda name, case, place=place: name.endswith(place)),  # type: ignore[misc]
        )
        for place in PLACES
    ),
    *(
        Signature(
            f"adapters of the {which} layer not used",
            2,
            f"the adapters of the {which} layer are not used in the forward pass",
            without(
                lambda name, case, number=number: (
                    int(name.split(".")[2]) == number % case.spec.num_hidden_layers
                )  # type: ignore[misc]
            ),
        )
        for which, number in (("first", 0), ("last", -1))
    ),
    Signature(
        "last adapter not used",
        2,
        "the adapter of the last linear is not used: a loop ends one too early",
        without(is_last),
    ),
    Signature("bias lost in the adapter", 2, "an adapted linear forgets its bias", adapter(without_bias)),
]
