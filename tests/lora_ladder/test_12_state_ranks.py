"""Rung 12, state: of several ranks one saves, and the others wait for it.

Two processes that write one file leave a mixture of both. A rank that goes on too early resumes, or reports
as saved, what is not there yet. `test_09_trajectory_ranks.py` judges how they train.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_impl.config import TrainConfig
from tests.lora_ladder.cases import Case
from tests.lora_ladder.judge import Judge


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.needs("save_on_ranks", "save")
def test_only_the_first_rank_saves_and_the_others_wait_for_it(
    case: Case, candidate: Any, judge: Judge, tmp_path: Path
) -> None:
    """It writes the files of one process, complete as soon as any rank goes on. Each was given a folder."""
    one, first, other = folders = [tmp_path / name for name in ("one", "first", "other")]
    for folder in folders:
        folder.mkdir()
    windows, training = [[case.batch]], TrainConfig(iters=1)
    alone, trainer = case.build(candidate), case.build(candidate)
    alone.train(windows, training)
    alone.save(one)
    seen = trainer.save_on_ranks(windows, training, [first, other])
    judge.claim(not names_in(other), f"only the first rank may save, and the other wrote {names_in(other)}")
    for rank, names in enumerate(seen):
        judge.claim(names == names_in(one), f"rank {rank} must wait for {names_in(one)}, and saw {names}")
