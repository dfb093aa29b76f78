"""What the ladder asks of a trainer: NumPy in, NumPy out, no framework across the border.

A trainer is a class. The seven members of `Trainer` are required; `OPTIONAL` names the rest, each with the
rung that asks for it. A capability that is absent, or None, is *not claimed*: the report says so, and nothing
passes. Whatever raises NotImplementedError (a model switch, a kind of adapter, an optimizer) is not claimed
either. Semantics that differ on purpose are declared in `dialect`; the ladder then holds the trainer to what
it declares, and prints each departure. A class may also say `share_expected = 0.25`: the summary then warns
where it uses more than that share of a tolerance.

Names are canonical, those of Hugging Face's checkpoints and this project's factors:
`model.layers.0.self_attn.q_proj.weight` (O, I) and beside it `model.layers.0.self_attn.q_proj.lora_a` (I, R),
`.lora_b` (R, O), with DoRA `.magnitude` (O,).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol

import numpy as np

from mlx_impl.config import LoRAConfig, ModelConfig, TrainConfig
from mlx_impl.data import Batch

Arrays = dict[str, np.ndarray]  # by canonical name

REQUIRED = ("dialect", "logits", "loss", "gradients", "train", "factors", "base")

# Capability -> the rung that asks for it.
OPTIONAL = {
    "ops": 1,  # a namespace of MLX functions, those of mlx_impl/ops.py
    "hidden_states": 3,  # (tokens_BT) -> the output of embedding, blocks and norm, by module name
    "exact": 3,  # a context manager of the class: trainers made in it compute in float64 throughout
    "loss_of_logits": 4,  # (logits_BTV, batch) -> (nats, num_targets): the loss alone
    "evaluate": 4,  # (batches) -> nats per target over all of them
    "pullback": 5,  # (batch, cotangent_BTV) -> the factors' gradients of <logits, cotangent>
    "optimizer_names": 6,  # (training) -> names of all parameters for which the optimizer holds state
    "apply_gradients": 7,  # (gradients of each update, training): schedule and optimizer alone, no clipping
    "learning_rates": 7,  # (training) -> that of every update
    "gradient_norms": 7,  # (windows, training) -> the global norm of every update, before clipping
    "train_compiled": 9,  # as train, compiled; the same seed gives the same dropout masks
    "train_checkpointed": 9,  # as train, activations recomputed in the backward pass
    "set_dropout_masks": 9,  # ({name of the linear: keep_BTI}): used instead of random ones, in every update
    "save": 11,  # (folder): the whole training state after `train`
    "load": 11,  # (folder): it again, into a trainer newly made; the next `train` goes on from there
    "merge": 12,  # (): the factors into the base; `base` then returns the merged weights
    "unmerge": 12,  # (): and out of it
    "greedy": 14,  # (prompt, num_tokens) -> token numbers
    "greedy_all": 14,  # (prompts, num_tokens, end) -> those of each prompt, together, each up to token `end`
}


# Of each field of a dialect, what it may say; any other word would only leave claims out.
WORDS: dict[str, tuple[object, ...]] = {
    "scale": ("alpha / rank", "alpha"),
    "bias_correction": (True, False),
    "accumulation": ("by targets", "mean of means"),
}


@dataclass(frozen=True)
class Dialect:
    """Declared semantics; the defaults are PyTorch's and PEFT's.

    Raises ValueError for a word that the ladder does not know.
    """

    scale: str = "alpha / rank"  # or "alpha": what multiplies the update
    bias_correction: bool = True  # of Adam
    pad_targets: int = 0  # padding positions counted as targets after the last target of each row
    accumulation: str = "by targets"  # or "mean of means": how micro-batches are weighed

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
    """The required members: about thirty lines over a trainer that works."""

    dialect: ClassVar[Dialect]

    def __init__(
        self, spec: ModelConfig, weights: Arrays, lora: LoRAConfig | None, factors: Arrays | None
    ) -> None:
        """A model with these weights, frozen, and an adapter with these factors; None: the bare model."""

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        """logits_BTV, without dropout."""

    def loss(self, batch: Batch) -> tuple[float, int]:
        """The sum of nats over the targets, and their number, without dropout."""

    def gradients(self, batch: Batch) -> Arrays:
        """The gradients of the mean nats per target, of everything that trains, without dropout."""

    def train(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[float]:
        """One optimizer update a window, over all its micro-batches; the mean nats per target of each.

        It begins a run, with `training.seed` for dropout; after `load` it goes on with the loaded one.
        `training.iters` is the length of the whole run, of which `windows` may be the first part.
        """

    def factors(self) -> Arrays:
        """What trains."""

    def base(self) -> Arrays:
        """What does not."""
