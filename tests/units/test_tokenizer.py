"""Tokenizers and chat templates of other people: what cannot be right is refused, in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from mlx_impl.checkpoint import load_model
from mlx_impl.data import Conversation
from mlx_impl.tokenizer import ChatTokenizer
from tests.tiny_folder import TEMPLATE, write_folder

CHAT = Conversation(
    ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), None, "data.jsonl:7"
)


def tokenizer_with(folder: Path, **changes: Any) -> ChatTokenizer:
    """The tiny model's, with other entries in tokenizer_config.json."""
    path = write_folder(folder) / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return load_model(folder).tokenizer


def test_only_the_first_end_of_turn_token_is_a_target(tmp_path: Path) -> None:
    """A template that prints it twice trains it once."""
    template = TEMPLATE.replace("{{ m.content }}<|im_end|>", "{{ m.content }}<|im_end|><|im_end|>")
    tokenizer = tokenizer_with(tmp_path, chat_template=template)
    example = tokenizer.encode_conversation(CHAT, mask_prompt=True)
    assert sum(example.is_target) == len(tokenizer.encode("b<|im_end|>"))
    assert example.tokens[-1] == tokenizer.eos_id


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "the chat template cannot be read"),
        ("{{ raise_exception('no system') }}", "data.jsonl:7: the chat template refuses .*: no system"),
        ("{{ 1 / 0 }}", "data.jsonl:7: the chat template refuses .*: division by zero"),
        ("{{ ''.__class__.__mro__ }}", "data.jsonl:7: the chat template refuses"),
        (
            "{{ messages | length }}",
            "data.jsonl:7: the chat template must render .* as the prompt followed by",
        ),
        (TEMPLATE.replace("<|im_end|>", ""), "data.jsonl:7: the chat template must end a reply with"),
    ],
)
def test_a_template_that_does_not_serve_is_an_error(tmp_path: Path, template: str, message: str) -> None:
    """Whatever a template does wrong, and the sandbox where it tries to leave it."""
    with pytest.raises(ValueError, match=message):
        tokenizer_with(tmp_path, chat_template=template).encode_conversation(CHAT, mask_prompt=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_token": None}, "the end-of-turn token '' must be in the vocabulary"),
        ({"eos_token": "</s>"}, "the end-of-turn token '</s>' must be in the vocabulary"),
        ({"chat_template": None}, 'must hold a "chat_template"'),
    ],
)
def test_a_configuration_that_lacks_something_is_an_error(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_with(tmp_path, **change)


def test_a_tokenizer_that_puts_a_space_before_a_text_is_refused() -> None:
    """Prompt and reply are tokenized apart: each would get a space of its own."""
    vocabulary = {"</s>": 0, "\u2581": 1, "a": 2, "\u2581a": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\u2581", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["</s>"])
    with pytest.raises(ValueError, match="puts a space before a text"):
        ChatTokenizer(tokenizer, TEMPLATE, "</s>", "")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    """Their embeddings would be read from beyond the matrix."""
    path = write_folder(tmp_path) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<one>", "<more>"])
    tokenizer.save(str(path))
    with pytest.raises(ValueError, match="must have at most the model's 260 tokens, got 262"):
        load_model(tmp_path)
