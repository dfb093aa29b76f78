"""The settings of rung 13, and what one combination of them is: model, adapter, training, and the way to run.

The first level of a factor is the simple one. A trainer that does not implement a level is judged with the
first level in its place, so that every pair that it does implement is still met.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_impl.config import LoRAConfig, ModelConfig, RopeScaling, TrainConfig
from mlx_impl.data import Batch
from tests.lora_ladder.cases import (
    LORA,
    SPEC,
    Case,
    make_batch,
    make_factors,
    make_weights,
    random_rows,
)
from tests.lora_ladder.pairwise import Row, pairwise_cover
from tests.lora_ladder.protocol import Arrays

UPDATES, STOP = 4, 2  # a resumed run is saved and loaded after the second update
PROMPTS = ((3, 5), (9, 4), (8, 6), (7, 2), (1, 6), (5, 8), (2, 9))  # of nine tokens a row
BASIC = TrainConfig(iters=UPDATES, learning_rate=2.0**-5)

# Factor -> level -> the fields that it sets, of whichever record has them.
FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "compiled": {"eager": {}, "compiled": {"how": "train_compiled"}},
    "memory": {"kept": {}, "checkpointed": {"grad_checkpoint": True}},
    "window": {f"{n} micro-batches": {"grad_accumulation_steps": n} for n in (1, 2, 3, 5)},
    "stop": {"uninterrupted": {}, "resumed": {"resumed": True}},
    "optimizer": {"adamw": {}, "sgd": {"optimizer": "sgd", "learning_rate": 2.0**-2}},
    "schedule": {
        "constant": {},
        "linear with warmup": {"lr_schedule": "linear", "warmup_steps": 1},
        "cosine with warmup": {"lr_schedule": "cosine", "warmup_steps": 2},
    },
    "clipping": {"unclipped": {}, "clipped": {"max_grad_norm": 2.0**-2}},
    "LoRA+": {"one rate": {}, "LoRA+": {"loraplus_lr_ratio": 8.0}},
    "decay": {"no decay": {}, "decay": {"weight_decay": 2.0**-3}},
    "DoRA": {"LoRA": {}, "DoRA": {"use_dora": True}},
    "rsLoRA": {"alpha / rank": {}, "rsLoRA": {"use_rslora": True}},
    "dropout": {"no dropout": {}, "dropout": {"dropout": 0.25}},
    "pattern": {
        "no pattern": {},
        "rank_pattern": {"rank_pattern": {"q_proj": 2, r"1\.mlp\.\w+": 5}},
        "alpha_pattern": {"alpha_pattern": {"v_proj": 3.0, r"0\.mlp\.up_proj": 5.0}},
    },
    "qk norm": {"no qk norm": {}, "qk norm": {"qk_norm": True}},
    "bias": {"no bias": {}, "qkv bias": {"qkv_bias": True}},
    "head": {"untied": {}, "tied": {"tie_word_embeddings": True}},
    "attention": {"full attention": {}, "sliding window": {"sliding_window": 4}},
    "rope": {
        "rope": {},
        "linear rope": {"rope_scaling": RopeScaling("linear", 2.5)},
        "llama3 rope": {"rope_scaling": RopeScaling("llama3", 3.0, 1.0, 4.0, 64)},
        "llama3 rope, narrow band": {"rope_scaling": RopeScaling("llama3", 5.0, 2.0, 3.0, 48)},
    },
}
ROWS = pairwise_cover({factor: list(levels) for factor, levels in FACTORS.items()})


@dataclass(frozen=True)
class Combination:
    """One level of each factor, as records."""

    spec: ModelConfig
    lora: LoRAConfig
    training: TrainConfig
    how: str = "train"
    resumed: bool = False

    @property
    def has_dropout(self) -> bool:
        return self.lora.dropout > 0


def combination(row: Row) -> Combination:
    settings: dict[str, Any] = {}
    for factor, level in row.items():
        settings |= FACTORS[factor][level]
    spec, lora, training = (with_fields(record, settings) for record in (SPEC, LORA, BASIC))
    return Combination(spec, lora, training, settings.get("how", "train"), settings.get("resumed", False))


def with_fields(record: Any, settings: Mapping[str, Any]) -> Any:
    """The record with those settings that are fields of it."""
    names = {field.name for field in fields(record)}
    return replace(record, **{name: value for name, value in settings.items() if name in names})


def case_with(chosen: Combination) -> Case:
    weights = make_weights(chosen.spec)
    factors = make_factors(chosen.spec, chosen.lora, weights)
    return Case("a combination", chosen.spec, chosen.lora, weights, factors)


def windows_of(training: TrainConfig) -> list[list[Batch]]:
    """Micro-batches of one shape, for dropout masks that are given, with unequal numbers of targets.

    No two updates have the same number of targets, and some rows have none.
    """
    size = training.grad_accumulation_steps
    return [
        [
            make_batch(
                random_rows(SPEC.vocab_size, (9, 9), seed=100 * update + n),
                PROMPTS[(update + n) % len(PROMPTS)],
            )
            for n in range(size)
        ]
        for update in range(training.iters)
    ]


def masks_of(case: Case) -> Arrays:
    """For each adapted linear which elements of its input are kept: three quarters of them."""
    rng = np.random.default_rng(29)
    names = [name.removesuffix(".lora_a") for name in case.factors if name.endswith("lora_a")]
    return {name: rng.random((2, 8, case.factors[f"{name}.lora_a"].shape[0])) >= 0.25 for name in names}


def trained(trainer: Any, case: Case, chosen: Combination, windows: list[list[Batch]], how: str) -> Arrays:
    if chosen.has_dropout:
        trainer.set_dropout_masks(masks_of(case))
    losses = getattr(trainer, how)(windows, chosen.training)
    return {"losses": np.array(losses), **trainer.factors()}


def run(case: Case, candidate: Any, chosen: Combination, folder: Path) -> Arrays:
    """By the candidate, in its way; a resumed run goes on in a second trainer, made with B = 0."""
    windows = windows_of(chosen.training)
    if not chosen.resumed:
        return trained(case.build(candidate), case, chosen, windows, chosen.how)
    first, second = case.build(candidate), case.with_zero_b().build(candidate)
    before = trained(first, case, chosen, windows[:STOP], chosen.how)
    first.save(folder)
    second.load(folder)
    after = trained(second, case, chosen, windows[STOP:], chosen.how)
    return after | {"losses": np.concatenate([before["losses"], after["losses"]])}


def simple(factor: str) -> str:
    return next(iter(FACTORS[factor]))


def claimed(row: Row, candidate: Any, not_claimed: list[str]) -> Row:
    """The row with the first level in place of each that the candidate does not implement."""
    return {
        factor: level
        if is_claimed(candidate, factor, level, tuple(not_claimed))
        else next(iter(FACTORS[factor]))
        for factor, level in row.items()
    }


@functools.cache
def is_claimed(candidate: Any, factor: str, level: str, not_claimed: tuple[str, ...]) -> bool:
    """Tried alone, in one update: a trainer says NotImplementedError for what it lacks."""
    settings = FACTORS[factor][level]
    needs = {"how": ("train_compiled",), "resumed": ("save", "load"), "dropout": ("set_dropout_masks",)}
    if any(name in not_claimed for setting in settings for name in needs.get(setting, ())):
        return False
    chosen = replace(combination({factor: level}), how="train", resumed=False)
    try:
        case_with(chosen).build(candidate).train(windows_of(chosen.training)[:1], chosen.training)
    except NotImplementedError:
        return False
    return True
