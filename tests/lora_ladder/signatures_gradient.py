"""Known bugs of the backward pass, behind a right loss: parts without gradient, wrong factors and means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlx_impl.data import Batch
from reference import ops
from reference.lora import DoRALinear, LoRALinear
from tests.lora_ladder.cases import rows_of
from tests.lora_ladder.protocol import Arrays
from tests.lora_ladder.signatures import Hypothesis, Signature, of_members, patched

Update = Callable[[Any, Tensor], Tensor]
TRAPS = "tests/traps/test_trap_"
ops_attention = ops.attention


def times(factor: Callable[[Batch], float]) -> Hypothesis:
    """Every gradient times one number, from the batch."""

    def gradients(_self: Any, gradients: Any, batch: Batch) -> Arrays:
        return {name: factor(batch) * x for name, x in gradients(batch).items()}

    return of_members(gradients=gradients)


def num_targets(batch: Batch) -> int:
    return int(batch.mask_BT.sum())


def without(is_lost: Callable[[str], bool]) -> Hypothesis:
    """Some gradients are 0."""
    return of_members(
        gradients=lambda self, gradients, batch: {
            n: x * (not is_lost(n)) for n, x in gradients(batch).items()
        }
    )


def layers(update: Update, base: Update = lambda self, x: self.linear(x)) -> Hypothesis:
    """The right output with another gradient; DoRA's layers too."""

    def forward(self: Any, x_BTI: Tensor) -> Tensor:
        return base(self, x_BTI) + self.scale * update(self, x_BTI)

    def of_dora(self: Any, x_BTI: Tensor) -> Tensor:
        length_O = LoRALinear.merged_weight(self).norm(dim=1).detach()
        return self.magnitude / length_O * forward(self, x_BTI)  # no case here has a bias and DoRA

    return patched((LoRALinear, {"forward": forward}), (DoRALinear, {"forward": of_dora}))


def with_trained_length(self: Any, x_BTI: Tensor) -> Tensor:
    weight_OI = LoRALinear.merged_weight(self)
    return self.magnitude / weight_OI.norm(dim=1) * (x_BTI @ weight_OI.T)


def scale_lost(*names: str) -> Hypothesis:
    """The gradient of these factors lacks the scale; what passes on is right."""

    def gradients(self: Any, gradients: Any, batch: Batch) -> Arrays:
        scales = {f"{name}.{kind}": layer.scale for name, layer in self.adapted().items() for kind in names}
        return {name: x / scales.get(name, 1.0) for name, x in gradients(batch).items()}

    return of_members(gradients=gradients)


def of_rows(choose: Callable[[int], list[int]]) -> Hypothesis:
    """The gradient of some rows alone, divided by the number of all targets."""

    def gradients(_self: Any, gradients: Any, batch: Batch) -> Arrays:
        some = rows_of(batch, choose(len(batch.mask_BT)))
        share = num_targets(some) / num_targets(batch)
        return {n: np.nan_to_num(x) * share for n, x in gradients(some).items()}

    return of_members(gradients=gradients)


def detached_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt().detach()


def half_silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x).detach()


def detached_values(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ops_attention(q, k, v.detach() + 0 * v, mask)


def detached_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ops_attention(q.detach() + 0 * q, k.detach() + 0 * k, v, mask)


def known(name: str, sentence: str, hypothesis: Hypothesis, link: str = "") -> Signature:
    return Signature(name, 6, sentence, hypothesis, link)


WHOLE = "the gradient is that of the sum over targets, not of their mean"
CUT_BASE = "no gradient passes through the frozen linears, as under no_grad"

SIGNATURES = [
    known("gradient of the sum", WHOLE, times(num_targets), TRAPS + "cross_entropy.py"),
    known(
        "gradient over rows",
        "the gradient is divided by the number of rows, not of targets",
        times(lambda batch: num_targets(batch) / len(batch.mask_BT)),
    ),
    known(
        "gradient over positions",
        "the gradient is divided by the number of all positions, not of targets",
        times(lambda batch: num_targets(batch) / batch.mask_BT.size),
        "litgpt#751",
    ),
    known(
        "gradient over tokens",
        "the gradient is divided by the number of input tokens, not of targets",
        times(lambda batch: num_targets(batch) / batch.num_tokens),
    ),
    known("gradient doubled", "the gradient is doubled", times(lambda batch: 2.0), "transformers#35207"),
    known("gradient halved", "the gradient is halved", times(lambda batch: 0.5)),
    known("gradient negated", "the gradient has the wrong sign", times(lambda batch: -1.0)),
    known(
        "no gradient",
        "every gradient is 0: the forward pass runs outside of what is differentiated",
        times(lambda batch: 0.0),
        "mlx-lm-lora#65",
    ),
    *(
        known(f"no gradient of {kind}", f"{what} gets no gradient", without(lambda n, k=kind: n.endswith(k)))  # type: ignore[misc]
        for kind, what in (("lora_a", "A"), ("lora_b", "B"), ("magnitude", "DoRA's magnitude"))
    ),
    *(
        known(
            f"no gradient of {which}",
            f"the adapters of {which} get no gradient",
            without(lambda n, places=places: n.split(".")[-2] in places),  # type: ignore[misc]
        )
        for which, places in {
            "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
            "the feed-forward": ("gate_proj", "up_proj", "down_proj"),
            "all but the first linear of an input": ("k_proj", "v_proj", "up_proj"),
        }.items()
    ),
    *(
        known(
            f"no gradient of layer {layer}",
            f"the adapters of layer {layer} get no gradient",
            without(lambda n, layer=layer: n.split(".")[2] == str(layer)),  # type: ignore[misc]
        )
        for layer in (0, 1)
    ),
    known(
        "A cut from B",
        "the graph is cut between A and B: A gets no gradient, nor does the input through it",
        layers(lambda self, x: (x @ self.lora_a).detach() @ self.lora_b + 0 * self.lora_a.sum()),
    ),
    known(
        "adapter's input detached",
        "the adapter reads a detached input: the layers below miss its part of the gradient",
        layers(lambda self, x: (self.dropout(x.detach()) @ self.lora_a) @ self.lora_b),
    ),
    known(
        "base without gradient",
        CUT_BASE,
        layers(
            lambda self, x: self.dropout(x) @ self.lora_a @ self.lora_b,
            lambda self, x: self.linear(x.detach()),
        ),
    ),
    known("scale forgotten in dA", "the gradient of A lacks the scale alpha / rank", scale_lost("lora_a")),
    known("scale forgotten in dB", "the gradient of B lacks the scale alpha / rank", scale_lost("lora_b")),
    known(
        "scale forgotten in both",
        "the gradients of A and B lack the scale alpha / rank",
        scale_lost("lora_a", "lora_b"),
    ),
    known(
        "DoRA's length trained",
        "DoRA's length gets a gradient; it should be detached (Liu et al. 2024, section 4.3)",
        patched((DoRALinear, {"forward": with_trained_length})),
    ),
    known(
        "gradient of the first row", "only the first row has a gradient", of_rows(lambda B: [0]), "mlx#3483"
    ),
    known("gradient of the last row", "only the last row has a gradient", of_rows(lambda B: [B - 1])),
    known(
        "norm detached",
        "the backward pass of RMSNorm treats the root mean square as a constant",
        patched((ops, {"rms_norm": detached_norm})),
    ),
    known(
        "sigmoid detached",
        "the backward pass of SiLU treats the sigmoid as a constant",
        patched((ops, {"silu": half_silu})),
    ),
    known(
        "values detached",
        "no gradient passes through the values of attention",
        patched((ops, {"attention": detached_values})),
    ),
    known(
        "scores detached",
        "no gradient passes through the scores of attention, to queries and keys",
        patched((ops, {"attention": detached_scores})),
    ),
]
