"""Decoding with a key/value cache, greedy or sampled.

Prompts of one length go through the model together; nothing is padded, so a batch needs no mask and a row's
answer does not depend on its company. Differs from reference/generate.py: the cache, batches, sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx

from .model import CausalLM, KeyValueCache

MAX_ROWS = 32  # prompts decoded together


def next_tokens(logits_BV: mx.array, temperature: float) -> mx.array:
    """argmax at temperature 0, else a draw from softmax(logits / temperature)."""
    if temperature == 0:
        return mx.argmax(logits_BV, axis=-1)
    return mx.random.categorical(logits_BV / temperature)


def decode(
    model: CausalLM, prompts_BT: mx.array, temperature: float = 0.0
) -> Iterator[tuple[mx.array, mx.array]]:
    """Endlessly the next token of every row, and the logits (B, V) that it was chosen by."""
    model.eval()
    caches = [KeyValueCache() for _ in model.model.layers]
    tokens_BT = prompts_BT
    while True:
        logits_BV = model(tokens_BT, caches)[:, -1]
        tokens_B = next_tokens(logits_BV, temperature)
        mx.eval(tokens_B, logits_BV)
        yield tokens_B, logits_BV
        tokens_BT = tokens_B[:, None]


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
    for _, (tokens_B, _) in zip(range(max_tokens), steps, strict=False):
        token = int(tokens_B.item())
        if token == eos_id:
            return
        yield token


def generate_all(
    model: CausalLM, prompts: Sequence[Sequence[int]], max_tokens: int, eos_id: int
) -> list[list[int]]:
    """The greedy answer to every prompt, in the order of the prompts."""
    answers: list[list[int]] = [[] for _ in prompts]
    for rows in equal_length_groups(prompts):
        finished: set[int] = set()
        steps = decode(model, mx.array([list(prompts[row]) for row in rows]))
        for _, (tokens_B, _) in zip(range(max_tokens), steps, strict=False):
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
