"""Kinds of bugs that were held out: names within numbers, stops between updates, a state of another run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_impl.files.formats.adapter_conversion import to_mlx_lm
from mlx_impl.files.formats.scale_folding import fold_scale, unfold_scale
from mlx_impl.lora import lora_layers
from mlx_impl.run.state import identify
from mlx_impl.run.trainer import with_targets
from mlx_impl.targets import AnyLinear
from mlx_impl.train import train
from tests.trainers.mutants.mutant import Mutant, training

# ---- rung 2: names


def found_anywhere(name: str, pattern: str) -> bool:
    return re.search(pattern, name) is not None


def ends_within_a_number(name: str, pattern: str) -> bool:
    return re.search(rf"({pattern})$", name) is not None


def last_blocks_by_name(model: Any, num_layers: int) -> dict[str, AnyLinear]:
    blocks = sorted(str(number) for number in range(len(model.model.layers)))
    chosen = blocks if num_layers == -1 else blocks[-num_layers:]
    return {
        f"model.layers.{number}.{path}": module
        for number in sorted(map(int, chosen))
        for path, module in reversed(model.model.layers[number].named_modules())
        if isinstance(module, AnyLinear)
    }


# ---- rung 12: updates


def read_in_pairs(windows: Any) -> Iterator[Any]:
    windows = with_targets(windows)
    for window in windows:
        following = next(windows, None)
        yield window
        if following is not None:
            yield following


def all_read_first(windows: Any) -> Iterator[Any]:
    yield from list(with_targets(windows))


def told_one_late(*given: Any, **more: Any) -> Iterator[Any]:
    told = None
    for record in train(*given, **more):
        if told is not None:
            yield told
        told = record
    if told is not None:
        yield told


# ---- rung 12: what a state belongs to


def digest_of_rounded(model: Any) -> str:
    arrays = sorted(tree_flatten(model.parameters()))
    digest = hashlib.sha256()
    for name, array in arrays:
        if not name.endswith(("lora_a", "lora_b", "magnitude")):
            digest.update(name.encode() + np.array(array.astype(mx.float16)).tobytes())
    return digest.hexdigest()


def digest_without_names(model: Any) -> str:
    """A sum of digests, so that the order of the arrays does not matter, and which is which neither."""
    arrays = [a for n, a in tree_flatten(model.parameters()) if "lora_" not in n and "magnitude" not in n]
    digests = (hashlib.sha256(np.array(array).tobytes()).digest() for array in arrays)
    return f"{sum(int.from_bytes(digest, 'little') for digest in digests):064x}"


def identified(keep: Callable[[str, Any, Any], bool]) -> dict[str, Any]:
    """Only some of what a state belongs to is compared."""

    def broken(model: Any, digest: str, examples: Any, lora: Any, config: Any) -> dict[str, Any]:
        return {
            name: value
            for name, value in identify(model, digest, examples, lora, config).items()
            if keep(name, lora, config)
        }

    return {"mlx_impl.run.trainer.identify": broken}


# ---- rung 14: dropout between updates


@contextmanager
def training_afterwards(model: Any) -> Iterator[None]:
    model.eval()
    yield
    model.train()


@contextmanager
def without_dropout_for_good(model: Any) -> Iterator[None]:
    for layer in lora_layers(model).values():
        layer.dropout.eval()
    yield


@contextmanager
def left_in_evaluation(model: Any) -> Iterator[None]:
    model.eval()
    yield


# ---- rung 17: mlx-lm's files


def saved_with_alpha(adapter: Any) -> Any:
    theirs = to_mlx_lm(adapter)
    settings = theirs.record["lora_parameters"]
    settings = settings | {"scale": settings["scale"] * settings["rank"]}
    return replace(theirs, record=theirs.record | {"lora_parameters": settings}, original=None)


MUTANTS = [
    Mutant(
        "pattern-within-a-number",
        2,
        r'A pattern is compared with the end of a name, within a word too: "1\.mlp" also means layer 11.',
        {"mlx_impl.targets.matches_end": ends_within_a_number},
    ),
    Mutant(
        "pattern-anywhere",
        2,
        "A pattern is looked for anywhere in the name, so that the one of layer 0 also counts in layer 10.",
        {"mlx_impl.targets.matches_end": found_anywhere},
    ),
    Mutant(
        "last-layers-by-name",
        2,
        'The last layers are chosen by sorting names as text, where "9" comes after "11".',
        {"mlx_impl.targets.linears_of_last_blocks": last_blocks_by_name},
    ),
    Mutant(
        "windows-read-in-pairs",
        12,
        "Two windows are read at a time: a run that stops after the first one loses the second.",
        {"mlx_impl.run.trainer.with_targets": read_in_pairs},
    ),
    Mutant(
        "all-windows-read-first",
        12,
        "All windows are read before the first update: a stream never begins to train, and a stop loses it.",
        {"mlx_impl.run.trainer.with_targets": all_read_first},
    ),
    Mutant(
        "record-told-one-late",
        12,
        "The record of an update is given only after the next update: who stops there has made one more.",
        training(told_one_late),
    ),
    Mutant(
        "digest-of-rounded-weights",
        12,
        "The digest of the base is of its weights in half precision: a slightly other base is accepted.",
        {"mlx_impl.run.trainer.digest_of_base": digest_of_rounded},
    ),
    Mutant(
        "digest-without-names",
        12,
        "The digests of the arrays are added up: a base with two layers swapped is accepted.",
        {"mlx_impl.run.trainer.digest_of_base": digest_without_names},
    ),
    Mutant(
        "state-of-another-architecture-accepted",
        12,
        "Only the weights are compared: a state resumes with another RoPE or sliding window.",
        identified(lambda name, lora, config: not name.startswith("the model's") or "weights" in name),
    ),
    Mutant(
        "state-of-another-adapter-accepted",
        12,
        "The adapter's settings are not compared: a state resumes with another alpha or dropout.",
        identified(lambda name, lora, config: not hasattr(lora, name)),
    ),
    Mutant(
        "state-of-another-schedule-accepted",
        12,
        "Of the training settings only seeds and learning rate are compared: the schedule may be another.",
        identified(
            lambda name, lora, config: (
                not hasattr(config, name) or name in ("seed", "data_seed", "learning_rate")
            )
        ),
    ),
    Mutant(
        "answers-to-many-turn-dropout-off",
        14,
        "After a batch of prompts was answered, the model stays in evaluation.",
        {"mlx_impl.fast.decode.in_evaluation": left_in_evaluation},
    ),
    Mutant(
        "answer-turns-dropout-on",
        14,
        "After an answer the model is in training, also when it was in evaluation before.",
        {
            "mlx_impl.fast.answer.in_evaluation": training_afterwards,
            "mlx_impl.fast.decode.in_evaluation": training_afterwards,
        },
    ),
    Mutant(
        "answer-turns-each-dropout-off",
        14,
        "An answer turns off the dropout of each adapter, and nothing turns it on again, because the model's "
        "own mode still says training.",
        {
            "mlx_impl.fast.answer.in_evaluation": without_dropout_for_good,
            "mlx_impl.fast.decode.in_evaluation": without_dropout_for_good,
        },
    ),
    Mutant(
        "mlx-lm-scale-saved-as-alpha",
        17,
        "mlx-lm's file gets scale * rank for its scale, as if it were an alpha.",
        {"mlx_impl.files.adapters.to_mlx_lm": saved_with_alpha},
    ),
    Mutant(
        "mlx-lm-scale-folded-the-wrong-way",
        17,
        "A linear with a scale of its own is saved for mlx-lm with B divided by the ratio of scales. Loading "
        "makes the same mistake, so that only mlx-lm sees it.",
        {
            "mlx_impl.files.formats.adapter_conversion.fold_scale": lambda factors, ratio: fold_scale(
                factors, 1 / ratio
            ),
            "mlx_impl.files.formats.adapter_conversion.unfold_scale": lambda factors, rank, ratio: (
                unfold_scale(factors, rank, 1 / ratio)
            ),
        },
    ),
    Mutant(
        "mlx-lm-magnitude-under-pefts-name",
        17,
        "mlx-lm's file has DoRA's magnitude under another name than m, which mlx-lm does not read.",
        {
            "mlx_impl.files.formats.mlx_lm.file_name": lambda name: name,
            "mlx_impl.files.formats.mlx_lm.our_name": lambda name, path: name,
        },
    ),
]
