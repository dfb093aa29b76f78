"""Rung 6, gradient: long rows, many targets, few targets, and NaN.

Through scores of 1e4 no gradient is claimed: PyTorch's own float32 is 46 tolerances off there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.derived import within
from tests.lora_ladder.cases import Case
from tests.lora_ladder.extremes import (
    COPIES,
    ENDS,
    many_words,
    repeated,
    require_lost,
    shorter_rows,
    windowed_rows,
    with_number,
    with_ruined_token,
)
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.protocol import Arrays
from tests.lora_ladder.test_06_gradient import cotangent


@pytest.mark.parametrize("make", [shorter_rows, windowed_rows], ids=["long rows", "in a window"])
def test_every_gradient_of_long_rows_equals_the_reference(make: Any, judge: Judge) -> None:
    """A gradient that sums over hundreds of positions."""
    case = make()
    judge(case, lambda trainer: trainer.gradients(case.batch))


@pytest.mark.needs("exact")
def test_in_float64_every_gradient_of_long_rows_equals_the_reference_to_1e_12(judge: Judge) -> None:
    """The algebra is the same at every position."""
    case = shorter_rows()
    judge.exactly(case, lambda trainer: trainer.gradients(case.batch))


def test_more_logits_than_are_computed_at_once_have_the_same_mean_gradient(
    candidate: Any, judge: Judge
) -> None:
    """18 copies of a batch have its mean gradient, in any number of chunks."""
    case = many_words()
    expected, noise = judge.reference(case, lambda trainer: trainer.gradients(case.batch))
    ours = case.build(candidate).gradients(repeated(case.batch, COPIES))
    judge.require_names(ours, expected)
    k = COPIES * case.longest_sum
    judge.hold([within(name, ours[name], expected[name], noise[name], k) for name in expected])


@pytest.mark.canonical("pad_targets")
@pytest.mark.parametrize("position", [0, -1], ids=["first", "last"])
def test_the_gradients_of_a_single_target_equal_the_reference(
    case: Case, judge: Judge, position: int
) -> None:
    """At the first position, which sees only itself, and at the last; all gradients as one vector.

    Those of the first position's query and key are 0, and rounding is all that float32 has of them.
    """
    mask_BT = np.zeros_like(case.batch.mask_BT)
    mask_BT[0, position] = True
    batch = case.batch._replace(mask_BT=mask_BT)

    def act(trainer: Any) -> Arrays:
        gradients = trainer.gradients(batch)
        return {"gradients": np.concatenate([gradients[name].ravel() for name in sorted(gradients)])}

    judge(case, act)


@pytest.mark.parametrize("number", ENDS.values(), ids=ENDS)
def test_a_number_that_ends_reaches_the_gradients(case: Case, judge: Judge, number: float) -> None:
    """From a factor; no element is finite that is not finite in the reference."""
    ruined = with_number(case, "model.layers.1.mlp.down_proj.lora_b", number)
    require_lost(judge, ruined, lambda t: t.gradients(case.batch), f"{number} in a factor")


def test_a_nan_in_one_row_of_a_batch_reaches_the_gradients(case: Case, judge: Judge) -> None:
    """A mean over rows with one NaN is NaN: the row is not left out."""
    ruined, batch = with_ruined_token(case, np.nan)
    require_lost(judge, ruined, lambda t: t.gradients(batch), "a NaN in the first token")


@pytest.mark.needs("pullback")
@pytest.mark.alone
@pytest.mark.parametrize("number", ENDS.values(), ids=ENDS)
def test_a_number_that_ends_in_the_cotangent_reaches_the_gradients(
    case: Case, judge: Judge, number: float
) -> None:
    """The gradient of one logit is given as NaN or infinity."""
    cotangent_BTV = cotangent(case)
    cotangent_BTV[0, -1, 0] = number
    require_lost(judge, case, lambda t: t.pullback(case.batch, cotangent_BTV), f"{number} in the cotangent")
