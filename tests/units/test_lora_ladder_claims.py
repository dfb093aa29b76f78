"""What is put back after a claim, and what the dialect "within one rounding" allows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from tests.derived import Divergence
from tests.lora_ladder.climb import run
from tests.lora_ladder.here import FOLDER
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.patched import PutsBack
from tests.lora_ladder.plugin import Ladder
from tests.lora_ladder.protocol import Batch, Dialect
from tests.trainers.reference import ReferenceTrainer


class Layer:
    """A class of somebody's trainer."""

    __module__ = "my_trainer.layers"
    calls = 0
    of_class: ClassVar[Any] = staticmethod(len)

    def __call__(self) -> str:
        return "as it was"


def during_a_claim(act: Callable[[], object]) -> None:
    """Runs the plugin's hook around an act, as pytest does around a test."""
    around = PutsBack().pytest_runtest_call()
    next(around)
    act()
    with pytest.raises(StopIteration):
        around.send(None)


def test_methods_that_a_trainer_patches_in_a_class_are_put_back() -> None:
    """Replaced, added or taken away; static methods too."""

    def patch() -> None:
        setattr(Layer, "__call__", lambda self: "patched")  # noqa: B010
        setattr(Layer, "added", lambda self: "added")  # noqa: B010
        del Layer.of_class

    during_a_claim(patch)
    assert Layer()() == "as it was" and not hasattr(Layer, "added") and Layer.of_class("abc") == 3


def test_numbers_that_a_trainer_keeps_in_a_class_stay() -> None:
    """They are its own affair: put back, a counter would run backwards."""
    during_a_claim(lambda: setattr(Layer, "calls", 5))
    assert Layer.calls == 5


def test_the_layers_of_pytorch_are_put_back_too() -> None:
    before = torch.nn.Linear.forward
    during_a_claim(lambda: setattr(torch.nn.Linear, "forward", None))
    assert torch.nn.Linear.forward is before


class Gradients:
    """As a trainer's own class has them; its module is not one of the tests."""

    __module__ = "my_trainer.gradients"

    def scaled(self, gradients: Any) -> Any:
        return gradients


class Patches(ReferenceTrainer):
    """The first call leaves a class with gradients that are doubled."""

    def gradients(self, batch: Batch) -> Any:
        found = Gradients().scaled(super().gradients(batch))
        setattr(Gradients, "scaled", lambda self, old: {n: 2 * g for n, g in old.items()})  # noqa: B010
        return found


class KeepsPatches(Patches):
    keeps_patches = True


@pytest.mark.parametrize(("trainer", "holds"), [(Patches, True), (KeepsPatches, False)])
def test_a_patch_reaches_no_later_claim_unless_the_class_says_so(
    trainer: type, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gradients, "scaled", Gradients.scaled)  # as it was, after the test
    claim = f"{FOLDER}/test_06_gradient.py::test_every_gradient_equals_the_reference"
    ladder = run(f"{__name__}:{trainer.__name__}", [f"{claim}[untied]", f"{claim}[tied]"])
    assert ladder.outcomes[6]["passed"] == (2 if holds else 1)
    assert ladder.outcomes[6]["failed"] == (0 if holds else 1)


def judge_of(equal: str) -> Judge:
    candidate = type("Candidate", (), {"dialect": Dialect(equal=equal)})
    return Judge(Ladder("my_adapter:MyTrainer", candidate), str(Path("test_16_merge.py")) + "::test_a")


ONE = {"weights": np.array([1.0, -2.0, 3.0], dtype=np.float32)}


def apart(by: float) -> dict[str, np.ndarray]:
    return {"weights": (ONE["weights"] * (1 + by)).astype(np.float32)}


def test_by_default_two_ways_to_compute_the_same_agree_to_the_bit() -> None:
    judge = judge_of("to the bit")
    judge.same_computation(ONE, ONE, 1)
    with pytest.raises(Divergence, match="to the bit"):
        judge.same_computation(apart(2.0**-23), ONE, 1)


def test_within_one_rounding_they_may_add_in_another_order_and_no_more() -> None:
    """One sum may differ by 8 u, for a longest sum of one; a thousandth is a fault."""
    judge = judge_of("within one rounding")
    judge.same_computation(apart(2.0**-22), ONE, 1)
    with pytest.raises(Divergence, match="1 of 1 tensors out of tolerance"):
        judge.same_computation(apart(1e-3), ONE, 1)
    with pytest.raises(Divergence, match="names differ"):
        judge.same_computation({}, ONE, 1)


def test_frozen_bytes_are_compared_to_the_bit_in_every_dialect() -> None:
    """The word is for sums, not for what no sum changes."""
    with pytest.raises(Divergence, match="to the bit"):
        judge_of("within one rounding").same_bits(apart(2.0**-23), ONE)
