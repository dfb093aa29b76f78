"""Training, validating, saving, loading, merging and unmerging in any order: the run equals its PyTorch twin.

If one of these acts changes something that it should not, the run differs from the twin from then on, and
Hypothesis shows the shortest failing sequence that it finds. Planted bugs show that the test can fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from mlx_impl.config import TrainConfig
from mlx_impl.generate import generate
from mlx_impl.lora import lora_layers
from mlx_impl.run import merging, trainer
from tests.derived import Divergence
from tests.lora_ladder.cases import named_case
from tests.properties.run_of_acts import RunOfActs
from tests.properties.strategies import HUNT
from tests.trainers.mlx_impl import MlxTrainer

TestRunOfActs = RunOfActs.TestCase
TestRunOfActs.settings = settings(stateful_step_count=15)


@contextmanager
def evaluation_keeps_dropout_on() -> Iterator[None]:
    """It forgets `model.eval()`."""
    evaluate = trainer.__dict__["evaluate"]

    def with_dropout(model: Any, *others: Any) -> Any:
        with patch.object(model, "eval", lambda: None):
            return evaluate(model, *others)

    with patch.object(trainer, "evaluate", with_dropout):
        yield


@contextmanager
def loading_forgets(part: str) -> Iterator[None]:
    """Loading sets the arrays to zero whose names end with `part`."""
    load_arrays = trainer.__dict__["load_arrays"]

    def forgetful(model: Any, optimizer: Any, arrays: dict[str, mx.array]) -> None:
        forgotten = {n: mx.zeros_like(a) if n.endswith(part) else a for n, a in arrays.items()}
        load_arrays(model, optimizer, forgotten)

    with patch.object(trainer, "load_arrays", forgetful):
        yield


@contextmanager
def unmerging_loses_the_factors() -> Iterator[None]:
    """The linears come back with B = 0, like new ones."""
    unmerge = merging.unmerge

    def lossy(model: Any, merged: Any) -> None:
        unmerge(model, merged)
        for layer in lora_layers(model).values():
            layer.lora_b = mx.zeros_like(layer.lora_b)

    with patch.object(merging, "unmerge", lossy):
        yield


@contextmanager
def unmerging_leaves_the_base_merged() -> Iterator[None]:
    """The adapter is restored, but its update stays in the base too, so it counts twice."""
    unmerge = merging.unmerge

    def doubled(model: Any, merged: Any) -> None:
        plain = {name: dict(model.named_modules())[name].weight for name in merged.layers}
        unmerge(model, merged)
        for name, layer in lora_layers(model).items():
            layer.linear.weight = plain[name]

    with patch.object(merging, "unmerge", doubled):
        yield


PLANTED: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "evaluation keeps dropout on": evaluation_keeps_dropout_on,
    "loading forgets the optimizer's step": lambda: loading_forgets(".step"),
    "loading forgets the second moments": lambda: loading_forgets(".v"),
    "unmerging loses the factors": unmerging_loses_the_factors,
    "unmerging leaves the base merged": unmerging_leaves_the_base_merged,
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug: str) -> None:
    """The same state machine finds it within a few hundred runs."""
    with PLANTED[bug](), pytest.raises(Divergence):
        run_state_machine_as_test(RunOfActs, settings=settings(HUNT, stateful_step_count=20))


# Two acts that the state machine leaves out.


def new_trainer() -> trainer.LoRATrainer:
    case = named_case("untied").with_dropout(0.25)
    return trainer.LoRATrainer(case.build(MlxTrainer).model, case.lora, TrainConfig(iters=4))


def test_saving_while_merged_is_refused(tmp_path: Path) -> None:
    run = new_trainer()
    merging.merge(run.model)
    with pytest.raises(ValueError, match="merged"):
        run.save(tmp_path / "state.safetensors", [])


def test_an_answer_between_two_updates_leaves_dropout_on() -> None:
    run = new_trainer()
    run.model.train()
    list(generate(run.model, [1, 2, 3], 2, stop_ids=()))
    assert run.model.training
