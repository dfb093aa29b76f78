"""Rung 17: adapter files with other names, shapes, scales or numbers than PEFT's, or read as others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_impl.files.adapters import load_adapter
from mlx_impl.files.formats import peft
from mlx_impl.files.formats.factors import write_files
from mlx_impl.lora import lora_parameters
from tests.trainers.mutants.mutant import Mutant, Patches

write, read, file_name, our_name = peft.write, peft.read, peft.file_name, peft.our_name
to_record, to_config = peft.to_record, peft.to_config
BLOCK = re.compile(r"layers\.(\d+)\.")


def recorded(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Patches:
    """Some keys of `adapter_config.json` with other values."""

    def broken(*given: Any) -> dict[str, Any]:
        record = to_record(*given)
        return record | change(record)

    return {"mlx_impl.files.formats.peft.to_record": broken}


def configured(**changed: Any) -> Patches:
    """Some settings of a file that loading replaces by others."""
    return {"mlx_impl.files.formats.peft.to_config": lambda *given: replace(to_config(*given), **changed)}


def stored(change: Callable[[dict[str, mx.array]], dict[str, mx.array]]) -> Patches:
    """Other tensors than the factors are saved."""

    def broken(folder: Path, adapter: Any) -> None:
        write(folder, replace(adapter, tensors=change(adapter.tensors)))

    return {"mlx_impl.files.formats.peft.write": broken}


def without_transposes(folder: Path, adapter: Any) -> None:
    tensors = {file_name(name): array for name, array in adapter.tensors.items()}
    write_files(folder, peft.FILE, tensors, adapter.record, {"format": "pt"})


def in_alphabetical_order(folder: Path, file: str, tensors: Any, record: Any, metadata: Any) -> None:
    write_files(folder, file, tensors, json.loads(json.dumps(record, sort_keys=True)), metadata)


def renamed(change: Callable[[str], str]) -> Patches:
    """A wrong name, the same in saving and in loading, where the two mistakes cancel."""
    return {
        "mlx_impl.files.formats.peft.file_name": lambda name: file_name(change(name)),
        "mlx_impl.files.formats.peft.our_name": lambda name, path: change(our_name(name, path)),
    }


def keys_and_values_swapped(name: str) -> str:
    other = {"k_proj": "v_proj", "v_proj": "k_proj"}
    return re.sub("k_proj|v_proj", lambda found: other[found[0]], name)


def with_weight(name: str) -> str:
    return re.sub("lora_magnitude_vector$", "lora_magnitude_vector.weight", file_name(name))


def also_with_weight(name: str, path: Path) -> str:
    return our_name(name.removesuffix(".weight") if "magnitude" in name else name, path)


def as_first_seen() -> Patches:
    seen: dict[int, dict[str, mx.array]] = {}

    def broken(model: Any) -> dict[str, mx.array]:
        return seen.setdefault(id(model), lora_parameters(model))

    return {"mlx_impl.files.adapters.lora_parameters": broken}


def by_names_in_order(folder: Path) -> Any:
    """The blocks' tensors as a sorted list of names has them: 10 before 2."""
    adapter = read(folder)
    numbers = sorted({int(BLOCK.findall(name)[0]) for name in adapter.tensors})
    moved = dict(zip(sorted(map(str, numbers)), map(str, numbers), strict=True))
    tensors = {
        BLOCK.sub(lambda found: f"layers.{moved[found[1]]}.", name): array
        for name, array in adapter.tensors.items()
    }
    return replace(adapter, tensors=tensors)


def loaded_and(change: Callable[[Any], None]) -> Patches:
    """What a broken end of `load_adapter` leaves."""

    def broken(model: Any, folder: Path) -> Any:
        config = load_adapter(model, folder)
        change(model)
        return config

    return {"tests.trainers.mlx_impl.load_adapter": broken}


def with_rounded_base(model: Any) -> None:
    linear = model.model.embed_tokens
    linear.weight = linear.weight.astype(mx.bfloat16).astype(mx.float32)


def with_rounded_factors(model: Any) -> None:
    model.update(tree_map(lambda a: a.astype(mx.float16).astype(mx.float32), model.trainable_parameters()))


def with_frozen_magnitudes(model: Any) -> None:
    for _, module in model.named_modules():
        if isinstance(module, nn.Module) and "magnitude" in module:
            module.freeze(recurse=False, keys="magnitude")


MUTANTS = [
    Mutant(
        "file-without-transposes",
        17,
        "A and B are saved as they are in memory, and PEFT's are the transposes.",
        {"mlx_impl.files.formats.peft.write": without_transposes},
    ),
    Mutant(
        "file-with-another-magnitude-name",
        17,
        "DoRA's magnitudes are saved and loaded under a name that ends in .weight, unlike PEFT's.",
        {
            "mlx_impl.files.formats.peft.file_name": with_weight,
            "mlx_impl.files.formats.peft.our_name": also_with_weight,
        },
    ),
    Mutant(
        "file-with-keys-for-values",
        17,
        "The names of the key and the value projection are exchanged both when saving and when loading.",
        renamed(keys_and_values_swapped),
    ),
    Mutant(
        "file-in-half",
        17,
        "The adapter is saved in float16.",
        stored(lambda tensors: {n: array.astype(mx.float16) for n, array in tensors.items()}),
    ),
    Mutant(
        "file-rounded-to-half",
        17,
        "The adapter is saved as float32 after a detour through bfloat16.",
        stored(lambda tensors: {n: a.astype(mx.bfloat16).astype(mx.float32) for n, a in tensors.items()}),
    ),
    Mutant(
        "file-of-the-beginning",
        17,
        "The factors are looked up once, so every later file has those of the first.",
        as_first_seen(),
    ),
    Mutant(
        "file-with-a-scaled-b",
        17,
        "The scale is multiplied into B before it is saved, and the record still says alpha.",
        stored(lambda tensors: {n: 2.5 * a if n.endswith("lora_b") else a for n, a in tensors.items()}),
    ),
    Mutant(
        "patterns-in-alphabetical-order",
        17,
        "The record's keys are sorted, so of two patterns that match a linear another one is the first.",
        {"mlx_impl.files.formats.peft.write_files": in_alphabetical_order},
    ),
    Mutant(
        "alpha-pattern-not-saved",
        17,
        "The record lacks alpha_pattern, so every linear gets the scale of the others.",
        recorded(lambda record: {"alpha_pattern": {}}),
    ),
    Mutant(
        "alpha-saved-as-scale",
        17,
        "The record has the scale where PEFT has alpha, so a reader divides by the rank twice.",
        recorded(lambda record: {"lora_alpha": record["lora_alpha"] / record["r"]}),
    ),
    Mutant(
        "alpha-saved-as-a-whole-number",
        17,
        "The record cuts alpha to a whole number.",
        recorded(lambda record: {"lora_alpha": int(record["lora_alpha"])}),
    ),
    Mutant(
        "rslora-not-saved",
        17,
        "The record does not say use_rslora, so a reader divides by the rank and not by its root.",
        recorded(lambda record: {"use_rslora": False}),
    ),
    Mutant(
        "dropout-not-saved",
        17,
        "The record says dropout 0, so training goes on without dropout.",
        recorded(lambda record: {"lora_dropout": 0.0}),
    ),
    Mutant(
        "first-layers-saved",
        17,
        "An adapter of the last layers is recorded as one of the first.",
        recorded(
            lambda record: {
                "layers_to_transform": record["layers_to_transform"]
                and list(range(len(record["layers_to_transform"])))
            }
        ),
    ),
    Mutant(
        "alpha-not-loaded",
        17,
        "Loading ignores lora_alpha and takes the default.",
        configured(alpha=16.0),
    ),
    Mutant(
        "dropout-not-loaded",
        17,
        "A loaded adapter trains on without the file's dropout.",
        configured(dropout=0.0),
    ),
    Mutant(
        "rslora-not-loaded",
        17,
        "Loading ignores use_rslora.",
        configured(use_rslora=False),
    ),
    Mutant(
        "tenth-layer-before-the-second",
        17,
        "Loading sorts the layers by name, so layer 10 comes before layer 2.",
        {"mlx_impl.files.formats.peft.read": by_names_in_order},
    ),
    Mutant(
        "missing-tensor-ignored",
        17,
        "A file that lacks a tensor is loaded without a word, and that factor keeps its initial value.",
        {"mlx_impl.files.adapters.require_adapter_shapes": lambda *given: None},
        "peft#2699",
    ),
    Mutant(
        "factors-rounded-in-loading",
        17,
        "Loading rounds the factors to float16.",
        loaded_and(with_rounded_factors),
    ),
    Mutant(
        "base-rounded-in-loading",
        17,
        "Loading an adapter rounds the embedding to bfloat16.",
        loaded_and(with_rounded_base),
    ),
    Mutant(
        "magnitudes-frozen-by-loading",
        17,
        "The magnitudes of a loaded DoRA adapter are frozen, so they train no more.",
        loaded_and(with_frozen_magnitudes),
    ),
]
