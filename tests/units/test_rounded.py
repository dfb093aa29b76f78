"""Factors that are rounded once an update train to the same bits, with fewer operations."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_impl.config import LoRAConfig, TrainConfig
from mlx_impl.data import Example, training_windows
from mlx_impl.fast import ops
from mlx_impl.fast.forward import FAST
from mlx_impl.fast.memory_model import state_bytes
from mlx_impl.fast.memory_sizes import sizes_of
from mlx_impl.fast.rounded import Rounded, rounded_factors, rounded_of, rounded_once
from mlx_impl.fast.vectors import SCALED, VectorOptimizer
from mlx_impl.lora import LoRALinear, lora_layers
from mlx_impl.model import CausalLM
from mlx_impl.run import trainer
from mlx_impl.run.guard import NotFinite, restore, snapshot
from mlx_impl.run.trainer import LoRATrainer
from mlx_impl.train import StepRecord
from tests.nightly import mostly_at_night
from tests.tiny_model import TINY_LLAMA

pytestmark = pytest.mark.usefixtures("on_the_cpu")

MODEL = replace(TINY_LLAMA, num_hidden_layers=2)
EXAMPLES = [Example(tuple(range(start, start + 9)), (False,) * 4 + (True,) * 5) for start in range(1, 40, 5)]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "on_gpu", lambda: True)


ADAPTERS = {
    "all linears": LoRAConfig(rank=3, alpha=6.0),
    "two of a group": LoRAConfig(rank=3, alpha=6.0, target_modules=("q_proj", "v_proj", "down_proj")),
    "several ranks": LoRAConfig(
        rank=3,
        alpha=6.0,
        rank_pattern={"k_proj": 5, "gate_proj": 2},
        alpha_pattern={"k_proj": 10.0, "gate_proj": 4.0},
    ),
    "several scales": LoRAConfig(rank=3, alpha=6.0, alpha_pattern={"k_proj": 5.0}),
    "scale 7/3": LoRAConfig(rank=3, alpha=7.0),
    "DoRA": LoRAConfig(rank=3, alpha=6.0, use_dora=True),
    "dropout": LoRAConfig(rank=3, alpha=6.0, dropout=0.5),
}


def make_trainer(
    adapter: str = "all linears", compiled: bool = True, recomputed: bool = False
) -> LoRATrainer:
    mx.random.seed(1)
    model = CausalLM(MODEL)
    model.set_dtype(mx.bfloat16)
    training = TrainConfig(
        iters=3, batch_size=2, learning_rate=0.01, max_seq_length=16, grad_checkpoint=recomputed
    )
    made = LoRATrainer(model, ADAPTERS[adapter], training, compiled)
    mx.eval(model.state, made.optimizer.state)
    return made


def vectors_of(made: LoRATrainer) -> VectorOptimizer:
    assert isinstance(made.optimizer, VectorOptimizer)
    return made.optimizer


def trained(made: LoRATrainer) -> tuple[list[StepRecord], dict[str, mx.array]]:
    return list(made.fit(EXAMPLES)), dict(tree_flatten(made.model.trainable_parameters()))


SAME_BITS = [adapter for adapter in ADAPTERS if adapter != "scale 7/3"]
EACH_TIME = [
    ("all linears", True, True),
    *((adapter, False, number % 2 == 0) for number, adapter in enumerate(SAME_BITS)),
]
AT_NIGHT = product(SAME_BITS, [False, True], [False, True])


def test_each_update_begins_with_its_gradients_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[object] = []
    monkeypatch.setattr(mx, "async_eval", begun.append)
    assert len(trained(make_trainer(compiled=False))[0]) == len(begun) > 0


@pytest.mark.parametrize(
    ("adapter", "compiled", "recomputed"), mostly_at_night([*EACH_TIME, *AT_NIGHT], len(EACH_TIME)), ids=str
)
def test_training_is_the_same_to_the_bit(
    adapter: str, compiled: bool, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, factors = trained(make_trainer(adapter, compiled, recomputed))
    monkeypatch.setattr(trainer, "rounded_once", lambda model, optimizer: nullcontext())
    without, expected = trained(make_trainer(adapter, compiled, recomputed))
    assert [record.loss_nats for record in records] == [record.loss_nats for record in without]
    for name, array in expected.items():
        assert mx.array_equal(factors[name], array), name


def freeze_a(layer: LoRALinear) -> None:
    layer.freeze(keys=["lora_a"], recurse=False)


def drop(layer: LoRALinear) -> None:
    """Then each linear of its input gets an input of its own."""
    layer.dropout.p = 0.5


@pytest.mark.parametrize("change", [freeze_a, drop])
def test_linears_that_cannot_share_slices_train_all_the_same(
    change: Callable[[LoRALinear], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def factors() -> dict[str, mx.array]:
        first = make_trainer()
        change(lora_layers(first.model)["model.layers.0.self_attn.k_proj"])
        made = LoRATrainer(first.model, ADAPTERS["all linears"], first.training, compiled=False)
        trained(made)
        return {name: layer.lora_b for name, layer in lora_layers(made.model).items()}

    found = factors()
    monkeypatch.setattr(trainer, "rounded_once", lambda model, optimizer: nullcontext())
    for name, expected in factors().items():
        assert mx.array_equal(found[name], expected), name


@pytest.mark.parametrize(("second", "follows"), [(8, True), (12, False)])
def test_factors_share_a_slice_only_where_they_follow_one_another(second: int, follows: bool) -> None:
    """A of (4, 2) from 0 on, and another of (4, 2) right behind it or later."""
    kinds = ("lora_a", "lora_b", SCALED + "lora_a", SCALED + "lora_b")
    vectors = {kind: mx.arange(20).astype(mx.bfloat16) for kind in kinds}
    places = [Rounded(vectors, {"lora_a": start, "lora_b": 0}) for start in (0, second)]
    found = rounded_factors(places, [mx.zeros((4, 2))] * 2, [mx.zeros((2, 6))] * 2, mx.bfloat16)
    assert (found is not None) == follows
    assert found is None or mx.array_equal(found.a_RI, mx.arange(16).reshape(4, 4))


def test_a_copy_of_a_model_in_training_has_factors_of_its_own() -> None:
    made = make_trainer()
    for _ in made.fit(EXAMPLES):
        for copied in (copy.deepcopy(made.model), pickle.loads(pickle.dumps(made.model))):
            copied.train()
            assert {rounded_of(layer) for layer in lora_layers(copied).values()} == {None}


def test_the_memory_check_counts_them() -> None:
    made = make_trainer()
    with rounded_once(made.model, made.optimizer):
        held = sum(vector.nbytes for vector in vectors_of(made).rounded.values())
    sizes = sizes_of(made.model)
    assert state_bytes(sizes) - state_bytes(replace(sizes, itemsize=4)) == held > 0


def test_the_guard_keeps_no_rounded_factors() -> None:
    """They follow from the others."""
    made = make_trainer()
    for _ in made.fit(EXAMPLES):
        assert vectors_of(made).rounded
        assert not any("rounded" in name for name in [*made.guard.now, *made.guard.good[1]])


def test_with_a_scale_that_is_no_power_of_two_gradients_are_as_accurate() -> None:
    """Scaled factors are rounded where scaled products were: against float64, at most twice the error.

    The factors are small, as ten times larger ones would make errors of a rounding into tenths.
    """
    made = make_trainer("scale 7/3")
    waves = tree_map(lambda factor: mx.sin(100 * factor + 1) / 40, made.model.trainable_parameters())
    made.model.update(waves)
    vectors_of(made).init(waves)
    in_each = gradients(made)
    with rounded_once(made.model, made.optimizer):
        once = gradients(made)
    made.model.set_dtype(mx.float64)
    for name, true in gradients(made).items():
        error, usual = (mx.linalg.norm(found[name] - true) for found in (once, in_each))
        assert error < 2 * usual, name
        assert not mx.array_equal(once[name], in_each[name]), name


def gradients(made: LoRATrainer) -> dict[str, mx.array]:
    made.model.train()
    batch = next(training_windows(EXAMPLES, made.training, 0))[0]
    _, grads = nn.value_and_grad(made.model, FAST.batch_loss)(made.model, FAST.to_arrays(batch))
    return {name: array.astype(mx.float32) for name, array in tree_flatten(grads)}


def operations(made: LoRATrainer) -> Counter[str]:
    """Those of loss and gradients, not compiled, by name."""
    graph = io.StringIO()
    mx.export_to_dot(graph, gradients(made))
    return Counter(re.findall(r'label ?= ?"(\w+)"', graph.getvalue()))


def test_in_a_step_no_factor_is_cast_no_a_joined_and_nothing_scaled() -> None:
    made = make_trainer()
    before = operations(made)
    with rounded_once(made.model, made.optimizer):
        mx.eval(vectors_of(made).rounded)
        during = operations(made)
    blocks = MODEL.num_hidden_layers
    assert before["AsType"] - during["AsType"] == blocks * (4 + 7)  # A by input, B by linear
    assert before["Multiply"] - during["Multiply"] == blocks * (4 + 4)  # x A and B dy, by input
    assert before["Concatenate"] - during["Concatenate"] == blocks * 2  # q, k, v; gate, up


def test_the_rounded_factors_follow_every_change_of_the_factors() -> None:
    """An update, a state that is put back, factors that training starts with."""
    made = make_trainer()
    optimizer = vectors_of(made)

    def hold() -> None:
        for kind, vector in optimizer.factors.items():
            assert mx.array_equal(optimizer.rounded[kind], vector.astype(mx.bfloat16)), kind
            assert mx.array_equal(optimizer.rounded[f"scaled {kind}"], (2 * vector).astype(mx.bfloat16)), kind

    before = snapshot(made.model, optimizer)
    with rounded_once(made.model, optimizer):
        hold()
        optimizer.update(made.model, {kind: mx.ones_like(v) for kind, v in optimizer.factors.items()})
        hold()
        assert not mx.array_equal(optimizer.factors["lora_a"], before["factors.lora_a"])
        restore(made.model, optimizer, before)
        hold()
        optimizer.init({"lora_a": mx.ones((2, 3)), "lora_b": mx.ones((3, 2))})
        assert mx.array_equal(optimizer.rounded["lora_b"], mx.ones(6))


def test_after_training_factors_are_rounded_where_they_are_used() -> None:
    """Also after a run that ends in an error: another adapter may be put into the model."""
    made = make_trainer()
    next(iter(made.fit(EXAMPLES)))
    made.model.update(tree_map(lambda factor: factor * mx.nan, made.model.trainable_parameters()))
    with pytest.raises(NotFinite):
        list(made.fit(EXAMPLES))
    assert vectors_of(made).rounded == {}
    made.model.train()
    assert [rounded_of(layer) for layer in lora_layers(made.model).values()] == [None] * 14


def test_an_answer_between_two_updates_uses_the_factors_that_the_model_holds() -> None:
    made = make_trainer()
    for _ in made.fit(EXAMPLES):
        of_now = made.evaluate(EXAMPLES)
        held = made.model.trainable_parameters()
        made.model.update(tree_map(mx.zeros_like, held))
        assert made.evaluate(EXAMPLES) != of_now
        made.model.update(held)


def test_float32_and_a_cpu_need_no_rounded_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_trainer()
    with rounded_once(made.model, made.optimizer):
        assert vectors_of(made).rounded
    made.model.set_dtype(mx.float32)
    with rounded_once(made.model, made.optimizer):
        assert not vectors_of(made).rounded
    made.model.set_dtype(mx.bfloat16)
    monkeypatch.setattr(ops, "on_gpu", lambda: False)
    with rounded_once(made.model, made.optimizer):
        assert not vectors_of(made).rounded
