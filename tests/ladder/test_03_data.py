"""Rung 3, data: what a run trains on. Every example once an epoch, in random order, every token in its place.

The batches are those that reach the training step. They are read back into examples (`examples.py`), so it
does not matter how a trainer makes them. The last claims are about the step before: a data file, a tokenizer
and a chat template become examples. MLX: a `take` past the end of an array reads something and raises
nothing, so a wrong index goes unnoticed.
Source on packing: Krell et al. 2021, "Efficient Sequence Packing", section 4.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_impl.config import TrainConfig
from tests.derived import Divergence
from tests.ladder.cases import Case
from tests.ladder.chance import FALSE_ALARM
from tests.ladder.chat import chat, example_of, write_lines, write_tokenizer
from tests.ladder.examples import (
    BATCHINGS,
    Order,
    Row,
    epochs_of,
    make_examples,
    named_contents,
    num_inputs,
    numbers_in,
    places_in,
    random_lengths,
    small_case,
    trained_on,
)
from tests.ladder.judge import Judge
from tests.ladder.protocol import Arrays, Examples

EPOCHS = 3
CAPACITY = 28  # inputs of a packed row; the longest random example has 24
# (examples, batch_size, grad_accumulation_steps): no remainder, remainders of both, one batch and less, more
# batches than a trainer may sort at once, more examples than a byte can count.
SIZES = [(8, 2, 2), (23, 3, 2), (19, 2, 3), (1, 1, 1), (2, 4, 2), (53, 1, 4), (259, 32, 1)]
MANY = 14  # P(at least k of the neighbours in one order are neighbours in a random one) <= 2 / k!

needs_batches = pytest.mark.needs("micro_batches")
needs_reading = pytest.mark.needs("read_examples")
each_batching = pytest.mark.parametrize("batching", BATCHINGS)


def settings(batching: str, num_examples: int, size: int = 2, steps: int = 1) -> TrainConfig:
    """Three epochs; more of them where packing needs fewer rows than there are examples."""
    return TrainConfig(
        iters=EPOCHS * math.ceil(num_examples / (size * steps)),
        batch_size=size,
        grad_accumulation_steps=steps,
        batching=batching,
        max_seq_length=CAPACITY,
    )


def whole_epochs(judge: Judge, examples: Examples, training: TrainConfig) -> list[Order]:
    return judge.report(lambda: epochs_of(trained_on(judge.candidate, examples, training), len(examples)))


def portions(total: int, size: int) -> list[int]:
    """Equal portions, and the rest."""
    return [size] * (total // size) + [total % size] * bool(total % size)


@needs_batches
@each_batching
@pytest.mark.parametrize(("num_examples", "size", "steps"), SIZES)
def test_each_example_is_trained_once_an_epoch_in_batches_of_the_size_asked_for(
    judge: Judge, batching: str, num_examples: int, size: int, steps: int
) -> None:
    """What is left at the end of an epoch makes a smaller batch, and a window of fewer micro-batches."""
    examples = make_examples(random_lengths(num_examples))
    epochs = whole_epochs(judge, examples, settings(batching, num_examples, size, steps))
    assert len(epochs) >= EPOCHS
    for epoch in epochs:
        rows = [len(batch) for window in epoch for batch in window]
        if batching == "grouped":  # its batches come in random order
            rows.sort(reverse=True)
        names = "rows of an epoch's micro-batches", "micro-batches of an epoch's windows"
        ours = np.array(rows), np.array([len(window) for window in epoch])
        expected = np.array(portions(sum(rows), size)), np.array(portions(len(rows), steps))
        judge.same_bits(dict(zip(names, ours, strict=True)), dict(zip(names, expected, strict=True)))


EVERY_LENGTH = [*range(2, 71), 300]
CONTENTS: dict[str, tuple[Callable[[], Examples], int]] = {
    "every length": (lambda: make_examples(EVERY_LENGTH), 809),
    "ids beyond 16 bits": (lambda: make_examples(random_lengths(9), first_tokens=69_000), 70_001),
}


@needs_batches
@each_batching
@pytest.mark.parametrize("name", CONTENTS)
def test_every_token_and_every_flag_of_an_example_is_in_its_place(
    candidate: Any, judge: Judge, name: str, batching: str
) -> None:
    """Position t predicts token t + 1; a flag stays with its token; padding is never a target.

    An example ends with its last target. None is cut, not even one that is longer than a packed row.
    """
    make, vocab_size = CONTENTS[name]
    examples, size = make(), 3 if batching == "packed" else 1
    training = replace(settings(batching, 1, size), iters=-(-len(make()) // size))
    windows = small_case(vocab_size).build(candidate).micro_batches(examples, training)
    contents = judge.report(lambda: list(named_contents(windows, examples)))
    judge.same_bits({name: ours for name, ours, _ in contents}, {name: x for name, _, x in contents})


@needs_batches
@each_batching
def test_a_batch_counts_its_inputs_without_padding(candidate: Any, judge: Judge, batching: str) -> None:
    """An example of n tokens has n - 1 inputs."""
    examples = make_examples(random_lengths(11))
    windows = small_case().build(candidate).micro_batches(examples, settings(batching, 11, 3))
    for update, window in enumerate(windows, 1):
        for batch in window:
            places, name = places_in(batch, examples), f"num_tokens in update {update}"
            expected = sum(num_inputs(examples[place.number]) for place in places)
            judge.same_bits({name: batch.num_tokens}, {name: expected})


@needs_batches
@each_batching
def test_every_epoch_and_every_seed_has_an_order_of_its_own(judge: Judge, batching: str) -> None:
    """Three epochs of the seeds 0, 1 and 2; two of them also differ where seed + epoch is the same number.

    An epoch orders 15 rows or batches at least, and two of 9 random orders are alike in 36 / 15! = 3e-11.
    """
    examples = make_examples(random_lengths(43))
    orders = {}
    for seed in range(3):
        training = replace(settings(batching, 43, steps=3), data_seed=seed)
        for epoch, order in enumerate(whole_epochs(judge, examples, training)[:EPOCHS], 1):
            orders[f"epoch {epoch} of data_seed {seed}"] = numbers_in(order)
    alike = [
        f"{one} and {other}"
        for one, other in itertools.combinations(orders, 2)
        if orders[one] == orders[other]
    ]
    claim(judge, not alike, f"the same order of the examples in {'; '.join(alike)}")


def require(holds: bool, message: str) -> None:
    __tracebackhide__ = True
    if not holds:
        raise Divergence(message)


def claim(judge: Judge, holds: bool, message: str) -> None:
    __tracebackhide__ = True
    judge.report(lambda: require(holds, message))


@needs_batches
@each_batching
def test_the_data_seed_alone_decides_the_order(candidate: Any, judge: Judge, batching: str) -> None:
    """Not another setting, not the tokens, not what drew random numbers before."""
    lengths = random_lengths(23)
    examples, training = make_examples(lengths), replace(settings(batching, 23, 2, 2), data_seed=5)
    expected = trained_on(candidate, examples, training)
    others = {
        "a longer run": (examples, replace(training, iters=training.iters + 4)),
        "another seed": (examples, replace(training, seed=3)),
        "another optimizer": (examples, replace(training, optimizer="sgd", learning_rate=0.1)),
        "a schedule": (examples, replace(training, lr_schedule="cosine", warmup_steps=2, max_grad_norm=1.0)),
        "other tokens": (make_examples(lengths, seed=62), training),
    }
    for name, (given, changed) in others.items():
        for draw in (random.seed, np.random.seed, mx.random.seed):
            draw(len(name))
        ours = trained_on(candidate, given, changed)[: training.iters]
        claim(judge, ours == expected, f"{name} changes the order")


@needs_batches
def test_no_order_reminds_of_the_file_or_of_another_epoch(judge: Judge) -> None:
    """Plain batches: neighbours in the file are no neighbours in an epoch, nor are those of the last epoch.

    For k pairs of neighbours to stay together n! / (n - k)! / k! choices have (n - k)! orders each, in either
    direction: at least k do so with probability 2 / k!, here 2e-11.
    """
    examples = make_examples(random_lengths(100))
    orders = {"the file": list(range(100))}
    for number, epoch in enumerate(whole_epochs(judge, examples, settings("plain", 100, steps=5)), 1):
        orders[f"epoch {number}"] = numbers_in(epoch)
    for (one, before), (other, after) in itertools.combinations(orders.items(), 2):
        pairs = [set(map(frozenset, itertools.pairwise(order))) for order in (before, after)]
        both = len(pairs[0] & pairs[1])
        message = f"{both} of 99 neighbours in {one} are neighbours in {other}, by chance at most {MANY - 1}"
        claim(judge, both < MANY, message)


@needs_batches
@each_batching
def test_what_is_trained_in_the_first_half_of_an_epoch_is_chance(judge: Judge, batching: str) -> None:
    """Neither the first ones of the file come early, nor the short ones.

    Rows come in random order, or grouped batches. Of N drawn without replacement the number above the median
    is within sqrt(N ln(2 / p) / 2) of its mean (Hoeffding 1963, section 6).
    """
    examples = make_examples(random_lengths(100))
    epochs = whole_epochs(judge, examples, settings(batching, 100, steps=5))[:EPOCHS]
    values = {"place in the file": list(range(100)), "length": list(map(num_inputs, examples))}
    for name, value_of in values.items():
        early, expected, drawn = 0, 0.0, 0
        for epoch in epochs:
            value = np.array([max(value_of[n] for n in unit) for unit in units_of(epoch, batching)])
            is_high, half = value > np.median(value), len(value) // 2
            early, expected = early + int(is_high[:half].sum()), expected + half * is_high.mean()
            drawn += half
        bound = math.sqrt(drawn * math.log(2 / FALSE_ALARM) / 2)
        message = (
            f"{early} of {drawn} in the first halves of the epochs are above the median by {name}, expected "
            f"{expected:.1f} within {bound:.1f} (Hoeffding's bound, false alarm {FALSE_ALARM:g})"
        )
        is_chance = abs(early - expected) <= bound
        claim(judge, is_chance, message)


def units_of(epoch: Order, batching: str) -> list[list[int]]:
    """The examples of each row, or of each batch, in the order of training."""
    batches = [batch for window in epoch for batch in window]
    units = batches if batching == "grouped" else [[row] for batch in batches for row in batch]
    return [[number for row in unit for number in row] for unit in units]


@needs_batches
def test_the_examples_of_a_grouped_batch_are_of_like_length(judge: Judge) -> None:
    """Less than a quarter of the padding of plain batches."""
    examples = make_examples([2 + n % 24 for n in np.random.default_rng(5).permutation(96)])

    def padding(batching: str) -> int:
        batches = [
            b for window in whole_epochs(judge, examples, settings(batching, 96, 4))[0] for b in window
        ]
        sizes = [[num_inputs(examples[n]) for (n,) in batch] for batch in batches]
        return sum(len(batch) * max(batch) - sum(batch) for batch in sizes)

    grouped, plain = padding("grouped"), padding("plain")
    judge.report(
        lambda: require(4 * grouped < plain, f"{grouped} positions of padding, {plain} in plain batches")
    )


@needs_batches
def test_packed_rows_hold_what_fits_and_no_more(judge: Judge) -> None:
    """At most `max_seq_length` inputs, but for an example that is longer alone; no two rows would fit in one.

    The second is so for best fit, first fit and any other rule that begins a row only if it must. Pairs of
    examples fill their row to the last position.
    """
    lengths = [*random_lengths(20), *([CAPACITY // 2 + 1] * 6), 11, CAPACITY - 8, CAPACITY + 6]
    examples = make_examples(lengths)
    for epoch in whole_epochs(judge, examples, settings("packed", len(lengths))):
        rows = [row for window in epoch for batch in window for row in batch]
        judge.report(partial(require_well_packed, rows, list(map(num_inputs, examples))))


def require_well_packed(rows: Sequence[Row], sizes: Sequence[int]) -> None:
    inputs = sorted(sum(sizes[n] for n in row) for row in rows if sizes[row[0]] <= CAPACITY or len(row) > 1)
    least, second, most = *inputs[:2], inputs[-1]
    require(most <= CAPACITY, f"a row has {most} inputs, where at most {CAPACITY} were asked for")
    require(least + second > CAPACITY, f"rows of {least} and {second} inputs would fit in one of {CAPACITY}")


@needs_batches
def test_segments_tell_the_examples_of_a_packed_row_apart(candidate: Any, judge: Judge) -> None:
    """All inputs of an example have one segment number, which no other example of the row has."""
    examples = make_examples(random_lengths(23))
    windows = small_case().build(candidate).micro_batches(examples, settings("packed", 23, 3, 2))
    batches = [batch for window in windows for batch in window]
    assert any(len(places_in(batch, examples)) > len(batch.inputs_BT) for batch in batches)
    for batch in batches:
        judge.report(partial(require_segments, batch, examples))


def require_segments(batch: Any, examples: Examples) -> None:
    require(batch.segment_BT is not None, "the batch must have segments, to tell its examples apart")
    taken: dict[tuple[int, int], int] = {}
    for place in places_in(batch, examples):
        end = place.start + num_inputs(examples[place.number])
        found = batch.segment_BT[place.row, place.start : end].tolist()
        message = f"example {place.number}, at {place.start} to {end} of its row, has the segments {found}"
        require(len(set(found)) == 1, message)
        other = taken.setdefault((place.row, found[0]), place.number)
        message = f"examples {other} and {place.number} of a row have the same segment {found[0]}"
        require(other == place.number, message)


TWO_TURNS = chat("Hi, é?", "Yes.", "a", "d d", system="Be brief.")
# template, targets, line of the data file -> its example by hand, targets between « and »
READ = {
    "the last reply": (
        ("chatml", "completion", TWO_TURNS),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi, é?<|im_end|>\n<|im_start|>assistant\n"
        "Yes.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«d d<|im_end|>»",
    ),
    "every reply": (
        ("chatml", "assistant", TWO_TURNS),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi, é?<|im_end|>\n<|im_start|>assistant\n"
        "«Yes.<|im_end|>»\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«d d<|im_end|>»",
    ),
    "every token": (
        ("chatml", "all", chat("a", "b")),
        "«<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>»",
    ),
    "an empty reply": (
        ("chatml", "assistant", chat("a", "", "b", "c")),
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«<|im_end|>»\n"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n«c<|im_end|>»",
    ),
    "a reply that repeats the question": (
        ("chatml", "completion", chat("user", "user")),
        "<|im_start|>user\nuser<|im_end|>\n<|im_start|>assistant\n«user<|im_end|>»",
    ),
    "prompt and completion": (
        ("chatml", "completion", {"prompt": "a", "completion": "😀\n"}),
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«😀\n<|im_end|>»",
    ),
    "a text": (("chatml", "completion", {"text": "One two."}), "«One two.<|im_end|>»"),
    "every reply, another template": (
        ("mistral", "assistant", chat("a", "bc", "d", "e")),
        "<s>[INST] a [/INST]«bc</s>»[INST] d [/INST]«e</s>»",
    ),
    "a template without an end of turn": (
        ("no end of turn", "assistant", chat("a", "bc", "d", "e")),
        "user: a\nassistant: «bc»\nuser: d\nassistant: «e</s>»",
    ),
}
UNLIMITED = 2048


@needs_reading
@pytest.mark.parametrize("name", READ)
def test_the_targets_are_the_replies_to_their_end_of_turn_token(
    case: Case, candidate: Any, judge: Judge, name: str, tmp_path: Path
) -> None:
    """Nothing of a prompt, and not what the template prints after the end of a turn."""
    (template, targets, row), marked = READ[name]
    file = write_lines(tmp_path, [row])
    ours = case.build(candidate).read_examples(write_tokenizer(tmp_path, template), file, targets, UNLIMITED)
    judge.same_bits(by_number(ours), by_number([example_of(marked)]))


def by_number(examples: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Arrays:
    return {
        f"{what} of example {number}": np.array(values, dtype=int)
        for number, example in enumerate(examples, 1)
        for what, values in zip(("tokens", "flags"), example, strict=True)
    }


@needs_reading
def test_every_line_is_an_example_in_the_order_of_the_file(
    case: Case, candidate: Any, judge: Judge, tmp_path: Path
) -> None:
    """Of whatever shape, and also one that stands there twice."""
    rows = [chat("a", "b"), {"text": "c"}, chat("a", "b"), chat("d", "e"), {"prompt": "f", "completion": "g"}]
    pairs = [("a", "b"), None, ("a", "b"), ("d", "e"), ("f", "g")]
    marked = [
        f"<|im_start|>user\n{pair[0]}<|im_end|>\n<|im_start|>assistant\n«{pair[1]}<|im_end|>»"
        if pair
        else "«c<|im_end|>»"
        for pair in pairs
    ]
    file = write_lines(tmp_path, rows)
    ours = case.build(candidate).read_examples(
        write_tokenizer(tmp_path, "chatml"), file, "completion", UNLIMITED
    )
    judge.same_bits(by_number(ours), by_number(list(map(example_of, marked))))


@needs_reading
def test_an_example_keeps_its_beginning_up_to_the_maximum_length(
    case: Case, candidate: Any, judge: Judge, tmp_path: Path
) -> None:
    """One that just fits is whole; one that has no target within the maximum is left out."""
    whole = example_of("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«bcdef<|im_end|>»")
    file, maximum = write_lines(tmp_path, [chat("a", "bcdef"), chat("a" * 30, "b")]), len(whole[0])
    folder = write_tokenizer(tmp_path, "chatml")
    for length in (maximum, maximum - 1, maximum - 3):
        ours = case.build(candidate).read_examples(folder, file, "completion", length)
        judge.same_bits(by_number(ours), by_number([(whole[0][:length], whole[1][:length])]))
