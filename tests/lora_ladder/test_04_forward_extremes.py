"""Rung 4, forward: long rows, many rows, large scores and logits, and NaN.

A toy's rows fit into any table, block and window, and its scores are tame. Here a row has 1,200 tokens, a
batch 300 rows, and scores and logits are about 1e4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.lora_ladder.cases import Case
from tests.lora_ladder.extremes import (
    ENDS,
    long_rows,
    many_rows,
    require_lost,
    sharp,
    with_number,
    with_ruined_token,
)
from tests.lora_ladder.judge import Judge

SIZES = {"long rows": long_rows, "many rows": many_rows, "large scores": sharp}
LAYER = "model.layers.0."
PLACES = {
    "a weight of a query": f"{LAYER}self_attn.q_proj.weight",
    "a weight of a value": f"{LAYER}self_attn.v_proj.weight",
    "a weight of the feed-forward": f"{LAYER}mlp.down_proj.weight",
    "a weight of the norm": "model.norm.weight",
    "a weight of the head": "lm_head.weight",
    "an A": f"{LAYER}mlp.down_proj.lora_a",
    "a B": f"{LAYER}self_attn.o_proj.lora_b",
}


@pytest.mark.parametrize("make", SIZES.values(), ids=SIZES)
def test_logits_at_extremes_equal_the_reference(make: Callable[[], Case], judge: Judge) -> None:
    """Positions beyond a thousand, rows beyond a byte and a softmax that is nearly hard."""
    case = make()
    judge(case, lambda trainer: {"logits": trainer.logits(case.batch.inputs_BT)})


@pytest.mark.needs("exact")
def test_in_float64_logits_of_long_rows_equal_the_reference_to_1e_12(judge: Judge) -> None:
    """The algebra is the same at every position."""
    case = long_rows()
    judge.exactly(case, lambda trainer: {"logits": trainer.logits(case.batch.inputs_BT[:, :520])})


@pytest.mark.parametrize("number", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("place", PLACES)
def test_a_number_that_ends_reaches_the_logits(case: Case, judge: Judge, place: str, number: float) -> None:
    """From any weight or factor; no logit is finite that is not finite in the reference."""
    ruined = with_number(case, PLACES[place], number)
    require_lost(judge, ruined, lambda t: {"logits": t.logits(case.batch.inputs_BT)}, f"{number} in {place}")


def test_a_nan_in_an_adapter_with_zero_b_reaches_the_logits(case: Case, judge: Judge) -> None:
    """0 times NaN is NaN: the adapter may not be left out because B is 0."""
    ruined = with_number(case.with_zero_b(), PLACES["an A"], np.nan)
    require_lost(judge, ruined, lambda t: {"logits": t.logits(case.batch.inputs_BT)}, "a NaN in an A")


@pytest.mark.parametrize("case", ["dora"], indirect=True)
def test_a_nan_in_a_magnitude_reaches_the_logits(case: Case, judge: Judge) -> None:
    """DoRA's third factor."""
    ruined = with_number(case, f"{LAYER}mlp.down_proj.magnitude", np.nan)
    require_lost(judge, ruined, lambda t: {"logits": t.logits(case.batch.inputs_BT)}, "a NaN in a magnitude")


def test_a_nan_in_one_row_leaves_the_other_rows_as_they_were(
    case: Case, candidate: Any, judge: Judge
) -> None:
    """A token's embedding holds NaN: the row that begins with it is lost, the others keep every bit."""
    ruined, batch = with_ruined_token(case, np.nan)
    require_lost(
        judge, ruined, lambda t: {"logits": t.logits(batch.inputs_BT)[:1]}, "a NaN in the first token"
    )
    sound, ours = (c.build(candidate).logits(batch.inputs_BT)[1:] for c in (case, ruined))
    judge.same_bits({"logits": ours}, {"logits": sound})
