"""The tokenizer in a GGUF file: byte-level BPE with a published splitting rule, or SentencePiece's BPE.

Sources: llama.cpp's names of the keys; the splitting rules in the `tokenizer.json` of Llama 3, Qwen2
and SmolLM2, and in Radford et al. 2019 (GPT-2); Kudo and Richardson 2018 (SentencePiece).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from ..tokenizer import ChatTokenizer
from .gguf_file import one_line, shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens
SPACE = "\u2581"  # how SentencePiece writes one

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # signs, ends of lines, other space
LLAMA3_RULE = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"
QWEN2_RULE = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"
LLAMA3, GPT2 = ("llama-bpe", "llama3", "llama-v3"), ("gpt-2", "gpt2")


def tokenizer_from_gguf(metadata: dict[str, Any], path: Path) -> ChatTokenizer:
    """ValueError in one sentence where there is none, or none whose rule is known."""
    try:
        tokens, template = token_list(metadata), metadata["tokenizer.chat_template"]
        return ChatTokenizer(
            pipeline(metadata),
            template,
            eos_token=special(metadata, tokens, "eos") or "",
            bos_token=special(metadata, tokens, "bos") or "",
        )
    except KeyError as error:
        raise ValueError(f"{path}: the key {error} is missing") from None
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path}: the tokenizer in it cannot be used: {one_line(str(error))}") from None


def pipeline(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer without a chat template: what Hugging Face keeps in `tokenizer.json`."""
    kind, tokens, types = metadata["tokenizer.ggml.model"], token_list(metadata), token_types(metadata)
    if kind == "gpt2":
        tokenizer = byte_level(metadata, tokens)
        adds_bos = metadata.get("tokenizer.ggml.pre") in LLAMA3
    elif kind == "llama":
        tokenizer, adds_bos = sentencepiece(metadata, tokens, types), True
    else:
        raise ValueError(f"tokenizer.ggml.model must be gpt2 or llama, got {shown(kind)}")
    whole = [(t, of) for t, of in zip(tokens, types, strict=True) if of in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(t, special=of == CONTROL, normalized=False) for t, of in whole])
    tokenizer.post_processor = around(metadata, tokens, adds_bos)
    return tokenizer


def byte_level(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre")
    merges = [two_halves(merge) for merge in texts(metadata, "tokenizer.ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in LLAMA3))
    tokenizer.pre_tokenizer = splitting_rule(pre)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def two_halves(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def splitting_rule(pre: object) -> pre_tokenizers.PreTokenizer:
    """How a text is cut before the merges, by llama.cpp's name of the rule."""
    if pre in GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if pre != "qwen2" and pre not in LLAMA3:
        raise ValueError(
            f"tokenizer.ggml.pre must be one of smollm, llama-bpe, qwen2, gpt-2, got {shown(pre)}: "
            f"how it splits a text is not known here"
        )
    split = pre_tokenizers.Split(Regex(QWEN2_RULE if pre == "qwen2" else LLAMA3_RULE), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def sentencepiece(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    """Of all neighbours that together are a piece, those of the highest score are joined first."""
    for key in ("tokenizer.ggml.precompiled_charsmap", "tokenizer.ggml.remove_extra_whitespaces"):
        if metadata.get(key):
            raise ValueError(f"{key} is not supported for a tokenizer of the model llama")
    scores = numbers(metadata, "tokenizer.ggml.scores", len(tokens))
    merges = merges_by_score(tokens, scores, types)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    unknown = special(metadata, tokens, "unknown")
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefixed = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    prepend = [normalizers.Prepend(SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def merges_by_score(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two, the pieces of the highest scores first."""
    known = {token for token, of in zip(tokens, types, strict=True) if of in (NORMAL, USER_DEFINED)}
    ranked = sorted(range(len(tokens)), key=lambda number: -scores[number])
    return [
        (token[:cut], token[cut:])
        for token in (tokens[number] for number in ranked)
        if token in known
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]


def around(metadata: dict[str, Any], tokens: list[str], adds_bos: bool) -> processors.PostProcessor | None:
    """The special tokens that belong around a text, where the file, or llama.cpp's default, says so."""
    bos = special(metadata, tokens, "bos") if metadata.get("tokenizer.ggml.add_bos_token", adds_bos) else None
    eos = special(metadata, tokens, "eos") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if bos is None and eos is None:
        return None
    parts = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    used = {token: tokens.index(token) for token in (bos, eos) if token}
    return processors.TemplateProcessing(single=parts, special_tokens=list(used.items()))


def special(metadata: dict[str, Any], tokens: list[str], name: str) -> str | None:
    """The text of the token whose number a key gives; None where there is no such key."""
    key = f"tokenizer.ggml.{name}_token_id"
    number = metadata.get(key)
    if number is None:
        return None
    if not isinstance(number, int) or not 0 <= number < len(tokens):
        raise ValueError(f"{key} must be the number of one of {len(tokens)} tokens, got {shown(number)}")
    return tokens[number]


def token_list(metadata: dict[str, Any]) -> list[str]:
    tokens = texts(metadata, "tokenizer.ggml.tokens")
    if len(set(tokens)) != len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise ValueError(f"the token {shown(twice)} stands twice in tokenizer.ggml.tokens")
    return tokens


def token_types(metadata: dict[str, Any]) -> list[int]:
    types = numbers(metadata, "tokenizer.ggml.token_type", len(token_list(metadata)))
    wrong = [of for of in types if of not in range(NORMAL, BYTE + 1)]
    if wrong:
        raise ValueError(f"tokenizer.ggml.token_type must hold numbers from 1 to 6, got {shown(wrong[0])}")
    return [int(of) for of in types]


def texts(metadata: dict[str, Any], key: str) -> list[str]:
    value = metadata[key]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{key} must be an array of texts, got {shown(value)}")
    return value


def numbers(metadata: dict[str, Any], key: str, count: int) -> list[float]:
    value = metadata[key]
    if not isinstance(value, list) or any(isinstance(number, str) for number in value) or len(value) != count:
        raise ValueError(f"{key} must be an array of {count} numbers, one for each token, got {shown(value)}")
    return value
