"""The vocabulary in a GGUF file's metadata: tokens, their types and scores, and which of them are special.

Source: llama.cpp's names of the keys, and its numbers of the types.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from .gguf_file import shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclass(frozen=True)
class Vocabulary:
    tokens: list[str]  # a token's number is its place
    types: list[int]
    bos: str | None
    eos: str | None
    unknown: str | None

    def numbers(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}


def read_vocabulary(metadata: dict[str, Any]) -> Vocabulary:
    """KeyError where a key is missing, ValueError where its value cannot be right."""
    tokens = read_texts(metadata, "tokenizer.ggml.tokens")
    token, times = next(iter(Counter(tokens).most_common(1)), ("", 0))
    if times > 1:
        raise ValueError(f"the token {shown(token)} stands {times} times in tokenizer.ggml.tokens")
    types = read_numbers(metadata, "tokenizer.ggml.token_type", len(tokens))
    wrong = [kind for kind in types if kind not in range(NORMAL, BYTE + 1)]
    if wrong:
        raise ValueError(f"tokenizer.ggml.token_type must hold numbers from 1 to 6, got {shown(wrong[0])}")
    bos, eos, unknown = (read_special(metadata, tokens, name) for name in ("bos", "eos", "unknown"))
    return Vocabulary(tokens, [int(kind) for kind in types], bos, eos, unknown)


def read_special(metadata: dict[str, Any], tokens: list[str], name: str) -> str | None:
    """The text of the token whose number a key gives; None where there is no such key."""
    key = f"tokenizer.ggml.{name}_token_id"
    number = metadata.get(key)
    if number is None:
        return None
    if not isinstance(number, int) or not 0 <= number < len(tokens):
        raise ValueError(f"{key} must be the number of one of {len(tokens)} tokens, got {shown(number)}")
    return tokens[number]


def read_texts(metadata: dict[str, Any], key: str) -> list[str]:
    value = metadata[key]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{key} must be an array of texts, got {shown(value)}")
    return value


def read_numbers(metadata: dict[str, Any], key: str, count: int) -> list[float]:
    value = metadata[key]
    if not isinstance(value, list) or any(isinstance(number, str) for number in value) or len(value) != count:
        raise ValueError(f"{key} must be an array of {count} numbers, one for each token, got {shown(value)}")
    return value
