"""Decoding with a key/value cache, greedy or sampled.

Prompts of one length go through the model together; nothing is padded, so a batch needs no mask. What all
prompts begin with, such as the system prompt, is read once. Differs from reference/generate.py: the cache,
batches, sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy

import mlx.core as mx

from .model import CausalLM, KeyValueCache

MAX_ROWS = 64  # prompts decoded together


def next_tokens(logits_BV: mx.array, temperature: float) -> mx.array:
    """argmax at temperature 0, else a draw from softmax(logits / temperature)."""
    if temperature == 0:
        return mx.argmax(logits_BV, axis=-1)
    return mx.random.categorical(logits_BV / temperature)


def decode(
    model: CausalLM,
    prompts_BT: mx.array,
    temperature: float = 0.0,
    prefix: Sequence[KeyValueCache] | None = None,
) -> Iterator[mx.array]:
    """Endlessly the next token of every row; `prefix` is what `read_prefix` kept of the text before."""
    model.eval()
    caches = [copy(cache) for cache in prefix] if prefix else empty_caches(model)
    tokens_BT = prompts_BT
    while True:
        x_BTD = model.model(tokens_BT, caches)
        tokens_B = next_tokens(model.head(x_BTD[:, -1:])[:, 0], temperature)
        mx.eval(tokens_B)
        yield tokens_B
        tokens_BT = tokens_B[:, None]


def empty_caches(model: CausalLM) -> list[KeyValueCache]:
    return [KeyValueCache() for _ in model.model.layers]


def read_prefix(model: CausalLM, prompts: Sequence[Sequence[int]]) -> tuple[int, list[KeyValueCache]]:
    """How many tokens all prompts begin with (at least one is left of each), and their keys and values."""
    shortest = min(len(prompt) for prompt in prompts)
    columns = zip(*(prompt[: shortest - 1] for prompt in prompts), strict=True)
    same = [len(set(column)) == 1 for column in columns]
    num_shared = (*same, False).index(False)
    caches = empty_caches(model)
    if num_shared:
        model.eval()
        mx.eval(model.model(mx.array([list(prompts[0][:num_shared])]), caches))
    return num_shared, caches


def generate(
    model: CausalLM,
    prompt: Sequence[int],
    max_tokens: int,
    eos_id: int,
    temperature: float = 0.0,
) -> Iterator[int]:
    """The tokens of one answer as they come; the end-of-turn token ends it and is not yielded."""
    if not prompt:
        raise ValueError("the prompt must have at least one token, got none")
    steps = decode(model, mx.array([list(prompt)]), temperature)
    for _, tokens_B in zip(range(max_tokens), steps, strict=False):
        token = int(tokens_B.item())
        if token == eos_id:
            return
        yield token


def generate_all(
    model: CausalLM, prompts: Sequence[Sequence[int]], max_tokens: int, eos_id: int
) -> list[list[int]]:
    """The greedy answer to every prompt, in the order of the prompts."""
    answers: list[list[int]] = [[] for _ in prompts]
    num_shared, prefix = read_prefix(model, prompts) if prompts else (0, [])
    for rows in equal_length_groups(prompts):
        finished: set[int] = set()
        own_parts = mx.array([list(prompts[row][num_shared:]) for row in rows])
        steps = decode(model, own_parts, prefix=prefix)
        for _, tokens_B in zip(range(max_tokens), steps, strict=False):
            for row, token in zip(rows, tokens_B.tolist(), strict=True):
                if token == eos_id:
                    finished.add(row)
                elif row not in finished:
                    answers[row].append(token)
            if len(finished) == len(rows):
                break
    return answers


def equal_length_groups(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """The numbers of the prompts, in groups of one length and at most MAX_ROWS."""
    by_length: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(row)
    for rows in by_length.values():
        for start in range(0, len(rows), MAX_ROWS):
            yield rows[start : start + MAX_ROWS]
