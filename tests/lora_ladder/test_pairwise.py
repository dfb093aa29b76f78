"""The combinations of rung 13: every two settings meet in one of them."""

from __future__ import annotations

from tests.lora_ladder.combinations import FACTORS, ROWS
from tests.lora_ladder.pairwise import all_pairs, pairs_of


def test_every_two_settings_meet_in_a_run() -> None:
    met = set().union(*map(pairs_of, ROWS))
    assert met == all_pairs({factor: list(levels) for factor, levels in FACTORS.items()})
