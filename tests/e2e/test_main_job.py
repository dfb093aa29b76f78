"""The main job: SmolLM2-135M-Instruct learns forty capitals, answers in other words, and forgets little."""

from __future__ import annotations

from mlx_impl.data import bucket_size
from mlx_impl.fast.kept_positions import TARGET_BUCKETS
from tests.e2e.conftest import Run

LOGITS_BYTES = (
    4 * 4 * 49152
)  # of one target, as benchmarks/memory.py has it: four arrays of SmolLM2's vocabulary


def test_the_loss_falls_to_a_twentieth(main_job: Run) -> None:
    """Nats per target over the whole training set, before and after."""
    assert main_job.report["loss_last"] <= 0.05 * main_job.report["loss_first"]


def test_the_trained_questions_are_learned(main_job: Run) -> None:
    """From at most 20% to at least 95%."""
    assert main_job.report["trained_before"] <= 0.20
    assert main_job.report["trained_after"] >= 0.95


def test_the_facts_are_known_in_phrasings_never_trained(main_job: Run) -> None:
    """From at most 20% to at least 90%, over three phrasings."""
    assert main_job.report["unseen_before"] <= 0.20
    assert main_job.report["unseen_after"] >= 0.90


def test_what_the_model_knew_is_not_forgotten(main_job: Run) -> None:
    """Twenty other capitals lose at most 10 points."""
    assert main_job.report["control_after"] >= main_job.report["control_before"] - 0.10


def test_it_says_what_it_works_with(main_job: Run) -> None:
    for words in (
        "SmolLM2-135M-Instruct",
        "fixtures/geography",
        "device:    ",
        "trainable parameters, 1.82%",
        "validation loss at step 0",
        "BLAS for MLX's CPU matmuls",
        "right before",
        "tokens/s",
    ):
        assert words in main_job.output


def test_memory_stays_flat(main_job: Run) -> None:
    """After the first epoch nothing is added but the logits of a batch with more targets than it had."""
    epoch = len(main_job.metrics) // 5
    first, all_epochs = main_job.metrics[:epoch], main_job.metrics
    more = max(size_of(record) for record in all_epochs) - max(size_of(record) for record in first)
    assert all_epochs[-1]["peak_bytes"] <= 1.01 * first[-1]["peak_bytes"] + more * LOGITS_BYTES


def size_of(record: dict) -> int:
    """The targets that a step makes room for."""
    return bucket_size(record["num_targets"], TARGET_BUCKETS)
