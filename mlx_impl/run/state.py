"""The training state, saved and loaded: what a run needs to resume bit-exactly.

That is the factors, the optimizer's state and the number of updates done. Which examples come next
(`batching.window_rows`) and the random numbers (`train.seed_random`) follow from that number and the seeds.
The file also says which model, data and settings the state belongs to, so that no run is resumed with others.
The arrays are named by factor, whichever optimizer wrote them. One file, written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..config import LoRAConfig, TrainConfig, require_number
from ..data import Example
from ..disk.files import atomic_write, one_line, require_file, with_printable_keys
from ..fast.vectors import VectorOptimizer
from ..files.precision import dtype_of
from ..model import CausalLM
from ..optim import LoRAOptimizer

FORMAT = "mlx-lora-training-state-4"
Validation = list[tuple[int, float]]  # (updates done, nats per target)


@dataclass(frozen=True)
class Progress:
    """How far a run has come, and what it belongs to."""

    step: int  # updates done
    validation: Validation
    identity: dict[str, Any]


def state_arrays(model: CausalLM, optimizer: LoRAOptimizer) -> dict[str, mx.array]:
    """The factors and the optimizer's state, by name; the same names for both kinds of optimizer."""
    state = optimizer.tree_state(model) if isinstance(optimizer, VectorOptimizer) else optimizer.state
    return dict(tree_flatten({"factors": model.trainable_parameters(), "optimizer": state}))


def load_arrays(model: CausalLM, optimizer: LoRAOptimizer, arrays: dict[str, mx.array]) -> None:
    """The inverse of `state_arrays`."""
    tree = tree_unflatten(list(arrays.items()))
    model.update(tree["factors"])
    if isinstance(optimizer, VectorOptimizer):
        optimizer.load_tree_state(model, tree["optimizer"])
    else:
        optimizer.state = tree["optimizer"]


def identify(
    model: CausalLM, base_digest: str, examples: Sequence[Example], lora: LoRAConfig, training: TrainConfig
) -> dict[str, Any]:
    """What a state belongs to: digests of the frozen weights and of the examples, and all settings."""
    return {
        "dtype": dtype_of(model),  # before the weights, which differ where it does
        "the model's weights": base_digest,
        **{f"the model's {name}": value for name, value in asdict(model.config).items()},
        "the training data": digest_of_examples(examples),
        **asdict(lora),
        **asdict(training),
    }


def digest_of_examples(examples: Sequence[Example]) -> str:
    """sha256 of the examples as JSON. Of a sequence with a memo, which never changes, it is computed once."""
    memo: dict[str, str] = getattr(examples, "memo", {})
    if "digest" not in memo:
        digest = hashlib.sha256(b"[")
        for number, example in enumerate(examples):
            row = [list(map(int, example.tokens)), list(map(bool, example.is_target))]
            digest.update((", " if number else "").encode() + json.dumps(row).encode())
        digest.update(b"]")
        memo["digest"] = digest.hexdigest()
    return memo["digest"]


def digest_of_base(model: CausalLM) -> str:
    """sha256 of every frozen parameter, its name, type and bytes."""
    trained = {name for name, _ in tree_flatten(model.trainable_parameters())}
    return digest_of_arrays({n: array for n, array in tree_flatten(model.parameters()) if n not in trained})


def digest_of_arrays(arrays: dict[str, mx.array]) -> str:
    """sha256 of every array, its name, type and bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.array(array.flatten().view(mx.uint8)).data)
    return digest.hexdigest()


def save_state(path: Path, arrays: dict[str, mx.array], progress: Progress) -> None:
    arrays = dict(sorted(arrays.items()))  # the same bytes, whatever order they came in
    metadata = {"format": FORMAT, "progress": json.dumps(asdict(progress))}
    with atomic_write(path) as part, open(part, "wb") as file:  # MLX would append a suffix to a name
        mx.save_safetensors(file, arrays, metadata=metadata)


def load_state(
    path: Path, identity: dict[str, Any], expected: dict[str, mx.array]
) -> tuple[dict[str, mx.array], Progress]:
    """The arrays and the progress; ValueError, by name, for what has changed since or does not fit."""
    if not path.exists():
        raise ValueError(f"{path}: a run to resume must have this file, and there is none")
    require_file(path)
    try:
        arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
        mx.eval(arrays)
        require_format(metadata.get("format"))
        progress = read_progress(metadata["progress"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a readable training state: {one_line(error)}") from None
    require_same(path, progress.identity, identity)
    for name, array in expected.items():
        if name not in arrays or (arrays[name].shape, arrays[name].dtype) != (array.shape, array.dtype):
            raise ValueError(f"{path}: the array {name} does not fit this model")
        if not mx.isfinite(arrays[name]).all():
            raise ValueError(f"{path}: the array {name} must be finite, and is not everywhere")
    for name in arrays.keys() - expected.keys():
        raise ValueError(f"{path}: the array {name!r} has no place in this model")
    return arrays, progress


def require_format(found: object) -> None:
    """ValueError for a state of another version, which another rule may have to continue."""
    if found != FORMAT:
        raise ValueError(
            f"it must be of the format {FORMAT}, got {found!r}: a run of another version of mlx_impl is not "
            f"resumed; begin a new one from its adapter with --init-adapter"
        )


def read_progress(text: str) -> Progress:
    """ValueError or TypeError where it is not what `save_state` writes."""
    progress = Progress(**json.loads(text, object_pairs_hook=with_printable_keys))
    require_number("step", progress.step, int, may_be_zero=True)
    if not isinstance(progress.identity, dict):
        raise ValueError(f"identity must be an object, got {progress.identity!r}")
    for step, nats in progress.validation:
        require_number("the step of a validation", step, int, may_be_zero=True)
        require_number("the loss of a validation", nats, float, may_be_zero=True)
    return progress


def require_same(path: Path, saved: dict[str, Any], given: dict[str, Any]) -> None:
    """ValueError that names the first thing in which the run to resume was another."""
    given = json.loads(json.dumps(given))  # as what was saved
    for name in (*saved, *(name for name in given if name not in saved)):
        was, now = saved.get(name), given.get(name)
        is_in_order = not isinstance(now, dict) or list(now) == list(was or ())
        if was != now or not is_in_order:  # of patterns the first that matches decides
            is_digest = isinstance(was, str) and len(was) == 64
            values = "" if is_digest else f": it was {one_line(was)}, got {one_line(now)}"
            raise ValueError(f"{path}: {name} must be as in the run to resume{values}")
