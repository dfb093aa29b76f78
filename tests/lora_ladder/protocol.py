"""What the ladder asks of a trainer. Arguments and results are NumPy arrays, whatever its framework.

A trainer is a class. The seven members of `Trainer` are required; `OPTIONAL` lists the other capabilities,
each with the rung that asks for it. A capability that is absent, or None, is *not claimed*: the report says
so, and no test that needs it counts as passed. A call that raises NotImplementedError (for a model switch, a
kind of adapter, an optimizer) is not claimed either. Semantics that differ on purpose are declared in
`dialect`; the ladder then judges the trainer by what it declares, and prints each departure. A class may also
set `share_expected = 0.25`: the summary then warns where it uses more than that share of a tolerance.

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

from mlx_impl.config import LoRAConfig, ModelConfig, TrainConfig
from mlx_impl.data import Batch

Arrays = dict[str, np.ndarray]  # by canonical name
Examples = Sequence[
    tuple[tuple[int, ...], tuple[bool, ...]]
]  # token ids, and for each whether it is a target

REQUIRED = ("dialect", "logits", "loss", "gradients", "train", "factors", "base")

# Capability -> the rung that asks for it.
OPTIONAL = {
    "ops": 1,  # a namespace of MLX functions, those of mlx_impl/ops.py
    "micro_batches": 3,  # (examples, training) -> the micro-batches of each update that `fit` trains on
    "read_examples": 3,  # (tokenizer's folder, .jsonl file, targets, max_tokens) -> examples
    "hidden_states": 4,  # (tokens_BT) -> the output of embedding, blocks and norm, by module name
    "exact": 4,  # a class-level context manager: trainers built inside it compute in float64 throughout
    "loss_of_logits": 5,  # (logits_BTV, batch) -> (nats, num_targets): the loss alone
    "evaluate": 5,  # (batches) -> nats per target over all of them
    "pullback": 6,  # (batch, cotangent_BTV) -> the factors' gradients of <logits, cotangent>
    "optimizer_names": 7,  # (training) -> names of all parameters for which the optimizer holds state
    "apply_gradients": 8,  # (gradients of each update, training): schedule and optimizer alone, no clipping
    "learning_rates": 8,  # (training) -> the learning rate of every update
    "start_at": 8,  # (update): the next run begins as if so many updates had been done, its moments still 0
    "token_counts": 8,  # (windows, training) -> the number of input tokens that every update reports
    "gradient_norms": 8,  # (windows, training) -> the global norm of every update, before clipping
    "train_on_ranks": 9,  # (windows, training, num_ranks) -> losses and factors of each of so many processes
    "train_compiled": 10,  # as train, compiled; the same seed gives the same dropout masks
    "train_checkpointed": 10,  # as train, with activations recomputed in the backward pass
    "set_dropout_masks": 10,  # ({name of the linear: keep_BTI}): used instead of random ones, in every update
    "fit": 12,  # (examples, training, num_updates, validation, folder) -> (losses, validation losses)
    "save": 12,  # (folder): writes the whole training state, after `train`
    "load": 12,  # (folder): restores that state in a new trainer; the next `train` continues the run
    "validation_losses": 12,  # () -> those of the whole run so far, by the number of updates done
    "require_same_run": 12,  # (folder, examples, training): refuses to resume another run than the saved one
    "each_update": 12,  # (iterator of windows, training) -> iterator of losses: each update when asked for
    "set_factors": 12,  # (factors): puts these in; the next `train` or `fit` continues the same run from them
    "dropout_is_on": 14,  # () -> whether the model drops inputs now
    "initial_factors": 14,  # (seed): those that the trainer makes for itself when it is given none
    "peak_bytes": 15,  # (windows, training) -> the most memory that `train` holds, beyond that held before
    "in_bfloat16": 15,  # a class-level context manager: trainers built inside have their base in bfloat16
    "in_4_bits": 15,  # the same, for linears quantized to 4 bits; `base` returns the weights dequantized
    "merge": 16,  # (): adds the factors into the base; `base` then returns the merged weights
    "unmerge": 16,  # (): restores base and factors
    "save_adapter": 17,  # (folder): writes PEFT's adapter_config.json and adapter_model.safetensors
    "load_adapter": 17,  # (folder): puts PEFT's adapter in these files into a trainer that has none
    "save_mlx_lm": 17,  # (folder): writes mlx-lm's adapter_config.json and adapters.safetensors
    "load_mlx_lm": 17,  # (folder): puts mlx-lm's adapter in these files into a trainer that has none
    "greedy": 19,  # (prompt, num_tokens) -> token numbers
    "sample": 19,  # (logits_V, temperature, top_p, number) -> so many tokens drawn from them
    "greedy_all": 19,  # (prompts, num_tokens, end) -> token numbers of each prompt, up to its token `end`
}


# The values that each field of a dialect may have. An unknown one would silently switch claims off.
WORDS: dict[str, tuple[object, ...]] = {
    "scale": ("alpha / rank", "alpha"),
    "bias_correction": (True, False),
    "accumulation": ("by targets", "mean of means"),
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
