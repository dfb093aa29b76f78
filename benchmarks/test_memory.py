"""The memory model agrees with the allocator, and no step leaks memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.cases import TINY, Case
from benchmarks.conftest import Record
from benchmarks.memory_run import Milestone, compare_with_model, long_run
from benchmarks.memory_table import MODELLED
from benchmarks.worker import call

WITHIN = 0.05  # of the measured peak
LENGTHS = 5
ONE_BLOCK = Case("one block", replace(TINY, num_hidden_layers=1), tokens=8, target_share=0.5)
TARGETS = ONE_BLOCK.batch_size * 8 * LENGTHS // 2  # of the longest batch: half its positions
AHEAD_BYTES = 2 * 4 * TARGETS * TINY.vocab_size  # two of the largest arrays: logits and their gradient
CACHE_LIMIT = 2**25 + 2**20  # MLX keeps at most 32 MiB of freed buffers on a CPU


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", MODELLED)
def test_the_memory_model_predicts_the_peak(name: str, is_checkpointed: bool, record: Record) -> None:
    found = call(compare_with_model, replace(MODELLED[name], checkpointed=is_checkpointed))
    sizes = {"peak_bytes": found.measured.peak_bytes, "model_bytes": found.budget.peak_bytes}
    record(found.seconds, **sizes, error=found.error)
    assert abs(found.error) <= WITHIN, (found.measured, found.budget)


@pytest.fixture(scope="module")
def milestones() -> dict[int, Milestone]:
    """10,000 steps of one block, over batches of five lengths."""
    return {found.step: found for found in call(long_run, ONE_BLOCK, [10, 1000, 10_000], LENGTHS)}


@pytest.mark.parametrize("step", [1000, 10_000])
def test_a_late_peak_is_at_most_that_at_step_10(
    step: int, milestones: dict[int, Milestone], record: Record
) -> None:
    """Plus two arrays that MLX may hold while it runs ahead. A leak of 17 bytes per step fails."""
    early, late = milestones[10].peak, milestones[step].peak
    record([milestones[step].step_seconds], peak_bytes=late.peak_bytes, at_step_10=early.peak_bytes)
    assert late.peak_bytes <= early.peak_bytes + AHEAD_BYTES
    assert late.active_bytes <= early.active_bytes + AHEAD_BYTES


def test_the_cache_stays_within_its_bound(milestones: dict[int, Milestone], record: Record) -> None:
    caches = [found.peak.cache_bytes for found in milestones.values()]
    record([found.step_seconds for found in milestones.values()], cache_bytes=caches)
    assert max(caches) <= CACHE_LIMIT
