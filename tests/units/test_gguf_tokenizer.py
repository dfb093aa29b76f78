"""Tokenizers in GGUF files split texts by their models' published rules; an unknown rule is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mlx_impl.files.checkpoint import load_model
from mlx_impl.files.formats.gguf_file import read_container
from mlx_impl.files.formats.gguf_tokenizer import build_tokenizer, tokenizer_from_gguf
from mlx_impl.files.formats.gguf_vocabulary import read_vocabulary
from tests.gguf_files import byte_level_metadata, write, write_family
from tests.tiny_folder import TEMPLATE

TEXTS = [
    "The year 2024, 31415926 digits and 1,000.50 more",
    "I'm you're WE'VE they'LL it'S 'tis don't can\u2019t",
    "  two   and    more spaces \t tab\n\n\nlines\r\n  end  ",
    "Größe, naïve cafe\u0301, Ελληνικά, русский, 日本語のテキスト, العربية",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 and \u00bd \u2167 \u0663\u0664 \u216b",
    'snake_case(x)=>{y[0]!="z"}; // http://a.b/c?d=e#f',
    "<|user|> says<|end|>\nhello <think>hm</think>  x<|end|>",
    "",
    " ",
    "\n",
    "a",
]
CORPUS = [
    *(text for text in TEXTS if "<" not in text),
    "the theory of the other: 2024 2025 31 314 3141",
    "we're you're they'll don't won't I'M",
]
SPECIAL = {"<|end|>": 3, "<|user|>": 3, "<think>": 4, "</think>": 4}  # 3 control, 4 user-defined
# As published: in GPT-2's encoder.py, and in Llama 3's and Qwen2's tokenizer.json.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def learned_merges() -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE, learned without splitting, so that splitting rules matter."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, max_token_length=5, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(pair) for pair in model["merges"]]


TOKENS, MERGES = learned_merges()
UNREACHED = "Ġdigits"  # a token that no merges make


def byte_level(pre: str, **change: Any) -> dict[str, Any]:
    tokens = [*TOKENS, *SPECIAL, *([UNREACHED] if UNREACHED not in TOKENS else [])]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [SPECIAL.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": tokens.index("<|user|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|end|>"),
        "tokenizer.chat_template": TEMPLATE,
    } | {f"tokenizer.{key}": value for key, value in change.items()}


def from_file(folder: Path, metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer read from a file with this metadata."""
    read, _ = read_container(write(folder / "tiny.gguf", "llama", metadata, {}))
    return build_tokenizer(read, read_vocabulary(read))


def published(metadata: dict[str, Any], rule: str, digits: bool = False, **model: Any) -> Tokenizer:
    tokens = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [(pair.split()[0], pair.split()[1]) for pair in MERGES]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **model))
    splits = [pre_tokenizers.Split(Regex(rule), behavior="isolated")]
    if digits:
        splits.insert(0, pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, kind in SPECIAL.items() if kind == 3])
    tokenizer.add_tokens([token for token, kind in SPECIAL.items() if kind == 4])
    return tokenizer


@pytest.mark.parametrize(
    ("pre", "rule", "settings"),
    [
        ("smollm", GPT2, {"digits": True}),
        ("gpt-2", GPT2, {}),
        ("llama-bpe", LLAMA3, {"ignore_merges": True}),
        ("qwen2", QWEN2, {}),
    ],
)
def test_byte_level_tokens_are_those_of_the_published_rule(
    tmp_path: Path, pre: str, rule: str, settings: dict[str, Any]
) -> None:
    """Digits, contractions, whitespace runs, other scripts, emoji, special tokens."""
    metadata = byte_level(pre)
    ours, theirs = from_file(tmp_path, metadata), published(metadata, rule, **settings)
    if pre == "qwen2":
        theirs.normalizer = normalizers.NFC()
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False).tokens == theirs.encode(text).tokens, text
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text).ids, text


def test_the_rules_differ_on_these_texts(tmp_path: Path) -> None:
    """Otherwise the test above could not tell the rules apart."""
    split = {pre: from_file(tmp_path, byte_level(pre)) for pre in ("smollm", "gpt-2", "llama-bpe", "qwen2")}
    seen = [[tuple(split[pre].encode(text).tokens) for text in TEXTS] for pre in split]
    assert all(a != b for n, a in enumerate(seen) for b in seen[:n])


def test_llama_3_uses_a_token_that_no_merges_make(tmp_path: Path) -> None:
    text = " digits"
    assert from_file(tmp_path, byte_level("llama-bpe")).encode(text).tokens[-1:] == [UNREACHED]
    assert len(from_file(tmp_path, byte_level("qwen2")).encode(text).tokens) > 1


def test_decoding_gives_the_text_back(tmp_path: Path) -> None:
    tokenizer = from_file(tmp_path, byte_level("llama-bpe"))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids[1:], skip_special_tokens=False) == text


def test_control_tokens_are_special_and_user_defined_ones_are_text(tmp_path: Path) -> None:
    tokenizer = from_file(tmp_path, byte_level("qwen2"))
    ids = tokenizer.encode("<think>a</think><|end|>").ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a</think>"


PIECES = ["▁", *"thero", "th", "the", "▁the", "er", "re", "he", "her", "▁h", "or", "oo", "o▁"]
BYTES = [f"<0x{n:02X}>" for n in range(256)]


def sentencepiece(**change: Any) -> dict[str, Any]:
    """A vocabulary whose scores fall with the piece's number, as SentencePiece's trainer writes them."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *PIECES, "[user]"]
    types = [2, 3, 3, *[6] * 256, *[1] * len(PIECES), 4]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(n) for n in range(len(PIECES))] + [0.0],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.{key}": value for key, value in change.items()}


def merged(text: str) -> list[str]:
    """SentencePiece's BPE, naively: merge the neighbours with the highest score, the leftmost first."""
    rank, symbols = {piece: n for n, piece in enumerate(PIECES)}, list(text)
    while pairs := [(rank[a + b], n) for n, (a, b) in enumerate(pairwise(symbols)) if a + b in rank]:
        n = min(pairs)[1]
        symbols[n : n + 2] = [symbols[n] + symbols[n + 1]]
    return [part for s in symbols for part in ([s] if s in rank else [f"<0x{b:02X}>" for b in s.encode()])]


@pytest.mark.parametrize(
    "text",
    ["the other", "  hooter  the", "here 42 é", "\U0001f600the\n", "ththererer", "ooooo", " ", "x"],
)
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokens_are_those_of_its_algorithm(tmp_path: Path, text: str, prefix: bool) -> None:
    """Merges by score, bytes for characters without a piece, a space before the text."""
    tokenizer = from_file(tmp_path, sentencepiece(**{"ggml.add_space_prefix": prefix}))
    expected = merged("▁" * prefix + text.replace(" ", "▁"))
    encoding = tokenizer.encode(text, add_special_tokens=False)
    assert encoding.tokens == expected
    assert tokenizer.decode(encoding.ids) == text


def test_sentencepiece_special_tokens_stay_whole(tmp_path: Path) -> None:
    tokens = (
        from_file(tmp_path, sentencepiece()).encode("<s>the</s>[user]the", add_special_tokens=False).tokens
    )
    assert tokens == ["<s>", "▁the", "</s>", "[user]", "▁the"]


def test_an_unused_piece_that_merges_would_form_is_refused(tmp_path: Path) -> None:
    metadata = sentencepiece()
    metadata["tokenizer.ggml.token_type"][metadata["tokenizer.ggml.tokens"].index("th")] = 5
    with pytest.raises(ValueError, match="the unused token 'th' must not be formed by two other tokens"):
        from_file(tmp_path, metadata)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (byte_level("llama-bpe"), ["<|user|>", "a"]),
        (byte_level("qwen2"), ["a"]),
        (byte_level("smollm", **{"ggml.add_bos_token": True}), ["<|user|>", "a"]),
        (byte_level("llama-bpe", **{"ggml.add_bos_token": False}), ["a"]),
        (byte_level("qwen2", **{"ggml.add_eos_token": True}), ["a", "<|end|>"]),
        (sentencepiece(), ["<s>", "▁the"]),
        (sentencepiece(**{"ggml.add_bos_token": False, "ggml.add_eos_token": True}), ["▁the", "</s>"]),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(
    tmp_path: Path, metadata: dict[str, Any], expected: list[str]
) -> None:
    """llama.cpp's defaults where it does not say: BOS for SentencePiece and Llama 3, no EOS."""
    text = "the" if metadata["tokenizer.ggml.model"] == "llama" else "a"
    assert from_file(tmp_path, metadata).encode(text).tokens == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ggml.pre": "tekken"}, "ggml.pre must be one of smollm, llama-bpe, qwen2, gpt-2, got 'tekken'"),
        ({"ggml.pre": None}, "ggml.pre must be one of smollm, llama-bpe, qwen2, gpt-2, got None"),
        ({"ggml.model": "bert"}, "ggml.model must be gpt2 or llama, got 'bert'"),
        ({"ggml.model": None}, "the key 'tokenizer.ggml.model' is missing"),
        ({"ggml.merges": None}, "the key 'tokenizer.ggml.merges' is missing"),
        ({"ggml.merges": ["x y"]}, "its tokenizer cannot be used: .*Token `x` out of vocabulary"),
        ({"ggml.merges": [3]}, "ggml.merges must be an array of texts"),
        ({"ggml.token_type": [1, 1]}, "token_type must be an array of 61 numbers, one for each token"),
        ({"ggml.token_type": [9] * 61}, "token_type must hold numbers from 1 to 6, got 9"),
        ({"ggml.tokens": ["a"] * 61}, "tokenizer.ggml.tokens must hold each token once, got 'a' 61 times"),
        ({"ggml.eos_token_id": 61}, "eos_token_id must be the id of one of 61 tokens, got 61"),
        ({"ggml.eos_token_id": None}, "must name the token that ends a turn, eos_token, and"),
        ({"ggml.model": "llama"}, "the key 'tokenizer.ggml.scores' is missing"),
        ({"ggml.model": "llama", "ggml.scores": [0.0]}, "scores must be an array of 61 numbers"),
        ({"ggml.model": "llama", "ggml.precompiled_charsmap": [1]}, "precompiled_charsmap is not supported"),
    ],
)
def test_an_invalid_or_unknown_tokenizer_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    changed = {f"tokenizer.{key}": value for key, value in change.items()}
    path = write_family(tmp_path / "tiny.gguf", change=changed)
    with pytest.raises(ValueError, match=rf"tiny\.gguf: .*{message}"):
        tokenizer_from_gguf(read_container(path)[0], path)


def test_a_byte_level_file_gives_a_chat_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_model(write_family(tmp_path / "tiny.gguf")).tokenizer
    assert tokenizer.eos_id == 2
    assert tokenizer.vocab_size == len(byte_level_metadata()["tokenizer.ggml.tokens"])
