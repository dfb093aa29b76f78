"""Rung 6, freezing: the base does not move by a bit, every LoRA factor does, and nothing else is trained."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_impl.config import TrainConfig
from mlx_impl.lora import count_parameters, lora_parameters
from mlx_impl.optim import make_optimizer
from tests.ladder.conftest import LORA, Case

TRAINING = TrainConfig(iters=3, learning_rate=0.01, weight_decay=0.1)


def digests(arrays: dict[str, np.ndarray]) -> dict[str, str]:
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}


def test_every_frozen_byte_is_identical_after_training(case: Case) -> None:
    """Three AdamW steps with weight decay; sha256 of every base tensor."""
    trainer = case.ours()
    before = digests(trainer.base())
    trainer.train([case.batch] * 3, TRAINING)
    assert digests(trainer.base()) == before == digests(case.weights)


def test_every_lora_factor_changes(case: Case) -> None:
    """Also A, whose gradient is zero in the first step when B starts at zero."""
    trainer = case.with_zero_b().ours()
    before = trainer.factors()
    trainer.train([case.batch] * 3, TRAINING)
    unchanged = [n for n, value in trainer.factors().items() if np.array_equal(value, before[n])]
    assert unchanged == []


def test_only_lora_factors_have_gradients_and_optimizer_state(case: Case) -> None:
    """The gradient's names, the declared names and the optimizer's names are one set."""
    trainer = case.ours()
    optimizer = make_optimizer(TRAINING)
    optimizer.init(trainer.model.trainable_parameters())
    state = {name.rpartition(".")[0] for name, _ in tree_flatten(optimizer.state)} - {""}
    assert state == set(trainer.gradients(case.batch)) == set(case.factors)


def test_the_trainable_count_is_rank_times_the_sum_of_the_sides(case: Case) -> None:
    """R (I + O) numbers for each wrapped linear."""
    trained, total = count_parameters(case.ours().model)
    linears = [w.shape for n, w in case.weights.items() if n.endswith("_proj.weight")]
    assert trained == LORA.rank * sum(num_out + num_in for num_out, num_in in linears)
    assert total == trained + sum(w.size for w in case.weights.values())


def test_a_trainable_parameter_that_is_no_lora_factor_is_refused(case: Case) -> None:
    """Whoever thaws a norm by mistake is told its name before the first step."""
    model = case.ours().model
    model.model.norm.unfreeze()
    with pytest.raises(ValueError, match=r"only LoRA factors may be trainable.*model\.norm\.weight"):
        lora_parameters(model)
