"""Examples for the claims about data and `fit`, and how a trainer's batches are read back into examples.

Every example begins with a token of its own, which stands nowhere else. So a row tells which examples it
holds, whatever the trainer calls them, and where each of them begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_impl.config import LoRAConfig, TrainConfig
from mlx_impl.data import Batch
from tests.derived import Divergence, some_of
from tests.lora_ladder.cases import (
    SPEC,
    Case,
    Draw,
    cached_for_each_draw,
    make_factors,
    make_weights,
)
from tests.lora_ladder.protocol import Arrays, Examples

FIRST_TOKENS = 401  # example i begins with this token + i; all other tokens are smaller
VOCABULARY = 809
BATCHINGS = ("plain", "grouped", "packed")

# For the model of the other rungs, whose vocabulary has 61 tokens. Their inputs add up to 35.
TO_FIT, HELD_OUT = (9, 3, 12, 5, 2, 7, 4), (6, 17, 3, 8, 5)
SMALL_FIRST_TOKENS = 41
FIT_CAPACITY, PACK_CAPACITY = 12, 16  # one example of HELD_OUT has more

Row = tuple[int, ...]  # numbers of examples, from 0
Order = list[list[list[Row]]]  # of every update, of every micro-batch, its rows


@dataclass(frozen=True)
class Place:
    """Where an example is in a batch: its inputs begin at this position of this row."""

    number: int
    row: int
    start: int


@cached_for_each_draw
def small_case(vocab_size: int = VOCABULARY) -> Case:
    """A model that trains quickly, because it is the batches that are judged."""
    spec = replace(SPEC, vocab_size=vocab_size, num_hidden_layers=1)
    lora, weights = LoRAConfig(rank=1, target_modules=("q_proj",)), make_weights(spec)
    return Case("small", spec, lora, weights, make_factors(spec, lora, weights))


def make_examples(lengths: Sequence[int], first_tokens: int = FIRST_TOKENS, seed: int = 61) -> Examples:
    """Random tokens and flags; at least one token after the first is a target, and not always the last."""
    rng = Draw.rng(seed)
    examples = []
    for number, length in enumerate(lengths):
        tokens, is_target = rng.integers(1, first_tokens, length), rng.random(length) < 0.5
        tokens[0], is_target[-1] = first_tokens + number, is_target[-1] or not is_target[1:].any()
        examples.append((tuple(tokens.tolist()), tuple(is_target.tolist())))
    return examples


def random_lengths(count: int, seed: int = 67) -> list[int]:
    """Of 2 to 25 tokens."""
    return Draw.rng(seed).integers(2, 26, count).tolist()


def num_inputs(example: tuple[Sequence[int], Sequence[bool]]) -> int:
    return len(example[0]) - 1


def places_in(batch: Batch, examples: Examples) -> list[Place]:
    """The examples that a batch holds. A row without one, and without a target, is padding."""
    number_of = {tokens[0]: number for number, (tokens, _) in enumerate(examples)}
    places = []
    for row, inputs_T in enumerate(batch.inputs_BT.tolist()):
        start = 0
        while start < len(inputs_T) and inputs_T[start] in number_of:
            number = number_of[inputs_T[start]]
            places.append(Place(number, row, start))
            start += num_inputs(examples[number])
        if start == 0 and batch.mask_BT[row].any():
            raise Divergence(f"a row begins with token {inputs_T[0]}, and no example does")
    return places


def rows_in(batch: Batch, examples: Examples) -> list[Row]:
    places = places_in(batch, examples)
    rows = range(len(batch.inputs_BT))
    numbers = [tuple(place.number for place in places if place.row == row) for row in rows]
    return [row for row in numbers if row]


def trained_on(candidate: Any, examples: Examples, training: TrainConfig, case: Case | None = None) -> Order:
    """The examples of every update."""
    windows = (case or small_case()).build(candidate).micro_batches(examples, training)
    if len(windows) != training.iters:
        raise Divergence(f"a run of {training.iters} updates was asked for, got {len(windows)}")
    return [[rows_in(batch, examples) for batch in window] for window in windows]


def numbers_in(windows: Order) -> list[int]:
    return [number for window in windows for batch in window for row in batch for number in row]


def epochs_of(order: Order, num_examples: int) -> list[Order]:
    """The updates of each whole epoch; Divergence where an example comes twice before all have come once."""
    epochs: list[Order] = []
    epoch: Order = []
    seen: set[int] = set()
    for update, window in enumerate(order, 1):
        for number in numbers_in([window]):
            if number in seen:
                missing = some_of([f"{n}" for n in range(num_examples) if n not in seen])
                raise Divergence(
                    f"update {update} trains on example {number} again, in an epoch that lacks {missing}"
                )
            seen.add(number)
        epoch.append(window)
        if len(seen) == num_examples:
            epochs.append(epoch)
            epoch, seen = [], set()
    return epochs


def named_contents(
    windows: Sequence[Sequence[Batch]], examples: Examples
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, ours, expected) of inputs, targets and flags of every example; and of targets in the padding."""
    for update, window in enumerate(windows, 1):
        for batch in window:
            mask_BT, places = batch.mask_BT.copy(), places_in(batch, examples)
            if len(batch.numbers):
                found = np.array([place.number for place in places])
                yield f"numbers of the examples in update {update}", np.array(batch.numbers), found
            for place in places:
                tokens, is_target = map(np.array, examples[place.number])
                here = (place.row, slice(place.start, place.start + len(tokens) - 1))
                mask_BT[here] = False
                name = f"example {place.number} in update {update}"
                yield f"{name}: inputs", batch.inputs_BT[here], tokens[:-1]
                yield f"{name}: targets", batch.targets_BT[here], tokens[1:]
                yield f"{name}: flags", batch.mask_BT[here].astype(int), is_target[1:].astype(int)
            yield f"targets in the padding of update {update}", mask_BT.sum(), np.array(0)


def alone(examples: Examples) -> Batch:
    """One example a row, padded with 0; position t predicts token t + 1."""
    width = max(map(num_inputs, examples))
    tokens = np.zeros((len(examples), width + 1), dtype=np.int32)
    is_target = np.zeros((len(examples), width + 1), dtype=bool)
    for row, (of_example, flags) in enumerate(examples):
        tokens[row, : len(of_example)], is_target[row, : len(flags)] = of_example, flags
    return Batch(tokens[:, :-1], tokens[:, 1:], is_target[:, 1:], sum(map(num_inputs, examples)))


def packed(case: Case, candidate: Any, examples: Examples) -> Batch:
    """All examples in one packed batch, as the trainer makes it."""
    training = TrainConfig(iters=1, batch_size=len(examples), batching="packed", max_seq_length=PACK_CAPACITY)
    ((batch,),) = case.build(candidate).micro_batches(examples, training)
    return batch


def to_pack() -> dict[str, Examples]:
    """Examples of unequal lengths; some that begin with four tokens alike, as under a system prompt; and two
    that together fill a row with the inputs of a third, which fills another one.
    """
    examples = make_examples(TO_FIT, SMALL_FIRST_TOKENS)
    prompt = tuple(range(21, 25))
    (half, _), (_, other_flags) = halves = make_examples([PACK_CAPACITY // 2 + 1] * 2, SMALL_FIRST_TOKENS)
    whole = (half[:-1] + half, halves[0][1][:-1] + other_flags)
    return {
        "unequal lengths": examples,
        "one prompt": [
            ((*prompt, *tokens), ((False,) * len(prompt) + is_target)) for tokens, is_target in examples[1:6]
        ],
        "rows of the same tokens": [halves[0], (half, other_flags), whole],
    }


def to_fit() -> Examples:
    return make_examples(TO_FIT, SMALL_FIRST_TOKENS)


def held_out() -> Examples:
    """For validation, with numbers of targets that are far from alike."""
    return make_examples(HELD_OUT, SMALL_FIRST_TOKENS, seed=71)


def fitting(batching: str) -> TrainConfig:
    """Four updates: with plain batching two an epoch, of two micro-batches, the last of one example."""
    return TrainConfig(
        iters=4,
        batch_size=2,
        grad_accumulation_steps=2,
        batching=batching,
        max_seq_length=FIT_CAPACITY,
        grad_checkpoint=batching != "plain",
        learning_rate=0.01,
        lr_schedule="cosine",
        warmup_steps=2,
        weight_decay=0.1,
    )


def fitted(
    trainer: Any, examples: Examples, training: TrainConfig, validation: Examples = (), *folder: Path
) -> Arrays:
    """The losses, the validation losses if there are any, and the factors in the end."""
    losses, validations = trainer.fit(examples, training, training.iters, validation, *folder)
    results = {"losses": losses} | ({"validation losses": validations} if validation else {})
    return {name: np.array(values) for name, values in results.items()} | trainer.factors()
