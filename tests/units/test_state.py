"""Stop and resume: to the bit what would have been, or one sentence on what has changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_impl.config import LoRAConfig, ModelConfig, TrainConfig
from mlx_impl.data import Example
from mlx_impl.lora import count_parameters, lora_parameters
from mlx_impl.model import CausalLM
from mlx_impl.run.guard import NotFinite
from mlx_impl.run.merging import merge, unmerge
from mlx_impl.run.state import digest_of_base
from mlx_impl.run.trainer import LoRATrainer
from tests.lora_ladder.cases import SPEC

EXAMPLES = [Example(tuple(range(n, 2 * n)), (False,) + (True,) * (n - 1)) for n in range(3, 12)]
LORA = LoRAConfig(rank=2, dropout=0.3)
TRAINING = TrainConfig(
    iters=9,
    batch_size=2,
    grad_accumulation_steps=2,
    learning_rate=0.01,
    lr_schedule="cosine",
    warmup_steps=2,
    loraplus_lr_ratio=4.0,
    max_grad_norm=1.0,
)


def trainer(
    lora: LoRAConfig = LORA,
    training: TrainConfig = TRAINING,
    base_seed: int = 5,
    spec: ModelConfig = SPEC,
) -> LoRATrainer:
    mx.random.seed(base_seed)
    model = CausalLM(spec)
    mx.eval(model.parameters())
    return LoRATrainer(model, lora, training)


def adapter(of: LoRATrainer) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in lora_parameters(of.model).items()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run stopped after four of nine updates, which is in the middle of its second epoch."""
    stopped, path = trainer(), tmp_path / "state.safetensors"
    steps = stopped.fit(EXAMPLES)
    for _ in range(4):
        next(steps)
    stopped.validate(EXAMPLES)
    stopped.save(path, EXAMPLES)
    return path


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(saved: Path) -> None:
    """Dropout, schedule, moments, order of the examples, last partial window: losses, norms and factors."""
    whole, resumed = trainer(), trainer()
    expected = [(r.step, r.loss_nats, r.grad_norm, r.learning_rate) for r in whole.fit(EXAMPLES)]
    resumed.resume(saved, EXAMPLES)
    mx.random.uniform()  # what another part of the program draws in between does not matter
    rest = [(r.step, r.loss_nats, r.grad_norm, r.learning_rate) for r in resumed.fit(EXAMPLES)]
    assert rest == expected[4:]
    for name, array in adapter(whole).items():
        np.testing.assert_array_equal(adapter(resumed)[name], array)


def test_a_resumed_run_trains_what_it_trained_before_and_nothing_else(saved: Path) -> None:
    resumed = trainer()
    digest, counts = digest_of_base(resumed.model), count_parameters(resumed.model)
    resumed.resume(saved, EXAMPLES)
    assert count_parameters(resumed.model) == counts
    list(resumed.fit(EXAMPLES))
    assert digest_of_base(resumed.model) == digest


def test_the_validations_are_remembered(saved: Path) -> None:
    resumed = trainer()
    resumed.resume(saved, EXAMPLES)
    assert [step for step, _ in resumed.validation] == [4]


def test_a_run_with_nothing_adapted_in_the_first_layers_is_resumed(tmp_path: Path) -> None:
    """A state of which some layers have no part."""
    stopped = trainer(replace(LORA, num_layers=1, use_dora=True))
    next(stopped.fit(EXAMPLES))
    stopped.save(tmp_path / "state", EXAMPLES)
    expected = [record.loss_nats for record in stopped.fit(EXAMPLES)]
    resumed = trainer(replace(LORA, num_layers=1, use_dora=True))
    resumed.resume(tmp_path / "state", EXAMPLES)
    assert [record.loss_nats for record in resumed.fit(EXAMPLES)] == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"base_seed": 6}, "the model's weights must be as in the run to resume$"),
        (
            {"spec": replace(SPEC, rope_theta=500.0)},
            "the model's rope_theta must be as in the run to resume: it was 1000.0, got 500.0",
        ),
        ({"lora": replace(LORA, alpha=8.0)}, "alpha must be as in the run to resume: it was 16.0, got 8.0"),
        (
            {"training": replace(TRAINING, learning_rate=0.1)},
            "learning_rate must be as in the run to resume: it was 0.01, got 0.1",
        ),
        (
            {"training": replace(TRAINING, data_seed=1)},
            "data_seed must be as in the run to resume: it was 0, got 1",
        ),
    ],
    ids=["weights", "model", "adapter", "training", "order"],
)
def test_a_change_of_model_or_configuration_is_refused_by_name(
    saved: Path, changed: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(**changed).resume(saved, EXAMPLES)


ORDERED = {r"0\.self_attn\.q_proj": 4.0, "q_proj": 8.0}  # the first pattern that matches decides


@pytest.mark.parametrize("name", ["alpha_pattern", "rank_pattern"])
def test_patterns_in_another_order_are_another_adapter(tmp_path: Path, name: str) -> None:
    """For a saved run, and for a model that has an adapter already."""
    numbers = ORDERED if name == "alpha_pattern" else {pattern: int(n) for pattern, n in ORDERED.items()}
    orders: list[dict[str, Any]] = [{name: numbers}, {name: dict(reversed(numbers.items()))}]
    lora, turned = (replace(LORA, **order) for order in orders)
    stopped = trainer(lora)
    stopped.save(tmp_path / "state", EXAMPLES)
    trainer(lora).resume(tmp_path / "state", EXAMPLES)
    with pytest.raises(ValueError, match=f"{name} must be as in the run to resume: it was"):
        # A turned rank_pattern gives other shapes, and is refused before these are looked at.
        trainer(turned).resume(tmp_path / "state", EXAMPLES)
    with pytest.raises(ValueError, match="must have the given configuration, and has LoRAConfig"):
        LoRATrainer(stopped.model, turned, TRAINING)


@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
def test_a_run_goes_back_to_no_factors_that_were_replaced(plain: bool) -> None:
    """Others are put into the model, and the next update is not finite."""
    run = LoRATrainer(trainer().model, LORA, replace(TRAINING, learning_rate=0.5), plain=plain)
    updates = run.fit(EXAMPLES)
    for _ in range(3):
        next(updates)
    updates.close()  # type: ignore[attr-defined]
    put = tree_map(mx.zeros_like, run.model.trainable_parameters())
    put["model"]["layers"][0]["self_attn"]["q_proj"]["lora_a"] += np.inf
    expected = {name: np.array(array) for name, array in tree_flatten(put)}
    run.model.update(put)
    with pytest.raises(NotFinite, match="back at step 3"):
        list(run.fit(EXAMPLES))
    for name, array in adapter(run).items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
def test_a_run_that_was_only_interrupted_still_goes_back_to_a_good_update(plain: bool) -> None:
    """The first update makes huge factors, which the second call of `fit` notices."""
    run = LoRATrainer(
        trainer().model, LORA, replace(TRAINING, learning_rate=1e25, warmup_steps=0), plain=plain
    )
    before = adapter(run)
    updates = run.fit(EXAMPLES)
    next(updates)
    updates.close()  # type: ignore[attr-defined]
    with pytest.raises(NotFinite, match="back at step 0"):
        list(run.fit(EXAMPLES))
    for name, array in adapter(run).items():
        np.testing.assert_array_equal(array, before[name])


def test_a_change_of_the_data_is_refused(saved: Path) -> None:
    changed = [*EXAMPLES[:-1], Example((1, 2, 3), (False, True, True))]
    with pytest.raises(ValueError, match="the training data must be as in the run to resume"):
        trainer().resume(saved, changed)


def test_a_state_that_cannot_be_read_is_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing: a run to resume must have this file"):
        trainer().resume(tmp_path / "nothing", EXAMPLES)
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"state\.safetensors: not a readable training state"):
        trainer().resume(saved, EXAMPLES)
    mx.save_safetensors(str(saved), {"a": mx.zeros(3)})
    with pytest.raises(ValueError, match=r"state\.safetensors: not a readable training state"):
        trainer().resume(saved, EXAMPLES)


def test_examples_are_the_same_whatever_they_are_made_of(saved: Path) -> None:
    """Lists and NumPy's numbers are no change of the data."""
    others = [Example(list(np.array(e.tokens)), list(np.array(e.is_target))) for e in EXAMPLES]  # type: ignore[arg-type]
    resumed = trainer()
    resumed.resume(saved, others)
    assert resumed.step == 4


def test_a_run_that_would_be_saved_with_a_ruined_adapter_goes_back(tmp_path: Path) -> None:
    """The last update is finite but huge; no step follows that could notice it."""
    ruined = trainer(training=TrainConfig(iters=1, learning_rate=1e25))
    before = adapter(ruined)
    list(ruined.fit(EXAMPLES))
    with pytest.raises(NotFinite, match=r"the loss after step 1 is not finite; .* back at step 0"):
        ruined.save(tmp_path / "state.safetensors", EXAMPLES)
    assert ruined.step == 0 and list(tmp_path.iterdir()) == []
    for name, array in adapter(ruined).items():
        np.testing.assert_array_equal(before[name], array)
    ruined.save(tmp_path / "state.safetensors", EXAMPLES)


@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
def test_updates_after_a_roll_back_between_two_of_them_begin_at_what_was_put_back(plain: bool) -> None:
    """A loss between updates was NaN, and the caller goes on reading; compiled too."""

    def losses(compiled: bool) -> list[float]:
        lora = replace(LORA, dropout=0.0)
        run = LoRATrainer(trainer(lora).model, lora, TRAINING, compiled, plain)
        found = []
        for record in run.fit(EXAMPLES):
            found.append(record.loss_nats)
            if record.step in (1, 4):
                with pytest.raises(NotFinite):
                    run.confirm_loss(np.nan)
        return found

    np.testing.assert_allclose(losses(compiled=True), losses(compiled=False), rtol=1e-5)


def test_a_run_is_saved_whose_first_examples_have_no_target(tmp_path: Path) -> None:
    """They are trained on too, beside others; the check before a save needs some that have one."""
    without = [Example((1, 2, 3), (True, False, False))] * 3
    run = trainer()
    list(run.fit(without + EXAMPLES))
    run.save(tmp_path / "state.safetensors", without + EXAMPLES)


def test_two_runs_side_by_side_do_not_disturb_each_other() -> None:
    """MLX's random state is one for the process; what an update draws depends on its number alone."""
    alone = [record.loss_nats for record in trainer().fit(EXAMPLES)]
    one, other = trainer(), trainer()
    pairs = zip(one.fit(EXAMPLES), other.fit(EXAMPLES), strict=True)
    assert [(a.loss_nats, b.loss_nats) for a, b in pairs] == [(loss, loss) for loss in alone]


def test_an_adapter_of_another_configuration_is_not_taken_for_this_one() -> None:
    model = trainer(replace(LORA, alpha=4.0)).model
    with pytest.raises(ValueError, match="must have the given configuration, and has LoRAConfig"):
        LoRATrainer(model, replace(LORA, alpha=400.0), TRAINING)


def test_a_merged_model_is_not_trained_saved_or_resumed(saved: Path, tmp_path: Path) -> None:
    """And a save in between has not kept a wrong digest of the base."""
    run = trainer()
    merged = merge(run.model)
    for act in (
        lambda: next(run.fit(EXAMPLES)),
        lambda: run.save(tmp_path / "a.safetensors", EXAMPLES),
        lambda: run.resume(saved, EXAMPLES),
    ):
        with pytest.raises(ValueError, match="unmerge a merged one first"):
            act()
    unmerge(run.model, merged)
    run.resume(saved, EXAMPLES)


def test_a_refused_state_leaves_the_trainer_as_it_was(saved: Path) -> None:
    other = trainer(training=replace(TRAINING, weight_decay=0.1))
    before = adapter(other)
    with pytest.raises(ValueError, match="weight_decay"):
        other.resume(saved, EXAMPLES)
    assert other.step == 0
    for name, array in adapter(other).items():
        np.testing.assert_array_equal(before[name], array)


def test_a_save_that_fails_leaves_the_last_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full in the middle of it."""
    before = saved.read_bytes()

    def half(file: BinaryIO, *_: object, **__: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", half)
    with pytest.raises(OSError, match="No space left"):
        trainer().save(saved, EXAMPLES)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_the_file_says_what_it_belongs_to(saved: Path) -> None:
    _, metadata = mx.load(str(saved), return_metadata=True)
    progress = json.loads(metadata["progress"])
    assert progress["step"] == 4
    assert progress["identity"]["iters"] == 9
