"""The arrays of a case in NumPy: configuration, base weights, and the batches of its updates.

Imports MLX to read the real model, so import this only after the BLAS is loaded.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
from mlx.utils import tree_flatten

from mlx_impl.batching import updates_an_epoch
from mlx_impl.config import ModelConfig
from mlx_impl.data import Example, Window, make_batch, training_windows
from mlx_impl.model import CausalLM

from .cases import GEOGRAPHY, Case

EXAMPLES = 64  # of an epoch
WEIGHT_SCALE = 0.02  # standard deviation of random weights
BLOCK = 1 << 20  # random numbers drawn; larger arrays repeat them, because drawing a billion takes long


@dataclass(frozen=True)
class Inputs:
    config: ModelConfig
    windows: list[Window]
    weights: dict[str, np.ndarray] = field(repr=False)


def read_inputs(case: Case) -> Inputs:
    if case.model is None:
        return geography(case)
    return Inputs(case.model, random_windows(case, case.model), random_weights(case.model))


def geography(case: Case) -> Inputs:
    """The real model and questions. The loaders are imported here, because random cases do not need them."""
    from mlx_impl.files.checkpoint import load_model, to_numpy
    from mlx_impl.text.examples import encode_all
    from mlx_impl.text.rows import read_conversations

    loaded = load_model(None)
    examples = encode_all(loaded.tokenizer, read_conversations(GEOGRAPHY), "completion", 2048)
    training = dataclasses.replace(case.training, iters=case.num_windows)
    return Inputs(loaded.model.config, list(training_windows(examples, training)), to_numpy(loaded.model))


def random_windows(case: Case, config: ModelConfig) -> list[Window]:
    """Rows without padding; the last `target_share` of each are targets."""
    if case.lengths:
        return epoch_of(case, config, *case.lengths)
    random = np.random.default_rng(0)
    num_targets = round(case.target_share * case.tokens)
    is_target = (False,) * (case.tokens + 1 - num_targets) + (True,) * num_targets

    def example() -> Example:
        return Example(tuple(random.integers(1, config.vocab_size, case.tokens + 1).tolist()), is_target)

    def window() -> Window:
        return [make_batch([example() for _ in range(case.batch_size)]) for _ in range(case.micro_batches)]

    return [window() for _ in range(case.num_windows)]


def epoch_of(case: Case, config: ModelConfig, shortest: int, longest: int) -> list[Window]:
    """EXAMPLES examples of random lengths and tokens, batched as a run would; the same for every batching."""
    random = np.random.default_rng(0)
    lengths = random.integers(shortest, longest + 1, EXAMPLES)
    examples = [
        Example(
            tuple(random.integers(1, config.vocab_size, n + 1).tolist()),
            tuple(t > n * (1 - case.target_share) for t in range(n + 1)),
        )
        for n in lengths.tolist()
    ]
    updates = updates_an_epoch(lengths.tolist(), case.training)
    return list(training_windows(examples, dataclasses.replace(case.training, iters=updates)))


def random_weights(config: ModelConfig) -> dict[str, np.ndarray]:
    """Normal random numbers, and ones for the norms, so that activations stay in range."""
    block = WEIGHT_SCALE * np.random.default_rng(1).standard_normal(BLOCK, dtype=np.float32)
    shapes = {name: array.shape for name, array in tree_flatten(CausalLM(config).parameters())}
    return {
        name: np.ones(shape, np.float32) if "norm" in name else np.resize(block, shape)
        for name, shape in shapes.items()
    }
