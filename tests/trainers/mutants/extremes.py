"""Bugs that show only on extreme numbers, and NaN or infinity that a bug hides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from mlx_impl import ops
from mlx_impl.fast import cpu_ops
from mlx_impl.fast.head import head_nats
from mlx_impl.fast.vectors import VectorOptimizer, as_vectors
from mlx_impl.lora import LoRALinear
from mlx_impl.model import CausalLM
from mlx_impl.optim import clip_gradients
from mlx_impl.train import evaluate
from tests.trainers.mutants.mutant import PLAIN, Mutant, Patches, lora_call, with_add_up
from tests.trainers.mutants.ops import fast_op, op

rms_norm, lora = ops.rms_norm, LoRALinear.__call__
update, head = VectorOptimizer.update, CausalLM.head
LARGEST_HALF = 65_504.0


def finite(x: mx.array) -> mx.array:
    return mx.where(mx.isfinite(x), x, 0)


def composed(
    masked: Callable[[mx.array, mx.array], mx.array], softmax: Callable[[mx.array], mx.array]
) -> Any:
    """Attention by automatic differentiation, from a way to mask the scores and a softmax."""

    def broken(q_BHTK: mx.array, k_BGSK: mx.array, v_BGSK: mx.array, mask_B1TS: Any) -> mx.array:
        (_, H, T, K), (_, G, S, _) = q_BHTK.shape, k_BGSK.shape
        if mask_B1TS is None:
            mask_B1TS = (mx.arange(S) <= mx.arange(S - T, S)[:, None])[None, None]
        k_BHSK, v_BHSK = (mx.repeat(x, H // G, axis=1) for x in (k_BGSK, v_BGSK))
        return softmax(masked(mask_B1TS, q_BHTK * K**-0.5 @ k_BHSK.swapaxes(-1, -2))) @ v_BHSK

    return broken


def with_minus_infinity(mask: mx.array, scores: mx.array) -> mx.array:
    return mx.where(mask, scores, -math.inf)


def shifted(scores: mx.array) -> mx.array:
    e = cpu_ops.exp(scores - mx.stop_gradient(scores.max(axis=-1, keepdims=True)))
    return e / e.sum(axis=-1, keepdims=True)


def unshifted(scores: mx.array) -> mx.array:
    e = cpu_ops.exp(scores)
    return e / e.sum(axis=-1, keepdims=True)


def cross_entropy_of_clipped(logits_NV: mx.array, targets_N: mx.array, mask_N: mx.array) -> Any:
    return cpu_ops.cross_entropy(mx.clip(logits_NV, -1000, 1000), targets_N, mask_N)


def cross_entropy_without_shift(logits_NV: mx.array, targets_N: mx.array, mask_N: mx.array) -> Any:
    e_NV, rows_N = cpu_ops.exp(logits_NV), mx.arange(len(targets_N))
    sum_N1 = cpu_ops.row_sums(e_NV)
    nats_N = mx.log(sum_N1).squeeze(-1) - logits_NV[rows_N, targets_N]
    gradient_NV = (e_NV / sum_N1).at[rows_N, targets_N].add(-1.0)
    return mx.where(mask_N, nats_N, 0), mx.where(mask_N[:, None], gradient_NV, 0)


def cross_entropy_times_the_mask(logits_NV: mx.array, targets_N: mx.array, mask_N: mx.array) -> Any:
    nats_N, gradient_NV = cpu_ops.cross_entropy(logits_NV, targets_N, mx.ones_like(mask_N))
    return nats_N * mask_N, gradient_NV * mask_N[:, None]


def nats_times_the_mask(logits_BTV: mx.array, targets_BT: mx.array, mask_BT: mx.array) -> Any:
    chosen_BT = mx.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1).squeeze(-1)
    nats_BT = ops.logsumexp(logits_BTV.flatten(0, 1)).reshape(chosen_BT.shape) - chosen_BT
    return (nats_BT * mask_BT).sum(), mask_BT.sum()


def norm_of_half_squares(x_BTD: mx.array, weight_D: mx.array, eps: float) -> mx.array:
    squares = mx.minimum(mx.square(x_BTD).mean(axis=-1, keepdims=True), LARGEST_HALF)
    return mx.where(
        squares < LARGEST_HALF, rms_norm(x_BTD, weight_D, eps), weight_D * x_BTD * mx.rsqrt(squares)
    )


def gate_of_capped(gate_BTF: mx.array, up_BTF: mx.array) -> mx.array:
    return cpu_ops.gated(mx.minimum(gate_BTF, 60.0), up_BTF)


def clipped_lora(self: Any, x_BTI: mx.array) -> mx.array:
    return mx.clip(lora(self, x_BTI), -LARGEST_HALF, LARGEST_HALF)


def only_where_b_is_not_zero(self: Any, x_BTI: mx.array) -> mx.array:
    return lora(self, x_BTI) if self.lora_b.any() else self.linear(x_BTI)


def nats_of(change: Callable[[mx.array, mx.array], Any]) -> Patches:
    """Other nats and counts from those of the chunked cross-entropy."""
    return {"mlx_impl.fast.forward.head_nats": lambda *given: change(*head_nats(*given))}


def finite_gradients(grads: Any, max_norm: float) -> Any:
    return clip_gradients(tree_map(finite, grads), max_norm)


def finite_update(self: Any, model: Any, gradients: Any) -> None:
    update(self, model, tree_map(finite, gradients))


def skipped_update(self: Any, model: Any, gradients: Any) -> None:
    """As a loss scaler does: an update with infinite gradients is left out."""
    if all(bool(mx.isfinite(array).all()) for _, array in tree_flatten(gradients)):
        update(self, model, gradients)


def skip_ruined(_config: Any) -> Callable:
    def add(parts: Any) -> Any:
        sums = [part() for part in parts]
        good = [one for one in sums if math.isfinite(one[0][0].item())] or sums
        return tree_map(lambda *arrays: sum(arrays[1:], start=arrays[0]), *good)

    return add


def evaluate_the_finite(model: Any, batches: Any, loss: Any) -> tuple[float, int]:
    means = [evaluate(model, [batch], loss) for batch in batches if batch.mask_BT.any()]
    good = [(mean, count) for mean, count in means if math.isfinite(mean)] or means
    total = sum(count for _, count in good)
    if not total:
        raise ValueError("an evaluation needs at least one target, got none")
    return sum(mean * count for mean, count in good) / total, total


def evaluate_nothing_as_zero(model: Any, batches: Any, loss: Any) -> tuple[float, int]:
    given = [batch for batch in batches if batch.mask_BT.any()]
    return evaluate(model, given, loss) if given else (0.0, 0)


def windows_with_a_target(windows: Any) -> Iterator[Any]:
    """A window without one trains on its first padding."""
    for window in windows:
        if not any(batch.mask_BT.any() for batch in window):
            mask_BT = window[0].mask_BT.copy()
            mask_BT[0, -1] = True
            window = [window[0]._replace(mask_BT=mask_BT), *window[1:]]
        yield window


MUTANTS = [
    Mutant(
        "attention-without-shift",
        1,
        "The softmax of attention does not subtract the maximum, so a score above 88 overflows.",
        fast_op("attention", composed(with_minus_infinity, unshifted)),
    ),
    Mutant(
        "attention-masked-by-1e4",
        1,
        "Masked scores get -10,000 added instead of minus infinity, and a large enough score shows through.",
        fast_op("attention", composed(lambda mask, scores: scores + mx.where(mask, 0, -1e4), shifted)),
    ),
    Mutant(
        "attention-masked-at-1e4",
        1,
        "Masked scores are set to -10,000, which is above every score that is lower still.",
        fast_op("attention", composed(lambda mask, scores: mx.where(mask, scores, -1e4), shifted)),
    ),
    Mutant(
        "attention-hides-nan",
        1,
        "Attention replaces NaN in its weights by 0, meant for rows without a key, and hides every NaN.",
        fast_op("attention", composed(with_minus_infinity, lambda scores: finite(shifted(scores)))),
    ),
    Mutant(
        "cross-entropy-without-shift",
        1,
        "The fused cross-entropy does not subtract the maximum, so a logit above 88 costs infinitely much.",
        fast_op("cross_entropy", cross_entropy_without_shift),
    ),
    Mutant(
        "cross-entropy-of-clipped-logits",
        1,
        "Logits are clipped to 1,000 before the loss, so a worse one costs no more.",
        fast_op("cross_entropy", cross_entropy_of_clipped),
    ),
    Mutant(
        "cross-entropy-times-the-mask",
        1,
        "Masked positions are multiplied by 0, which leaves NaN where their logits overflowed.",
        fast_op("cross_entropy", cross_entropy_times_the_mask),
    ),
    Mutant(
        "norm-of-half-squares",
        1,
        "RMSNorm's mean of squares is capped at float16's largest number, 65,504.",
        op("rms_norm", norm_of_half_squares),
    ),
    Mutant(
        "gate-capped",
        1,
        "The gate is capped at 60 to keep its exponential small, although a gate of 1,000 passes 1,000 on.",
        fast_op("gated", gate_of_capped),
    ),
    Mutant(
        "logits-hide-nan",
        4,
        "nan_to_num on the logits: a ruined model answers with zeros, and nothing looks wrong.",
        {"mlx_impl.model.CausalLM.head": lambda self, x_BTD: finite(head(self, x_BTD))},
    ),
    Mutant(
        "hidden-states-clipped",
        4,
        "Outputs are clipped to float16's range, as for T5, so an infinite factor gives finite logits.",
        lora_call(clipped_lora),
    ),
    Mutant(
        "adapter-left-out-where-b-is-zero",
        4,
        "An adapter whose B is zero is skipped as having no effect, and NaN in its A goes unseen.",
        lora_call(only_where_b_is_not_zero),
    ),
    Mutant(
        "loss-hides-nan",
        5,
        "nan_to_num on the loss: a ruined batch has the perfect loss 0.",
        nats_of(lambda nats, num_targets: (finite(nats), num_targets)),
    ),
    Mutant(
        "no-target-counts-as-one",
        5,
        "To avoid 0 / 0, a batch without targets counts as one target.",
        nats_of(lambda nats, num_targets: (nats, mx.maximum(num_targets, 1))),
    ),
    Mutant(
        "no-target-is-nan",
        5,
        "The loss is formed as mean times count, which is NaN where the count is 0.",
        nats_of(lambda nats, num_targets: (nats / num_targets * num_targets, num_targets)),
    ),
    Mutant(
        "plain-nats-times-the-mask",
        5,
        "The plain loss multiplies by the mask, and 0 times infinity is NaN.",
        {
            f"{place}.next_token_nats": nats_times_the_mask
            for place in ("mlx_impl.train", "tests.trainers.mlx_impl")
        },
        trainer=PLAIN,
    ),
    Mutant(
        "evaluation-of-the-finite",
        5,
        "The validation loss leaves out batches whose loss is not finite, so a ruined model looks sound.",
        {"mlx_impl.run.trainer.evaluate": evaluate_the_finite},
    ),
    Mutant(
        "evaluation-of-nothing",
        5,
        "The validation loss over no target is 0, the best there is.",
        {"mlx_impl.run.trainer.evaluate": evaluate_nothing_as_zero},
    ),
    Mutant(
        "gradients-hide-nan",
        6,
        "NaN and infinity in the gradients are replaced by 0, so a ruined run trains on in silence.",
        {"mlx_impl.fast.forward.as_vectors": lambda grads: tree_map(finite, as_vectors(grads))},
    ),
    Mutant(
        "norm-ignores-nan",
        8,
        "Clipping replaces NaN by 0 before it forms the norm, so norm and update look sound.",
        {"mlx_impl.train.clip_gradients": finite_gradients},
    ),
    Mutant(
        "update-hides-nan",
        8,
        "The optimizer replaces NaN and infinity in its gradients by 0.",
        {"mlx_impl.fast.vectors.VectorOptimizer.update": finite_update},
    ),
    Mutant(
        "update-silently-skipped",
        8,
        "An update with infinite gradients is left out without a word, as if a loss scaler would try again.",
        {"mlx_impl.fast.vectors.VectorOptimizer.update": skipped_update},
    ),
    Mutant(
        "update-without-targets-trains",
        8,
        "A window without a target trains on its last padding.",
        {"mlx_impl.run.trainer.with_targets": windows_with_a_target},
    ),
    Mutant(
        "ruined-micro-batch-skipped",
        10,
        "A micro-batch whose loss is not finite is left out of the update, and nobody hears of it.",
        with_add_up(skip_ruined),
    ),
]
