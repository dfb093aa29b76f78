"""LoRA as it is put into a model: how a new adapter begins, and what training does to it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_impl.config import LoRAConfig, TrainConfig
from mlx_impl.data import Example, training_windows
from mlx_impl.lora import add_lora, lora_parameters
from mlx_impl.model import CausalLM
from mlx_impl.run.guard import NotFinite, snapshot
from mlx_impl.run.trainer import LoRATrainer
from tests.lora_ladder.cases import SPEC

TOKENS = mx.array([[5, 6, 7, 8], [9, 10, 11, 12]])
WIDE = replace(SPEC, hidden_size=512)  # enough numbers to see a law
EXAMPLES = [Example(tuple(range(n, 2 * n)), (False,) + (True,) * (n - 1)) for n in range(3, 12)]
fast_and_plain = pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])


def adapted(config: LoRAConfig, spec: object = SPEC) -> CausalLM:
    model = CausalLM(spec)  # type: ignore[arg-type]
    add_lora(model, config)
    return model


def test_a_new_adapter_changes_nothing_yet() -> None:
    """Every B begins at zero, so the logits are the base model's to the bit."""
    model = CausalLM(SPEC)
    before = np.array(model(TOKENS))
    add_lora(model, LoRAConfig())
    np.testing.assert_array_equal(model(TOKENS), before)
    assert not any(a.any() for n, a in lora_parameters(model).items() if n.endswith("lora_b"))


def test_a_begins_uniform_within_one_over_the_root_of_its_inputs() -> None:
    """PEFT's law: bounds 1/sqrt(in), mean 0, variance 1/(3 in), within five standard errors."""
    mx.random.seed(1)
    name = "model.layers.0.mlp.gate_proj.lora_a"
    a = np.array(lora_parameters(adapted(LoRAConfig(rank=16), WIDE))[name])
    assert a.shape == (512, 16)
    scaled = a * np.sqrt(512)
    assert 0.999 < np.abs(scaled).max() <= 1
    assert abs(scaled.mean()) < 5 * np.sqrt(1 / 3 / a.size)
    assert abs((scaled**2).mean() - 1 / 3) < 5 * np.sqrt((1 / 5 - 1 / 9) / a.size)


def test_no_two_layers_begin_alike() -> None:
    factors = lora_parameters(adapted(LoRAConfig()))
    first = [a for n, a in factors.items() if n.endswith("q_proj.lora_a")]
    assert not mx.array_equal(first[0], first[1])


def test_a_new_dora_begins_with_the_lengths_of_the_weights_rows() -> None:
    model = CausalLM(SPEC)
    before = np.array(model(TOKENS))
    weight_OI = np.array(model.model.layers[0].mlp.up_proj.weight)
    add_lora(model, LoRAConfig(use_dora=True))
    magnitude_O = np.array(lora_parameters(model)["model.layers.0.mlp.up_proj.magnitude"])
    np.testing.assert_allclose(magnitude_O, np.linalg.norm(weight_OI, axis=1), rtol=1e-6)
    np.testing.assert_allclose(model(TOKENS), before, rtol=1e-4, atol=1e-5)


def test_dropout_is_on_in_training_and_off_in_evaluation() -> None:
    model = adapted(LoRAConfig(rank=2, dropout=0.5))
    ones = [(name, mx.ones_like(a)) for name, a in lora_parameters(model).items()]
    model.load_weights(ones, strict=False)
    model.train()
    assert not mx.array_equal(model(TOKENS), model(TOKENS))
    model.eval()
    assert mx.array_equal(model(TOKENS), model(TOKENS))


def test_evaluation_between_two_steps_leaves_dropout_on_for_the_second() -> None:
    trainer = LoRATrainer(CausalLM(SPEC), LoRAConfig(rank=2, dropout=0.5), TrainConfig(iters=2))
    for _ in trainer.fit(EXAMPLES):
        trainer.evaluate(EXAMPLES)
        assert trainer.model.training


def test_evaluation_has_no_dropout() -> None:
    model = adapted(LoRAConfig(rank=2, dropout=0.5))
    ones = [(name, mx.ones_like(a)) for name, a in lora_parameters(model).items()]
    model.load_weights(ones, strict=False)
    trainer = LoRATrainer(model, LoRAConfig(rank=2, dropout=0.5), TrainConfig(iters=1))
    assert trainer.evaluate(EXAMPLES) == trainer.evaluate(EXAMPLES)


def test_a_trainer_refuses_a_model_in_which_anything_else_is_trainable() -> None:
    model = adapted(LoRAConfig())
    model.model.norm.unfreeze()
    with pytest.raises(ValueError, match="only LoRA factors may be trainable"):
        LoRATrainer(model, LoRAConfig(), TrainConfig(iters=1))


def test_training_on_no_example_is_an_error() -> None:
    trainer = LoRATrainer(CausalLM(SPEC), LoRAConfig(rank=2), TrainConfig(iters=1))
    with pytest.raises(ValueError, match="training needs at least one example"):
        next(trainer.fit([]))


@fast_and_plain
def test_an_update_that_ruins_the_adapter_is_undone(plain: bool) -> None:
    """The first update is finite but huge, and the second loss shows it: back to before the first."""
    config = TrainConfig(iters=3, batch_size=2, grad_accumulation_steps=2, learning_rate=1e30)
    trainer = LoRATrainer(CausalLM(SPEC), LoRAConfig(rank=2, dropout=0.1), config, plain=plain)
    before = changing_arrays(trainer)
    _, second = itertools.islice(training_windows(EXAMPLES, config), 2)
    numbers = ", ".join(str(n + 1) for batch in second for n in batch.numbers)
    message = (
        f"the loss is not finite at step 2, on the examples {numbers}; "
        "the adapter is back at step 0, the last good one"
    )
    with pytest.raises(NotFinite, match=message):
        list(trainer.fit(EXAMPLES))
    assert trainer.step == 0
    after = changing_arrays(trainer)
    assert after.keys() == before.keys()
    for name, array in after.items():
        np.testing.assert_array_equal(array, before[name])


def changing_arrays(trainer: LoRATrainer) -> dict[str, np.ndarray]:
    """Every array that an update changes."""
    return {name: np.array(array) for name, array in snapshot(trainer.model, trainer.optimizer).items()}


@fast_and_plain
def test_an_update_that_overflows_at_once_is_undone(plain: bool) -> None:
    """Its own loss and gradient are finite, so the state before it is good."""
    config = TrainConfig(iters=3, batch_size=2, learning_rate=3e37, loraplus_lr_ratio=10)
    trainer = LoRATrainer(CausalLM(SPEC), LoRAConfig(rank=2), config, plain=plain)
    with pytest.raises(NotFinite, match=r"the updated adapter is not finite at step 1, .* back at step 0"):
        list(trainer.fit(EXAMPLES))
    assert all(mx.isfinite(a).all() for a in lora_parameters(trainer.model).values())


def test_a_nan_in_the_weights_is_a_loss_that_is_not_finite() -> None:
    model = CausalLM(SPEC)
    model.model.norm.weight = model.model.norm.weight * float("nan")
    trainer = LoRATrainer(model, LoRAConfig(rank=2), TrainConfig(iters=1))
    with pytest.raises(NotFinite, match="the loss is not finite at step 1"):
        next(trainer.fit(EXAMPLES))
    assert all(mx.isfinite(a).all() for a in lora_parameters(model).values())


def test_validation_changes_nothing_in_training() -> None:
    """It draws no random number and leaves dropout on: the losses are those without it, to the bit."""
    config = TrainConfig(iters=4, learning_rate=0.01)
    runs = []
    for is_validated in (True, False):
        mx.random.seed(99)
        trainer = LoRATrainer(CausalLM(SPEC), LoRAConfig(rank=2, dropout=0.3), config)
        losses = []
        for record in trainer.fit(EXAMPLES):
            losses.append(record.loss_nats)
            if is_validated:
                trainer.validate(EXAMPLES)
        runs.append(losses)
    assert runs[0] == runs[1]


def test_the_validations_since_the_best_are_counted() -> None:
    trainer = LoRATrainer(CausalLM(SPEC), LoRAConfig(rank=2), TrainConfig(iters=1))
    assert trainer.validations_since_best() == 0
    trainer.validation = [(0, 3.0), (1, 2.0), (2, 2.5), (3, 2.0)]
    assert trainer.validations_since_best() == 2  # an equal loss is no better one


def run(seed: int, disturbance: int) -> list[float]:
    mx.random.seed(99)  # of the base model
    model = CausalLM(SPEC)
    mx.eval(model.parameters())
    mx.random.seed(disturbance)  # what the caller did before must not matter
    config = TrainConfig(iters=5, seed=seed, learning_rate=0.01)
    trainer = LoRATrainer(model, LoRAConfig(rank=2, dropout=0.2), config)
    return [record.loss_nats for record in trainer.fit(EXAMPLES)]


def test_a_seed_repeats_a_run_to_the_bit() -> None:
    """The initial adapter, the order of the examples and dropout follow from the seed."""
    assert run(seed=1, disturbance=7) == run(seed=1, disturbance=8)
    assert run(seed=1, disturbance=7) != run(seed=2, disturbance=7)


@fast_and_plain
def test_a_window_without_a_target_is_refused_before_the_update(plain: bool) -> None:
    """Its mean loss would be 0 / 0; the factors are as they were, to the bit."""
    trainer = LoRATrainer(CausalLM(SPEC), LoRAConfig(), TrainConfig(iters=1), plain=plain)
    before = {name: np.array(value) for name, value in lora_parameters(trainer.model).items()}
    (batch, *_) = next(iter(training_windows(EXAMPLES, TrainConfig(iters=1))))
    nothing = batch._replace(mask_BT=np.zeros_like(batch.mask_BT))
    with pytest.raises(ValueError, match="at least one target"):
        list(trainer.fit_windows([[nothing]]))
    for name, value in lora_parameters(trainer.model).items():
        np.testing.assert_array_equal(value, before[name])
