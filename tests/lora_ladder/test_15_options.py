"""Rung 15, options: every field of the configuration records matters, and has its effect.

Many trainers accept a setting and drop it. So each field is swept: at two values the results differ, and they
are the reference's. Checkpointing, gradient accumulation, freezing and bfloat16 are there for memory, which
is counted. MLX: a computation is lazy, so what holds memory is decided by when it is evaluated; and one
float32 constant makes all that follows it float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mlx_impl.config import LoRAConfig, TrainConfig
from mlx_impl.data import Batch
from tests.derived import UNIT_ROUNDOFF, Divergence, require, some_of, within
from tests.lora_ladder.bfloat16 import bfloat16_case, expected, rounded, with_other_digits
from tests.lora_ladder.cases import (
    LORA,
    SPEC,
    Case,
    make_batch,
    make_factors,
    make_weights,
    random_array,
    random_rows,
)
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.options import SWEEPS, Sweep, are_equal, run_at
from tests.lora_ladder.protocol import Arrays


@pytest.mark.parametrize("sweep", SWEEPS, ids=str)
def test_an_option_changes_the_results_and_gives_the_references(judge: Judge, sweep: Sweep) -> None:
    """Logits, losses, and the factors after one update, or after three for a field of `TrainConfig`."""
    runs = [run_at(sweep, value) for value in (sweep.one, sweep.other)]
    one, other = (judge.run(run.case, run.results) for run in runs)
    if are_equal(one, other):
        what = f"{sweep.name}: {sweep.one!r} and {sweep.other!r} give the same results to the bit"
        judge.report(lambda: fail(f"{judge.title}: accepted and dropped\n  {what}"))
    if not sweep.is_random:
        judge.subject = repr(sweep.other)
        run = runs[1]
        judge.given(other, run.case, run.results, run.num_updates * run.case.longest_sum)


def fail(report: str) -> None:
    raise Divergence(report)


def memory_case(lora: LoRAConfig | None = None, **fields: Any) -> Case:
    """A model whose activations need far more memory than its adapter."""
    spec, lora = replace(DEEP, **fields), lora or replace(LORA, rank=1)
    weights = make_weights(spec)
    return Case("memory", spec, lora, weights, make_factors(spec, lora, weights))


ROWS, TOKENS = 4, 32
DEEP = replace(
    SPEC, hidden_size=32, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)
FEW, MORE = 2, 12  # layers, and how many more
STATE = 4 * ROWS * TOKENS * DEEP.hidden_size  # bytes of one hidden state in float32
# What backpropagation through a block needs at least, in hidden states: the inputs of both norms; queries,
# keys, values and what attention gives; gate and up.
D, QUERIES, KEYS = DEEP.hidden_size, DEEP.num_attention_heads * 8, DEEP.num_key_value_heads * 8
NEEDED = (2 * D + 2 * QUERIES + 2 * KEYS + 2 * DEEP.intermediate_size) / D


def micro_batches(number: int, rows: int, tokens: int = TOKENS) -> list[Batch]:
    """Full rows, of which every second half counts."""
    many = (random_rows(SPEC.vocab_size, [tokens + 1] * rows, seed=40 + n) for n in range(number))
    return [make_batch(of_one, [tokens // 2] * rows) for of_one in many]


def peak_bytes(candidate: Any, case: Case, window: list[Batch], **training: Any) -> int:
    """Of one update; the least of two runs, because memory that is freed late only adds to it."""
    trainer = case.build(candidate)
    one_update = TrainConfig(iters=1, grad_accumulation_steps=len(window), **training)
    return min(trainer.peak_bytes([window], one_update) for _ in range(2))


def states_a_layer(candidate: Any, lora: LoRAConfig | None = None, **training: Any) -> float:
    """The bytes that each further layer holds at the peak, in hidden states of float32."""
    few, many = (
        peak_bytes(candidate, memory_case(lora, num_hidden_layers=number), micro_batches(1, ROWS), **training)
        for number in (FEW, FEW + MORE)
    )
    return (many - few) / MORE / STATE


# The second has a gradient to pass on where a block below has an adapter.
CHECKPOINTED = {
    "plain": replace(LORA, rank=1),
    "without an adapter": replace(LORA, rank=1, target_modules=r"model\.layers\.0\..*"),
    "dropout": replace(LORA, rank=1, dropout=0.25),
    "dora": replace(LORA, rank=1, use_dora=True),
}


@pytest.mark.needs("peak_bytes")
@pytest.mark.parametrize("lora", CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_a_checkpointed_block_holds_its_input_and_no_activations(
    candidate: Any, judge: Judge, lora: LoRAConfig
) -> None:
    """One hidden state, or a few; to recompute every other block would leave half of what a block needs."""
    held = states_a_layer(candidate, lora, grad_checkpoint=True)
    at_most("hidden states a checkpointed layer", held, NEEDED / 4, "what a block needs / 4")


@pytest.mark.needs("peak_bytes")
def test_gradient_accumulation_holds_one_micro_batch_at_a_time(candidate: Any, judge: Judge) -> None:
    """The next may begin before the last is freed, so twelve hold at most what two do."""
    case = memory_case(num_hidden_layers=FEW)
    batches = micro_batches(12, ROWS)
    one, twelve = (peak_bytes(candidate, case, batches[:number]) for number in (1, 12))
    at_most("bytes of twelve micro-batches", twelve, 2 * one, "twice those of one")


@pytest.mark.needs("peak_bytes")
def test_a_long_run_holds_no_more_than_a_short_one(candidate: Any, judge: Judge) -> None:
    """Nothing of an update is kept: neither its factors, nor its moments, nor its graph.

    Memory that is freed late may add a little, but not a quarter of the factors of twenty updates.
    """
    case = memory_case(num_hidden_layers=FEW)
    (batch,) = micro_batches(1, 1, 4)
    few, many = (
        min(case.build(candidate).peak_bytes([[batch]] * number, TrainConfig(iters=number)) for _ in range(2))
        for number in (4, 24)
    )
    factors = sum(4 * factor.size for factor in case.factors.values())
    at_most("bytes of 24 updates", many, few + 5 * factors, "those of 4 and five times the factors'")


@pytest.mark.needs("peak_bytes")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_holds_nothing_of_the_size_of_the_base(candidate: Any, judge: Judge, optimizer: str) -> None:
    """No copy, no gradient and no moments of frozen weights, each of which would be as large as they are.

    The base is large beside the few MB that a GPU's matrix library takes for itself.
    """
    case = memory_case(
        num_hidden_layers=FEW, hidden_size=1024, intermediate_size=2048, num_attention_heads=16, head_dim=64
    )
    base = sum(4 * weight.size for weight in case.weights.values())
    peak = peak_bytes(candidate, case, micro_batches(1, 1, 4), optimizer=optimizer)
    at_most("bytes of training", peak, base / 2, "half of the base's bytes")


def at_most(what: str, ours: float, limit: float, derivation: str) -> None:
    assert ours <= limit, f"{what}: expected at most {limit:.4g}, {derivation}, got {ours:.4g}"


every_kind = pytest.mark.parametrize(
    "name", ["untied", "tied", "qkv bias", "qk norm", "llama3 rope", "sliding window", "dora", "patterns"]
)


@pytest.mark.needs("in_bfloat16", "hidden_states")
@every_kind
def test_in_bfloat16_every_hidden_state_is_bfloat16(candidate: Any, judge: Judge, name: str) -> None:
    """One float32 constant on the way (a mask, an angle, a scale) would make all that follows it float32."""
    case = bfloat16_case(name)
    with candidate.in_bfloat16():
        states = case.build(candidate).hidden_states(case.batch.inputs_BT)
    wrong = with_other_digits(states)
    if wrong:
        judge.report(lambda: fail(f"{judge.title}: digits that bfloat16 does not have: {some_of(wrong)}"))


@pytest.mark.needs("in_bfloat16", "peak_bytes")
@pytest.mark.parametrize(
    "patterns",
    [{}, {"alpha_pattern": {"q_proj": 3.0, "up_proj": 5.0}}, {"rank_pattern": {"k_proj": 2, "gate_proj": 2}}],
    ids=["one scale", "alphas", "ranks"],
)
def test_in_bfloat16_activations_need_half_the_memory(
    candidate: Any, judge: Judge, patterns: dict[str, Any]
) -> None:
    """Three quarters at most, because a few of them may be float32 rightly; also with scales of their own."""
    lora = replace(LORA, rank=1, **patterns)
    in_float32 = states_a_layer(candidate, lora)
    with candidate.in_bfloat16():
        held = states_a_layer(candidate, lora)
    at_most("hidden states a layer", held, 0.75 * in_float32, "3/4 of float32's")


@pytest.mark.needs("in_bfloat16")
@every_kind
def test_in_bfloat16_loss_and_gradients_are_the_references(candidate: Any, judge: Judge, name: str) -> None:
    """Within bfloat16's rounding; and the gradients have digits that bfloat16 does not have."""
    case = bfloat16_case(name)

    def act(trainer: Any) -> Arrays:
        nats, num_targets = trainer.loss(case.batch)
        return {"loss": np.array(nats / num_targets), **trainer.gradients(case.batch)}

    with candidate.in_bfloat16():
        ours = judge.run(case, act)
    if not with_other_digits({n: x for n, x in ours.items() if n != "loss"}):
        judge.report(lambda: fail(f"{judge.title}: every gradient is rounded to bfloat16"))
    ref64, noise = expected(case, act, judge.oracle(torch.float64))
    judge.require_names(ours, ref64)
    source = "the noise of rounding to bfloat16"
    judge.report(
        lambda: require(judge.title, [within(n, ours[n], ref64[n], noise[n], 1, source) for n in ref64])
    )


@pytest.mark.needs("in_bfloat16", "initial_factors")
def test_in_bfloat16_dora_begins_with_the_lengths_in_float32(candidate: Any, judge: Judge) -> None:
    """Of the rows as the base has them; a sum of squares in bfloat16 would lose all digits but two."""
    case = bfloat16_case("dora")
    with candidate.in_bfloat16():
        trainer = case.build(candidate)
    factors, base = trainer.initial_factors(0), trainer.base()
    names = [name for name in case.factors if name.endswith("magnitude")]
    rows = {name: base[name.replace("magnitude", "weight")].astype(np.float64) for name in names}
    lengths = {name: np.linalg.norm(weight_OI, axis=1) for name, weight_OI in rows.items()}
    judge.hold([judge.rounded(n, factors[n], lengths[n], rows[n].shape[1]) for n in names])


@pytest.mark.needs("in_bfloat16", "loss_of_logits")
def test_the_loss_of_bfloat16_logits_is_formed_in_float32(judge: Judge, case: Case) -> None:
    """A log-sum-exp, and a sum over the targets, in bfloat16 would lose all digits but two."""
    logits_BTV = rounded(random_array("logits", (*case.batch.inputs_BT.shape, case.spec.vocab_size), 3.0))

    def act(trainer: Any) -> Arrays:
        return {"nats": np.array(trainer.loss_of_logits(logits_BTV, case.batch)[0])}

    with judge.candidate.in_bfloat16():
        ours = judge.run(case, act)
    judge.given(ours, case, act)


@pytest.mark.needs("in_bfloat16", "apply_gradients")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_in_bfloat16_the_optimizer_is_float32s(judge: Judge, optimizer: str) -> None:
    """Factors and moments are float32: given gradients move them as in float32."""
    case, training = bfloat16_case("untied"), TrainConfig(iters=5, learning_rate=2.0**-9, optimizer=optimizer)
    gradients = [
        {name: random_array(f"{name} {t}", x.shape, 0.1) for name, x in case.factors.items()}
        for t in range(5)
    ]

    def act(trainer: Any) -> Arrays:
        trainer.apply_gradients(gradients, training)
        return trainer.factors()

    with judge.candidate.in_bfloat16():
        ours = judge.run(case, act)
    judge.given(ours, case, act, longest_sum=5)


@pytest.mark.needs("in_bfloat16")
def test_in_bfloat16_gradients_are_summed_in_float32(candidate: Any, judge: Judge) -> None:
    """Seven times the same micro-batch is one; in bfloat16 the sum of three of them is rounded already."""
    case = bfloat16_case("untied")
    training = TrainConfig(iters=1, optimizer="sgd", learning_rate=1.0)

    def trained(number: int) -> Arrays:
        trainer = case.build(candidate)
        trainer.train([[case.batch] * number], replace(training, grad_accumulation_steps=number))
        return {name: x - case.factors[name] for name, x in trainer.factors().items()}

    with candidate.in_bfloat16():
        one, seven = trained(1), trained(7)
    stored = {name: float(np.linalg.norm(x)) * UNIT_ROUNDOFF for name, x in case.factors.items()}
    judge.hold([within(n, seven[n], one[n], stored[n], 7, "the rounding of the factor") for n in one])
