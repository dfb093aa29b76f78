"""Rung 11, metamorphic: changes of the input that must change nothing, or scale the result, do just that.

No reference is needed: the input is changed in a way whose effect is known, and the trainer is compared with
itself. If the change multiplies by a power of two, the bits must be equal. MLX: a compiled update has fixed
shapes and so gets padded batches; padding must have no effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlx_impl.data import Batch
from tests.lora_ladder.cases import (
    PROMPT_COUNTS,
    TOKEN_COUNTS,
    Case,
    make_batch,
    one_prompt_batch,
    random_rows,
    rows_of,
)
from tests.lora_ladder.judge import Act, Judge
from tests.lora_ladder.protocol import Arrays


def learned(batch: Batch) -> Act:
    """The mean loss over a batch, and its gradients."""

    def act(trainer: Any) -> Arrays:
        nats, num_targets = trainer.loss(batch)
        return {"mean nats": np.array(nats / num_targets), **trainer.gradients(batch)}

    return act


def test_the_order_of_the_rows_does_not_matter(case: Case, judge: Judge) -> None:
    """Loss and gradients of the batch with its rows rotated by one."""
    judge.alike((case, learned(case.batch)), (case, learned(rows_of(case.batch, [1, 2, 0]))))


@pytest.mark.canonical("pad_targets")
def test_more_padding_of_random_tokens_does_not_matter(case: Case, judge: Judge) -> None:
    """The batch is seven columns wider, and every padding position holds a random token."""
    wide = make_batch(random_rows(case.spec.vocab_size, TOKEN_COUNTS), PROMPT_COUNTS, width=20)
    rng = np.random.default_rng(31)
    noise_BT = rng.integers(0, case.spec.vocab_size, wide.inputs_BT.shape).astype(np.int32)
    inputs_BT = np.where(wide.inputs_BT == 0, noise_BT, wide.inputs_BT)
    targets_BT = np.where(wide.targets_BT == 0, noise_BT, wide.targets_BT)
    noisy = Batch(inputs_BT, targets_BT, wide.mask_BT, wide.num_tokens)
    judge.alike((case, learned(case.batch)), (case, learned(noisy)))


def test_a_batch_given_twice_has_the_same_mean(case: Case, judge: Judge) -> None:
    """Twice the sum of nats over twice the number of targets."""
    judge.alike((case, learned(case.batch)), (case, learned(rows_of(case.batch, [0, 1, 2, 0, 1, 2]))))


@pytest.mark.canonical("pad_targets")
def test_rows_with_a_common_prefix_add_up_to_the_rows_alone(case: Case, judge: Judge) -> None:
    """As with a shared system prompt: nats and gradients are the sums over the rows as single batches."""
    together = one_prompt_batch(case.spec.vocab_size)
    alone = [rows_of(together, [row]) for row in range(len(together.inputs_BT))]
    judge.alike((case, lambda t: summed(t, [together])), (case, lambda t: summed(t, alone)))


def summed(trainer: Any, parts: Sequence[Batch]) -> Arrays:
    """The sums of nats and of their gradients over all parts."""
    sums: Arrays = {}
    for part in parts:
        nats, num_targets = trainer.loss(part)
        gradients = {name: num_targets * value for name, value in trainer.gradients(part).items()}
        for name, value in {"nats": np.array(nats), **gradients}.items():
            sums[name] = sums.get(name, 0) + value
    return sums


def rescaled(case: Case, alpha: float, a: float, b: float) -> Case:
    """alpha, every A and every B, multiplied by these numbers."""
    by = {"lora_a": np.float32(a), "lora_b": np.float32(b)}
    factors = {name: value * by[name.rpartition(".")[2]] for name, value in case.factors.items()}
    return replace(case, lora=replace(case.lora, alpha=alpha * case.lora.alpha), factors=factors)


MOVES = {"alpha to b": (4.0, 1.0, 0.25), "alpha to a": (4.0, 0.25, 1.0), "b to a": (1.0, 4.0, 0.25)}


@pytest.mark.parametrize(("alpha", "a", "b"), MOVES.values(), ids=MOVES)
def test_factors_of_two_move_freely_between_alpha_a_and_b(
    case: Case, candidate: Any, judge: Judge, alpha: float, a: float, b: float
) -> None:
    """Only the product alpha A B matters: one of the three times 4 and another by 4 changes no bit."""
    moved, tokens_BT = rescaled(case, alpha, a, b), case.batch.inputs_BT
    one, other = ({"logits": c.build(candidate).logits(tokens_BT)} for c in (case, moved))
    judge.same_computation(other, one, case.longest_sum)


@pytest.mark.canonical("scale")
@pytest.mark.parametrize("times", [2, 6])
@pytest.mark.parametrize("first", [True, False], ids=["zeros last", "zeros first"])
def test_the_update_is_proportional_to_alpha_over_rank(
    case: Case, judge: Judge, times: int, first: bool
) -> None:
    """Two or six times rank and alpha, with zeros in what is new of A and B, change nothing."""
    wider = {}
    for name, value in case.factors.items():
        zeros = [np.zeros_like(value)] * (times - 1)
        parts = [value, *zeros] if first else [*zeros, value]
        wider[name] = np.concatenate(parts, axis=1 if name.endswith("lora_a") else 0)
    lora = replace(case.lora, rank=times * case.lora.rank, alpha=times * case.lora.alpha)

    def logits(trainer: Any) -> Arrays:
        return {"logits": trainer.logits(case.batch.inputs_BT)}

    judge.alike((case, logits), (replace(case, lora=lora, factors=wider), logits))


def renumbered(vocab_size: int, first: int, last: int) -> np.ndarray:
    """A random order of the token ids that begins with one and ends with another: new token id -> old one."""
    order = np.random.default_rng(37).permutation(vocab_size)
    inner = order[~np.isin(order, [first, last])]
    return np.concatenate([[first], inner, [last]])


@pytest.mark.parametrize("case", ["untied", "tied"], indirect=True)
def test_renumbering_the_tokens_changes_nothing(case: Case, judge: Judge) -> None:
    """The rows of embedding and head are permuted, and the token ids of the batch with them.

    Two tokens that are inputs and targets become the first and the last of the vocabulary.
    """
    order = renumbered(case.spec.vocab_size, *np.unique(case.batch.inputs_BT[0, 8:])[:2].tolist())
    number = np.argsort(order).astype(np.int32)  # old token id -> new token id
    weights = dict(case.weights)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = weights[name][order]
    inputs_BT, targets_BT, mask_BT, num_tokens = case.batch[:4]
    renamed = Batch(number[inputs_BT], number[targets_BT], mask_BT, num_tokens)
    judge.alike((case, learned(case.batch)), (replace(case, weights=weights), learned(renamed)))


@pytest.mark.canonical("pad_targets")
def test_prompt_and_reply_add_up_to_the_whole(case: Case, judge: Judge, candidate: Any) -> None:
    """Only the set of targets matters: nats over the prompt plus nats over the reply are nats over both."""
    rows = random_rows(case.spec.vocab_size, TOKEN_COUNTS)
    whole, reply = make_batch(rows, (1, 1, 1)), make_batch(rows, PROMPT_COUNTS)
    prompt = reply._replace(mask_BT=whole.mask_BT & ~reply.mask_BT)

    def total(trainer: Any, *parts: Batch) -> Arrays:
        return {"nats": np.array(sum(trainer.loss(part)[0] for part in parts))}

    trainer = case.build(candidate)
    assert trainer.loss(whole)[1] == trainer.loss(prompt)[1] + trainer.loss(reply)[1]
    judge.alike((case, lambda t: total(t, prompt, reply)), (case, lambda t: total(t, whole)))
