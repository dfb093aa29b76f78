"""The factors in the type of the frozen weights, rounded once an update and not in each product.

Without this, a block of seven linears joins all A of one input, casts every factor and scales each x A and
B dy: some 20 of the 45 kernels of its forward pass, and a host takes as long to launch a small kernel as a
large one. Instead the vectors of `vectors.py` are rounded as a whole, as they are and times the scale. In
them linears of one input follow one another, so that all their A are one slice.
The rounded vectors belong to the optimizer's state, so that a compiled step captures them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from ..lora import LoRALinear, lora_layers
from ..model import CausalLM
from ..optim import LoRAOptimizer
from . import ops
from .vectors import SCALED, VectorOptimizer, Vectors, view

KINDS = ("lora_a", "lora_b")
ATTRIBUTE = "rounded"  # of a LoRALinear; not an entry of the module, which would be in `model.state` too


@dataclass(frozen=True)
class Rounded:
    """The rounded vectors of all linears, and where the factors of one begin in them."""

    vectors: Vectors
    start_of: dict[str, int]

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of the model has factors of its own, that no optimizer rounds."""

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()


class RoundedFactors(NamedTuple):
    """Of linears of one input, in the type of that input."""

    a_RI: mx.array  # all A^T
    bs_RO: list[mx.array]
    scaled_a_RI: mx.array
    scaled_bs_RO: list[mx.array]


@contextmanager
def rounded_once(model: CausalLM, optimizer: LoRAOptimizer) -> Iterator[None]:
    """On a GPU linears in training use factors that a `VectorOptimizer` rounds in every update.

    All must have the same scale, and the model another type than the factors.
    """
    dtype, layers = model.model.norm.weight.dtype, lora_layers(model)
    scales = {layer.scale for layer in layers.values()}
    if (
        not (isinstance(optimizer, VectorOptimizer) and ops.on_gpu())
        or dtype == mx.float32
        or len(scales) > 1
    ):
        yield
        return
    optimizer.keep_rounded(dtype, *scales)
    try:
        for name, start_of in factor_starts(model).items():
            if start_of.keys() >= set(KINDS):  # neither A nor B is frozen
                vars(layers[name])[ATTRIBUTE] = Rounded(optimizer.rounded, start_of)
        yield
    finally:
        optimizer.rounded = {}
        for layer in layers.values():
            vars(layer).pop(ATTRIBUTE, None)


def rounded_of(linear: LoRALinear) -> Rounded | None:
    return vars(linear).get(ATTRIBUTE) if linear.training else None


def factor_starts(model: CausalLM) -> dict[str, dict[str, int]]:
    """Where the factors of each linear begin in `as_vectors`, by the linear's name and by kind."""
    start_of: dict[str, dict[str, int]] = {}
    ends: dict[str, int] = {}
    for name, array in tree_flatten(model.trainable_parameters()):
        path, _, kind = name.rpartition(".")
        start_of.setdefault(path, {})[kind] = ends.get(kind, 0)
        ends[kind] = ends.get(kind, 0) + array.size
    return start_of


def rounded_factors(
    places: Sequence[Rounded | None], as_IR: Sequence[mx.array], bs_RO: Sequence[mx.array], dtype: mx.Dtype
) -> RoundedFactors | None:
    """Slices of the rounded vectors; None if they have another type, or other linears are in between."""
    known = [place for place in places if place is not None]
    if len(known) < len(places) or known[0].vectors["lora_a"].dtype != dtype:
        return None
    starts = [place.start_of["lora_a"] for place in known]
    ends = [start + a_IR.size for start, a_IR in zip(starts, as_IR, strict=True)]
    if ends[:-1] != starts[1:]:
        return None
    vectors, num_in = known[0].vectors, as_IR[0].shape[0]
    shape_RI = ((ends[-1] - starts[0]) // num_in, num_in)
    a_RI, scaled_a_RI = (view(vectors[kind], shape_RI, starts[0]) for kind in ("lora_a", SCALED + "lora_a"))
    of_b = [
        [
            view(vectors[kind], b_RO.shape, place.start_of["lora_b"])
            for place, b_RO in zip(known, bs_RO, strict=True)
        ]
        for kind in ("lora_b", SCALED + "lora_b")
    ]
    return RoundedFactors(a_RI, of_b[0], scaled_a_RI, of_b[1])
