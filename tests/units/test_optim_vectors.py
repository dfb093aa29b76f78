"""The optimizer holds all factors of a kind as one vector, and the model's factors are views of them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_impl.config import LoRAConfig, TrainConfig
from mlx_impl.lora import add_lora, lora_parameters
from mlx_impl.model import CausalLM
from mlx_impl.optim import LoRAOptimizer, as_factors, as_vectors
from mlx_impl.run.state import restore, snapshot
from mlx_impl.run.trainer import LoRATrainer
from tests.ladder.cases import SPEC, VARIANTS
from tests.units.test_lora import EXAMPLES

DORA = LoRAConfig(rank=2, use_dora=True)


def numbered(config: LoRAConfig) -> CausalLM:
    """An adapter whose every number is another, so that none can change places unnoticed."""
    model = CausalLM(SPEC)
    add_lora(model, config)
    start = 0
    for name, array in lora_parameters(model).items():
        numbers = mx.arange(start, start + array.size, dtype=mx.float32)
        model.load_weights([(name, numbers.reshape(array.shape))], strict=False)
        start += array.size
    return model


def same(ours: dict[str, mx.array], expected: dict[str, mx.array]) -> bool:
    return ours.keys() == expected.keys() and all(mx.array_equal(ours[n], expected[n]) for n in ours)


@pytest.mark.parametrize("name", VARIANTS)
def test_vectors_cut_up_again_are_the_factors(name: str) -> None:
    """Ranks of their own and DoRA's magnitudes included; every number is in a vector once."""
    factors = numbered(VARIANTS[name]).trainable_parameters()
    vectors = as_vectors(factors)
    assert same(dict(tree_flatten(as_factors(vectors, factors))), dict(tree_flatten(factors)))
    numbers = np.sort(np.concatenate([np.array(vector) for vector in vectors.values()]))
    np.testing.assert_array_equal(numbers, np.arange(len(numbers)))


def test_there_is_a_vector_of_each_kind() -> None:
    vectors = as_vectors(numbered(DORA).trainable_parameters())
    assert sorted(vectors) == ["lora_a", "lora_b", "magnitude"]
    assert all(vector.ndim == 1 for vector in vectors.values())


def test_vectors_are_their_own_vectors() -> None:
    """A step's gradients come as vectors already."""
    vectors = as_vectors(numbered(DORA).trainable_parameters())
    assert same(as_vectors(vectors), vectors)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("config", [LoRAConfig(rank=2), DORA], ids=["lora", "dora"])
def test_after_every_update_the_models_factors_are_the_optimizers(config: LoRAConfig, compiled: bool) -> None:
    trainer = LoRATrainer(CausalLM(SPEC), config, TrainConfig(iters=3, learning_rate=0.01), compiled)
    seen = [as_vectors(trainer.model.trainable_parameters())]
    for _ in trainer.fit(EXAMPLES):
        seen.append(as_vectors(trainer.model.trainable_parameters()))
        assert same(seen[-1], trainer.optimizer.factors)
        assert not mx.array_equal(seen[-1]["lora_b"], seen[-2]["lora_b"])
    assert len(seen) == 4 and not any(mx.array_equal(seen[-1][kind], seen[0][kind]) for kind in seen[0])


def test_an_adapter_loaded_after_the_trainer_was_made_is_the_one_that_trains() -> None:
    """At a rate of almost nothing it stays as it was loaded; what the optimizer was made with would show."""
    training = TrainConfig(iters=2, learning_rate=1e-12, optimizer="sgd", weight_decay=0.0)
    trainer = LoRATrainer(CausalLM(SPEC), LoRAConfig(rank=2), training)
    loaded = tree_map(lambda factor: 2 * factor + 0.5, trainer.model.trainable_parameters())
    trainer.model.update(loaded)
    losses = [record.loss_nats for record in trainer.fit(EXAMPLES[:1])]
    assert same(lora_parameters(trainer.model), dict(tree_flatten(loaded)))
    assert same(trainer.optimizer.factors, as_vectors(loaded))
    assert losses == [trainer.evaluate(EXAMPLES[:1])] * 2


def test_what_is_restored_is_the_models_too() -> None:
    """A snapshot put back is seen by optimizer and model alike."""
    trainer = LoRATrainer(CausalLM(SPEC), DORA, TrainConfig(iters=2, learning_rate=0.01))
    records = trainer.fit(EXAMPLES)
    next(records)
    arrays = snapshot(trainer.optimizer)
    factors = lora_parameters(trainer.model)
    next(records)
    assert not same(lora_parameters(trainer.model), factors)
    restore(trainer.model, trainer.optimizer, arrays)
    assert same(lora_parameters(trainer.model), factors)
    assert same(snapshot(trainer.optimizer), arrays)


def test_the_state_is_factors_and_moments_and_nothing_frozen() -> None:
    model = numbered(DORA)
    optimizer = LoRAOptimizer(TrainConfig(iters=1))
    optimizer.init(model.trainable_parameters())
    num_trained = sum(factor.size for factor in lora_parameters(model).values())
    vectors = [array.size for array in snapshot(optimizer).values() if array.ndim]
    assert sum(vectors) == 3 * num_trained  # the factors, and two moments of each
