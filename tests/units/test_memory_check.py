"""The memory check: the need of the largest batch, the messages, and the suggested flags."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mlx_impl.config import TrainConfig
from mlx_impl.data import Example, training_windows
from mlx_impl.fast.memory_model import training_bytes
from mlx_impl.fast.memory_sizes import Sizes, shape_of
from mlx_impl.machine.memory_limits import Limit, TooLittleMemory
from mlx_impl.model import CausalLM
from mlx_impl.run import memory_check
from mlx_impl.run.memory_check import Workload, check_limits, check_workload, require_generation_memory
from tests.lora_ladder.cases import SPEC

SIZES = Sizes(SPEC, weights=1000, trained=10, itemsize=4, more=0, unpacked=0, head=0, keeps_scores=True)
LENGTHS = (600, 30, 200, 40, 1100, 10, 90)
EXAMPLES = [Example((1,) * n, (False,) + (True,) * (n - 1)) for n in LENGTHS]


def workload(**training: Any) -> Workload:
    config = TrainConfig(**{"iters": 9, "batch_size": 2, "max_seq_length": 2048, **training})
    return Workload(SIZES, EXAMPLES, (EXAMPLES,), config)


@pytest.mark.parametrize("batching", ["plain", "grouped", "packed"])
def test_the_need_is_that_of_the_largest_batch(batching: str) -> None:
    load = replace(workload(batching=batching), evaluated=())  # an evaluation has its own batches
    batches = [batch for window in training_windows(EXAMPLES, load.training) for batch in window]
    assert load.bytes_needed() == max(training_bytes(SIZES, shape_of(batch), False) for batch in batches)


@pytest.mark.parametrize("batching", ["plain", "grouped", "packed"])
def test_the_need_of_a_long_run_is_bounded_by_its_longest_rows(
    batching: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = workload(batching=batching).bytes_needed()
    monkeypatch.setattr(memory_check, "MAX_ROWS_CHECKED", 0)
    assert exact <= workload(batching=batching).bytes_needed() < 2 * exact


def test_a_run_that_fits_gets_no_remark() -> None:
    load = workload()
    assert check_workload(load, [Limit("RLIMIT_AS", load.bytes_needed(), True)]) == []


def test_the_error_names_each_flag_that_helps_and_its_need() -> None:
    load = workload()
    with pytest.raises(TooLittleMemory) as caught:
        check_workload(load, [Limit("RLIMIT_AS", load.bytes_needed() - 1, True)])
    sentence = str(caught.value)
    assert sentence.startswith("the longest batch needs about ") and "(RLIMIT_AS): " in sentence
    for flag in ("--batch-size 1 would need ", "--grad-checkpoint ", "--max-seq-length 1024 "):
        assert flag in sentence
    assert "\n" not in sentence


def test_flags_that_do_not_help_are_not_named() -> None:
    load = replace(
        workload(batch_size=1, grad_checkpoint=True), train=EXAMPLES[:1], evaluated=(EXAMPLES[:1],)
    )
    with pytest.raises(TooLittleMemory) as caught:
        check_workload(load, [Limit("RLIMIT_AS", load.bytes_needed() - 1, True)])
    assert "--batch-size" not in str(caught.value) and "--grad-checkpoint" not in str(caught.value)


def test_flags_are_combined_where_none_is_enough_alone() -> None:
    load = workload()
    frugal = load.with_training(batch_size=1, grad_checkpoint=True)
    with pytest.raises(TooLittleMemory, match="--batch-size 1 --grad-checkpoint "):
        check_workload(load, [Limit("RLIMIT_AS", frugal.bytes_needed(), True)])


def test_the_suggested_max_seq_length_fits() -> None:
    load = workload()
    for tokens in (512, 256, 64):
        limit = load.truncated(tokens).bytes_needed()
        (named,) = memory_check.longest_that_fits(load, limit, "").values()
        assert named <= limit


def test_too_little_free_memory_is_only_a_remark() -> None:
    load = workload()
    (remark,) = check_workload(load, [Limit("free memory", 1, False), Limit("memory and swap", 10**12, True)])
    assert remark.startswith("the longest batch needs about ") and " is free" in remark


def test_a_hard_limit_is_an_error_even_beside_a_soft_one() -> None:
    limits = [Limit("free memory", 1, False), Limit("memory and swap", 2, True)]
    with pytest.raises(TooLittleMemory, match="memory and swap"):
        check_limits("it", 3, limits, lambda _: "")


def test_grad_checkpoint_is_not_suggested_for_an_evaluation() -> None:
    load = replace(workload(), train=())
    with pytest.raises(TooLittleMemory) as caught:
        check_workload(load, [Limit("RLIMIT_AS", load.bytes_needed() - 1, True)])
    assert "--grad-checkpoint" not in str(caught.value) and "--batch-size 1 " in str(caught.value)


def test_a_prompt_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_check, "memory_limits", lambda: [Limit("RLIMIT_AS", 10**6, True)])
    model = CausalLM(SPEC)
    assert require_generation_memory(model, [[1] * 5], 3) == require_generation_memory(model, [], 3) == []
    with pytest.raises(TooLittleMemory, match="the longest prompt, of 5000 tokens, needs about"):
        require_generation_memory(model, [[1] * 5000], 3)
