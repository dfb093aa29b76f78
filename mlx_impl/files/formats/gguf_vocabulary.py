"""Read the vocabulary in a GGUF file's metadata: tokens, their types and scores, special tokens.

Source: llama.cpp's names of the keys, and its numbers of the token types.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from .gguf_file import quote

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclass(frozen=True)
class Vocabulary:
    tokens: list[str]  # a token's id is its index
    types: list[int]
    bos: str | None
    eos: str | None
    unknown: str | None

    def ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}


def read_vocabulary(metadata: dict[str, Any]) -> Vocabulary:
    """The vocabulary; KeyError for a missing key, ValueError for a wrong value."""
    tokens = read_texts(metadata, "tokenizer.ggml.tokens")
    token, times = next(iter(Counter(tokens).most_common(1)), ("", 0))
    if times > 1:
        raise ValueError(f"tokenizer.ggml.tokens must hold each token once, got {quote(token)} {times} times")
    types = read_numbers(metadata, "tokenizer.ggml.token_type", len(tokens))
    wrong = [kind for kind in types if kind not in range(NORMAL, BYTE + 1)]
    if wrong:
        raise ValueError(f"tokenizer.ggml.token_type must hold numbers from 1 to 6, got {quote(wrong[0])}")
    bos, eos, unknown = (read_special(metadata, tokens, name) for name in ("bos", "eos", "unknown"))
    return Vocabulary(tokens, [int(kind) for kind in types], bos, eos, unknown)


def read_special(metadata: dict[str, Any], tokens: list[str], name: str) -> str | None:
    """The token whose id the metadata gives, such as BOS; None if the key is missing."""
    key = f"tokenizer.ggml.{name}_token_id"
    number = metadata.get(key)
    if number is None:
        return None
    if not isinstance(number, int) or not 0 <= number < len(tokens):
        raise ValueError(f"{key} must be the id of one of {len(tokens)} tokens, got {quote(number)}")
    return tokens[number]


def read_texts(metadata: dict[str, Any], key: str) -> list[str]:
    value = metadata[key]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{key} must be an array of texts, got {quote(value)}")
    return value


def read_numbers(metadata: dict[str, Any], key: str, count: int) -> list[float]:
    value = metadata[key]
    if not isinstance(value, list) or any(isinstance(number, str) for number in value) or len(value) != count:
        raise ValueError(f"{key} must be an array of {count} numbers, one for each token, got {quote(value)}")
    return value
