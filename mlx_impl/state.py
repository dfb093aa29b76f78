"""The training state, out and in: what a run needs to go on to the bit as if it had never stopped.

That is the adapter, the optimizer, the random numbers and the number of updates done; which examples come
next follows from the last (`data.window_numbers`). Beside them stands what they belong to, so that a run is
not continued with another model, other data or another configuration. One file, replaced whole or not at all.
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

from .config import LoRAConfig, TrainConfig
from .data import Example
from .files import whole_file
from .model import CausalLM
from .optim import LoRAOptimizer

FORMAT = "mlx-lora-training-state"
Validation = list[tuple[int, float]]  # (updates done, nats per target)


@dataclass(frozen=True)
class Progress:
    """How far a run has come, and what it belongs to."""

    step: int  # updates done
    validation: Validation
    identity: dict[str, Any]


def snapshot(model: CausalLM, optimizer: LoRAOptimizer) -> dict[str, mx.array]:
    """Every array that an update changes, by name. MLX never changes an array, so references are a copy."""
    tree = {"model": model.trainable_parameters(), "optimizer": optimizer.state, "random": mx.random.state[0]}
    return dict(tree_flatten(tree))


def restore(model: CausalLM, optimizer: LoRAOptimizer, arrays: dict[str, mx.array]) -> None:
    """Put a snapshot back."""
    tree = tree_unflatten(list(arrays.items()))
    model.update(tree["model"])
    optimizer.state = tree["optimizer"]
    high, low = tree["random"].tolist()
    mx.random.seed(high << 32 | low)  # MLX: the two words of a key are those of its seed


def identify(
    base_digest: str, examples: Sequence[Example], lora: LoRAConfig, training: TrainConfig
) -> dict[str, Any]:
    """What a state belongs to: digests of the frozen weights and of the examples, and every setting."""
    settings = {f"the {n} of the run": value for n, value in {**asdict(lora), **asdict(training)}.items()}
    return {
        "the model": base_digest,
        "the training data": hashlib.sha256(repr(list(examples)).encode()).hexdigest(),
        **json.loads(json.dumps(settings)),  # as JSON has them: lists for tuples
    }


def digest_of_base(model: CausalLM) -> str:
    """sha256 of every frozen parameter, its name, type and bytes."""
    trained = {name for name, _ in tree_flatten(model.trainable_parameters())}
    digest = hashlib.sha256()
    for name, array in sorted(tree_flatten(model.parameters())):
        if name not in trained:
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.array(array.view(mx.uint8)).data)
    return digest.hexdigest()


def save_state(path: Path, arrays: dict[str, mx.array], progress: Progress) -> None:
    metadata = {"format": FORMAT, "progress": json.dumps(asdict(progress))}
    with whole_file(path) as part, open(part, "wb") as file:  # MLX would append a suffix to a name
        mx.save_safetensors(file, arrays, metadata=metadata)


def load_state(
    path: Path, identity: dict[str, Any], expected: dict[str, mx.array]
) -> tuple[dict[str, mx.array], Progress]:
    """The arrays and the progress; ValueError, by name, for what has changed since or does not fit."""
    if not path.is_file():
        raise ValueError(f"{path}: a run to resume must have this file, and there is none")
    try:
        arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
        mx.eval(arrays)
        progress = Progress(**json.loads(metadata["progress"]))
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: not a readable training state: {reason}") from None
    for name in identity.keys() | progress.identity.keys():
        was, now = progress.identity.get(name), identity.get(name)
        if was != now:
            raise ValueError(f"{path}: {name} must be as it was, {was}, to be resumed; got {now}")
    for name in arrays.keys() | expected.keys():
        if name not in arrays or name not in expected or arrays[name].shape != expected[name].shape:
            raise ValueError(f"{path}: the array {name} does not fit this model")
    return arrays, progress
