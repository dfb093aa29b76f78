"""Rung 13, combinations: every way to train, with every feature, is the reference's simple run.

Eager or compiled, with activations kept or recomputed, over windows of 1, 2, 3 or 5 micro-batches,
uninterrupted or resumed; crossed with schedule, clipping, LoRA+, decay, DoRA, rsLoRA, dropout, patterns,
qk norm, bias, tied head, sliding window and rope scaling. Every two of them meet in a run (`pairwise.py`).
MLX: a compiled step that is not told of the learning rate keeps the first one for ever.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lora_ladder.combinations import (
    ROWS,
    case_with,
    claimed,
    combination,
    run,
    simple,
    trained,
    windows_of,
)
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.pairwise import Row


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_a_combination_trains_as_the_reference(judge: Judge, number: int, tmp_path: Path) -> None:
    """Four updates: the losses, and every factor in the end."""
    row = claimed(ROWS[number], judge.candidate, judge.ladder.not_claimed)
    chosen = combination(row)
    case = case_with(chosen)
    judge.subject = " + ".join(special(row))
    ours = run(case, judge.candidate, chosen, tmp_path)
    windows, k = windows_of(chosen.training), chosen.training.iters * case.longest_sum
    judge.given(ours, case, lambda trainer: trained(trainer, case, chosen, windows, "train"), k)


def special(row: Row) -> list[str]:
    """The levels that are not the simple one."""
    return [level for factor, level in row.items() if level != simple(factor)]
