"""For random models, adapters and batches, `mlx_impl` computes what the reference computes.

The ladder tests chosen cases. Here shapes, switches and counts are random, and Hypothesis shrinks a failure
to the smallest failing model. Updates are eager, because compiling would take a second for each new shape.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, target
from hypothesis import strategies as st

from mlx_impl import model as model_module
from mlx_impl import targets
from mlx_impl.config import ModelConfig, TrainConfig
from mlx_impl.data import Batch
from mlx_impl.fast.low_rank import LowRank
from mlx_impl.model import CausalLM
from mlx_impl.targets import AnyLinear, linears_of_last_blocks
from tests.derived import NUM_DRAWS, UNIT_ROUNDOFF, Divergence, noise_of, require_same_bits
from tests.lora_ladder.protocol import Arrays
from tests.properties.agreement import require_agreement, require_exact_agreement, verdicts
from tests.properties.strategies import HUNT, Drawn, cases, train_configs, windows
from tests.trainers.mlx_impl import MlxTrainer
from tests.trainers.mutants.gradient import with_trained_length
from tests.trainers.reference import ReferenceTrainer

Windows = list[list[Batch]]
ITERS = 4
TRAJECTORY = 1e-10  # relative: gradients off by 1e-12, then Adam's division by the root, over `ITERS` updates


def logits_loss_and_gradients(trainer: MlxTrainer | ReferenceTrainer, case: Drawn) -> Arrays:
    nats, num_targets = trainer.loss(case.batch)
    assert num_targets == case.batch.mask_BT.sum(), "the count of targets"
    logits_BTV = trainer.logits(case.batch.inputs_BT)
    return {"logits": logits_BTV, "nats": np.array(nats), **trainer.gradients(case.batch)}


@given(cases())
def test_in_float64_logits_loss_and_every_gradient_equal_the_reference_to_1e_12(case: Drawn) -> None:
    """The sharpest test: the algebra is the same for every architecture, adapter and batch."""
    target(require_exact_agreement(case, logits_loss_and_gradients).used)


@given(cases())
def test_in_float32_logits_loss_and_every_gradient_are_within_rounding_of_the_reference(case: Drawn) -> None:
    """This runs MLX's own kernels, which the float64 test replaces with exact compositions."""
    target(require_agreement(case, logits_loss_and_gradients).used)


@st.composite
def runs(draw: st.DrawFn, dropout: float = 0.0) -> tuple[Drawn, Windows, TrainConfig]:
    case = draw(cases(dropout))
    return case, draw(windows(case.spec, ITERS)), draw(train_configs(ITERS))


@given(runs())
def test_in_float64_a_trajectory_equals_the_reference_to_1e_10(
    run: tuple[Drawn, Windows, TrainConfig],
) -> None:
    """AdamW and SGD, schedules, LoRA+, clipping, and any number of micro-batches of any shape per update."""
    case, drawn_windows, training = run

    def trajectory(trainer: MlxTrainer | ReferenceTrainer, _case: Drawn) -> Arrays:
        losses = trainer.train(drawn_windows, training)
        return {"losses": np.array(losses), **trainer.factors()}

    target(require_exact_agreement(case, trajectory, ITERS, TRAJECTORY).used)


@given(runs(dropout=0.25), st.integers(1, ITERS - 1))
def test_a_run_resumed_at_any_update_equals_the_uninterrupted_run_to_the_bit(
    run: tuple[Drawn, Windows, TrainConfig], stop: int
) -> None:
    """Factors and losses, with random dropout. The resuming trainer starts with other factors."""
    case, drawn_windows, training = run
    whole, first, second = (
        case.build(MlxTrainer),
        case.build(MlxTrainer),
        case.with_zero_b().build(MlxTrainer),
    )
    expected = whole.train(drawn_windows, training)
    before = first.train(drawn_windows[:stop], training)
    with tempfile.TemporaryDirectory() as folder:
        first.save(Path(folder))
        second.load(Path(folder))
        after = second.train(drawn_windows[stop:], training)
    require_same_bits(
        "resumed",
        {"losses": np.array([*before, *after]), **second.factors(), **second.base()},
        {"losses": np.array(expected), **whole.factors(), **case.weights},
    )


@given(cases())
def test_merged_weights_act_as_the_adapter_did_and_unmerging_restores_every_byte(case: Drawn) -> None:
    """Merged: within the rounding of every weight to float32. Unmerged: to the bit."""
    tokens_BT = case.batch.inputs_BT
    trainer = case.build(MlxTrainer)
    adapted = trainer.logits(tokens_BT)
    trainer.merge()
    merged = trainer.logits(tokens_BT)
    trainer.unmerge()
    state = {"logits": trainer.logits(tokens_BT), **trainer.base(), **trainer.factors()}
    require_same_bits("unmerged", state, {"logits": adapted, **case.weights, **case.factors})

    exact = {"logits": case.build(ReferenceTrainer).logits(tokens_BT)}
    moved = [case.moved(seed).build(ReferenceTrainer) for seed in range(NUM_DRAWS)]
    noise = noise_of(({"logits": trainer.logits(tokens_BT)} for trainer in moved), exact)
    unit = np.sqrt(case.longest_sum) * UNIT_ROUNDOFF
    for what, logits_BTV in {"adapted": adapted, "merged": merged}.items():
        (found,) = verdicts({"logits": logits_BTV}, exact, noise, unit, 0.0)
        assert found.used <= 1, f"{what}: {found.report}"


def without_scaling(config: ModelConfig) -> list[float]:
    return [config.rope_theta ** (-k / config.head_dim) for k in range(0, config.head_dim, 2)]


def of_the_first_blocks(model: CausalLM, num_layers: int) -> dict[str, AnyLinear]:
    every = linears_of_last_blocks(model, -1)
    return {n: linear for n, linear in every.items() if num_layers == -1 or int(n.split(".")[2]) < num_layers}


PLANTED = {
    "DoRA's length is not detached": (LowRank, "finish", with_trained_length),
    "rope is never stretched": (model_module, "rope_frequencies", without_scaling),
    "the first blocks for the last": (targets, "linears_of_last_blocks", of_the_first_blocks),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug: str) -> None:
    """Each bug needs certain switches to show, so this also proves that the random draws reach them."""

    @HUNT
    @given(cases())
    def hunt(case: Drawn) -> None:
        require_exact_agreement(case, logits_loss_and_gradients)

    with patch.object(*PLANTED[bug]), pytest.raises(Divergence):
        hunt()
