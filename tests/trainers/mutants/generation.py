"""Rung 19, generation; and bugs that show only at real sizes (rungs 1, 4 and 18)."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn

from mlx_impl.fast import cpu_ops, ops
from mlx_impl.fast.answer import generate
from mlx_impl.fast.decode import before_stop, generate_all
from mlx_impl.fast.kv_cache import KVCache
from mlx_impl.lora import lora_layers
from mlx_impl.model import attention_mask, rope_frequencies
from mlx_impl.ops import rms_norm
from tests.trainers.mlx_impl import MlxTrainer
from tests.trainers.mutants.mutant import Mutant
from tests.trainers.mutants.ops import cross_entropy_of

embed, greedy = nn.Embedding.__call__, MlxTrainer.greedy
CHUNK = 10_000  # words of the vocabulary


def whole_chunks(x_NV: mx.array) -> mx.array:
    V = x_NV.shape[-1]
    return x_NV[:, : V - V % CHUNK if V > CHUNK else V]


def of_whole_chunks(x_NV: mx.array) -> mx.array:
    """Powers of e compute in float64, so that the bug shows only in a large vocabulary."""
    top_N1 = mx.stop_gradient(x_NV.max(axis=-1, keepdims=True))
    return mx.log(cpu_ops.exp(whole_chunks(x_NV) - top_N1).sum(axis=-1)) + top_N1.squeeze(-1)


def norm_of_the_first(x_BTD: mx.array, weight_D: mx.array, eps: float) -> mx.array:
    if x_BTD.shape[-1] <= 128:
        return rms_norm(x_BTD, weight_D, eps)
    return weight_D * x_BTD * mx.rsqrt(mx.square(x_BTD[..., :128]).mean(axis=-1, keepdims=True) + eps)


def first_five(frequency_P: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(frequency if p < 5 else 1e-30 for p, frequency in enumerate(frequency_P))


def one_position_late(x_BHTK: mx.array, wavelength_P: mx.array, position: Any) -> mx.array:
    return rotated(x_BHTK, wavelength_P, position - 1 if x_BHTK.shape[2] == 1 else position)


def forgetting_the_first(self: Any, k_BGTK: mx.array, v_BGTK: mx.array) -> tuple[mx.array, mx.array]:
    k_BGSK, v_BGSK = extend(self, k_BGTK, v_BGTK)
    return (k_BGSK[:, :, -16:], v_BGSK[:, :, -16:]) if k_BGTK.shape[2] == 1 else (k_BGSK, v_BGSK)


extend, rotated = KVCache.extend, ops.rotated


def without_window_in_decoding(T: int, offset: int, window: int | None, segment_BT: Any) -> mx.array | None:
    return None if T == 1 else attention_mask(T, offset, window, segment_BT)


def greedy_of_the_base(self: Any, prompt: list[int], num_tokens: int) -> list[int]:
    layers = lora_layers(self.model).values()
    scales = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale = 0.0
    answer = greedy(self, prompt, num_tokens)
    for layer, scale in zip(layers, scales, strict=True):
        layer.scale = scale
    return answer


def greedy_in_training(self: Any, prompt: list[int], num_tokens: int) -> list[int]:
    with patch("mlx.nn.Module.eval", lambda self: self.train()):
        return greedy(self, prompt, num_tokens)


def answers_by_length(model: Any, prompts: Any, *limits: Any, **more: Any) -> list[list[int]]:
    return generate_all(model, sorted(prompts, key=len), *limits, **more)


def all_end_with_the_first(model: Any, prompts: Any, *limits: Any, **more: Any) -> list[list[int]]:
    answers = generate_all(model, prompts, *limits, **more)
    return [answer[: min(map(len, answers))] for answer in answers]


def sampled(model: Any, prompt: Any, max_tokens: int, stop_ids: Any, choose: Any = None) -> Any:
    return generate(model, prompt, max_tokens, stop_ids, choose=mx.random.categorical)


def with_the_end(tokens: list[int], stop_ids: Any) -> list[int]:
    return tokens[: len(before_stop(tokens, stop_ids)) + 1]


MUTANTS = [
    Mutant(
        "tokens-in-a-byte",
        4,
        "Token ids are stored in eight bits: right for a toy vocabulary, wrong tokens for a real one.",
        {"mlx.nn.Embedding.__call__": lambda self, tokens: embed(self, tokens % 256)},
        cases=("real vocabulary",),
    ),
    Mutant(
        "last-chunk-of-the-vocabulary",
        1,
        "The cross-entropy goes over the vocabulary in chunks, and drops the last, incomplete chunk.",
        cross_entropy_of(of_whole_chunks),
    ),
    Mutant(
        "norm-of-a-narrow-row",
        18,
        "The norm's kernel sums only the first 128 elements of a row: right for a toy width.",
        {"mlx_impl.ops.rms_norm": norm_of_the_first},
    ),
    Mutant(
        "rope-table-too-short",
        4,
        "RoPE's table has only 5 frequencies, enough for a toy; a wider head has pairs that are not rotated.",
        {"mlx_impl.model.rope_frequencies": lambda config: first_five(rope_frequencies(config))},
    ),
    Mutant(
        "cache-one-position-late",
        19,
        "After the prompt, RoPE's positions are one too small, so answers are nearly right.",
        {"mlx_impl.fast.ops.rotated": one_position_late},
    ),
    Mutant(
        "cache-forgets-the-beginning",
        19,
        "The key/value cache silently keeps only the last 16 tokens.",
        {"mlx_impl.fast.kv_cache.KVCache.extend": forgetting_the_first},
    ),
    Mutant(
        "window-not-in-decoding",
        19,
        "Once the cache is used, a new token attends all tokens, also those outside the attention window.",
        {"mlx_impl.model.attention_mask": without_window_in_decoding},
        cases=("sliding window",),
    ),
    Mutant(
        "answers-from-nan",
        19,
        "The logits are NaN, and generation answers with the argmax all the same: token 0, again and again.",
        {"mlx_impl.fast.answer.zero_if_finite": lambda logits_BV: mx.zeros(len(logits_BV))},
    ),
    Mutant(
        "sampled-for-greedy",
        19,
        "Temperature 0 is treated as not given, so tokens are sampled at temperature 1.",
        {"tests.trainers.mlx_impl.generate": sampled},
    ),
    Mutant(
        "generation-without-the-adapter",
        19,
        "Generation uses the base model, so training seems to have had no effect.",
        {"tests.trainers.mlx_impl.MlxTrainer.greedy": greedy_of_the_base},
    ),
    Mutant(
        "end-token-does-not-end",
        19,
        "Generation does not stop at the end of turn.",
        {"mlx_impl.fast.decode.before_stop": lambda tokens, stop_ids: tokens},
    ),
    Mutant(
        "end-token-in-the-answer",
        19,
        "The end-of-turn token is returned as part of the answer.",
        {"mlx_impl.fast.decode.before_stop": with_the_end},
    ),
    Mutant(
        "answers-in-another-order",
        19,
        "Prompts are sorted by length for batching, and the answers are not put back in order.",
        {"tests.trainers.mlx_impl.generate_all": answers_by_length},
    ),
    Mutant(
        "one-end-ends-all",
        19,
        "The first row that ends stops the whole batch.",
        {"tests.trainers.mlx_impl.generate_all": all_end_with_the_first},
    ),
    Mutant(
        "dropout-in-generation",
        19,
        "Generation leaves the model in training mode, with dropout on.",
        {"tests.trainers.mlx_impl.MlxTrainer.greedy": greedy_in_training},
    ),
]
