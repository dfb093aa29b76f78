"""The optimizer on vectors: all A are one array, all B another, and so are their moments.

An update is then a few operations, where the tree of parameters takes a few for each of hundreds of arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from .. import ops
from ..config import TrainConfig
from ..optim import LoRAOptimizer
from . import ops as fast_ops

SCALED = "scaled "  # before the kind of a factor

Vectors = dict[str, mx.array]  # "lora_a", "lora_b", "magnitude" -> all factors of this kind


class VectorOptimizer(LoRAOptimizer):
    """`LoRAOptimizer` on vectors; the model's factors are slices of them."""

    factors: Vectors
    flags: dict[str, mx.array]  # "finite": whether all factors are, computed within the update
    rounded: Vectors  # the factors in another type, as they are and times `scale` (`rounded.py`), or empty
    scale: float

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.rounded = {}

    def init(self, parameters: Any) -> None:
        self.factors = as_vectors(parameters)
        self.flags = {"finite": all_finite(self.factors)}
        self.round()
        super().init(self.factors)

    def update(self, model: nn.Module, gradients: Vectors) -> None:
        # In place: a compiled step captured these dictionaries, and would not notice others.
        self.factors.update(self.apply_gradients(gradients, self.factors))
        self.flags["finite"] = all_finite(self.factors)
        self.round()
        self.write_back(model)

    def keep_rounded(self, dtype: mx.Dtype, scale: float) -> None:
        """Round the factors to this type, as they are and times the scale, now and in every update."""
        self.scale = scale
        kinds = [kind for kind in self.factors if kind != "magnitude"]
        self.rounded = dict.fromkeys([*kinds, *(SCALED + kind for kind in kinds)], mx.array([], dtype))
        self.round()

    def round(self) -> None:
        """Make the rounded factors those of now; in place, as `update` says."""
        for name, old in self.rounded.items():
            factor = fast_ops.unfused(self.factors[name.removeprefix(SCALED)])
            factor = fast_ops.scaled(self.scale, factor) if name.startswith(SCALED) else factor
            self.rounded[name] = fast_ops.unfused(factor).astype(old.dtype)

    def write_back(self, model: nn.Module) -> None:
        """Make the model's factors slices of the vectors."""
        model.update(as_factors(self.factors, model.trainable_parameters()))

    @property
    def state(self) -> dict[str, Any]:
        states = [optimizer.state for optimizer in self.optimizers]
        return {"factors": self.factors, "flags": self.flags, "rounded": self.rounded, "states": states}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.factors, self.flags = state["factors"], state["flags"]
        self.round()
        for optimizer, of_optimizer in zip(self.optimizers, state["states"], strict=True):
            optimizer.state = of_optimizer

    def tree_state(self, model: nn.Module) -> dict[str, Any]:
        """The state that a plain `LoRAOptimizer` would have: the moments in trees of factors."""
        factors = model.trainable_parameters()
        return {"states": [as_tree(optimizer.state, factors) for optimizer in self.optimizers]}

    def load_tree_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        """The inverse of `tree_state`; the factors are the model's."""
        factors = model.trainable_parameters()
        self.factors = as_vectors(factors)
        self.flags = {"finite": all_finite(self.factors)}
        self.round()
        for optimizer, tree in zip(self.optimizers, state["states"], strict=True):
            optimizer.state = from_tree(tree, factors)
        self.write_back(model)


def make_contiguous(model: nn.Module) -> None:
    """Give each factor its own memory, as if it had been loaded from a file.

    A BLAS or a GPU may round a product with a transposed slice differently, and answers right after training
    would differ in their last bits from those of the saved adapter.
    """
    model.update(tree_map(mx.contiguous, model.trainable_parameters()))


def all_finite(factors: Vectors) -> mx.array:
    """x - x is NaN where x is infinite or NaN."""
    return mx.stack([(x - x).sum() for x in factors.values()]).sum() == 0


def as_vectors(factors: Any) -> Vectors:
    """The factors of each kind as one vector, in float32 or better.

    A is stored transposed, like its gradient (`projection.py`), to avoid a transpose.
    """
    return joined(tree_flatten(factors))


def joined(named: Iterable[tuple[str, mx.array]]) -> Vectors:
    arrays: dict[str, list[mx.array]] = {}
    for name, array in named:
        kind = name.rpartition(".")[2]
        arrays.setdefault(kind, []).append((array.T if kind == "lora_a" else array).flatten())
    return {kind: ops.widened(mx.concatenate(of_kind)) for kind, of_kind in arrays.items()}


def as_factors(vectors: Vectors, like: Any) -> Any:
    """The slices of the vectors as a tree of factors: the inverse of `as_vectors(like)`."""
    factors, start = [], dict.fromkeys(vectors, 0)
    for name, array in tree_flatten(like):
        kind = name.rpartition(".")[2]
        if kind not in vectors:
            continue
        factors.append((name, view(vectors[kind], array.shape, start[kind], kind == "lora_a")))
        start[kind] += array.size
    return tree_unflatten(factors) if factors else {}


def view(vector: mx.array, shape: Sequence[int], start: int, transposed: bool = False) -> mx.array:
    """The array of this shape, (N,) or (M, N), that begins at `start`, row after row or column after column.

    Nothing is copied, and it is one operation; a slice, a reshape and a transpose would be three.
    """
    strides = (1, shape[0]) if transposed else (shape[-1], 1)[-len(shape) :]
    return mx.as_strided(vector, shape, strides, start)


def as_tree(state: dict[str, Any], factors: Any) -> dict[str, Any]:
    """An optimizer's state with each vector of moments cut into those of the factors."""
    kinds = [kind for kind in state if isinstance(state[kind], dict)]
    leaves = [(kind, value) for kind, value in state.items() if kind not in kinds]
    for moment in {moment for kind in kinds for moment in state[kind]}:
        cut = as_factors({kind: state[kind][moment] for kind in kinds}, factors)
        leaves += [(f"{name}.{moment}", array) for name, array in tree_flatten(cut)]
    return tree_unflatten(leaves)


def from_tree(tree: dict[str, Any], factors: Any) -> dict[str, Any]:
    """The inverse of `as_tree`."""
    arrays = dict(tree_flatten(tree))
    state: dict[str, Any] = {name: array for name, array in arrays.items() if "." not in name}
    for moment in {name.rpartition(".")[2] for name in arrays if "." in name}:
        in_order = ((name, arrays.get(f"{name}.{moment}")) for name, _ in tree_flatten(factors))
        of_moment = joined((name, array) for name, array in in_order if array is not None)
        for kind, vector in of_moment.items():
            state.setdefault(kind, {})[moment] = vector
    return state
