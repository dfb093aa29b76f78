"""The sweep of rung 15: for each field of the configuration records two values, and the settings around it.

A field is swept in settings in which it matters: a warmup with three updates, alpha_pattern with equal ranks.
The other value is one that the lower rungs do not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from mlx_impl.config import BLOCK_LINEARS, LoRAConfig, ModelConfig, RopeScaling, TrainConfig
from mlx_impl.data import Batch
from tests.lora_ladder.cases import LORA, SPEC, Case, make_batch, make_factors, make_weights, random_rows
from tests.lora_ladder.protocol import Arrays

RECORDS = (ModelConfig, RopeScaling, LoRAConfig, TrainConfig)
UPDATES = 3
ONE_LAYER = replace(SPEC, num_hidden_layers=1)
BASIC = TrainConfig(iters=UPDATES, optimizer="sgd", learning_rate=2.0**-5)
ADAMW = {"optimizer": "adamw", "learning_rate": 2.0**-7}
QK_NORM = {"qk_norm": True}
DROPOUT = {"dropout": 0.5}
LINEAR, LLAMA3 = RopeScaling("linear", 2.5), RopeScaling("llama3", 5.0, 2.0, 8.0, 64)


@dataclass(frozen=True)
class Sweep:
    """One field at two values, the other settings being the same."""

    name: str  # "TrainConfig.iters", say
    one: Any
    other: Any
    around: Mapping[str, Any] = field(default_factory=dict)  # fields of any record
    what: str = ""  # the settings around it in words, where a field is swept several times
    is_random: bool = False  # the trainer draws numbers of its own, so only itself can be compared

    def __str__(self) -> str:
        return self.name + f": {self.what}" * bool(self.what)

    def settings(self, value: Any) -> dict[str, Any]:
        """The fields of the records at this value."""
        record, _, name = self.name.partition(".")
        if record == "RopeScaling":
            return {**self.around, "rope_scaling": replace(self.around["rope_scaling"], **{name: value})}
        return {**self.around, name: value}


TWO, THREE = {"num_hidden_layers": 2}, {"num_hidden_layers": 3}
SWEEPS = [
    Sweep("ModelConfig.vocab_size", 61, 67),
    Sweep("ModelConfig.hidden_size", 36, 30),
    Sweep("ModelConfig.intermediate_size", 44, 46),
    Sweep("ModelConfig.num_hidden_layers", 1, 2),
    Sweep("ModelConfig.num_attention_heads", 6, 4),
    Sweep("ModelConfig.num_key_value_heads", 2, 3),
    Sweep("ModelConfig.head_dim", 10, 12),
    Sweep("ModelConfig.rms_norm_eps", 1e-5, 2.0**-4),
    Sweep("ModelConfig.rms_norm_eps", 1e-5, 0.5, QK_NORM, "with qk norm"),
    Sweep("ModelConfig.rope_theta", 1000.0, 50.0),
    Sweep("ModelConfig.tie_word_embeddings", False, True),
    Sweep("ModelConfig.qkv_bias", False, True),
    Sweep("ModelConfig.qk_norm", False, True),
    Sweep("ModelConfig.rope_scaling", None, LINEAR),
    Sweep("ModelConfig.sliding_window", None, 3),
    Sweep("RopeScaling.rope_type", "llama3", "linear", {"rope_scaling": LLAMA3}),
    Sweep("RopeScaling.factor", 2.5, 6.5, {"rope_scaling": LINEAR}, "linear"),
    Sweep("RopeScaling.factor", 5.0, 2.5, {"rope_scaling": LLAMA3}, "llama3"),
    Sweep("RopeScaling.low_freq_factor", 2.0, 0.125, {"rope_scaling": LLAMA3}),
    Sweep("RopeScaling.high_freq_factor", 8.0, 16.0, {"rope_scaling": LLAMA3}),
    Sweep("RopeScaling.original_max_position_embeddings", 64, 300, {"rope_scaling": LLAMA3}),
    Sweep("LoRAConfig.rank", 3, 5),
    Sweep("LoRAConfig.alpha", 7.0, 2.5),
    Sweep("LoRAConfig.alpha", 7.0, 5.0, {"use_rslora": True}, "with rsLoRA"),
    Sweep("LoRAConfig.alpha", 7.0, 2.5, {"use_dora": True}, "with DoRA"),
    Sweep("LoRAConfig.dropout", 0.0, 0.25, is_random=True),
    Sweep("LoRAConfig.dropout", 0.25, 0.5, {"use_dora": True}, "with DoRA", is_random=True),
    Sweep("LoRAConfig.target_modules", ("v_proj", "up_proj"), ("k_proj", "mlp.gate_proj"), what="names"),
    # The second alternative is the beginning of a name, and no whole name.
    Sweep(
        "LoRAConfig.target_modules",
        BLOCK_LINEARS,
        r".*\.[qv]_proj|model\.layers\.0\.mlp",
        what="an expression for the whole name",
    ),
    Sweep("LoRAConfig.target_modules", ("o_proj",), "all-linear", what="all-linear"),
    Sweep("LoRAConfig.num_layers", 1, 2, THREE, "two of three"),
    Sweep("LoRAConfig.use_rslora", False, True),
    Sweep("LoRAConfig.use_dora", False, True),
    Sweep("LoRAConfig.rank_pattern", {}, {"v_proj": 2, r"1\.mlp\.\w+": 5}, TWO, "alone"),
    Sweep(
        "LoRAConfig.rank_pattern",
        {r"\w_proj": 4, "v_proj": 2},
        {"v_proj": 2, r"\w_proj": 4},
        what="the first match decides",
    ),
    Sweep("LoRAConfig.rank_pattern", {}, {"mlp.gate_proj|q_proj": 2}, what="this or that"),
    Sweep("LoRAConfig.alpha_pattern", {}, {"k_proj": 3.0, "gate_proj": 12.0}, what="alone, ranks equal"),
    Sweep(
        "LoRAConfig.alpha_pattern",
        {r"\w_proj": 4.5, "v_proj": 2.0},
        {"v_proj": 2.0, r"\w_proj": 4.5},
        what="the first match decides",
    ),
    Sweep(
        "LoRAConfig.alpha_pattern", {}, {"mlp.gate_proj|q_proj": 3.0}, {"use_rslora": True}, "this or that"
    ),
    Sweep("TrainConfig.iters", 3, 5, {"lr_schedule": "linear"}, "of a linear schedule"),
    Sweep("TrainConfig.learning_rate", 2.0**-5, 2.0**-9, what="sgd"),
    Sweep("TrainConfig.learning_rate", 2.0**-7, 2.0**-4, ADAMW, "adamw"),
    Sweep("TrainConfig.lr_schedule", "constant", "cosine", what="sgd"),
    Sweep("TrainConfig.lr_schedule", "constant", "linear", ADAMW, "adamw"),
    Sweep("TrainConfig.warmup_steps", 0, 2, what="sgd"),
    Sweep("TrainConfig.warmup_steps", 0, 1, ADAMW, "adamw"),
    Sweep("TrainConfig.loraplus_lr_ratio", 1.0, 0.75, what="sgd"),
    Sweep("TrainConfig.loraplus_lr_ratio", 1.0, 2.5, ADAMW, "adamw"),
    Sweep("TrainConfig.optimizer", "sgd", "adamw"),
    Sweep("TrainConfig.weight_decay", 0.0, 2.0**-2, what="sgd"),
    Sweep("TrainConfig.weight_decay", 0.0, 2.0, ADAMW, "adamw"),
    Sweep("TrainConfig.max_grad_norm", 0.0, 2.0**-4, what="sgd"),
    Sweep("TrainConfig.max_grad_norm", 0.0, 2.0**-7, ADAMW, "adamw"),
    Sweep("TrainConfig.seed", 0, 1, DROPOUT, is_random=True),
    Sweep("TrainConfig.seed", 5, 2**31 - 1, DROPOUT, "a large one", is_random=True),
]

DATA = "the ladder brings its own batches: what it changes is which examples make a batch"
# Field -> why no result of a run on given batches may depend on it.
WITHOUT_RESULT = {
    "TrainConfig.batch_size": DATA,
    "TrainConfig.batching": DATA,
    "TrainConfig.max_seq_length": DATA,
    "TrainConfig.grad_accumulation_steps": DATA,
    "TrainConfig.data_seed": DATA,
    "TrainConfig.grad_checkpoint": "it saves memory, and rung 10 claims that it changes no result",
}


def all_fields() -> Iterator[str]:
    for record in RECORDS:
        yield from (f"{record.__name__}.{of_record.name}" for of_record in fields(record))


def windows() -> list[list[Batch]]:
    """One batch an update: other targets each time."""
    rows = random_rows(SPEC.vocab_size, (9, 6, 8))
    return [[make_batch(rows, prompts)] for prompts in ((3, 2, 5), (7, 1, 4), (2, 4, 3))]


@dataclass(frozen=True)
class Run:
    """Model, adapter and training with some settings, and what the first updates of a run give."""

    case: Case
    training: TrainConfig
    num_updates: int

    def results(self, trainer: Any) -> Arrays:
        """The losses of the updates, and the factors after them; the logits before one update."""
        batches = windows()[: self.num_updates]
        inputs_BT = batches[0][0].inputs_BT
        before = {"logits": trainer.logits(inputs_BT)} if self.num_updates == 1 else {}
        losses = trainer.train(batches, self.training)
        return {**before, "losses": np.array(losses), **trainer.factors()}


def run_at(sweep: Sweep, value: Any) -> Run:
    """One update, or three where the field is one of training: an update of SGD shows every gradient."""
    settings = sweep.settings(value)
    spec, lora, training = (with_fields(record, settings) for record in (ONE_LAYER, LORA, BASIC))
    weights = make_weights(spec)
    case = Case("settings", spec, lora, weights, make_factors(spec, lora, weights))
    return Run(case, training, UPDATES if sweep.name.startswith("TrainConfig") else 1)


def with_fields(record: Any, settings: Mapping[str, Any]) -> Any:
    """The record with those settings that are fields of it."""
    names = {of_record.name for of_record in fields(record)}
    return replace(record, **{name: value for name, value in settings.items() if name in names})


def are_equal(ours: Arrays, others: Arrays) -> bool:
    """The same names, shapes and bits."""
    return ours.keys() == others.keys() and all(np.array_equal(ours[n], others[n]) for n in ours)
