"""The sweeps of rung 15 leave no configuration field out."""

from __future__ import annotations

from tests.lora_ladder.options import SWEEPS, WITHOUT_RESULT, all_fields


def test_every_field_is_swept_or_cannot_change_a_result() -> None:
    """A new field needs a sweep, or a reason why it has none."""
    swept = {sweep.name for sweep in SWEEPS}
    assert swept | WITHOUT_RESULT.keys() == set(all_fields()) and not swept & WITHOUT_RESULT.keys()
