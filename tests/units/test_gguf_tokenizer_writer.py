"""Tokenizers as GGUF metadata: the keys of a file come back, and what cannot be written is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from mlx_impl.files.formats.gguf_tokenizer import tokenizer_from_gguf
from mlx_impl.files.formats.gguf_tokenizer_writer import PROBE, metadata_of_tokenizer
from mlx_impl.text.tokenizer import ChatTokenizer
from tests.units.test_gguf_tokenizer import byte_level, sentencepiece

ANY = Path("a.gguf")


def written(metadata: dict[str, Any], spare: int = 0) -> dict[str, Any]:
    chat = tokenizer_from_gguf(metadata, ANY)
    return metadata_of_tokenizer(chat, {}, len(metadata["tokenizer.ggml.tokens"]) + spare)


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "gpt-2"])
def test_a_byte_level_tokenizer_gets_the_keys_that_it_was_read_from(pre: str) -> None:
    before, after = byte_level(pre), written(byte_level(pre))
    for key in ("model", "pre", "tokens", "token_type", "merges", "eos_token_id"):
        assert after[f"tokenizer.ggml.{key}"] == before[f"tokenizer.ggml.{key}"], key
    assert after["tokenizer.ggml.add_bos_token"] is (pre == "llama-bpe")
    assert after["tokenizer.ggml.add_eos_token"] is False


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_gets_scores_in_the_order_of_its_merges(prefix: bool) -> None:
    before = sentencepiece(**{"ggml.add_space_prefix": prefix})
    after = written(before)
    for key in ("model", "tokens", "token_type", "bos_token_id", "eos_token_id", "unknown_token_id"):
        assert after[f"tokenizer.ggml.{key}"] == before[f"tokenizer.ggml.{key}"], key
    assert after["tokenizer.ggml.add_space_prefix"] is prefix
    again = tokenizer_from_gguf(after, ANY).tokenizer
    assert again.to_str() == tokenizer_from_gguf(before, ANY).tokenizer.to_str()


def test_embeddings_without_a_token_get_an_unused_one() -> None:
    after, count = written(byte_level("qwen2"), spare=2), len(byte_level("qwen2")["tokenizer.ggml.tokens"])
    assert after["tokenizer.ggml.tokens"][count:] == [f"[PAD{count}]", f"[PAD{count + 1}]"]
    assert after["tokenizer.ggml.token_type"][count:] == [5, 5]


def changed(metadata: dict[str, Any], **parts: Any) -> ChatTokenizer:
    """The tokenizer with parts of its `tokenizer.json` replaced."""
    chat = tokenizer_from_gguf(metadata, ANY)
    record = json.loads(chat.tokenizer.to_str())
    record["model"] |= parts.pop("model", {})
    text = json.dumps(record | parts)
    return ChatTokenizer(Tokenizer.from_str(text), None, chat.special_tokens["eos_token"], "")


def state(part: Any) -> Any:
    return json.loads(part.__getstate__())


REFUSED = {
    "a splitting rule of its own": (
        changed(byte_level("gpt-2"), pre_tokenizer=state(pre_tokenizers.Whitespace())),
        "must be that of smollm, llama-bpe, qwen2, gpt-2",
    ),
    "whole words first": (
        changed(byte_level("gpt-2"), model={"ignore_merges": True}),
        "ignore_merges must be False for gpt-2",
    ),
    "another normalization": (
        changed(byte_level("gpt-2"), normalizer=state(normalizers.Lowercase())),
        "would no longer split",
    ),
    "no word pieces of scores": (
        changed(sentencepiece(), model={"merges": [["t", "h"]]}),
        "merges follow from no scores",
    ),
    "another model": (
        ChatTokenizer(Tokenizer(models.WordLevel({"</s>": 0, "?": 1}, "?")), None, "</s>", ""),
        "must be BPE",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tokenizer_that_gguf_cannot_express_is_refused(name: str) -> None:
    chat, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        metadata_of_tokenizer(chat, {}, chat.vocab_size)


def test_a_space_before_the_first_word_alone_is_none_after_a_special_token() -> None:
    """Mistral's: `prepend_scheme` first. Conversations begin with a special token, and keep their tokens."""
    first = state(pre_tokenizers.Metaspace(prepend_scheme="first", split=False))
    chat = changed(sentencepiece(), pre_tokenizer=first, normalizer=None)
    again = tokenizer_from_gguf(metadata_of_tokenizer(chat, {}, chat.vocab_size), ANY)
    assert again.encode(f"</s>{PROBE}") == chat.encode(f"</s>{PROBE}")


def test_templates_keep_their_names() -> None:
    chat = tokenizer_from_gguf(byte_level("qwen2"), ANY)
    keys = metadata_of_tokenizer(chat, {"default": "a", "tool_use": "b"}, chat.vocab_size)
    assert keys["tokenizer.chat_template"] == "a" and keys["tokenizer.chat_template.tool_use"] == "b"
    assert keys["tokenizer.chat_templates"] == ["tool_use"]
