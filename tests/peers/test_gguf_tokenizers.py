"""Tokenizers in GGUF files give the tokens of sentencepiece and of transformers' own classes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from transformers.convert_slow_tokenizer import generate_merges

from tests.units.test_gguf_tokenizer import CORPUS, MERGES, TEXTS, UNREACHED, byte_level, from_file

PLAIN = [text for text in TEXTS if "<" not in text] + [
    "thee others",
    "0123456789",
    " \t mixed  runs   ",
    "ǅ ﬁ ½",
]


def trained(**change: Any) -> tuple[sentencepiece.SentencePieceProcessor, dict[str, Any]]:
    """A small sentencepiece model with Llama 2's settings, and its metadata as llama.cpp would write it."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3),
        model_writer=written,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["[user]"],
        minloglevel=2,
        **change,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    numbers = range(model.get_piece_size())
    types = [
        3 if model.is_control(n) else 2 if model.is_unknown(n) else 6 if model.is_byte(n) else 1
        for n in numbers
    ]
    types[model.piece_to_id("[user]")] = 4
    return model, {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(n) for n in numbers],
        "tokenizer.ggml.scores": [model.get_score(n) for n in numbers],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": change.get("add_dummy_prefix", True),
    }


@pytest.mark.parametrize("prefix", [True, False])
def test_tokens_are_those_of_sentencepiece(tmp_path: Path, prefix: bool) -> None:
    model, metadata = trained(add_dummy_prefix=prefix)
    ours = from_file(tmp_path, metadata)
    for text in PLAIN:
        assert ours.encode(text, add_special_tokens=False).ids == model.encode(text), text
        assert ours.decode(model.encode(text)) == model.decode(model.encode(text)) == text


def test_llama_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    """But for texts that begin with a space: transformers does not add another one, as sentencepiece does."""
    _, metadata = trained()
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = generate_merges(vocabulary, dict(zip(tokens, scores, strict=True)))
    theirs = transformers.LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    ours = from_file(tmp_path, metadata)
    for text in PLAIN:
        if not text.startswith(" "):
            assert ours.encode(text).ids == theirs(text)["input_ids"], text


def test_qwen2_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    metadata = byte_level("qwen2")
    vocabulary = {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges: Any = [tuple(merge.split()) for merge in MERGES]
    theirs = transformers.Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, unk_token="<|end|>", eos_token="<|end|>"
    )
    ours = from_file(tmp_path, metadata)
    for text in PLAIN:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text


@pytest.mark.parametrize("pre", ["llama-bpe", "gpt-2", "qwen2"])
def test_byte_level_tokens_are_those_that_transformers_reads_from_the_file(tmp_path: Path, pre: str) -> None:
    """But it ignores the digit rule of smollm, NFC in qwen2 and tokens that no merges make."""
    metadata = byte_level(pre) | {"general.architecture": "llama"}
    ours = from_file(tmp_path, metadata)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    for text in PLAIN:
        if UNREACHED.strip("Ġ") not in text and "e\u0301" not in text:
            ids = ours.encode(text, add_special_tokens=False).ids
            assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
