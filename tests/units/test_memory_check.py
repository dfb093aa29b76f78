"""Whether a run fits: of which batch it is asked, what is said, and which flags are named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mlx_impl.config import TrainConfig
from mlx_impl.data import Example, training_windows
from mlx_impl.fast.memory_model import Sizes, shape_of, training_bytes
from mlx_impl.machine.memory_limits import Limit, TooLittle
from mlx_impl.model import CausalLM
from mlx_impl.run import memory_check
from mlx_impl.run.memory_check import Run, judged, require_answers, verdict
from tests.ladder.cases import SPEC

SIZES = Sizes(SPEC, weights=1000, trained=10, itemsize=4, more=0, unpacked=0, keeps_scores=True)
LENGTHS = (600, 30, 200, 40, 1100, 10, 90)
EXAMPLES = [Example((1,) * n, (False,) + (True,) * (n - 1)) for n in LENGTHS]


def run_of(**training: Any) -> Run:
    config = TrainConfig(**{"iters": 9, "batch_size": 2, "max_seq_length": 2048, **training})
    return Run(SIZES, EXAMPLES, (EXAMPLES,), config)


@pytest.mark.parametrize("batching", ["plain", "grouped", "packed"])
def test_the_need_is_that_of_the_batch_that_needs_most(batching: str) -> None:
    run = replace(run_of(batching=batching), judged=())  # an evaluation has its own batches
    batches = [batch for window in training_windows(EXAMPLES, run.training) for batch in window]
    assert run.need() == max(training_bytes(SIZES, shape_of(batch), False) for batch in batches)


@pytest.mark.parametrize("batching", ["plain", "grouped", "packed"])
def test_a_run_of_too_many_batches_is_judged_by_its_longest_rows(
    batching: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = run_of(batching=batching).need()
    monkeypatch.setattr(memory_check, "MANY", 0)
    assert exact <= run_of(batching=batching).need() < 2 * exact


def test_what_fits_is_said_nothing_of() -> None:
    run = run_of()
    assert judged(run, [Limit("RLIMIT_AS", run.need(), True)]) == []


def test_too_little_names_each_flag_that_helps_with_its_need() -> None:
    run = run_of()
    with pytest.raises(TooLittle) as caught:
        judged(run, [Limit("RLIMIT_AS", run.need() - 1, True)])
    sentence = str(caught.value)
    assert sentence.startswith("the longest batch needs about ") and "(RLIMIT_AS): " in sentence
    for flag in ("--batch-size 1 would need ", "--grad-checkpoint ", "--max-seq-length 1024 "):
        assert flag in sentence
    assert "\n" not in sentence


def test_flags_that_do_not_help_are_not_named() -> None:
    run = replace(run_of(batch_size=1, grad_checkpoint=True), train=EXAMPLES[:1], judged=(EXAMPLES[:1],))
    with pytest.raises(TooLittle) as caught:
        judged(run, [Limit("RLIMIT_AS", run.need() - 1, True)])
    assert "--batch-size" not in str(caught.value) and "--grad-checkpoint" not in str(caught.value)


def test_together_where_none_is_enough_alone() -> None:
    run = run_of()
    frugal = run.changed(batch_size=1, grad_checkpoint=True)
    with pytest.raises(TooLittle, match="--batch-size 1 --grad-checkpoint "):
        judged(run, [Limit("RLIMIT_AS", frugal.need(), True)])


def test_a_named_length_fits() -> None:
    run = run_of()
    for tokens in (512, 256, 64):
        limit = run.cut(tokens).need()
        (named,) = memory_check.length_that_fits(run, limit, "").values()
        assert named <= limit


def test_free_memory_is_worth_a_remark() -> None:
    run = run_of()
    (remark,) = judged(run, [Limit("free memory", 1, False), Limit("memory and swap", 10**12, True)])
    assert remark.startswith("the longest batch needs about ") and " is free" in remark


def test_a_hard_limit_goes_before_a_remark() -> None:
    limits = [Limit("free memory", 1, False), Limit("memory and swap", 2, True)]
    with pytest.raises(TooLittle, match="memory and swap"):
        verdict("it", 3, limits, lambda _: "")


def test_an_evaluation_has_no_gradients_to_checkpoint() -> None:
    run = replace(run_of(), train=())
    with pytest.raises(TooLittle) as caught:
        judged(run, [Limit("RLIMIT_AS", run.need() - 1, True)])
    assert "--grad-checkpoint" not in str(caught.value) and "--batch-size 1 " in str(caught.value)


def test_a_prompt_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_check, "limits", lambda: [Limit("RLIMIT_AS", 10**6, True)])
    model = CausalLM(SPEC)
    assert require_answers(model, [[1] * 5], 3) == require_answers(model, [], 3) == []
    with pytest.raises(TooLittle, match="the longest prompt, of 5000 tokens, needs about"):
        require_answers(model, [[1] * 5000], 3)
