"""LoRA: a trained low-rank update beside a frozen linear layer, and its variant DoRA.

Sources: [1] Hu et al. 2021, "LoRA", eq. 3 and section 4.1 (B starts at zero); [2] Liu et al. 2024, "DoRA",
eq. 5 and section 4.3 (the norm is detached), in the variant of torchtune and mlx-lm: dropout on A's input
only, where PEFT drops the base layer's input too.
An input x is a row, as in the arrays. In the papers it is a column: their W x + B A x is x W^T + (x A) B with
the transposes of their A and B.
A's initial law U(-1/sqrt(I), 1/sqrt(I)) is that of PEFT, `kaiming_uniform_(a=sqrt(5))`.
Differs from reference/lora.py: `freeze` for `requires_grad_`; a `Dropout` of its own, whose key may be given
(`recompute.py`); the base may be quantized or in bfloat16, the factors stay float32; a second adapter is
refused. The trainable parameters are listed and counted here, and merged in `run/merging.py`.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .config import LoRAConfig
from .model import CausalLM
from .recompute import next_key
from .targets import AnyLinear, select_targets, shape_OI

FACTORS = ("lora_a", "lora_b", "magnitude")


class Dropout(nn.Module):
    """In training x * mask / (1 - p), each element of the mask 0 with probability p, else 1.

    `train.seed_random` seeds the masks for every micro-batch.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training or self.p == 0:
            return x
        return x * mx.random.bernoulli(1 - self.p, x.shape, next_key()) / (1 - self.p)


class LoRALinear(nn.Module):
    """y = x W^T + scale * (dropout(x) A) B, with W of shape (O, I), lora_a (I, R) and lora_b (R, O)."""

    def __init__(self, linear: AnyLinear, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        num_out, num_in = shape_OI(linear)
        bound = num_in**-0.5
        self.linear = linear
        self.lora_a = mx.random.uniform(-bound, bound, (num_in, rank))
        self.lora_b = mx.zeros((rank, num_out))
        self.dropout = Dropout(dropout)
        self.scale = scale

    def __call__(self, x_BTI: mx.array) -> mx.array:
        return self.linear(x_BTI) + self.scale * self.update_BTO(x_BTI)

    def update_BTO(self, x_BTI: mx.array) -> mx.array:
        """(dropout(x) A) B, the float32 factors rounded to the type of x."""
        a_IR, b_RO = self.lora_a.astype(x_BTI.dtype), self.lora_b.astype(x_BTI.dtype)
        return (self.dropout(x_BTI) @ a_IR) @ b_RO

    def delta_OI(self) -> mx.array:
        """What the adapter adds to the base weight."""
        return self.scale * (self.lora_a @ self.lora_b).T


class DoRALinear(LoRALinear):
    """y = x V^T m / |V| + b with V = W + scale * (A B)^T and |V| the length of each row, a constant [2]."""

    def __init__(self, linear: AnyLinear, rank: int, scale: float, dropout: float) -> None:
        super().__init__(linear, rank, scale, dropout)
        self.magnitude = mx.linalg.norm(dense_weight_OI(linear).astype(mx.float32), axis=1)

    def __call__(self, x_BTI: mx.array) -> mx.array:
        direction_BTO = x_BTI @ dense_weight_OI(self.linear).T + self.scale * self.update_BTO(x_BTI)
        y_BTO = (self.magnitude / self.length_O()).astype(x_BTI.dtype) * direction_BTO
        return y_BTO + self.linear.bias if "bias" in self.linear else y_BTO

    def length_O(self) -> mx.array:
        return mx.stop_gradient(mx.linalg.norm(dense_weight_OI(self.linear) + super().delta_OI(), axis=1))

    def delta_OI(self) -> mx.array:
        stretch_O1 = (self.magnitude / self.length_O())[:, None]
        return (stretch_O1 - 1) * dense_weight_OI(self.linear) + stretch_O1 * super().delta_OI()


def dense_weight_OI(module: AnyLinear | nn.Embedding | nn.QuantizedEmbedding) -> mx.array:
    """The weight of a linear or an embedding in full."""
    if not isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        return module.weight
    return mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)


def add_lora(model: CausalLM, config: LoRAConfig) -> None:
    """Freeze the model, then wrap the targeted linears: their factors are the only trainable parameters.

    MLX: call `freeze()` before the new layers exist. It freezes what the model holds at that moment.
    Raises ValueError, and leaves the model as it was, when the configuration does not fit it or when it
    carries an adapter already.
    """
    if lora_layers(model):
        raise ValueError("a model can carry one adapter, and this one has one already")
    targets = select_targets(model, config)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, AnyLinear)}
    kind = DoRALinear if config.use_dora else LoRALinear
    model.freeze()
    wrapped = [(t.name, kind(linears[t.name], t.rank, t.scale, config.dropout)) for t in targets]
    model.update_modules(tree_unflatten(wrapped))
    model.lora = config


def lora_layers(model: CausalLM) -> dict[str, LoRALinear]:
    """The wrapped linears by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_parameters(model: CausalLM) -> dict[str, mx.array]:
    """The trainable parameters by name; ValueError when there is none, or one that is not a LoRA factor."""
    trainable = dict(tree_flatten(model.trainable_parameters()))
    others = [name for name in trainable if name.rpartition(".")[2] not in FACTORS]
    if others:
        raise ValueError(f"only LoRA factors may be trainable, and {', '.join(others[:3])} are too")
    if not trainable:
        raise ValueError("at least one LoRA factor must be trainable, and none is")
    return trainable


def count_parameters(model: CausalLM) -> tuple[int, int]:
    """The number of trainable parameters, and of all."""
    total = sum(array.size for _, array in tree_flatten(model.parameters()))
    return sum(array.size for array in lora_parameters(model).values()), total
