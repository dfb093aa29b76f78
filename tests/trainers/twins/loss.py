"""Rung 4: what counts as a target, and how the targets are weighed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_impl import ops
from mlx_impl.data import Batch, target_positions
from mlx_impl.fast.head import head_nats, next_token_nats
from mlx_impl.train import Arrays, batch_loss, evaluate
from tests.trainers.reference import with_pad_targets
from tests.trainers.twins.twin import Patches, Twin

CHUNK = 9  # positions


def batches(change: Callable[[Batch], Batch]) -> Patches:
    return {"mlx_impl.train.target_positions": lambda batch: target_positions(change(batch))}


def masks(change: Callable[[np.ndarray], np.ndarray]) -> Patches:
    return batches(lambda batch: batch._replace(mask_BT=change(batch.mask_BT)))


def losses(broken: Callable) -> Patches:
    return dict.fromkeys(("mlx_impl.train.batch_loss", "tests.trainers.mlx_impl.batch_loss"), broken)


def evaluations(broken: Callable[[Any, Sequence[Batch]], float]) -> Patches:
    return {"tests.trainers.mlx_impl.evaluate": lambda model, batches: (broken(model, batches), 0)}


def from_the_first_column(mask_BT: np.ndarray) -> np.ndarray:
    return np.flip(np.maximum.accumulate(np.flip(mask_BT, 1), 1), 1)


def all_but_the_last_target(mask_BT: np.ndarray) -> np.ndarray:
    return mask_BT & np.pad(mask_BT[:, 1:], ((0, 0), (0, 1)))


def counting_everything(nats_of: Callable) -> Callable:
    return lambda *arguments: (nats_of(*arguments)[0], mx.array(arguments[-1].size))  # the mask is the last


def rows_of_targets(arrays: Arrays) -> mx.array:
    """Which target stands in which row."""
    inputs_BT, positions_N, _, mask_N, _ = arrays
    B, T = inputs_BT.shape
    return ((positions_N // T)[:, None] == mx.arange(B)) * mask_N[:, None]


def mean_of_rows(model: Any, arrays: Arrays) -> tuple[mx.array, mx.array]:
    inputs_BT, positions_N, targets_N, mask_N, _ = arrays
    logits_NV = model.head(model.model(inputs_BT).flatten(0, 1)[positions_N])
    nats_N = ops.logsumexp(logits_NV) - mx.take_along_axis(logits_NV, targets_N[:, None], -1).squeeze(-1)
    rows_NB = rows_of_targets(arrays)
    counts_B = rows_NB.sum(axis=0)
    means_B = nats_N @ rows_NB.astype(nats_N.dtype) / mx.maximum(counts_B, 1)
    return means_B.sum() / mx.maximum((counts_B > 0).sum(), 1) * mask_N.sum(), mask_N.sum()


def at_least_one_a_row(model: Any, arrays: Arrays) -> tuple[mx.array, mx.array]:
    return batch_loss(model, arrays)[0], mx.maximum(rows_of_targets(arrays).sum(axis=0), 1).sum()


def one_more_a_row(model: Any, arrays: Arrays) -> tuple[mx.array, mx.array]:
    nats, num_targets = batch_loss(model, arrays)
    return nats, num_targets + arrays[0].shape[0]


def by_chunks(broken: Callable[[mx.array, mx.array, mx.array], tuple]) -> Patches:
    """The loss of other positions, targets and mask; the count is right."""

    def nats(head: Any, vocab_size: int, *arrays: mx.array) -> tuple[mx.array, mx.array]:
        return head_nats(head, vocab_size, *broken(*arrays))[0], arrays[-1].sum()

    return {"mlx_impl.train.head_nats": nats}


def masked_by_the_first(x_ND: mx.array, targets_N: mx.array, mask_N: mx.array) -> tuple:
    return x_ND, targets_N, mx.tile(mask_N[:CHUNK], -(-len(mask_N) // CHUNK))[: len(mask_N)]


def of_whole_chunks(*arrays: mx.array) -> tuple:
    return tuple(array[: len(array) - len(array) % CHUNK] for array in arrays)


TWINS = [
    Twin(
        "pad-target-counted",
        4,
        "The mask compares positions with lengths by <=, so one padding target a row is trained.",
        masks(lambda mask_BT: with_pad_targets(mask_BT, 1)),
        "mlx-lm#1697",
    ),
    Twin(
        "prompt-counted",
        4,
        "The loss runs over the question as well as the answer.",
        masks(from_the_first_column),
        "mlx-examples#689",
    ),
    Twin(
        "end-token-masked",
        4,
        "Padding and end of turn share a number, so masking one masks the other: the model never stops.",
        masks(all_but_the_last_target),
        "transformers#23530",
    ),
    Twin(
        "labels-shifted-twice",
        4,
        "Data set and loss both shift: position t is trained to predict token t + 2.",
        batches(lambda batch: batch._replace(targets_BT=np.roll(batch.targets_BT, -1, axis=1))),
        "transformers#37830",
    ),
    Twin(
        "labels-not-shifted",
        4,
        "Nobody shifts: each token predicts itself, and the loss falls to nothing.",
        batches(lambda batch: batch._replace(targets_BT=batch.inputs_BT)),
        "litgpt#419",
    ),
    Twin(
        "masked-tokens-in-the-denominator",
        4,
        "The sum over the targets is divided by all positions, masked ones too.",
        {
            "mlx_impl.train.head_nats": counting_everything(head_nats),
            "tests.trainers.mlx_impl.next_token_nats": counting_everything(next_token_nats),
        },
        "litgpt#751",
    ),
    Twin(
        "mean-of-row-means",
        4,
        "The loss is averaged in each row and then over rows: a short answer's words weigh more.",
        losses(mean_of_rows),
    ),
    Twin(
        "chunks-masked-by-the-first",
        4,
        "The loss goes over the positions in chunks, and all of them take the first one's mask.",
        by_chunks(masked_by_the_first),
    ),
    Twin(
        "last-chunk-of-the-positions",
        4,
        "The loss goes over the positions in chunks, and leaves out the last, which is not full.",
        by_chunks(of_whole_chunks),
    ),
    Twin(
        "masked-row-counted",
        4,
        "To avoid 0 / 0, a row whose targets were all cut off counts as one.",
        losses(at_least_one_a_row),
    ),
    Twin(
        "one-more-target-a-row",
        4,
        "The number of targets, counted apart from the loss, includes one label a row that is not scored.",
        losses(one_more_a_row),
        "transformers#46204",
    ),
    Twin(
        "evaluation-by-batches",
        4,
        "The validation loss is the mean of the batches' means, and changes with the batch size.",
        evaluations(lambda model, parts: float(np.mean([evaluate(model, [part])[0] for part in parts]))),
        "transformers#39241",
    ),
    Twin(
        "evaluation-without-the-last-batch",
        4,
        "The validation drops its last batch, so that it does not see the whole set.",
        evaluations(lambda model, parts: evaluate(model, parts[:-1] or parts)[0]),
        "mlx-examples#752",
    ),
]
