"""The gate with this machine's noise: an unchanged step never fails, one slower by 15% always does."""

from __future__ import annotations

from benchmarks.conftest import Record
from benchmarks.trial import try_gate
from benchmarks.worker import call

TRIES, PAIRS = 50, 30


def test_a_step_against_itself_fails_in_none_of_50_tries(record: Record) -> None:
    trial = call(try_gate, 0, TRIES, PAIRS)
    record(trial.step_seconds, failures=trial.num_failures, ratios=[str(v.ratio) for v in trial.verdicts])
    assert trial.num_failures == 0, [v.sentence for v in trial.verdicts if v.is_failure]


def test_a_planted_slowdown_of_fifteen_percent_fails_in_50_of_50(record: Record) -> None:
    trial = call(try_gate, 3, TRIES, PAIRS)
    record(trial.step_seconds, failures=trial.num_failures, ratios=[str(v.ratio) for v in trial.verdicts])
    assert trial.num_failures == TRIES, [v.sentence for v in trial.verdicts if not v.is_failure]
