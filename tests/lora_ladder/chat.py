"""Data files and tokenizers for the claims about text, and their tokens by hand.

A tokenizer has one token for each byte and one for each special token, so the tokens of a text can be read
off it. The expected text of an example is written with the targets between « and ».
Source of the letters that stand for bytes: GPT-2's `bytes_to_unicode` (Radford et al. 2019).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
OTHERS = [byte for byte in range(256) if byte not in PRINTED]
LETTERS = {**{byte: chr(byte) for byte in PRINTED}, **{byte: chr(256 + n) for n, byte in enumerate(OTHERS)}}

# name: (chat template, its end-of-turn token)
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "mistral": (
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
        "</s>",
    ),
    "no end of turn": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "</s>",
    ),
}


def write_tokenizer(folder: Path, name: str) -> Path:
    """`tokenizer.json` and `tokenizer_config.json`, as Hugging Face has them."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install 'lora-ladder[chat]'")
    template, end = TEMPLATES[name]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *LETTERS.values()])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": None, "eos_token": end, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def chat(*contents: str, system: str = "") -> dict[str, Any]:
    """A line of a data file: the user and the assistant in turn."""
    roles = itertools.cycle(("user", "assistant"))
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + turns}


def write_lines(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def tokens_of(text: str) -> list[int]:
    """A special token is one token, any other byte is one too."""
    ids, first_letter = [], len(SPECIAL)
    numbers = {byte: first_letter + n for n, byte in enumerate(LETTERS)}
    for part in re.split(f"({'|'.join(map(re.escape, SPECIAL))})", text):
        ids += [SPECIAL.index(part)] if part in SPECIAL else [numbers[byte] for byte in part.encode()]
    return ids


def example_of(marked: str) -> tuple[list[int], list[bool]]:
    """The tokens of a text, and which of them are between « and »."""
    tokens: list[int] = []
    is_target: list[bool] = []
    for number, part in enumerate(re.split("[«»]", marked)):
        tokens += tokens_of(part)
        is_target += [number % 2 == 1] * (len(tokens) - len(is_target))
    return tokens, is_target
