"""`tox -e e2e-mlx-short`: the plan's success criteria on a real model, in twenty steps or the main job."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tests.e2e.conftest import Run


def test_training_runs_without_the_plans_errors(short_run: Run) -> None:
    """Criteria 1 and 5: it ends with exit code 0, as the fixture asserts, after all of its steps."""
    assert [line["step"] for line in short_run.metrics] == list(range(1, short_run.report["iters"] + 1))
    assert short_run.report["iters"] >= 20


def test_every_lora_parameter_changes(short_run: Run) -> None:
    """Criterion 2: all 210 B's began at zero and are zero no more."""
    tensors = mx.load(str(short_run.folder / "adapter_model.safetensors"))
    assert isinstance(tensors, dict)
    factors = {name: array for name, array in tensors.items() if "lora_B" in name}
    assert len(factors) == 30 * 7
    assert [name for name, array in factors.items() if not array.any()] == []


def test_the_loss_decreases(short_run: Run) -> None:
    """Criterion 3: over the whole training set, at least by half in two epochs."""
    assert short_run.report["loss_last"] < 0.5 * short_run.report["loss_first"]


def test_answers_improve(short_run: Run) -> None:
    """Criterion 4: more questions are answered rightly than before, also in phrasings never seen."""
    report = short_run.report
    assert report["trained_after"] > report["trained_before"]
    assert report["unseen_after"] > report["unseen_before"]


def test_the_metrics_are_those_of_the_data(short_run: Run) -> None:
    """Ten batches are an epoch: each counts every target once, and learning rates are as asked."""
    first, second = (
        sum(line["num_targets"] for line in short_run.metrics[start : start + 10]) for start in (0, 10)
    )
    assert first == second
    assert short_run.metrics[0]["learning_rate"] == pytest.approx(3e-4)
