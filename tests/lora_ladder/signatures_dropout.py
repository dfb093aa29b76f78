"""Known bugs of dropout, read off the masks that a trainer draws (masks.py), and of recomputing with it.

Masks are random, so what is compared is their law: the share of elements that are kept, the number that these
are multiplied by, and along which axes the masks repeat. A bug is named if it changes just what differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from mlx_impl.config import TrainConfig
from reference.lora import DoRALinear, LoRALinear
from tests.lora_ladder.cases import named_case
from tests.lora_ladder.masks import AXES, Masks, masks_drawn
from tests.lora_ladder.plugin import is_claimed
from tests.lora_ladder.signatures import Hypothesis, Signature, patched
from tests.trainers.reference import FixedDropout

P = 0.25
TOLERANCE = 0.02  # of a share of more than 10,000 elements, and of a number that is read off gradients
SLOPE = 0.02  # relative: a gradient of other masks is off by much more, rounding by much less
STEP = 2.0**-7
STILL = TrainConfig(iters=3, learning_rate=0.0)
ONE_UPDATE = TrainConfig(iters=1, learning_rate=1.0, optimizer="sgd")

REDRAWN = "redrawn masks"
OF_LAWS = {
    name: Signature(f"dropout {name}", 14, sentence, None, link)
    for name, sentence, link in (
        ("never", "dropout is never applied", "torchtune#995"),
        ("not rescaled", "dropout does not divide what it keeps by 1 - p", ""),
        ("divided twice", "dropout divides what it keeps by 1 - p twice", ""),
        ("times 1 + p", "dropout multiplies what it keeps by 1 + p, instead of dividing by 1 - p", ""),
        ("keeps p", "dropout keeps the share p, instead of dropping it", ""),
        (
            REDRAWN,
            "checkpointing recomputes with other dropout masks than the forward pass had",
            "tests/traps/test_trap_checkpoint_dropout.py",
        ),
        *((axis, f"every {axis} has the same dropout mask", "") for axis in AXES),
    )
}
LAWS = {  # the share of kept elements, and what they are multiplied by
    "never": (1.0, 1.0),
    "not rescaled": (1 - P, 1.0),
    "divided twice": (1 - P, (1 - P) ** -2),
    "times 1 + p": (1 - P, 1 + P),
    "keeps p": (P, 1 / P),
    "": (1 - P, 1 / (1 - P)),
}


def whole_layer_dropped(self: Any, x_BTI: Tensor) -> Tensor:
    x_BTI = self.dropout(x_BTI)
    return self.linear(x_BTI) + self.scale * (x_BTI @ self.lora_a @ self.lora_b)


def dora_without_dropout(self: Any, x_BTI: Tensor) -> Tensor:
    weight_OI = LoRALinear.merged_weight(self)
    update_BTO = self.scale * (x_BTI @ self.lora_a @ self.lora_b)
    return self.magnitude / weight_OI.norm(dim=1).detach() * (x_BTI @ self.linear.weight.T + update_BTO)


def of_masks(change: Callable[[Any, Tensor], Tensor]) -> Hypothesis:
    """Dropout with given masks, while training, that does something else with them."""
    return patched((FixedDropout, {"forward": lambda self, x: change(self, x) if self.training else x}))


SIGNATURES = [
    Signature(
        "dropout on the base too",
        10,
        "dropout acts on the input of the frozen linear too, not of A alone",
        patched((LoRALinear, {"forward": whole_layer_dropped})),
    ),
    Signature(
        "DoRA without dropout",
        10,
        "a DoRA layer has no dropout",
        patched((DoRALinear, {"forward": dora_without_dropout})),
        "peft#1806",
    ),
    *(
        Signature(f"given masks: {name}", 10, sentence, of_masks(change))
        for name, sentence, change in (
            ("not used", "dropout is never applied", lambda self, x: x),
            (
                "not rescaled",
                "dropout does not divide what it keeps by 1 - p",
                lambda self, x: x * self.keep_BTI,
            ),
            (
                "divided by p",
                "dropout divides what it keeps by p, not by 1 - p",
                lambda self, x: x * self.keep_BTI / self.p,
            ),
            (
                "turned round",
                "dropout drops what the mask keeps",
                lambda self, x: x * ~self.keep_BTI / (1 - self.p),
            ),
        )
    ),
]


@dataclass(frozen=True)
class Law:
    """What was found of the masks: the law's name (None: not known), and the axes along which they repeat."""

    name: str | None
    axes: tuple[str, ...]


def law_of(masks: Masks) -> Law:
    share = float(masks.keep[masks.is_read].mean())
    factor = float(np.median(masks.ratio[masks.is_read & masks.keep])) if share else 0.0
    found = [
        name
        for name, (right_share, right_factor) in LAWS.items()
        if abs(share - right_share) < TOLERANCE and abs(factor - right_factor) < TOLERANCE
    ]
    # Where nothing is dropped all masks are alike.
    axes = tuple(a for n, a in enumerate(AXES) if repeats(masks, n)) if found and share < 1 else ()
    return Law(found[0] if found else None, axes)


def repeats(masks: Masks, axis: int) -> bool:
    """Whether all masks along the axis are the first one, wherever both could be read."""
    first, first_read = (np.take(x, [0], axis) for x in (masks.keep, masks.is_read))
    both = masks.is_read & first_read
    both[(slice(None),) * axis + (0,)] = False
    return bool(both.any() and (masks.keep == first)[both].all())


def named(candidate: Any) -> list[Signature]:
    """Nothing where dropout is right, or wrong in another way."""
    law = law_of(masks_drawn(candidate, P))
    if law.name is None or len(law.axes) > 1 or (law.name and law.axes):
        return []
    if law == Law("", ()):
        return [OF_LAWS[REDRAWN]] if redraws(candidate) else []
    return [OF_LAWS[law.name or law.axes[0]]]


def named_by_losses(candidate: Any) -> list[Signature]:
    """For a trainer without SGD: at rate 0 nothing but the masks tells the losses of its updates apart.

    Raises whatever the trainer raises, as for dropout.
    """

    def losses(p: float) -> list[float]:
        case = named_case("untied").with_dropout(p)
        return [float(x) for x in case.build(candidate).train([[case.batch]] * 3, STILL)]

    dropped, whole = losses(0.5), losses(0.0)
    if len(set(dropped)) > 1:
        return []
    return [OF_LAWS["never" if dropped == whole else "update"]]


def redraws(candidate: Any) -> bool:
    """Whether the gradient is the slope of the loss by `train`, and not by `train_checkpointed`."""
    if not is_claimed(candidate, "train_checkpointed"):
        return False
    return is_slope(candidate, "train") and not is_slope(candidate, "train_checkpointed")


def is_slope(candidate: Any, how: str) -> bool:
    """|g| = (L(w + h g / |g|) - L(w - h g / |g|)) / 2h with the gradient g and the masks of one seed."""
    case = named_case("untied").with_dropout(P)

    def run(factors: dict[str, np.ndarray], rate: float) -> tuple[float, dict[str, np.ndarray]]:
        trainer = replace(case, factors=factors).build(candidate)
        (loss,) = getattr(trainer, how)([[case.batch]], replace(ONE_UPDATE, learning_rate=rate))
        return float(loss), trainer.factors()

    _, after = run(case.factors, 1.0)
    grads = {name: case.factors[name] - x for name, x in after.items()}
    norm = float(np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values())))
    sides = [
        run({n: case.factors[n] + np.float32(by / norm) * g for n, g in grads.items()}, 0.0)[0]
        for by in (STEP, -STEP)
    ]
    return abs((sides[0] - sides[1]) / (2 * STEP) - norm) < SLOPE * norm
