"""Every fast path is faster than its plain twin."""

from __future__ import annotations

import pytest

from benchmarks.conftest import Record
from benchmarks.pairs import PAIRS, judge_pair
from benchmarks.worker import call


@pytest.mark.parametrize("name", PAIRS)
def test_a_fast_path_is_faster_than_its_plain_twin(name: str, record: Record) -> None:
    judged = call(judge_pair, name)
    record(judged.fast_seconds, **judged.verdict.record)
    assert not judged.verdict.is_failure, judged.verdict.sentence
