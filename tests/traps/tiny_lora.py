"""The model that the traps use: two non-square linear layers, 3 -> 5 -> 4, each with a rank-2 LoRA.

B batch, I in, O out, R rank.
"""

import io
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


class LoRALinear(nn.Module):
    """y_BO = linear(x_BI) + x_BI @ a_IR @ b_RO, with b_RO = 0.1 so that no gradient vanishes."""

    def __init__(self, linear: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        out_dims, in_dims = linear.weight.shape
        self.linear = linear
        self.lora_a = mx.random.normal((in_dims, rank))
        self.lora_b = mx.full((rank, out_dims), 0.1)

    def __call__(self, x_BI: mx.array) -> mx.array:
        return self.linear(x_BI) + x_BI @ self.lora_a @ self.lora_b


class Tiny(nn.Module):
    """The base model: nothing frozen, no LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[Any] = [nn.Linear(3, 5), nn.Linear(5, 4)]  # or LoRALinear

    def __call__(self, x_BI: mx.array) -> mx.array:
        return self.layers[1](mx.tanh(self.layers[0](x_BI)))


LORA_NAMES = ["layers.0.lora_a", "layers.0.lora_b", "layers.1.lora_a", "layers.1.lora_b"]


def tiny_lora() -> Tiny:
    """The right order: freeze the base, then add LoRA."""
    model = Tiny()
    model.freeze()
    model.layers = [LoRALinear(layer) for layer in model.layers]
    mx.eval(model.parameters())
    return model


def batch() -> mx.array:
    """x_BI, shape (2, 3)."""
    return mx.array([[1.0, -2.0, 0.5], [0.25, 1.0, -1.0]])


def loss_fn(model: Any, x_BI: mx.array) -> mx.array:
    """The mean square of the output, as an example of a loss."""
    return mx.mean(mx.square(model(x_BI)))


def names(tree: Any) -> list[str]:
    return [name for name, _ in tree_flatten(tree)]


def arrays(tree: Any) -> list[mx.array]:
    return [array for _, array in tree_flatten(tree)]


def pending_ops(*outputs: mx.array) -> int:
    """The number of operations that these arrays depend on and that have not run yet."""
    dot = io.StringIO()
    mx.export_to_dot(dot, *outputs)
    return dot.getvalue().count("shape=rectangle")
