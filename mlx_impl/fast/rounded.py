"""The factors in the type of the frozen weights, rounded once an update and not in each product.

Without this, a block of seven linears joins all A of one input and casts every factor: some 16 of its 45
kernels forward, which a host takes as long to launch as large ones. The vectors of `vectors.py` are rounded
as a whole instead, and as linears of one input follow one another in them, all their A are one slice.
The rounded vectors belong to the optimizer's state, so that a compiled step knows of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
from mlx.utils import tree_flatten

from ..lora import LoRALinear, lora_layers
from ..model import CausalLM
from ..optim import LoRAOptimizer
from . import ops
from .vectors import VectorOptimizer, Vectors

ATTRIBUTE = "rounded"  # of a LoRALinear; not an entry of the module, which would be in `model.state` too


@dataclass(frozen=True)
class Rounded:
    """The rounded vectors of all linears, and where the factors of one begin in them."""

    vectors: Vectors
    start_of: dict[str, int]


@contextmanager
def rounded_once(model: CausalLM, optimizer: LoRAOptimizer) -> Iterator[None]:
    """On a GPU, linears in training use factors that a `VectorOptimizer` rounds in every update."""
    dtype = model.model.norm.weight.dtype
    if not (isinstance(optimizer, VectorOptimizer) and ops.on_gpu()) or dtype == mx.float32:
        yield
        return
    layers = lora_layers(model)
    optimizer.keep_rounded(dtype)
    try:
        for name, start_of in starts(model).items():
            vars(layers[name])[ATTRIBUTE] = Rounded(optimizer.rounded, start_of)
        yield
    finally:
        optimizer.rounded = {}
        for layer in layers.values():
            vars(layer).pop(ATTRIBUTE, None)


def rounded_of(linear: LoRALinear) -> Rounded | None:
    return vars(linear).get(ATTRIBUTE) if linear.training else None


def starts(model: CausalLM) -> dict[str, dict[str, int]]:
    """Where the factors of each linear begin in `as_vectors`, by the linear's name and by kind."""
    start_of: dict[str, dict[str, int]] = {}
    ends: dict[str, int] = {}
    for name, array in tree_flatten(model.trainable_parameters()):
        path, _, kind = name.rpartition(".")
        start_of.setdefault(path, {})[kind] = ends.get(kind, 0)
        ends[kind] = ends.get(kind, 0) + array.size
    return start_of


def rounded_factors(
    places: Sequence[Rounded | None], factors: Sequence[mx.array], dtype: mx.Dtype
) -> tuple[mx.array, list[mx.array]] | None:
    """`projection.cast_factors` of linears that follow one another, as slices; None where they do not."""
    known = [place for place in places if place is not None]
    if len(known) < len(places) or known[0].vectors["lora_a"].dtype != dtype:
        return None
    as_IR, bs_RO = factors[: len(places)], factors[len(places) :]
    starts = [place.start_of["lora_a"] for place in known]
    if any(start + a_IR.size != after for (start, after), a_IR in zip(pairwise(starts), as_IR, strict=False)):
        return None
    end = starts[-1] + as_IR[-1].size
    a_RI = known[0].vectors["lora_a"][starts[0] : end].reshape(-1, as_IR[0].shape[0])
    return a_RI, [slice_of(place, "lora_b", b_RO) for place, b_RO in zip(known, bs_RO, strict=True)]


def slice_of(place: Rounded, kind: str, like: mx.array) -> mx.array:
    start = place.start_of[kind]
    return place.vectors[kind][start : start + like.size].reshape(like.shape)
