"""Build the tokenizer in a GGUF file: byte-level BPE with a published splitting rule, or SentencePiece's BPE.

Sources: the splitting rules in the `tokenizer.json` of Llama 3, Qwen2 and SmolLM2, and in Radford et al. 2019
(GPT-2); Kudo and Richardson 2018 (SentencePiece); llama.cpp's names of the rules and its defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ...disk.files import one_line
from ...text.template_choice import TemplateChoice, replacement
from ...text.tokenizer import ChatTokenizer
from .gguf_file import quote
from .gguf_vocabulary import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    read_numbers,
    read_texts,
    read_vocabulary,
)

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # punctuation, ends of lines, other white space
LLAMA3_RULE = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"
QWEN2_RULE = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")  # llama.cpp's names of one rule
TEMPLATE = "tokenizer.chat_template"  # and with a further name, after a point, other templates
OWN = TemplateChoice()
SPACE = "\u2581"  # SentencePiece's sign for a space


def tokenizer_from_gguf(metadata: dict[str, Any], path: Path, choice: TemplateChoice = OWN) -> ChatTokenizer:
    """The tokenizer; ValueError if there is none, or if its splitting rule is unknown."""
    own = read_templates(metadata)
    templates = choice.choose(own)
    try:
        vocabulary = read_vocabulary(metadata)
        chat = ChatTokenizer(
            build_tokenizer(metadata, vocabulary),
            template=templates or None,
            eos_token=vocabulary.eos or "",
            bos_token=vocabulary.bos or "",
        )
    except KeyError as error:
        raise ValueError(f"{path}: the key {error} is missing") from None
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path}: its tokenizer cannot be used: {one_line(error)}") from None
    chat.replacement = replacement(own, templates)
    return chat


def read_templates(metadata: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name."""
    named = {"default": metadata[TEMPLATE]} if TEMPLATE in metadata else {}
    more = [key for key in metadata if key.startswith(f"{TEMPLATE}.")]
    return named | {key.removeprefix(f"{TEMPLATE}."): metadata[key] for key in more}


def build_tokenizer(metadata: dict[str, Any], vocabulary: Vocabulary) -> Tokenizer:
    """What Hugging Face keeps in `tokenizer.json`: all but the chat template."""
    kind, pre = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model must be gpt2 or llama, got {quote(kind)}")
    tokenizer = (byte_level if kind == "gpt2" else sentencepiece)(metadata, vocabulary)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=type_ == CONTROL, normalized=False)
            for token, type_ in zip(vocabulary.tokens, vocabulary.types, strict=True)
            if type_ in (CONTROL, USER_DEFINED)
        ]
    )
    adds_bos = kind == "llama" or pre in LLAMA3  # llama.cpp's default where the file does not say
    bos = vocabulary.bos if metadata.get("tokenizer.ggml.add_bos_token", adds_bos) else None
    eos = vocabulary.eos if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if bos or eos:
        special = {token: vocabulary.tokens.index(token) for token in (bos, eos) if token}
        parts = [part for part in (bos, "$A", eos) if part]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=parts, special_tokens=list(special.items())
        )
    return tokenizer


def byte_level(metadata: dict[str, Any], vocabulary: Vocabulary) -> Tokenizer:
    """Byte-level BPE: a text is split by a rule, then the bytes of each piece are merged."""
    pre = metadata.get("tokenizer.ggml.pre")
    merges = [split_merge(merge) for merge in read_texts(metadata, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocabulary.ids(), merges, ignore_merges=pre in LLAMA3))
    tokenizer.pre_tokenizer = splitting_rule(pre)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def split_merge(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def splitting_rule(pre: object) -> pre_tokenizers.PreTokenizer:
    """How a text is split before merging, by llama.cpp's name of the rule; ValueError for an unknown rule."""
    if pre == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if pre != "qwen2" and pre not in LLAMA3:
        raise ValueError(
            f"tokenizer.ggml.pre must be one of smollm, llama-bpe, qwen2, gpt-2, got {quote(pre)}"
        )
    split = pre_tokenizers.Split(Regex(QWEN2_RULE if pre == "qwen2" else LLAMA3_RULE), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def sentencepiece(metadata: dict[str, Any], vocabulary: Vocabulary) -> Tokenizer:
    """SentencePiece's BPE: of all neighbours that form a piece, those with the highest score merge first."""
    for key in ("tokenizer.ggml.precompiled_charsmap", "tokenizer.ggml.remove_extra_whitespaces"):
        if metadata.get(key):
            raise ValueError(f"{key} is not supported for a tokenizer of the model llama")
    scores = read_numbers(metadata, "tokenizer.ggml.scores", len(vocabulary.tokens))
    merges = merges_by_score(vocabulary, scores)
    tokenizer = Tokenizer(
        models.BPE(vocabulary.ids(), merges, unk_token=vocabulary.unknown, fuse_unk=True, byte_fallback=True)
    )
    adds_space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    prepend = [normalizers.Prepend(SPACE)] * adds_space
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] * adds_space
    to_text = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(to_text)
    return tokenizer


def merges_by_score(vocabulary: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Every pair of pieces that forms a piece, the result with the highest score first."""
    ranked = sorted(zip(vocabulary.tokens, vocabulary.types, scores, strict=True), key=lambda row: -row[2])
    pieces = {token: type_ for token, type_, _ in ranked if type_ in (NORMAL, USER_DEFINED, UNUSED)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    unused = [left + right for left, right in merges if pieces[left + right] == UNUSED]
    if unused:  # SentencePiece would merge it, then split it again
        raise ValueError(f"the unused token {quote(unused[0])} must not be formed by two other tokens")
    return merges
