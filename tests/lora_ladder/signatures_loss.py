"""Known bugs of the loss: what counts as a target, which token it is, how targets are weighed."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import cross_entropy

from mlx_impl.data import Batch
from reference import train
from reference.loss import next_token_nats
from tests.lora_ladder.signatures import Hypothesis, Signature, of_batches, of_dialect, of_members, patched

SMOOTHING = 0.1


def masked(change: Callable[[Batch], np.ndarray]) -> Hypothesis:
    return of_batches(lambda batch: batch._replace(mask_BT=change(batch)))


def from_the_first(batch: Batch) -> np.ndarray:
    """Everything before a row's last target too."""
    return np.flip(np.maximum.accumulate(np.flip(batch.mask_BT, 1), 1), 1)


def before_the_last(mask_BT: np.ndarray) -> np.ndarray:
    return mask_BT & np.pad(mask_BT[:, 1:], ((0, 0), (0, 1)))


def after_the_first(mask_BT: np.ndarray) -> np.ndarray:
    return mask_BT & np.pad(mask_BT[:, :-1], ((0, 0), (1, 0)))


def shifted(mask_BT: np.ndarray, by: int) -> np.ndarray:
    moved = np.roll(mask_BT, by, axis=1)
    moved[:, slice(None, by) if by > 0 else slice(by, None)] = False
    return moved


def nats(broken: Callable[[Tensor, Tensor, Tensor], tuple[Any, Any]]) -> Hypothesis:
    """Another sum and count, from logits, targets and mask: in the loss, its gradient and every update."""
    return patched((train, {"next_token_nats": broken}))


def counting(count: Callable[[Tensor, Tensor], Any]) -> Hypothesis:
    """The right sum with another number of targets, from targets and mask."""
    return nats(
        lambda logits, targets, mask: (next_token_nats(logits, targets, mask)[0], count(targets, mask))
    )


def each_nats(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    return cross_entropy(logits_BTV.swapaxes(1, 2), targets_BT, reduction="none")


def mean_of_rows(logits_BTV: Tensor, targets_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the rows' means, times the number of targets; a row without targets has none."""
    counts_B = mask_BT.sum(1)
    means_B = (each_nats(logits_BTV, targets_BT) * mask_BT).sum(1) / counts_B.clamp(min=1)
    return means_B.sum() / (counts_B > 0).sum() * mask_BT.sum(), mask_BT.sum()


def mean(logits_BTV: Tensor, targets_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    total, count = next_token_nats(logits_BTV, targets_BT, mask_BT)
    return total / count, count


def in_bits(logits_BTV: Tensor, targets_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    total, count = next_token_nats(logits_BTV, targets_BT, mask_BT)
    return total / log(2), count


def smoothed(logits_BTV: Tensor, targets_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    logits_BVT = logits_BTV.swapaxes(1, 2)
    nats_BT = cross_entropy(logits_BVT, targets_BT, reduction="none", label_smoothing=SMOOTHING)
    return nats_BT[mask_BT].sum(), mask_BT.sum()


def by_batches(self: Any, evaluate: Any, batches: Any) -> float:
    return float(np.mean([evaluate([batch]) for batch in batches]))


def known(name: str, sentence: str, hypothesis: Hypothesis, link: str = "", dialect: str = "") -> Signature:
    return Signature(name, 5, sentence, hypothesis, link, dialect)


UNSHIFTED = "tests/traps/test_trap_unshifted_labels.py"
MEAN = "tests/traps/test_trap_cross_entropy.py"

SIGNATURES = [
    *(
        known(
            f"pad targets {n}",
            f"{n} padding position{'s' * (n > 1)} of each row count{'s' * (n == 1)} as a target",
            of_dialect(pad_targets=n),
            "mlx-lm#1697",
            f"pad_targets = {n}",
        )
        for n in (1, 2)
    ),
    known(
        "prompt counted",
        "the prompt counts as well as the answer",
        masked(from_the_first),
        "mlx-examples#689",
    ),
    known(
        "everything counted",
        "every position counts, prompt and padding too: no mask",
        masked(lambda batch: np.ones_like(batch.mask_BT)),
    ),
    known(
        "last target masked",
        "the last target of each row does not count, as where the end token is the padding",
        masked(lambda batch: before_the_last(batch.mask_BT)),
        "transformers#23530",
    ),
    known(
        "first target masked",
        "the first target of each row does not count",
        masked(lambda batch: after_the_first(batch.mask_BT)),
    ),
    known(
        "mask one late",
        "the mask is one position late: the last prompt token is no input of a target",
        masked(lambda batch: shifted(batch.mask_BT, 1)),
    ),
    known(
        "mask one early",
        "the mask is one position early: it is that of the targets, moved once more",
        masked(lambda batch: shifted(batch.mask_BT, -1)),
    ),
    known(
        "token 0 is padding",
        "a target that is token 0 does not count, as if it were padding",
        masked(lambda batch: batch.mask_BT & (batch.targets_BT != 0)),
    ),
    known(
        "labels not shifted",
        "the targets are not shifted: each token predicts itself",
        of_batches(lambda batch: batch._replace(targets_BT=batch.inputs_BT)),
        UNSHIFTED,
    ),
    known(
        "labels shifted twice",
        "the targets are shifted twice: position t predicts token t + 2",
        of_batches(lambda batch: batch._replace(targets_BT=np.roll(batch.targets_BT, -1, axis=1))),
        "transformers#37830",
    ),
    known(
        "mean of row means",
        "the mean is taken in each row and then over rows: short answers weigh more",
        nats(mean_of_rows),
        MEAN,
    ),
    known("mean for the sum", "the loss is the mean where the sum of nats is asked for", nats(mean), MEAN),
    known(
        "count of positions",
        "the number of targets is that of all positions, masked ones too",
        counting(lambda targets, mask: mask.sum() * 0 + mask.numel()),
        "litgpt#751",
    ),
    known(
        "count of rows",
        "the number of targets is the number of rows",
        counting(lambda targets, mask: mask.sum() * 0 + len(mask)),
    ),
    known(
        "count of tokens",
        "the number of targets is that of all tokens but padding, the prompt too",
        counting(lambda targets, mask: (targets != 0).sum()),
    ),
    known(
        "one more target a row",
        "the number of targets is one too many in each row",
        counting(lambda targets, mask: mask.sum() + len(mask)),
        "transformers#46204",
    ),
    known(
        "a row without targets counts as one",
        "a row without a target counts as one, as if to avoid 0 / 0",
        counting(lambda targets, mask: mask.sum(1).clamp(min=1).sum()),
    ),
    known("in bits", "the loss is in bits, not in nats: log2 for log", nats(in_bits)),
    known("label smoothing", f"the targets are smoothed by {SMOOTHING}", nats(smoothed)),
    known(
        "evaluation by batches",
        "the validation loss is the mean of the batches' means",
        of_members(evaluate=by_batches),
        "transformers#39241",
    ),
    known(
        "evaluation without the last batch",
        "the validation loss leaves out the last batch",
        of_members(evaluate=lambda self, evaluate, batches: evaluate(batches[:-1] or batches)),
        "mlx-examples#752",
    ),
]
