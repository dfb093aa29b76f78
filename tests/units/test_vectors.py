"""The fast optimizer holds all factors of a kind as one vector; the model's factors are slices of it."""

from __future__ import annotations

import io
import re
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_impl.config import LoRAConfig, TrainConfig
from mlx_impl.fast.vectors import VectorOptimizer, Vectors, as_factors, as_vectors
from mlx_impl.lora import add_lora, lora_parameters
from mlx_impl.model import CausalLM
from mlx_impl.optim import LoRAOptimizer
from mlx_impl.run.guard import restore, snapshot
from mlx_impl.run.state import load_arrays, state_arrays
from mlx_impl.run.trainer import LoRATrainer
from tests.lora_ladder.cases import SPEC, VARIANTS
from tests.nightly import mostly_at_night
from tests.units.test_lora import EXAMPLES

LORA, DORA = LoRAConfig(rank=2), LoRAConfig(rank=2, use_dora=True)


def numbered(config: LoRAConfig) -> CausalLM:
    """An adapter whose numbers all differ, so that a swap of two would be noticed."""
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


def vectors_of(trainer: LoRATrainer) -> Vectors:
    assert isinstance(trainer.optimizer, VectorOptimizer)
    return trainer.optimizer.factors


@pytest.mark.parametrize("name", VARIANTS)
def test_vectors_cut_into_slices_are_the_factors(name: str) -> None:
    """Also for patterns of ranks and for DoRA; each number is in one vector, once."""
    factors = numbered(VARIANTS[name]).trainable_parameters()
    vectors = as_vectors(factors)
    assert same(dict(tree_flatten(as_factors(vectors, factors))), dict(tree_flatten(factors)))
    numbers = np.sort(np.concatenate([np.array(vector) for vector in vectors.values()]))
    np.testing.assert_array_equal(numbers, np.arange(len(numbers)))


def test_a_factor_is_one_step_from_its_vector() -> None:
    """A host takes as long for a step that copies nothing as for a kernel, and a model has many factors."""
    factors = numbered(DORA).trainable_parameters()
    vectors, graph = as_vectors(factors), io.StringIO()
    mx.eval(vectors)
    mx.export_to_dot(graph, *dict(tree_flatten(as_factors(vectors, factors))).values())
    steps = Counter(re.findall(r'label ?= ?"(\w+)"', graph.getvalue()))
    assert sum(steps.values()) == len(tree_flatten(factors))


def test_there_is_a_vector_of_each_kind() -> None:
    vectors = as_vectors(numbered(DORA).trainable_parameters())
    assert sorted(vectors) == ["lora_a", "lora_b", "magnitude"]
    assert all(vector.ndim == 1 for vector in vectors.values())


@pytest.mark.parametrize(
    ("config", "compiled"), mostly_at_night([(LORA, False), (DORA, False), (DORA, True), (LORA, True)], 3)
)
def test_after_every_update_the_models_factors_are_the_optimizers(config: LoRAConfig, compiled: bool) -> None:
    trainer = LoRATrainer(CausalLM(SPEC), config, TrainConfig(iters=3, learning_rate=0.01), compiled)
    vectors = [as_vectors(trainer.model.trainable_parameters())]
    for _ in trainer.fit(EXAMPLES):
        vectors.append(as_vectors(trainer.model.trainable_parameters()))
        assert same(vectors[-1], vectors_of(trainer))
        assert not mx.array_equal(vectors[-1]["lora_b"], vectors[-2]["lora_b"])
    assert len(vectors) == 4 and not any(
        mx.array_equal(vectors[-1][kind], vectors[0][kind]) for kind in vectors[0]
    )


def test_an_adapter_loaded_after_the_trainer_was_made_is_the_one_that_trains() -> None:
    """At a learning rate of almost nothing the factors stay as loaded, whatever the optimizer began with."""
    training = TrainConfig(iters=2, learning_rate=1e-12, optimizer="sgd", weight_decay=0.0)
    trainer = LoRATrainer(CausalLM(SPEC), LoRAConfig(rank=2), training)
    loaded = tree_map(lambda factor: 2 * factor + 0.5, trainer.model.trainable_parameters())
    trainer.model.update(loaded)
    losses = [record.loss_nats for record in trainer.fit(EXAMPLES[:1])]
    assert same(lora_parameters(trainer.model), dict(tree_flatten(loaded)))
    assert same(vectors_of(trainer), as_vectors(loaded))
    assert losses == [trainer.evaluate(EXAMPLES[:1])] * 2


def test_a_restored_snapshot_is_in_both_the_optimizer_and_the_model() -> None:
    trainer = LoRATrainer(CausalLM(SPEC), DORA, TrainConfig(iters=2, learning_rate=0.01))
    records = trainer.fit(EXAMPLES)
    next(records)
    before = snapshot(trainer.model, trainer.optimizer)
    factors = lora_parameters(trainer.model)
    next(records)
    assert not same(lora_parameters(trainer.model), factors)
    restore(trainer.model, trainer.optimizer, before)
    assert same(lora_parameters(trainer.model), factors)
    assert same(vectors_of(trainer), as_vectors(trainer.model.trainable_parameters()))
    assert same(snapshot(trainer.model, trainer.optimizer), before)


def test_the_state_is_factors_and_moments_and_nothing_frozen() -> None:
    model = numbered(DORA)
    optimizer = VectorOptimizer(TrainConfig(iters=1))
    optimizer.init(model.trainable_parameters())
    num_trained = sum(factor.size for factor in lora_parameters(model).values())
    vectors = [array.size for array in snapshot(model, optimizer).values() if array.ndim]
    assert sum(vectors) == 3 * num_trained  # the factors, and two moments of each


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_saved_state_has_the_same_names_and_shapes_as_the_plain_optimizers(name: str, kind: str) -> None:
    model, training = numbered(VARIANTS[name]), TrainConfig(iters=1, optimizer=kind)
    shapes = []
    for optimizer in (VectorOptimizer(training), LoRAOptimizer(training)):
        optimizer.init(model.trainable_parameters())
        arrays = state_arrays(model, optimizer)
        shapes.append({key: (array.shape, array.dtype) for key, array in arrays.items()})
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_saved_state_is_loaded_to_the_bit(name: str) -> None:
    """Each moment with numbers of its own, so that a swap of two would be noticed."""
    model, optimizer = numbered(VARIANTS[name]), VectorOptimizer(TrainConfig(iters=1))
    optimizer.init(model.trainable_parameters())
    saved = {
        key: array + number if array.ndim else array
        for number, (key, array) in enumerate(state_arrays(model, optimizer).items())
    }
    load_arrays(model, optimizer, saved)
    assert same(state_arrays(model, optimizer), saved)
    assert same(optimizer.factors, as_vectors(model.trainable_parameters()))
