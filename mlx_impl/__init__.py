"""A LoRA trainer in pure MLX.

Read in this order: model, lora, loss, optim, train; then config, ops, targets, batching, data, recompute and
generate. These are the pattern, and train by themselves. The folders below are what a user needs beside them.

Shapes live in names, one letter an axis: B batch, T query time, S key time (T and what a cache holds),
D width, H heads, G key/value heads, K head dim, P rotated pairs, F ffn, V vocab, I in, O out, R rank,
N positions in one list, such as a flattened (B, T) or its targets. In `fast/` also: U the positions that
unpadding keeps, C those of N in one chunk, X the queries that share a key/value head, T H / G. A 1 is an axis
of length 1. `logits_BTV` has three axes; a new shape is a new name.

For programs, beside the pattern; help() of each says more:

    load_optimized_blas()                       a fast BLAS on a Linux CPU; before anything imports MLX
    load_model(name or path)                    a LoadedModel: model, tokenizer, name
    read_conversations(file)                    the rows of a data file
    encode_all(tokenizer, conversations, ...)   the rows as Examples, tokens with their targets
    LoRAConfig, TrainConfig, ModelConfig        the settings
    LoRATrainer(model, lora, training)          .fit(examples) yields a StepRecord for every update
    answer(loaded, prompt)                      the model's answer as text
    save_adapter, load_adapter                  PEFT's files or mlx-lm's
    merge, unmerge                              the adapter into the weights (a Merged), and out again

The names below load on first use, so that importing the package does not import MLX: an optimized BLAS must
be loaded before it (see `machine/blas.py`), and `reference/` reads `config.py` without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import LoRAConfig, ModelConfig, TrainConfig
    from .data import Example
    from .files.adapters import load_adapter, save_adapter
    from .files.checkpoint import LoadedModel, load_model
    from .machine.blas import load_optimized_blas
    from .run.answering import answer
    from .run.merging import Merged, merge, unmerge
    from .run.trainer import LoRATrainer
    from .text.examples import encode_all
    from .text.rows import read_conversations
    from .train import StepRecord

__version__ = "0.1.0"

HOMES = {
    "Example": "data",
    "LoRAConfig": "config",
    "LoRATrainer": "run.trainer",
    "LoadedModel": "files.checkpoint",
    "ModelConfig": "config",
    "Merged": "run.merging",
    "StepRecord": "train",
    "TrainConfig": "config",
    "answer": "run.answering",
    "encode_all": "text.examples",
    "load_adapter": "files.adapters",
    "load_model": "files.checkpoint",
    "load_optimized_blas": "machine.blas",
    "merge": "run.merging",
    "read_conversations": "text.rows",
    "save_adapter": "files.adapters",
    "unmerge": "run.merging",
}

__all__ = [
    "Example",
    "LoRAConfig",
    "LoRATrainer",
    "LoadedModel",
    "Merged",
    "ModelConfig",
    "StepRecord",
    "TrainConfig",
    "answer",
    "encode_all",
    "load_adapter",
    "load_model",
    "load_optimized_blas",
    "merge",
    "read_conversations",
    "save_adapter",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
