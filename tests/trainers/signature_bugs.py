"""The bugs that the signatures of the ladder must name: mutants, and small ones for which there is no mutant.

They are planted in `mlx_impl`, while a signature computes its bug with the PyTorch reference: the two are
written independently. Those of gradients and of updates have files of their own. Mutants that
`test_signatures.py` sets aside to measure the signatures are not here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_impl import ops
from mlx_impl.loss import next_token_nats
from mlx_impl.optim import AdamW, clip_gradients, learning_rate_of
from mlx_impl.targets import select_targets
from tests.trainers.mlx_impl import PlainTrainer
from tests.trainers.mutants.forward import frequencies
from tests.trainers.mutants.gradient import begun
from tests.trainers.mutants.layer import ignoring
from tests.trainers.mutants.loss import masks, plain_loss
from tests.trainers.mutants.mutant import PLAIN, SHIPPED, Mutant, Patches, lora_call
from tests.trainers.mutants.ops import op
from tests.trainers.mutants.step import adamw, rates, scheduled

stop = mx.stop_gradient
attention, rope = ops.attention, ops.rope
MLX, PATTERN = "tests.trainers.mlx_impl.MlxTrainer", "tests.trainers.mlx_impl.PlainTrainer"

# Mutant -> the signature that must name it.
OF_MUTANTS = {
    "alpha-ignored": "scale is 20",
    "rslora-ignored": "rsLoRA ignored",
    "alpha-pattern-ignored": "alpha_pattern ignored",
    "last-linear-forgotten": "last adapter not used",
    "adapter-not-in-the-path": "adapter not used",
    "factor-not-transposed": "A read as its transpose",
    "bias-lost-in-the-adapter": "bias lost in the adapter",
    "dora-length-of-the-base": "DoRA by the length of W",
    "rope-scaling-without-blend": "llama3 without blend",
    "rope-base-fixed": "rope base 10000",
    "llama3-factor-fixed": "llama3 factor fixed",
    "llama3-bands-fixed": "llama3 bands fixed",
    "qk-norm-after-rope": "qk norm after rope",
    "sliding-window-ignored": "window ignored",
    "sliding-window-one-too-wide": "window one too wide",
    "residual-after-the-norm": "residual after the norm",
    "embedding-scaled": "embedding scaled",
    "attention-unscaled": "attention unscaled",
    "attention-heads-tiled": "kv heads tiled",
    "norm-eps-fixed": "norm eps 1e-06",
    "norm-eps-outside-the-root": "norm eps outside the root",
    "silu-is-gelu": "silu is gelu",
    "end-token-masked": "last target masked",
    "labels-shifted-twice": "labels shifted twice",
    "labels-not-shifted": "labels not shifted",
    "masked-tokens-in-the-denominator": "count of positions",
    "mean-of-row-means": "mean of row means",
    "masked-row-counted": "a row without targets counts as one",
    "one-more-target-a-row": "one more target a row",
    "token-zero-is-padding": "token 0 is padding",
    "evaluation-by-batches": "evaluation by batches",
    "evaluation-without-the-last-batch": "evaluation without the last batch",
    "base-without-gradient": "base without gradient",
    "forward-outside-the-graph": "no gradient",
    "gradient-scaled-again": "gradient doubled",
    "only-the-first-trains": "no gradient of all but the first linear of an input",
    "embedding-trained": "embedding trained",
    "norm-trained": "last norm trained",
    "frozen-decayed": "frozen weights decayed",
    "no-bias-correction": "no bias correction",
    "bias-correction-one-step-late": "bias correction one late",
    "eps-inside-the-root": "eps in the root",
    "loraplus-on-a": "LoRA+ on A",
    "schedule-one-update-late": "schedule one late",
    "warmup-one-update-longer": "warmup holds its peak",
    "clip-by-value": "clipped by value",
    "clip-each-tensor": "each tensor clipped alone",
    "schedule-not-used": "schedule ignored",
    "mean-of-means": "mean of means, in the loss too",
    "last-micro-batch-only": "last micro-batch only",
    "divided-by-accumulation-again": "divided by the accumulation again",
    "clip-each-micro-batch": "each micro-batch clipped",
}


def targets(scale: Callable[[Any, Any], float]) -> Patches:
    """Another scale, from the target and the configuration."""

    def select(model: Any, config: Any) -> Any:
        return [replace(t, scale=scale(t, config)) for t in select_targets(model, config)]

    return {"mlx_impl.lora.select_targets": select}


def of_dora(length: Callable[[Any], Any]) -> Patches:
    """In the pattern, and in the fast path on a CPU."""

    def row_lengths(weight_OI: mx.array, a_IR: mx.array, b_RO: mx.array, scale: float) -> mx.array:
        base = SimpleNamespace(weight=weight_OI)
        return length(SimpleNamespace(linear=base, lora_a=a_IR, lora_b=b_RO, scale=scale))

    return {
        "mlx_impl.lora.DoRALinear.length_O": lambda self: stop(length(self)),
        "mlx_impl.fast.projection.row_lengths": row_lengths,
    }


def merged(self: Any) -> mx.array:
    return self.linear.weight + self.scale * (self.lora_a @ self.lora_b).T


def rope_of_pairs(x_BHTK: mx.array, frequency_P: Any, position: Any) -> mx.array:
    K = x_BHTK.shape[-1]
    order = np.concatenate([np.arange(0, K, 2), np.arange(1, K, 2)])
    return rope(x_BHTK[..., mx.array(order)], frequency_P, position)[..., mx.array(np.argsort(order))]


def attending(change: Callable[[mx.array], mx.array]) -> Patches:
    """Attention with another mask (T, S), from the right one."""

    def broken(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None) -> mx.array:
        T, S = q.shape[2], k.shape[2]
        right = mx.tril(mx.ones((T, S)), S - T) > 0 if mask is None else mask
        return attention(q, k, v, change(right))

    return op("attention", broken)


def one_ahead(mask: mx.array) -> mx.array:
    T = mask.shape[-1]
    return mx.logical_or(mask, mx.arange(T)[:, None] + 1 == mx.arange(T))


def first_head(q: mx.array, k: mx.array, v: mx.array, mask: Any) -> mx.array:
    return attention(q, k[:, :1], v[:, :1], mask)


def without_norms(self: Any, x_BTD: mx.array, position: Any, mask: Any, *_: Any) -> mx.array:
    outputs = (projection(x_BTD) for projection in (self.q_proj, self.k_proj, self.v_proj))
    q, k, v = (mx.unflatten(y, -1, (-1, self.head_dim)).swapaxes(1, 2) for y in outputs)
    q, k = (ops.rope(x, self.frequency_P, position) for x in (q, k))
    return self.o_proj(ops.attention(q, k, v, mask).swapaxes(1, 2).flatten(2))


def one_padding_target(mask_BT: np.ndarray) -> np.ndarray:
    """By <= instead of <: also the position after the last target of a row, if there is one."""
    after = np.zeros_like(mask_BT)
    for row, mask_T in enumerate(mask_BT):
        places = np.nonzero(mask_T)[0]
        if len(places) and places[-1] + 1 < len(mask_T):
            after[row, places[-1] + 1] = True
    return mask_BT | after


def moved(mask_BT: np.ndarray, by: int) -> np.ndarray:
    wide = np.pad(mask_BT, ((0, 0), (1, 1)))
    return wide[:, 1 - by : wide.shape[1] - 1 - by]


def of_nats(change: Callable[[mx.array, mx.array, Any], tuple]) -> Patches:
    """Another sum and count, from the right ones and the arrays."""
    return plain_loss(lambda *arrays: change(*next_token_nats(*arrays), arrays))


def gradients(change: Callable[[dict, Any], dict]) -> Patches:
    right = PlainTrainer.gradients
    return {f"{PATTERN}.gradients": lambda self, batch: change(right(self, batch), batch)}


def times(factor: Callable[[Any], float]) -> Patches:
    return gradients(lambda grads, batch: {name: factor(batch) * x for name, x in grads.items()})


def losing(*ends: str) -> Patches:
    return gradients(lambda grads, _: {n: 0 * x if n.endswith(ends) else x for n, x in grads.items()})


def cut_between(self: Any, x_BTI: mx.array) -> mx.array:
    return self.linear(x_BTI) + self.scale * (stop(x_BTI @ self.lora_a) @ self.lora_b)


def detached_input(self: Any, x_BTI: mx.array) -> mx.array:
    return self.linear(x_BTI) + self.scale * (stop(x_BTI) @ self.lora_a @ self.lora_b)


def losses_after(self: Any, windows: Any, training: Any) -> list[float]:
    losses = []
    trainer = self.begin(training)
    for record in trainer.fit_windows([list(window) for window in windows]):
        sums = [self.loss(batch) for batch in windows[record.step - 1]]
        losses.append(sum(nats for nats, _ in sums) / sum(count for _, count in sums))
    return losses


def with_losses(change: Callable[[list[float], Any], list[float]]) -> Patches:
    right = PlainTrainer.train
    return {
        f"{PATTERN}.train": lambda self, windows, training: change(right(self, windows, training), windows)
    }


def sums_of_nats(losses: list[float], windows: Any) -> list[float]:
    counts = [sum(batch.mask_BT.sum() for batch in window) for window in windows]
    return [loss * int(count) for loss, count in zip(losses, counts, strict=True)]


def clipping(broken: Callable[[Any, float], Any]) -> Patches:
    """Gradients clipped in another way; the reported norm is right."""
    return {
        "mlx_impl.train.clip_gradients": lambda grads, limit: (
            broken(grads, limit),
            clip_gradients(grads, 0)[1],
        )
    }


def raised_to(grads: Any, limit: float) -> Any:
    norm = clip_gradients(grads, 0)[1]
    return tree_map(lambda g: g * limit / norm, grads) if limit else grads


def stepping(change: Callable[[Any, Any, Any, dict], mx.array]) -> Patches:
    return {"mlx_impl.optim.AdamW.apply_single": change}


right_step = AdamW.apply_single


def decayed_by_itself(self: Any, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
    """p - decay * p, without the rate."""
    by = self.learning_rate * self.weight_decay
    return right_step(self, gradient, parameter * (1 - self.weight_decay) / (1 - by), state)


def plain_rate(step: int, config: Any) -> float:
    return learning_rate_of(step, replace(config, warmup_steps=0))


def warm_at_once(step: int, config: Any) -> float:
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    return learning_rate_of(step, config)


def as_cosine(step: int, config: Any) -> float:
    is_linear = config.lr_schedule == "linear"
    return learning_rate_of(step, replace(config, lr_schedule="cosine") if is_linear else config)


def bug(name: str, patches: Patches, trainer: str = PLAIN) -> tuple[str, Mutant]:
    return name, Mutant(name, 0, "", patches, trainer=trainer)


# Signature -> a bug of its kind.
OF_OTHERS: dict[str, Mutant] = dict(
    [
        bug(
            "scale is alpha", targets(lambda t, config: t.scale * t.rank ** (0.5 if config.use_rslora else 1))
        ),
        bug("rsLoRA always", ignoring(use_rslora=True), SHIPPED),
        bug("common rank in the scale", targets(lambda t, config: t.scale * t.rank / config.rank), SHIPPED),
        bug("scale is 1", targets(lambda t, config: 1.0), SHIPPED),
        bug("scale divided twice", targets(lambda t, config: t.scale / t.rank), SHIPPED),
        bug("DoRA by one length", of_dora(lambda self: mx.sqrt(mx.square(merged(self)).sum())), SHIPPED),
        bug("DoRA without length", of_dora(lambda self: mx.array(1.0)), SHIPPED),
        bug(
            "DoRA without magnitude",
            {
                "mlx_impl.lora.DoRALinear.__call__": lambda self, x: (
                    x @ merged(self).T + (self.linear.bias if "bias" in self.linear else 0.0)
                )
            },
        ),
        bug("rope interleaved", op("rope", rope_of_pairs)),
        bug("rope left out", op("rope", lambda x, *_: x)),
        bug("rope base 500000", frequencies(rope_theta=5e5), SHIPPED),
        bug("no causal mask", attending(mx.ones_like)),
        bug("causal mask one ahead", attending(one_ahead)),
        bug("first kv head for all", op("attention", first_head)),
        bug(
            "attention divided by K",
            op("attention", lambda q, k, v, m: attention(q * q.shape[-1] ** -0.5, k, v, m)),
        ),
        bug("norm weight plus one", op("rms_norm", lambda x, w, eps: mx.fast.rms_norm(x, 1 + w, eps))),
        bug("norm subtracts the mean", op("rms_norm", lambda x, w, eps: mx.fast.layer_norm(x, w, None, eps))),
        bug("silu is relu", op("silu", lambda x: mx.maximum(x, 0))),
        bug("qk norm ignored", {"mlx_impl.model.Attention.__call__": without_norms}),
        bug(
            "head always tied",
            {"mlx_impl.model.CausalLM.head": lambda self, x: x @ self.model.embed_tokens.weight.T},
        ),
        bug("pad targets 1", masks(one_padding_target), SHIPPED),
        bug("everything counted", masks(np.ones_like), SHIPPED),
        bug("prompt counted", masks(lambda m: np.cumsum(m[:, ::-1], 1)[:, ::-1] > 0), SHIPPED),
        bug("first target masked", masks(lambda m: m & moved(m, 1)), SHIPPED),
        bug("mask one late", masks(lambda m: moved(m, 1)), SHIPPED),
        bug("mask one early", masks(lambda m: moved(m, -1)), SHIPPED),
        bug("mean for the sum", of_nats(lambda nats, count, _: (nats / count, count))),
        bug("in bits", of_nats(lambda nats, count, _: (nats / np.log(2), count))),
        bug("count of rows", of_nats(lambda nats, count, arrays: (nats, mx.array(len(arrays[2]))))),
        bug("gradient of the sum", times(lambda batch: int(batch.mask_BT.sum()))),
        bug("gradient over rows", times(lambda batch: int(batch.mask_BT.sum()) / len(batch.mask_BT))),
        bug("gradient over positions", times(lambda batch: float(batch.mask_BT.mean()))),
        bug("no gradient of lora_b", losing("lora_b")),
        bug(
            "scale forgotten in dA",
            {
                "mlx_impl.lora.LoRALinear.update_BTO": lambda self, x: (
                    x @ (stop(self.lora_a) + (self.lora_a - stop(self.lora_a)) / self.scale) @ self.lora_b
                )
            },
        ),
        bug("A cut from B", lora_call(cut_between)),
        bug("adapter's input detached", lora_call(detached_input)),
        bug("sigmoid detached", op("silu", lambda x: x * stop(mx.sigmoid(x)))),
        bug("values detached", op("attention", lambda q, k, v, m: attention(q, k, stop(v), m))),
        bug("whole base trained", begun(lambda model: model.unfreeze())),
        bug(
            "norms trained",
            begun(
                lambda model: [layer.unfreeze() for name, layer in model.named_modules() if "norm" in name]
            ),
            SHIPPED,
        ),
        bug("eps 1e-06", adamw(lambda self: {"eps": 1e-6})),
        bug("betas (0.9, 0.99)", adamw(lambda self: {"betas": [0.9, 0.99]})),
        bug("decay without the rate", stepping(decayed_by_itself)),
        bug("decay ignored by AdamW", adamw(lambda self: {"weight_decay": 0.0})),
        bug("LoRA+ on both", rates(lambda rate, ratio: (ratio * rate, ratio * rate))),
        bug("LoRA+ slows A down", rates(lambda rate, ratio: (rate / ratio, rate))),
        bug("warmup ignored", scheduled(plain_rate)),
        bug("warmup from one", scheduled(warm_at_once)),
        bug("cosine for linear", scheduled(as_cosine)),
        bug("clipping ignored", clipping(lambda grads, limit: grads)),
        bug("clipped from below too", clipping(raised_to)),
        bug("loss after the update", {f"{PATTERN}.train": losses_after}),
        bug("sum of nats reported", with_losses(sums_of_nats)),
        bug("nothing trains", {"mlx_impl.optim.LoRAOptimizer.update": lambda self, model, grads: None}),
    ]
)
