"""What the ladder asks of a trainer. Arguments and results are NumPy arrays, whatever its framework.

A trainer is a class. The seven members of `Trainer` are required; capabilities.py lists the
others, each with the rung that asks for it. One that is absent, or None, is *not claimed*: the report says
so, and no test that needs it counts as passed. A call that raises NotImplementedError (for a model switch, a
kind of adapter, an optimizer) is not claimed either. Semantics that differ on purpose are declared in
`dialect`; the ladder then judges the trainer by what it declares, and prints each departure. A class may also
set `share_expected = 0.25`: the summary then warns where it uses more than that share of a tolerance. With
`optimizer_from` and `schedule_from` it says in a few words by whom these came ("mlx.optimizers, made by the
adapter"): the report prints it, because a fault there may not be the trainer's. What a trainer patches in
classes is put back after each claim (patched.py); `keeps_patches = True` leaves it.

`peak_bytes` counts the bytes of arrays that are in use on the device that computes, not those that an
allocator keeps in reserve: `max_memory_allocated` in PyTorch, `get_peak_memory` in MLX. The trainer exists
before; its optimizer is part of what is counted. Inside `in_bfloat16` the base weights and what is computed
from them are bfloat16, the factors, their gradients and the optimizer float32, and the loss is formed in
float32; results are float32 arrays, which hold every bfloat16 number.

Names are canonical, those of Hugging Face's checkpoints and this project's factors:
`model.layers.0.self_attn.q_proj.weight` (O, I) and beside it `model.layers.0.self_attn.q_proj.lora_a` (I, R),
`.lora_b` (R, O), with DoRA `.magnitude` (O,).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol

import numpy as np

from mlx_impl.config import LoRAConfig as LoRAConfig
from mlx_impl.config import ModelConfig as ModelConfig
from mlx_impl.config import RopeScaling as RopeScaling
from mlx_impl.config import TrainConfig as TrainConfig
from mlx_impl.data import Batch as Batch
from tests.lora_ladder.capabilities import OPTIONAL as OPTIONAL
from tests.lora_ladder.capabilities import REQUIRED as REQUIRED

Arrays = dict[str, np.ndarray]  # by canonical name
Examples = Sequence[
    tuple[tuple[int, ...], tuple[bool, ...]]
]  # token ids, and for each whether it is a target

# The values that each field of a dialect may have. An unknown one would silently switch claims off.
WORDS: dict[str, tuple[object, ...]] = {
    "scale": ("alpha / rank", "alpha"),
    "bias_correction": (True, False),
    "accumulation": ("by targets", "mean of means"),
    "equal": ("to the bit", "within one rounding"),
}


@dataclass(frozen=True)
class Dialect:
    """The semantics that a trainer declares; the defaults are those of PyTorch and PEFT.

    Raises ValueError for a value that the ladder does not know.
    """

    scale: str = "alpha / rank"  # or "alpha": the factor on A B
    bias_correction: bool = True  # of Adam's moments
    pad_targets: int = 0  # padding positions counted as targets after the last target of each row
    accumulation: str = "by targets"  # or "mean of means": how micro-batches are weighed
    equal: str = "to the bit"  # or "within one rounding": two ways to compute the same, in another order

    def __post_init__(self) -> None:
        for name, words in WORDS.items():
            said = getattr(self, name)
            if not any(said is word or (isinstance(said, str) and said == word) for word in words):
                raise ValueError(f"{name} of a Dialect must be {words[0]!r} or {words[1]!r}, got {said!r}")
        if type(self.pad_targets) is not int or self.pad_targets < 0:
            raise ValueError(f"pad_targets of a Dialect must be 0, 1, 2, ..., got {self.pad_targets!r}")

    def departures(self) -> list[str]:
        return [
            f"{field.name} = {getattr(self, field.name)!r} instead of {field.default!r}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]


class Trainer(Protocol):
    """The required members. An adapter for a working trainer takes about thirty lines."""

    dialect: ClassVar[Dialect]

    def __init__(
        self, spec: ModelConfig, weights: Arrays, lora: LoRAConfig | None, factors: Arrays | None
    ) -> None:
        """Builds a model with these frozen weights and an adapter with these factors; None: no adapter."""

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        """logits_BTV, without dropout."""

    def loss(self, batch: Batch) -> tuple[float, int]:
        """The sum of the loss in nats over the targets, and the number of targets, without dropout."""

    def gradients(self, batch: Batch) -> Arrays:
        """The gradients of the mean nats per target for every trained array, without dropout."""

    def train(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[float]:
        """The mean nats per target of every update. A window holds the micro-batches of one optimizer update.

        The call starts a new run, with `training.seed` for dropout; after `load` it continues the loaded run.
        `training.iters` is the length of the whole run; `windows` may cover only its first part.
        """

    def factors(self) -> Arrays:
        """The trained arrays."""

    def base(self) -> Arrays:
        """The frozen arrays."""
