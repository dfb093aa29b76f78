"""Write a Hugging Face tokenizer as a GGUF file's metadata: the inverse of `gguf_tokenizer.py`.

What is written is read again and must give the same tokens; a tokenizer that does not is refused. Sources:
llama.cpp's names of the keys and of the splitting rules; Kudo and Richardson 2018 (SentencePiece), where a
merge comes the earlier the higher the score of its piece.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from tokenizers import Tokenizer

from ...text.tokenizer import ChatTokenizer
from .gguf_tokenizer import LLAMA3, TEMPLATE, build_tokenizer, merges_by_score, splitting_rule
from .gguf_vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_vocabulary

KEY = "tokenizer.ggml."
RULES = ("smollm", "llama-bpe", "qwen2", "gpt-2")
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
PROBE = "It's 12345 o'clock, NAI\u0308VE  caf\xe9 - \u4f60\u597d \U0001f600!\n\n\tx = [1, 2]; the end's near "


def metadata_of_tokenizer(
    chat: ChatTokenizer, templates: Mapping[str, str], vocab_size: int
) -> dict[str, Any]:
    """Vocabulary, merges, special tokens and chat templates; ValueError if GGUF cannot express them.

    `vocab_size` is the number of the model's embeddings: there may be more of them than tokens.
    """
    record = json.loads(chat.tokenizer.to_str())
    model = record["model"]
    if model["type"] != "BPE":
        raise ValueError(f"a tokenizer must be BPE to be written to a GGUF file, got {model['type']}")
    tokens = tokens_in_order(chat.tokenizer, vocab_size)
    metadata = {
        f"{KEY}tokens": tokens,
        f"{KEY}token_type": token_types(chat.tokenizer, tokens, model.get("unk_token")),
        **special_tokens(chat, model.get("unk_token")),
        **template_keys(templates),
    }
    merges = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]
    ]
    metadata |= (
        sentencepiece(record, tokens, merges) if model["byte_fallback"] else byte_level(record, merges)
    )
    require_same_tokens(chat, metadata, merges)
    return metadata


def tokens_in_order(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """The tokens by their ids; ids without a token get a name, as in llama.cpp's conversion."""
    by_id = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    return [by_id.get(number, f"[PAD{number}]") for number in range(vocab_size)]


def token_types(tokenizer: Tokenizer, tokens: list[str], unknown: str | None) -> list[int]:
    is_special = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
    known = tokenizer.get_vocab(with_added_tokens=True)

    def type_of(token: str) -> int:
        if token not in known:
            return UNUSED
        if token == unknown:
            return UNKNOWN
        if token in is_special:
            return CONTROL if is_special[token] else USER_DEFINED
        return BYTE if unknown is not None and BYTE_PIECE.fullmatch(token) else NORMAL

    return [type_of(token) for token in tokens]


def special_tokens(chat: ChatTokenizer, unknown: str | None) -> dict[str, Any]:
    """The ids of special tokens, and which of them a text gets."""
    end_of_turn = next((number for number in chat.end_of_turn_ids() if number != chat.eos_id), None)
    ids = {
        "bos": chat.bos_id,
        "eos": chat.eos_id,
        "eot": end_of_turn,
        "unknown": None if unknown is None else chat.tokenizer.token_to_id(unknown),
    }
    keys: dict[str, Any] = {
        f"{KEY}{name}_token_id": number for name, number in ids.items() if number is not None
    }
    encoding = chat.tokenizer.encode("a", add_special_tokens=False)
    text, whole = list(encoding.ids), list(encoding.ids)
    if chat.post_processor is not None:
        whole = list(chat.post_processor.process(encoding, None, True).ids)
    keys[f"{KEY}add_bos_token"] = chat.bos_id is not None and whole[:1] == [chat.bos_id] != text[:1]
    keys[f"{KEY}add_eos_token"] = whole[-1:] == [chat.eos_id] != text[-1:]
    return keys


def template_keys(templates: Mapping[str, str]) -> dict[str, Any]:
    keys: dict[str, Any] = {
        TEMPLATE if name == "default" else f"{TEMPLATE}.{name}": text for name, text in templates.items()
    }
    others = [name for name in templates if name != "default"]
    return keys | ({"tokenizer.chat_templates": others} if others else {})


def byte_level(record: dict[str, Any], merges: Iterable[tuple[str, ...]]) -> dict[str, Any]:
    """Byte-level BPE: the merges and the name of the splitting rule; ValueError for an unknown rule."""
    found = without_trimming(record["pre_tokenizer"])
    rules = {rule: json.loads(splitting_rule(rule).__getstate__()) for rule in RULES}
    pre = next((rule for rule, steps in rules.items() if without_trimming(steps) == found), None)
    if pre is None:
        raise ValueError(
            f"the splitting rule of a tokenizer must be that of {', '.join(RULES)} "
            f"to be written to a GGUF file, and this one is another"
        )
    if bool(record["model"].get("ignore_merges")) != (pre in LLAMA3):
        raise ValueError(f"ignore_merges must be {pre in LLAMA3} for {pre} to be written to a GGUF file")
    return {f"{KEY}model": "gpt2", f"{KEY}pre": pre, f"{KEY}merges": [" ".join(pair) for pair in merges]}


def without_trimming(steps: Any) -> Any:
    """The steps of a pre-tokenizer without what changes offsets alone."""
    if isinstance(steps, dict):
        return {key: without_trimming(value) for key, value in steps.items() if key != "trim_offsets"}
    return [without_trimming(step) for step in steps] if isinstance(steps, list) else steps


def sentencepiece(record: dict[str, Any], tokens: list[str], merges: list[tuple[str, ...]]) -> dict[str, Any]:
    """SentencePiece's BPE: scores from the order of the merges, and whether a text gets a space before it."""
    rank = {piece: -float(n) for n, (piece, _) in enumerate(groupby(merges, "".join))}
    return {
        f"{KEY}model": "llama",
        f"{KEY}pre": "default",
        f"{KEY}scores": [rank.get(token, -float(len(rank) + n)) for n, token in enumerate(tokens)],
        f"{KEY}add_space_prefix": '"Prepend"' in json.dumps(record["normalizer"])
        or (record["pre_tokenizer"] or {}).get("prepend_scheme") == "always",
    }


def require_same_tokens(chat: ChatTokenizer, metadata: dict[str, Any], merges: list[tuple[str, ...]]) -> None:
    """ValueError unless the tokenizer in the metadata merges and splits as the given one.

    After a special token a text must have the same tokens. At its very start it may lack a space: GGUF has
    one switch for both, and conversations start with a special token.
    """
    vocabulary = read_vocabulary(metadata)
    if scores := metadata.get(f"{KEY}scores"):
        again: list[tuple[str, ...]] = [*merges_by_score(vocabulary, scores)]
        if len(again) != len(merges) or set(again) != set(merges):
            raise ValueError("the tokenizer's merges follow from no scores of pieces, which GGUF stores")
    rebuilt = build_tokenizer(metadata, vocabulary)
    for text in (f"{vocabulary.eos}{PROBE}", *(f"{vocabulary.eos}{word}" for word in PROBE.split(" "))):
        if (encode := chat.encode(text)) != rebuilt.encode(text, add_special_tokens=False).ids:
            raise ValueError(
                f"the tokenizer cannot be written to a GGUF file: it would no longer split {text!r} "
                f"into the tokens {encode}"
            )
