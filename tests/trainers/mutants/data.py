"""Rungs 3 and 5: wrong batches, wrong orders, wrong targets; packed examples that see each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_impl import batching
from mlx_impl.batching import chunks, group_by_length, pack_rows, rows_of
from mlx_impl.data import Batch, Example, make_batch, make_packed_batch
from mlx_impl.fast import segments
from mlx_impl.fast.layout import rows_of as rows_of_sub_batches
from mlx_impl.model import attention_mask, position_ids
from mlx_impl.text.examples import Encoded, encode_all, encode_each, mark_targets
from tests.trainers.mutants.mutant import PLAIN, Mutant, Patches

Rows = list[list[tuple[int, ...]]]


def windows(broken: Callable[..., Rows]) -> Patches:
    """Another choice of the rows of each micro-batch: (step, rows, lengths, config)."""

    def broken_windows(lengths: Any, config: Any, first_step: int) -> Iterator[Rows]:
        rows = rows_of(lengths, config)
        return (broken(step, rows, lengths, config) for step in count(first_step))

    return {"mlx_impl.data.window_rows": broken_windows}


def window_rows(step: int, _: Any, lengths: Any, config: Any) -> Rows:
    """Those of one update."""
    return next(batching.window_rows(lengths, config, step))


def batches(change: Callable[[Batch, Sequence[Example]], Batch]) -> Patches:
    """A padded batch, changed."""
    return {
        "mlx_impl.data.make_batch": lambda examples, numbers=(): change(
            make_batch(examples, numbers), examples
        )
    }


def packed(change: Callable[[Batch], Batch]) -> Patches:
    return {"mlx_impl.data.make_packed_batch": lambda *given: change(make_packed_batch(*given))}


def updates_an_epoch(rows: Sequence[Any], config: Any) -> int:
    return -(-len(rows) // (config.batch_size * config.grad_accumulation_steps))


def without_small_batches(step: int, rows: Any, lengths: Any, config: Any) -> Rows:
    window = window_rows(step, rows, lengths, config)
    return [batch for batch in window if len(batch) == config.batch_size] or window


def without_last_window(step: int, rows: Any, lengths: Any, config: Any) -> Rows:
    whole = max(1, len(rows) // (config.batch_size * config.grad_accumulation_steps))
    epoch, index = divmod(step, whole)
    return window_rows(epoch * updates_an_epoch(rows, config) + index, rows, lengths, config)


def first_epoch_again(step: int, rows: Any, lengths: Any, config: Any) -> Rows:
    return window_rows(step % updates_an_epoch(rows, config), rows, lengths, config)


def with_seed(seed: int, step: int, rows: Any, lengths: Any, config: Any) -> Rows:
    return window_rows(step, rows, lengths, replace(config, data_seed=seed))


def seed_plus_epoch(step: int, rows: Any, lengths: Any, config: Any) -> Rows:
    epoch, index = divmod(step, updates_an_epoch(rows, config))
    return with_seed(config.data_seed + epoch, index, rows, lengths, config)


def in_order(order_of: Callable[[np.random.Generator, int], Sequence[int]]) -> Patches:
    """Another order of the rows, drawn for each epoch."""

    def broken(step: int, rows: Any, lengths: Any, config: Any) -> Rows:
        epoch, index = divmod(step, updates_an_epoch(rows, config))
        order = order_of(np.random.default_rng([config.data_seed, epoch]), len(rows))
        size, steps = config.batch_size, config.grad_accumulation_steps
        window = chunks([int(n) for n in order], size)[index * steps : (index + 1) * steps]
        return [[rows[n] for n in batch] for batch in window]

    return windows(broken)


def in_buffers(random: np.random.Generator, count: int) -> list[int]:
    numbers = list(range(count))
    return [int(n) for start in range(0, count, 10) for n in random.permutation(numbers[start : start + 10])]


def without_last_pool(batches: Any, lengths: Any, random: Any) -> Any:
    whole = len(batches) // batching.POOL * batching.POOL or len(batches)
    return group_by_length(batches[:whole], lengths, random)


class InOrder(np.random.Generator):
    """A generator whose permutations are the order in which things are."""

    def permutation(self, x: Any, axis: int = 0) -> Any:
        return np.arange(x)


def unshuffled(batches: Any, lengths: Any, _: Any) -> Any:
    return group_by_length(batches, lengths, InOrder(np.random.PCG64()))


def flags_of_inputs(batch: Batch, examples: Sequence[Example]) -> Batch:
    mask_BT = np.zeros_like(batch.mask_BT)
    for row, example in enumerate(examples):
        mask_BT[row, : len(example.is_target)] = example.is_target[: mask_BT.shape[1]]
    return batch._replace(mask_BT=mask_BT)


def without_last_target(batch: Batch, examples: Sequence[Example]) -> Batch:
    mask_BT = batch.mask_BT.copy()
    for row, example in enumerate(examples):
        mask_BT[row, len(example.tokens) - 2] = False
    return batch._replace(mask_BT=mask_BT)


def one_target_more(batch: Batch, examples: Sequence[Example]) -> Batch:
    mask_BT = batch.mask_BT.copy()
    for row, example in enumerate(examples):
        mask_BT[row, len(example.tokens) - 1 : len(example.tokens)] = True
    return batch._replace(mask_BT=mask_BT)


def cut_to_their_end(examples: Sequence[Example], numbers: Sequence[int] = ()) -> Batch:
    return make_batch([Example(e.tokens[-256:], e.is_target[-256:]) for e in examples], numbers)


def in_16_bits(batch: Batch, _: Any) -> Batch:
    return batch._replace(inputs_BT=batch.inputs_BT.astype(np.uint16).astype(np.int32))


def with_late_segments(batch: Batch) -> Batch:
    assert batch.segment_BT is not None
    segment_BT = np.roll(batch.segment_BT, 1, axis=1)
    segment_BT[:, 0] = 0
    return batch._replace(segment_BT=segment_BT)


def pack_one_more(lengths: Any, capacity: int, seed: int) -> Any:
    return pack_rows(lengths, capacity + 1, seed)


def pack_only_if_room_is_left(lengths: Any, capacity: int, seed: int) -> Any:
    return pack_rows(lengths, capacity - 1, seed)


def attend_all(T: int, offset: int, window: int | None, segment_BT: Any) -> Any:
    return attention_mask(T, offset, window, None if segment_BT is None else segment_BT * 0)


def positions_one_late(segment_BT: Any) -> Any:
    position_BT = position_ids(segment_BT)
    position_BT[:, 1:] = position_BT[:, :-1]
    return position_BT


def rows_as_they_are(batch: Batch) -> tuple[Batch, list[segments.SubBatch]]:
    return batch._replace(segment_BT=None), []


def cut_to_powers_of_two(
    lengths: Any, *shape: int, real: Any = segments.sub_batches_of
) -> list[segments.SubBatch]:
    return real([1 << (int(n).bit_length() - 1) for n in lengths], *shape)


def only_the_first_learns(x_1HTK: mx.array, sub_batches: Sequence[segments.SubBatch]) -> list[mx.array]:
    first, *others = rows_of_sub_batches(x_1HTK, sub_batches)
    return [first, *map(mx.stop_gradient, others)]


def marked(change: Callable[[Example], Example]) -> Patches:
    """An example from text, changed."""
    return {
        "mlx_impl.text.examples.mark_targets": lambda *given, **more: change(mark_targets(*given, **more))
    }


def last_reply(tokenizer: Any, whole: Any, turns: Any, all_tokens: bool) -> Example:
    return mark_targets(tokenizer, whole, turns[-1:], all_tokens)


def keep_the_end(tokenizer: Any, conversations: Any, targets: str, max_tokens: int, *_: Any) -> Encoded:
    examples = encode_each(tokenizer, conversations, targets)
    cut = [Example(e.tokens[-max_tokens:], e.is_target[-max_tokens:]) for e in examples]
    return Encoded(cut, max_tokens, 0, ())


def without_doubles(*given: Any) -> Iterable[Example]:
    return list(dict.fromkeys(encode_all(*given)))


MUTANTS = [
    Mutant(
        "last-batch-dropped",
        3,
        "A batch that is not full is dropped, so some examples are never seen in an epoch.",
        windows(without_small_batches),
    ),
    Mutant(
        "epochs-of-whole-windows",
        3,
        "An epoch ends with the last whole window, so the micro-batches that are left are not trained.",
        windows(without_last_window),
    ),
    Mutant(
        "one-order-for-all-epochs",
        3,
        "The examples are shuffled once, and every epoch has the order of the first.",
        windows(first_epoch_again),
    ),
    Mutant(
        "order-of-the-file",
        3,
        "The examples are not shuffled.",
        in_order(lambda random, count: range(count)),
    ),
    Mutant(
        "drawn-with-replacement",
        3,
        "Each example is drawn anew, so some come twice in an epoch and others not at all.",
        in_order(lambda random, count: random.integers(0, count, count).tolist()),
    ),
    Mutant(
        "shuffled-in-a-buffer",
        3,
        "The examples are shuffled in buffers of ten, so those at the end of the file always come last.",
        in_order(in_buffers),
    ),
    Mutant(
        "data-seed-ignored",
        3,
        "Every data_seed gives the same order.",
        windows(lambda *given: with_seed(0, *given)),
    ),
    Mutant(
        "seed-plus-epoch",
        3,
        "An epoch is shuffled by data_seed + epoch, so the second epoch of seed 0 is the first of seed 1.",
        windows(seed_plus_epoch),
    ),
    Mutant(
        "order-by-the-other-seed",
        3,
        "The order depends on the seed of dropout instead of data_seed.",
        windows(lambda *given: with_seed(given[-1].seed, *given)),
    ),
    Mutant(
        "grouped-from-short-to-long",
        3,
        "Batches of like length are not shuffled, so an epoch begins with the shortest examples.",
        {"mlx_impl.batching.group_by_length": unshuffled},
    ),
    Mutant(
        "last-pool-lost",
        3,
        "Grouping by length takes whole pools of batches only and drops the rest of the epoch.",
        {"mlx_impl.batching.group_by_length": without_last_pool},
    ),
    Mutant(
        "flags-not-shifted",
        3,
        "The mask is that of the inputs and not of the targets, so a reply lacks its first token.",
        batches(flags_of_inputs),
    ),
    Mutant(
        "last-target-lost",
        3,
        "The last token of every row is no target, so the model does not learn to stop.",
        batches(without_last_target),
    ),
    Mutant(
        "first-padding-is-a-target",
        3,
        "The mask compares positions with lengths and is one too long: one padding token a row is a target.",
        batches(one_target_more),
    ),
    Mutant(
        "long-examples-cut",
        3,
        "Examples are cut to their last 256 tokens without a word.",
        {"mlx_impl.data.make_batch": cut_to_their_end},
    ),
    Mutant(
        "ids-in-16-bits",
        3,
        "Token ids are kept in 16 bits, which is too few for a large vocabulary.",
        batches(in_16_bits),
    ),
    Mutant(
        "padding-counted-as-tokens",
        3,
        "num_tokens counts padding, so the reported tokens per second are too many.",
        batches(lambda batch, _: batch._replace(num_tokens=batch.inputs_BT.size)),
    ),
    Mutant(
        "packed-segments-one-late",
        3,
        "Segment numbers begin one position late, so the first token of an example belongs to the last one.",
        packed(with_late_segments),
    ),
    Mutant(
        "packed-rows-too-long",
        3,
        "A packed row may hold one input more than max_seq_length.",
        {"mlx_impl.batching.pack_rows": pack_one_more},
    ),
    Mutant(
        "packed-rows-never-full",
        3,
        "Packing asks for more room than an example needs, so a row is never filled to its last position.",
        {"mlx_impl.batching.pack_rows": pack_only_if_room_is_left},
    ),
    Mutant(
        "end-of-turn-is-no-target",
        3,
        "The end-of-turn token of a reply is no target, so the model talks on for ever.",
        marked(lambda e: Example(e.tokens, (*e.is_target[:-1], False))),
        "trl#976",
    ),
    Mutant(
        "one-reply-of-many",
        3,
        "Only the last reply is a target where all were asked for.",
        {"mlx_impl.text.examples.mark_targets": last_reply},
    ),
    Mutant(
        "prompt-is-a-target",
        3,
        "The prompt is not masked: the model is trained to ask the user's questions.",
        marked(lambda e: Example(e.tokens, (True,) * len(e.tokens))),
    ),
    Mutant(
        "beginning-cut-off",
        3,
        "An example that is too long loses its beginning instead of its end.",
        {"mlx_impl.text.examples.encode_file": keep_the_end},
    ),
    Mutant(
        "doubles-dropped",
        3,
        "A line that stands twice in the data file is trained once.",
        {"tests.trainers.mlx_impl.encode_all": without_doubles},
    ),
    Mutant(
        "packed-examples-see-each-other",
        5,
        "In a packed row attention is causal only, so an example attends to those before it.",
        {"mlx_impl.fast.forward.examples_apart": rows_as_they_are},
        "trl#3699",
    ),
    Mutant(
        "packed-examples-see-each-other-plain",
        5,
        "The same in the plain pattern.",
        {"mlx_impl.model.attention_mask": attend_all},
        trainer=PLAIN,
    ),
    Mutant(
        "packed-positions-one-late",
        5,
        "Positions of an example start one token late, so its first two tokens have wrong distances.",
        {"mlx_impl.model.position_ids": positions_one_late},
        trainer=PLAIN,
    ),
    Mutant(
        "packed-examples-cut-to-a-bucket",
        5,
        "For attention packed examples get rows of a power of two, and what is longer than its row is lost.",
        {"mlx_impl.fast.segments.sub_batches_of": cut_to_powers_of_two},
    ),
    Mutant(
        "only-the-longest-examples-learn",
        6,
        "Packed examples attend in sub-batches of like length, of which only the first has a backward pass.",
        {"mlx_impl.fast.layout.rows_of": only_the_first_learns},
    ),
]
