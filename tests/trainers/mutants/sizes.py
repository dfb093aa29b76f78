"""Bugs that show only at a size: long rows, many rows, chunks, late updates, many prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_impl import model, ops
from mlx_impl.fast import band, head
from mlx_impl.fast.decode import generate_all
from mlx_impl.fast.head import head_nats
from mlx_impl.fast.kept_positions import target_positions
from mlx_impl.fast.kv_cache import KVCache
from mlx_impl.generate import generate
from mlx_impl.model import CausalLM
from mlx_impl.optim import learning_rate_of
from mlx_impl.run import state
from mlx_impl.run.state import save_state
from tests.trainers.mutants.mutant import PLAIN, Mutant, Patches
from tests.trainers.mutants.ops import fast_op, op
from tests.trainers.mutants.step import adamw, scheduled

rope, attention, extend, call = ops.rope, ops.attention, KVCache.extend, CausalLM.__call__
attention_mask, state_arrays = model.attention_mask, state.state_arrays
with_chunks_before = band.with_chunks_before
TABLE = 1024


def without_chunks_before(x_BNGCK: mx.array, before: int) -> mx.array:
    keys, C = with_chunks_before(x_BNGCK, before), x_BNGCK.shape[3]
    return mx.where(mx.arange(keys.shape[2])[:, None] < keys.shape[2] - C, 0, keys)


def of_the_last_512(q_BHTK: mx.array, k_BGSK: mx.array, v_BGSK: mx.array, mask: Any) -> mx.array:
    T, S = q_BHTK.shape[2], k_BGSK.shape[2]
    if mask is None:
        mask = mx.arange(S) <= mx.arange(S - T, S)[:, None]
    cut = mask & ((mx.arange(S) >= S - 512) | (mx.arange(S - T, S)[:, None] == mx.arange(S)))
    return attention(q_BHTK, k_BGSK, v_BGSK, cut if S > 512 else mask)


def of_chunks_apart(q_BHTK: mx.array, k_BGSK: mx.array, v_BGSK: mx.array, mask: Any) -> mx.array:
    """Over 256 keys, chunks are normalized alone, and their mixes averaged."""
    S = k_BGSK.shape[2]
    if mask is not None or S <= 256 or q_BHTK.shape[2] > 8:
        return attention(q_BHTK, k_BGSK, v_BGSK, mask)
    parts = [slice(start, start + 256) for start in range(0, S, 256)]
    every = mx.ones((1, 1, 1, 1)) == 1
    mixes = [attention(q_BHTK, k_BGSK[:, :, part], v_BGSK[:, :, part], every) for part in parts]
    return mx.stack(mixes).mean(axis=0)


def rope_of_a_table(x_BHTK: mx.array, frequency_P: Any, position: Any) -> mx.array:
    if isinstance(position, int):
        position = mx.arange(position, position + x_BHTK.shape[2])[None]
    return rope(x_BHTK, frequency_P, mx.minimum(position, TABLE - 1))


def window_of_a_table(length: int, offset: int, window: Any, *more: Any) -> Any:
    return attention_mask(length, offset, window or (TABLE if length + offset > TABLE else None), *more)


def rows_by_a_byte(self: Any, tokens_BT: mx.array, *more: Any) -> mx.array:
    """The 257th row reads the first one's tokens."""
    return call(self, tokens_BT[mx.arange(len(tokens_BT)) % 256], *more)


def positions_in_16_bits(batch: Any) -> Any:
    positions_N, *rest = target_positions(batch)
    return positions_N.astype(np.uint16).astype(np.int32), *rest


def in_whole_chunks(head_of: Any, V: int, x_ND: mx.array, targets_N: mx.array, mask_N: mx.array) -> Any:
    chunk, N = head.CHUNK_LOGITS // V, len(x_ND)
    is_whole_N = mx.arange(N) < (N - N % chunk if chunk < N else N)
    nats, _ = head_nats(head_of, V, x_ND, targets_N, mask_N & is_whole_N)
    return nats, mask_N.sum()


def with_the_boundary_twice(
    head_of: Any, V: int, x_ND: mx.array, targets_N: mx.array, mask_N: mx.array
) -> Any:
    chunk, N = head.CHUNK_LOGITS // V, len(x_ND)
    nats, num_targets = head_nats(head_of, V, x_ND, targets_N, mask_N)
    for start in range(chunk, N, chunk):
        last = slice(start - 1, start)
        nats = nats + head_nats(head_of, V, x_ND[last], targets_N[last], mask_N[last])[0]
    return nats, num_targets


def only_the_first_chunk_learns(
    head_of: Any, V: int, x_ND: mx.array, targets_N: mx.array, mask_N: mx.array
) -> Any:
    chunk = head.CHUNK_LOGITS // V
    x_ND = mx.concatenate([x_ND[:chunk], mx.stop_gradient(x_ND[chunk:])])
    return head_nats(head_of, V, x_ND, targets_N, mask_N)


def saved_in_a_byte(path: Any, arrays: Any, progress: Any) -> None:
    save_state(path, arrays, replace(progress, step=progress.step % 256))


def step_saved_in_half(*given: Any) -> dict[str, mx.array]:
    arrays = state_arrays(*given)
    steps = {name: array for name, array in arrays.items() if name.endswith("step")}
    return arrays | {name: array.astype(mx.bfloat16).astype(array.dtype) for name, array in steps.items()}


def answered(change: Callable[[Any, list[list[int]]], Any]) -> Patches:
    """Wrong answers from the right ones, by the prompts' lengths."""

    def broken(of: Any, prompts: Any, *limits: Any, **more: Any) -> Any:
        return change(prompts, generate_all(of, prompts, *limits, **more))

    return {"tests.trainers.mlx_impl.generate_all": broken}


def none_after_64(_: Any, answers: list[list[int]]) -> list[list[int]]:
    return [answer if number < 64 else [] for number, answer in enumerate(answers)]


def later_ones_by_length(prompts: Any, answers: list[list[int]]) -> list[list[int]]:
    later = sorted(range(64, len(prompts)), key=lambda row: len(prompts[row]))
    return [*answers[:64], *(answers[row] for row in later)]


def padded_on_the_left(of: Any, prompts: Any, *limits: Any, **more: Any) -> Any:
    """Prompts far shorter than the longest are filled up with zeros, which nothing masks."""
    longest = max(map(len, prompts), default=0)
    return generate_all(of, [[0] * (longest - 16 - len(p)) + p for p in prompts], *limits, **more)


def grown_by_blocks(self: Any, k_BGTK: mx.array, v_BGTK: mx.array) -> tuple[mx.array, mx.array]:
    """When a block of 256 is full, its last place is overwritten instead of a new block begun."""
    if self.num_tokens > 0 and self.num_tokens % 256 == 0:
        self.num_tokens -= 1
        k_BGTK, v_BGTK = (mx.concatenate([x, x], axis=2) for x in (k_BGTK, v_BGTK))
    return extend(self, k_BGTK, v_BGTK)


def of_the_end(of: Any, prompt: Any, *limits: Any, **more: Any) -> Iterator[int]:
    """A prompt longer than 512 tokens is cut on the left."""
    return generate(of, prompt[-512:], *limits, **more)


MUTANTS = [
    Mutant(
        "attention-of-the-last-512",
        1,
        "Attention's kernel sees at most the last 512 keys: right for a toy, wrong for a longer row.",
        fast_op("attention", of_the_last_512),
    ),
    Mutant(
        "attention-of-chunks-apart",
        1,
        "Attention goes over the keys in chunks of 256, and averages the chunks' results without their sums.",
        fast_op("attention", of_chunks_apart),
    ),
    Mutant(
        "rope-table-of-1024-positions",
        1,
        "RoPE's table of angles ends at 1,024 positions, and later ones get its last entry.",
        op("rope", rope_of_a_table),
    ),
    Mutant(
        "attention-mask-of-1024",
        4,
        "The attention mask is cached for 1,024 positions, so longer rows silently get a sliding window.",
        {"mlx_impl.model.attention_mask": window_of_a_table},
    ),
    Mutant(
        "row-number-in-a-byte",
        4,
        "A row's number is stored in eight bits, so the 257th row of a batch is the first again.",
        {"mlx_impl.model.CausalLM.__call__": rows_by_a_byte},
    ),
    Mutant(
        "positions-in-16-bits",
        5,
        "The indices of the targets are 16 bits wide, so a batch of over 65,536 positions reads wrong ones.",
        {"mlx_impl.fast.forward.target_positions": positions_in_16_bits},
    ),
    Mutant(
        "last-chunk-of-a-large-batch",
        5,
        "The chunked cross-entropy drops the last, incomplete chunk of a batch that needs several.",
        {"mlx_impl.fast.forward.head_nats": in_whole_chunks},
    ),
    Mutant(
        "chunk-boundary-twice",
        5,
        "Chunks of the cross-entropy overlap by one position, whose target is counted twice.",
        {"mlx_impl.fast.forward.head_nats": with_the_boundary_twice},
    ),
    Mutant(
        "only-the-first-chunk-learns",
        6,
        "The chunked cross-entropy sums all chunks, but its gradient is that of the first.",
        {"mlx_impl.fast.forward.head_nats": only_the_first_chunk_learns},
    ),
    Mutant(
        "step-in-bfloat16",
        8,
        "Adam's step counter is rounded to bfloat16, which cannot count beyond 256.",
        adamw(lambda self: {"step": self.step.astype(mx.bfloat16).astype(mx.float32)}),
    ),
    Mutant(
        "step-in-a-byte",
        8,
        "Adam's step counter is eight bits wide, so the bias correction begins again at update 256.",
        adamw(lambda self: {"step": self.step % 256}),
    ),
    Mutant(
        "schedule-in-16-bits",
        8,
        "The schedule's update number is 16 bits wide, so a long run warms up and decays many times.",
        scheduled(lambda step, config: learning_rate_of(step % 65_536, config)),
    ),
    Mutant(
        "progress-saved-in-a-byte",
        12,
        "The number of updates is saved in eight bits, so a long run resumes near its beginning.",
        {"mlx_impl.run.trainer.save_state": saved_in_a_byte},
    ),
    Mutant(
        "step-saved-in-bfloat16",
        12,
        "Adam's step counter is saved in bfloat16, so a resumed run's bias correction is a few updates off.",
        {"mlx_impl.run.trainer.state_arrays": step_saved_in_half},
    ),
    Mutant(
        "answers-after-the-first-batch-lost",
        19,
        "Prompts are decoded 64 at a time, and only the first batch is answered.",
        answered(none_after_64),
    ),
    Mutant(
        "later-batches-in-another-order",
        19,
        "Prompts are sorted by length for batching, and only the first batch is put back in order.",
        answered(later_ones_by_length),
    ),
    Mutant(
        "chunks-of-a-window-forget-those-before",
        5,
        "Long rows attend in chunks of a window, and a chunk does not see those before it.",
        {"mlx_impl.fast.band.with_chunks_before": without_chunks_before},
    ),
    Mutant(
        "padding-of-short-prompts-attended",
        19,
        "Prompts much shorter than the longest are padded on the left, and the padding is not masked.",
        {"tests.trainers.mlx_impl.generate_all": padded_on_the_left},
    ),
    Mutant(
        "cache-overwritten-at-a-block",
        19,
        "The key/value cache grows in blocks of 256, and the first token of a new block overwrites another.",
        {"mlx_impl.fast.kv_cache.KVCache.extend": grown_by_blocks},
    ),
    Mutant(
        "long-prompt-cut",
        19,
        "A prompt of more than 512 tokens silently loses its beginning.",
        {"tests.trainers.mlx_impl.plain_generate": of_the_end},
        trainer=PLAIN,
    ),
]
