"""Rung 5: what counts as a target, and how the targets are weighed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_impl import ops
from mlx_impl.data import Batch
from mlx_impl.fast.head import head_nats
from mlx_impl.fast.kept_positions import kept_positions, target_positions
from mlx_impl.loss import next_token_nats
from mlx_impl.train import evaluate
from tests.trainers.mutants.mutant import PLAIN, Mutant, Patches
from tests.trainers.reference import with_pad_targets

CHUNK = 9  # positions


def batches(change: Callable[[Batch], Batch]) -> Patches:
    return {
        "mlx_impl.fast.forward.target_positions": lambda batch: target_positions(change(batch)),
        "mlx_impl.fast.kept_positions.kept_positions": lambda batch, **more: kept_positions(
            change(batch), **more
        ),
    }


def masks(change: Callable[[np.ndarray], np.ndarray]) -> Patches:
    return batches(lambda batch: batch._replace(mask_BT=change(batch.mask_BT)))


def plain_loss(broken: Callable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]) -> Patches:
    return {"mlx_impl.train.next_token_nats": broken}


def evaluations(broken: Callable[..., float]) -> Patches:
    """A broken evaluation, called with a model, batches and a loss."""
    return {"mlx_impl.run.trainer.evaluate": lambda *arguments: (broken(*arguments), 0)}


def from_the_first_column(mask_BT: np.ndarray) -> np.ndarray:
    return np.flip(np.maximum.accumulate(np.flip(mask_BT, 1), 1), 1)


def all_but_the_last_target(mask_BT: np.ndarray) -> np.ndarray:
    return mask_BT & np.pad(mask_BT[:, 1:], ((0, 0), (0, 1)))


def counting_everything(logits_BTV: mx.array, targets_BT: mx.array, mask_BT: mx.array) -> Any:
    return next_token_nats(logits_BTV, targets_BT, mask_BT)[0], mx.array(mask_BT.size)


def mean_of_rows(logits_BTV: mx.array, targets_BT: mx.array, mask_BT: mx.array) -> Any:
    nats_BT = ops.logsumexp(logits_BTV.flatten(0, 1)).reshape(targets_BT.shape)
    nats_BT = nats_BT - mx.take_along_axis(logits_BTV, targets_BT[..., None], -1).squeeze(-1)
    counts_B = mask_BT.sum(axis=1)
    means_B = mx.where(mask_BT, nats_BT, 0).sum(axis=1) / mx.maximum(counts_B, 1)
    return means_B.sum() / mx.maximum((counts_B > 0).sum(), 1) * mask_BT.sum(), mask_BT.sum()


def at_least_one_a_row(logits_BTV: mx.array, targets_BT: mx.array, mask_BT: mx.array) -> Any:
    nats, _ = next_token_nats(logits_BTV, targets_BT, mask_BT)
    return nats, mx.maximum(mask_BT.sum(axis=1), 1).sum()


def one_more_a_row(logits_BTV: mx.array, targets_BT: mx.array, mask_BT: mx.array) -> Any:
    nats, num_targets = next_token_nats(logits_BTV, targets_BT, mask_BT)
    return nats, num_targets + len(mask_BT)


def by_chunks(broken: Callable[[mx.array, mx.array, mx.array], tuple]) -> Patches:
    """The loss over broken positions, targets and mask; the count is right."""

    def nats(head: Any, vocab_size: int, *arrays: mx.array) -> tuple[mx.array, mx.array]:
        return head_nats(head, vocab_size, *broken(*arrays))[0], arrays[-1].sum()

    return {"mlx_impl.fast.forward.head_nats": nats}


def masked_by_the_first(x_ND: mx.array, targets_N: mx.array, mask_N: mx.array) -> tuple:
    return x_ND, targets_N, mx.tile(mask_N[:CHUNK], -(-len(mask_N) // CHUNK))[: len(mask_N)]


def of_whole_chunks(*arrays: mx.array) -> tuple:
    return tuple(array[: len(array) - len(array) % CHUNK] for array in arrays)


def lengths(with_cross: float, scale_of: Callable[[float], float]) -> Patches:
    """DoRA's lengths by a wrong expansion of |w + s A b|^2."""

    def lengths_O(weight_OI: mx.array, a_IR: mx.array, b_RO: mx.array, scale: float) -> mx.array:
        cross_O = (b_RO * (a_IR.T @ weight_OI.T)).sum(axis=0)
        update_O = (b_RO * (a_IR.T @ a_IR @ b_RO)).sum(axis=0)
        base_O = mx.square(weight_OI).sum(axis=1)
        return mx.sqrt(mx.abs(base_O + with_cross * scale * cross_O + scale_of(scale) * update_O))

    return {"mlx_impl.fast.projection.row_lengths": lengths_O}


MUTANTS = [
    Mutant(
        "pad-target-counted",
        5,
        "The mask compares positions with lengths by <= instead of <, so one padding target per row counts.",
        masks(lambda mask_BT: with_pad_targets(mask_BT, 1)),
        "mlx-lm#1697",
    ),
    Mutant(
        "prompt-counted",
        5,
        "The loss counts the prompt as well as the answer.",
        masks(from_the_first_column),
        "mlx-examples#689",
    ),
    Mutant(
        "end-token-masked",
        5,
        "Padding and end of turn share a token id, so both are masked, and the model never learns to stop.",
        masks(all_but_the_last_target),
        "transformers#23530",
    ),
    Mutant(
        "labels-shifted-twice",
        5,
        "Both the data set and the loss shift the labels, so position t learns to predict token t + 2.",
        batches(lambda batch: batch._replace(targets_BT=np.roll(batch.targets_BT, -1, axis=1))),
        "transformers#37830",
    ),
    Mutant(
        "labels-not-shifted",
        5,
        "Nothing shifts the labels, so each token predicts itself, and the loss falls to zero.",
        batches(lambda batch: batch._replace(targets_BT=batch.inputs_BT)),
        "litgpt#419",
    ),
    Mutant(
        "masked-tokens-in-the-denominator",
        5,
        "The sum over the targets is divided by the number of all positions, masked ones included.",
        plain_loss(counting_everything),
        "litgpt#751",
        trainer=PLAIN,
    ),
    Mutant(
        "mean-of-row-means",
        5,
        "The loss is averaged within each row and then over rows, so the tokens of short answers weigh more.",
        plain_loss(mean_of_rows),
        trainer=PLAIN,
    ),
    Mutant(
        "chunks-masked-by-the-first",
        5,
        "The loss goes over the positions in chunks, and every chunk uses the mask of the first.",
        by_chunks(masked_by_the_first),
    ),
    Mutant(
        "last-chunk-of-the-positions",
        5,
        "The loss goes over the positions in chunks, and drops the last, incomplete chunk.",
        by_chunks(of_whole_chunks),
    ),
    Mutant(
        "masked-row-counted",
        5,
        "To avoid 0 / 0, a row without targets counts as one target.",
        plain_loss(at_least_one_a_row),
        trainer=PLAIN,
    ),
    Mutant(
        "one-more-target-a-row",
        5,
        "The number of targets is counted separately from the loss, and is one too many in each row.",
        plain_loss(one_more_a_row),
        "transformers#46204",
        trainer=PLAIN,
    ),
    Mutant(
        "evaluation-by-batches",
        5,
        "The validation loss is the mean of the batches' means, so it depends on the batch size.",
        evaluations(
            lambda model, parts, loss: float(np.mean([evaluate(model, [part], loss)[0] for part in parts]))
        ),
        "transformers#39241",
    ),
    Mutant(
        "evaluation-without-the-last-batch",
        5,
        "The validation loss leaves out the last batch.",
        evaluations(lambda model, parts, loss: evaluate(model, parts[:-1] or parts, loss)[0]),
        "mlx-examples#752",
    ),
    Mutant(
        "dora-cross-term-once",
        5,
        "DoRA's length is the root of |w|^2 + w.d + |d|^2, which lacks the factor 2 of the cross term.",
        lengths(1, lambda scale: scale**2),
        cases=("dora",),
    ),
    Mutant(
        "dora-scale-not-squared",
        5,
        "DoRA's length is the root of |w|^2 + 2 s w.d + s |d|^2, whose last scale should be squared.",
        lengths(2, lambda scale: scale),
        cases=("dora",),
    ),
]
