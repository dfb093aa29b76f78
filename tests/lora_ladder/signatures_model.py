"""Known bugs of the rest of the model: norms, activation, residuals, embedding and head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from reference import model, ops
from reference.model import Block, CausalLM, FeedForward
from tests.lora_ladder.signatures import Hypothesis, patched
from tests.lora_ladder.signatures_attention import known, op

EPSILONS = (1e-6, 1e-8, 1e-12, 0.0)


def norm(broken: Callable[[Tensor, Tensor, float], Tensor]) -> Hypothesis:
    return op(rms_norm=broken)


def eps_fixed(eps: float) -> Hypothesis:
    return norm(lambda x, weight, _: functional.rms_norm(x, weight.shape, weight, eps))


def normed_residual(self: Any, x_BTD: Tensor, *more: Tensor) -> Tensor:
    normed = self.input_layernorm(x_BTD)
    x_BTD = normed + self.self_attn(normed, *more)
    return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


def parallel(self: Any, x_BTD: Tensor, *more: Tensor) -> Tensor:
    attended = self.self_attn(self.input_layernorm(x_BTD), *more)
    return x_BTD + attended + self.mlp(self.post_attention_layernorm(x_BTD))


def gated(self: Any, x_BTD: Tensor) -> Tensor:
    return self.down_proj(ops.silu(self.up_proj(x_BTD)) * self.gate_proj(x_BTD))


def without_last_norm(self: Any, *given: Any, **named: Any) -> Tensor:
    kept, self.norm = self.norm, torch.nn.Identity()
    try:
        return decode(self, *given, **named)
    finally:
        self.norm = kept


decode = model.Decoder.forward


def embedding_scaled(self: Any, tokens: Tensor) -> Tensor:
    return self.weight[tokens] * self.weight.shape[1] ** 0.5


SIGNATURES = [
    *(
        known(
            f"norm eps {eps:g}",
            f"RMSNorm's eps is {eps:g}, whatever the configuration says",
            eps_fixed(eps),
            "torchtune#409",
        )
        for eps in EPSILONS
    ),
    known(
        "norm eps outside the root",
        "RMSNorm adds eps to the root, not under it",
        norm(lambda x, weight, eps: weight * x / (x.square().mean(-1, keepdim=True).sqrt() + eps)),
    ),
    known(
        "norm weight plus one",
        "RMSNorm multiplies by 1 + weight, as Gemma does",
        norm(lambda x, weight, eps: functional.rms_norm(x, weight.shape, 1 + weight, eps)),
    ),
    known(
        "norm without weight",
        "RMSNorm's weight is not used",
        norm(lambda x, weight, eps: functional.rms_norm(x, weight.shape, None, eps)),
    ),
    known(
        "norm subtracts the mean",
        "the norm subtracts the mean: LayerNorm instead of RMSNorm",
        norm(lambda x, weight, eps: functional.layer_norm(x, weight.shape, weight, None, eps)),
    ),
    known(
        "last norm left out",
        "the norm before the head is left out",
        patched((model.Decoder, {"forward": without_last_norm})),
    ),
    known(
        "qkv bias lost",
        "the biases of the linears are not added",
        patched((torch.nn.Linear, {"forward": lambda self, x: x @ self.weight.T})),
    ),
    known("silu is gelu", "the activation is GELU, not SiLU", op(silu=functional.gelu)),
    known(
        "silu is gelu's tanh",
        "the activation is GELU in its tanh form, not SiLU",
        op(silu=lambda x: functional.gelu(x, approximate="tanh")),
    ),
    known("silu is relu", "the activation is ReLU, not SiLU", op(silu=functional.relu)),
    known("silu is sigmoid", "the activation is the sigmoid, not x * sigmoid(x)", op(silu=torch.sigmoid)),
    known(
        "gate and up swapped", "gate_proj and up_proj are swapped", patched((FeedForward, {"forward": gated}))
    ),
    known(
        "residual after the norm",
        "the residual of attention is the normed input, not the input",
        patched((Block, {"forward": normed_residual})),
    ),
    known(
        "parallel block",
        "attention and feed-forward read the same input, as in GPT-J",
        patched((Block, {"forward": parallel})),
    ),
    known(
        "embedding scaled",
        "the embedding is multiplied by sqrt(width), as Gemma does",
        patched((torch.nn.Embedding, {"forward": embedding_scaled})),
    ),
    known(
        "head always tied",
        "the head is the embedding, although the checkpoint has a head",
        patched((CausalLM, {"head": lambda self, x: x @ self.model.embed_tokens.weight.T})),
    ),
]
