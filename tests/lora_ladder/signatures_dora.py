"""Known bugs of DoRA: its length, its magnitude, its direction and the bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from reference.lora import DoRALinear, LoRALinear
from tests.lora_ladder.signatures import Hypothesis, Signature, patched


def of_dora(forward: Callable[[Any, Tensor, Tensor], Tensor]) -> Hypothesis:
    """DoRA with another output, from the layer, its input and its direction x V^T."""

    def broken(self: Any, x_BTI: Tensor) -> Tensor:
        update_BTO = (self.dropout(x_BTI) @ self.lora_a) @ self.lora_b
        return forward(self, x_BTI, x_BTI @ self.linear.weight.T + self.scale * update_BTO)

    return patched((DoRALinear, {"forward": broken}))


def share(self: Any) -> Tensor:
    """m / |V|."""
    return self.magnitude / LoRALinear.merged_weight(self).norm(dim=1).detach()


def plus_bias(self: Any, y_BTO: Tensor) -> Tensor:
    return y_BTO if self.linear.bias is None else y_BTO + self.linear.bias


def unscaled(self: Any, x_BTI: Tensor) -> Tensor:
    return x_BTI @ self.linear.weight.T + self.dropout(x_BTI) @ self.lora_a @ self.lora_b


SIGNATURES = [
    Signature(
        "DoRA scales the bias",
        2,
        "DoRA multiplies the bias by m / |V| too",
        of_dora(lambda self, x, v: share(self) * plus_bias(self, v)),
    ),
    Signature(
        "DoRA ignores alpha",
        2,
        "DoRA's direction adds A B without the scale",
        of_dora(lambda self, x, v: plus_bias(self, share(self) * unscaled(self, x))),
        "fsdp_qlora#68",
    ),
    Signature(
        "DoRA adds the base twice",
        2,
        "DoRA's result is added to the base's, which it has in it already",
        of_dora(lambda self, x, v: plus_bias(self, share(self) * (v + x @ self.linear.weight.T))),
        "peft#1474",
    ),
    Signature(
        "DoRA by the length of W",
        2,
        "DoRA divides by |W|, not by |W + scale A B|",
        of_dora(lambda self, x, v: plus_bias(self, self.magnitude / self.linear.weight.norm(dim=1) * v)),
        "Liu et al. 2024, eq. 5",
    ),
    Signature(
        "DoRA by one length",
        2,
        "DoRA divides by one length of the whole matrix, not by that of each output's row",
        of_dora(
            lambda self, x, v: plus_bias(self, self.magnitude / LoRALinear.merged_weight(self).norm() * v)
        ),
        "Liu et al. 2024, eq. 5",
    ),
    Signature(
        "DoRA without magnitude",
        2,
        "with DoRA the layer computes as LoRA: the magnitude is not used",
        of_dora(lambda self, x, v: plus_bias(self, v)),
    ),
    Signature(
        "DoRA without length",
        2,
        "DoRA multiplies by the magnitude and does not divide by the length",
        of_dora(lambda self, x, v: plus_bias(self, self.magnitude * v)),
        "Liu et al. 2024, eq. 5",
    ),
]
