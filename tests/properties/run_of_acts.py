"""A state machine of everything that a user can do with a run, in any order; its PyTorch twin does the same.

It computes in float64, so that the comparison is sharp. MLX cannot write float64 to safetensors, so its bits
are stored as integers. Dropout is on with fixed masks: the same features of A's input are dropped in every
update, so an update without dropout, or an evaluation with it, gives another number.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlx_impl.config import TrainConfig
from mlx_impl.data import Example, evaluation_batches, training_windows
from mlx_impl.run import merging
from mlx_impl.run.merging import Merged
from mlx_impl.run.trainer import LoRATrainer
from mlx_impl.train import StepRecord
from tests.derived import UNIT_ROUNDOFF, noise_of, require, require_same_bits
from tests.lora_ladder.protocol import Arrays
from tests.properties.agreement import UNIT_ROUNDOFF_64, in_double, verdicts
from tests.properties.strategies import SEEDS, Drawn, cases, train_configs
from tests.properties.twin import Twin, TwinState
from tests.trainers.given_masks import with_given_masks
from tests.trainers.mlx_impl import MlxTrainer

ITERS = 16  # a power of two, see train_configs
DROPOUT = 0.25
PROMISE = 1e-10  # relative, over a trajectory, as in test_random_models
NUM_TWINS = 3  # the first is exact, the others are moved by rounding, for the noise
MARK = ".float64"


@contextmanager
def float64_in_safetensors() -> Iterator[None]:
    """MLX refuses to write float64, so its bits are written as uint64 and read back as float64."""
    save: Callable = mx.save_safetensors
    load: Callable = mx.load

    def save_bits(file: BinaryIO, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
        doubles = {name for name, array in arrays.items() if array.dtype == mx.float64}
        bits = {
            n + MARK * (n in doubles): a.view(mx.uint64) if n in doubles else a for n, a in arrays.items()
        }
        save(file, bits, metadata=metadata)

    def load_bits(path: str, **options: Any) -> tuple[dict[str, mx.array], dict[str, str]]:
        bits, metadata = load(path, **options)
        doubles = {n.removesuffix(MARK): a.view(mx.float64) for n, a in bits.items() if n.endswith(MARK)}
        return {**{n: a for n, a in bits.items() if not n.endswith(MARK)}, **doubles}, metadata

    with patch.object(mx, "save_safetensors", save_bits), patch.object(mx, "load", load_bits):
        yield


@st.composite
def example_lists(draw: st.DrawFn, vocab_size: int) -> list[Example]:
    """Examples with at least one target each."""
    rng = np.random.default_rng(draw(SEEDS))
    counts = draw(st.lists(st.integers(2, 9), min_size=1, max_size=6))
    prompts = [draw(st.integers(1, count - 1)) for count in counts]
    return [
        Example(tuple(rng.integers(1, vocab_size, n).tolist()), (False,) * p + (True,) * (n - p))
        for n, p in zip(counts, prompts, strict=True)
    ]


def make_masks(case: Drawn, seed: int) -> Arrays:
    """A mask keep_I for every adapted linear, the same at every position."""
    rng = np.random.default_rng(seed)
    inputs = {n.removesuffix(".lora_a"): a.shape[0] for n, a in case.factors.items() if n.endswith("lora_a")}
    return {name: rng.random(num_in) >= DROPOUT for name, num_in in inputs.items()}


class RunOfActs(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.stack.enter_context(MlxTrainer.exact())
        self.stack.enter_context(float64_in_safetensors())
        self.merged: Merged | None = None
        self.merged_twins: list[Twin] = []  # compared with while merged; merged weights near float32
        self.saved: dict[str, tuple[int, list[tuple[int, float]], list[TwinState]]] = {}

    def teardown(self) -> None:
        self.stack.close()

    @initialize(
        case=cases(dropout=DROPOUT),
        training=train_configs(ITERS, ["adamw"]),  # SGD has no state that a bug could lose
        batch_size=st.integers(1, 3),
        num_batches=st.integers(1, 2),
        plain=st.booleans(),
        data=st.data(),
    )
    def begin(
        self,
        case: Drawn,
        training: TrainConfig,
        batch_size: int,
        num_batches: int,
        plain: bool,
        data: st.DataObject,
    ) -> None:
        self.case = in_double(case)
        self.training = replace(training, batch_size=batch_size, grad_accumulation_steps=num_batches)
        self.examples = data.draw(example_lists(case.spec.vocab_size))
        self.held_out = data.draw(example_lists(case.spec.vocab_size))
        self.masks = make_masks(case, seed=len(self.examples))
        self.trainer = self.new_trainer(self.case, plain)
        self.records: Iterator[StepRecord] | None = None
        roundings = [self.case.moved(seed, UNIT_ROUNDOFF_64) for seed in range(1, NUM_TWINS)]
        self.twins = [Twin(c, self.training, self.masks) for c in (self.case, *roundings)]

    def new_trainer(self, case: Any, plain: bool) -> LoRATrainer:
        """On a float64 model that already has its adapter; by the plain or the fast path."""
        built = case.build(MlxTrainer)
        trainer = LoRATrainer(built.model, self.case.lora, self.training, plain=plain)
        # The masks are the same at every position, so the loss need not gather them.
        with_given_masks(built.model, self.masks, trainer.loss)
        return trainer

    # The rules: what a user can do.

    @precondition(lambda self: self.merged is None and self.trainer.step < ITERS)
    @rule(num_updates=st.integers(1, 3))
    def train(self, num_updates: int) -> None:
        """One iterator of `fit` is used until a state is loaded; other acts happen between its updates."""
        for _ in range(min(num_updates, ITERS - self.trainer.step)):
            step = self.trainer.step
            window = next(training_windows(self.examples, self.training, step))
            self.records = self.records or self.trainer.fit(self.examples)
            record = next(self.records)
            assert record.step == self.trainer.step == step + 1
            self.agree("loss of an update", record.loss_nats, partial(Twin.update, window=window))

    @rule()
    def validate(self) -> None:
        batches = list(evaluation_batches(self.held_out, self.training.batch_size))
        loss_nats = self.trainer.validate(self.held_out)
        assert self.trainer.validation[-1] == (self.trainer.step, loss_nats)
        self.agree("validation", loss_nats, lambda twin: twin.evaluate(batches))

    @precondition(lambda self: self.merged is None)
    @rule(name=st.sampled_from(["one", "other"]))
    def save(self, name: str) -> None:
        """It overwrites an older state with the same name."""
        self.trainer.save(self.folder / name, self.examples)
        states = [twin.state() for twin in self.twins]
        self.saved[name] = (self.trainer.step, list(self.trainer.validation), states)

    @precondition(lambda self: self.merged is None and self.saved)
    @rule(new=st.sampled_from([None, "fast", "plain"]), data=st.data())
    def load(self, new: str | None, data: st.DataObject) -> None:
        """Load any saved state into this trainer, or into a new one (plain or fast) with other factors."""
        self.resume(data.draw(st.sampled_from(sorted(self.saved))), new)

    @precondition(lambda self: self.merged is None)
    @rule(before=st.integers(0, 2), after=st.integers(0, 2), new=st.sampled_from(["fast", "plain"]))
    def stop_and_go_on(self, before: int, after: int, new: str) -> None:
        """Save and resume in a new trainer, the most frequent use."""
        self.train(before)
        self.save("one")
        self.resume("one", new)
        self.train(after)

    def resume(self, name: str, new: str | None) -> None:
        if new is not None:
            self.trainer = self.new_trainer(self.case.with_zero_b(), plain=new == "plain")
        self.trainer.resume(self.folder / name, self.examples)
        self.records = None
        step, validation, states = self.saved[name]
        assert (self.trainer.step, self.trainer.validation) == (step, validation)
        for twin, state in zip(self.twins, states, strict=True):
            twin.go_back(state)

    @precondition(lambda self: self.merged is None)
    @rule()
    def merge(self) -> None:
        self.before = MlxTrainer.factors(self.view())
        self.merged = merging.merge(self.trainer.model)
        self.merged_twins = [self.twins[0].merged(seed) for seed in range(NUM_TWINS)]

    @precondition(lambda self: self.merged is not None)
    @rule()
    def unmerge(self) -> None:
        assert self.merged is not None
        merging.unmerge(self.trainer.model, self.merged)
        self.merged, self.merged_twins = None, []
        require_same_bits("unmerged", MlxTrainer.factors(self.view()), self.before)

    @precondition(lambda self: self.merged is not None)
    @rule(act=st.sampled_from(["merge", "train", "load"]))
    def refuse(self, act: str) -> None:
        """A merged model refuses to merge again, to train, and to load a state."""
        acts: dict[str, Callable[[], object]] = {
            "merge": lambda: merging.merge(self.trainer.model),
            "train": lambda: next(self.trainer.fit(self.examples)),
            "load": lambda: self.trainer.resume(self.folder / min(self.saved), self.examples),
        }
        is_possible = {"train": self.trainer.step < ITERS, "load": bool(self.saved)}.get(act, True)
        if is_possible:
            with pytest.raises(ValueError):
                acts[act]()

    # The invariants: what holds after every act.

    @invariant()
    def logits_are_the_twins(self) -> None:
        tokens_BT = self.case.batch.inputs_BT
        self.agree("logits", self.logits(), lambda twin: twin.logits(tokens_BT))

    @invariant()
    def factors_are_the_twins(self) -> None:
        if self.merged is None:
            expected, *roundings = [twin.factors() for twin in self.twins]
            self.hold(MlxTrainer.factors(self.view()), expected, roundings)

    @invariant()
    def the_base_is_what_it_was(self) -> None:
        if self.merged is None:
            masks = {f"{name}.dropout.keep_BTI" for name in self.masks}
            base = MlxTrainer.base(self.view())
            require_same_bits("base", {n: v for n, v in base.items() if n not in masks}, self.case.weights)

    def logits(self) -> np.ndarray:
        """The logits; the train or eval mode of the model stays as it was."""
        was_training = self.trainer.model.training
        logits_BTV = MlxTrainer.logits(self.view(), self.case.batch.inputs_BT)
        self.trainer.model.train(was_training)
        return logits_BTV

    def view(self) -> Any:
        """The ladder's adapter around this trainer's model, for its accessors."""
        view = MlxTrainer.__new__(MlxTrainer)
        view.model = self.trainer.model
        return view

    def agree(self, what: str, ours: Any, act: Callable[[Twin], Any]) -> None:
        expected, *roundings = [{what: np.asarray(act(twin))} for twin in (*self.twins, *self.merged_twins)]
        self.hold({what: np.asarray(ours)}, expected, roundings)

    def hold(self, ours: Arrays, expected: Arrays, roundings: list[Arrays]) -> None:
        unit = UNIT_ROUNDOFF if self.merged else UNIT_ROUNDOFF_64
        k = self.case.longest_sum * max(1, self.trainer.step)
        noise = noise_of(roundings, expected)
        worst = require("run of acts", verdicts(ours, expected, noise, np.sqrt(k) * unit, PROMISE))
        note(f"{worst.name} used {worst.used:.0%}")
