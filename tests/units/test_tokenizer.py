"""Tokenizers and chat templates from a folder: special tokens are placed right, bad files are refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from mlx_impl.files.checkpoint import load_model
from mlx_impl.text.conversation import Conversation
from mlx_impl.text.examples import encode
from mlx_impl.text.tokenizer import ChatTokenizer
from tests.tiny_folder import TEMPLATE, write_folder

CHAT = Conversation(
    ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), None, "data.jsonl:7"
)


def tokenizer_with(folder: Path, **changes: Any) -> ChatTokenizer:
    """The tiny model's tokenizer, with other entries in tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    if not path.exists():
        write_folder(folder)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return load_model(folder).tokenizer


def test_only_the_first_end_of_turn_token_is_a_target(tmp_path: Path) -> None:
    """The template prints it twice, but it is trained once."""
    template = TEMPLATE.replace("{{ m.content }}<|im_end|>", "{{ m.content }}<|im_end|><|im_end|>")
    tokenizer = tokenizer_with(tmp_path, chat_template=template)
    example = encode(tokenizer, CHAT, "completion")
    assert sum(example.is_target) == len(tokenizer.encode("b<|im_end|>"))
    assert example.tokens[-1] == tokenizer.eos_id


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "the chat template cannot be read"),
        ("{{ raise_exception('no system') }}", "data.jsonl:7: the chat template refuses .*: no system"),
        ("{{ 1 / 0 }}", "data.jsonl:7: the chat template refuses .*: division by zero"),
        ("{{ ''.__class__.__mro__ }}", "data.jsonl:7: the chat template refuses"),
        ("{{ messages | length }}", "data.jsonl:7: the chat template must show message 2, the reply"),
    ],
)
def test_a_template_that_fails_is_an_error(tmp_path: Path, template: str, message: str) -> None:
    """Bad syntax, an exception, an attempt to leave the sandbox, a reply that is not shown."""
    with pytest.raises(ValueError, match=message):
        encode(tokenizer_with(tmp_path, chat_template=template), CHAT, "completion")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_token": None}, "must name the token that ends a turn, eos_token, and this one names none"),
        ({"eos_token": "</s>"}, "the end-of-turn token '</s>' must be in the vocabulary"),
        ({"chat_template": 3}, '"chat_template" must be a text, texts by name, or a list'),
        (
            {"chat_template": [{"name": "default"}]},
            '"chat_template" must be a text, texts by name, or a list',
        ),
        ({"eos_token": {"content": 3}}, "a special token must be a text"),
    ],
)
def test_a_missing_or_wrong_tokenizer_setting_is_an_error(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_with(tmp_path, **change)


def test_a_model_without_a_chat_template_is_trained_on_texts(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, chat_template=None)
    example = encode(tokenizer, Conversation((), None, "data.jsonl:1", text="yes"), "completion")
    assert list(example.tokens) == [*tokenizer.encode("yes"), tokenizer.eos_id]
    assert all(example.is_target)
    with pytest.raises(ValueError, match=r"data\.jsonl:7: the model must have a chat template"):
        encode(tokenizer, CHAT, "completion")


def test_template_files_take_precedence_over_the_configuration(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[1].content }}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    tokenizer = tokenizer_with(tmp_path, chat_template=named)
    assert tokenizer.render(CHAT.messages, False) == "file b"
    assert tokenizer.render(CHAT.messages, False, [{"name": "now"}]) == "tools"


@pytest.mark.parametrize(("eos_token_id", "more"), [(1, {1}), ([1, 0], {0, 1}), (None, set())])
def test_generation_config_adds_stop_tokens(tmp_path: Path, eos_token_id: Any, more: set[int]) -> None:
    write_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id}))
    assert load_model(tmp_path).tokenizer.stop_ids == {2, *more}


def test_the_templates_end_of_turn_token_is_a_stop_token_besides_eos(tmp_path: Path) -> None:
    """As in Llama 3, whose EOS is not <|eot_id|>: a turn ends with <|eot_id|>, and no EOS is added."""
    tokenizer = tokenizer_with(tmp_path, eos_token="<pad>")
    assert tokenizer.stop_ids == {0, 2} and tokenizer.eos_id == 0
    assert encode(tokenizer, CHAT, "completion").tokens[-1] == 2


def test_bos_and_eos_are_added_once(tmp_path: Path) -> None:
    path = write_folder(tmp_path) / "tokenizer.json"
    raw = Tokenizer.from_file(str(path))
    raw.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    raw.save(str(path))
    tokenizer = tokenizer_with(tmp_path, bos_token="<|im_start|>")
    a = tokenizer.encode("a")
    for text in ("a", "<|im_start|>a", "a<|im_end|>", "<|im_start|>a<|im_end|>"):
        assert tokenizer.encode_text(text) == [1, *a, 2]
    assert tokenizer.encode("a") == a  # encode_text leaves no trace
    assert Counter(encode(tokenizer, CHAT, "completion").tokens)[1] == 2  # one per turn, from the template


def test_truncation_and_padding_in_a_tokenizer_file_are_ignored(tmp_path: Path) -> None:
    path = write_folder(tmp_path) / "tokenizer.json"
    raw = Tokenizer.from_file(str(path))
    raw.enable_truncation(3)
    raw.enable_padding(length=9)
    raw.save(str(path))
    assert len(load_model(tmp_path).tokenizer.encode("x" * 5)) == 5


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    """Their embeddings would be read from beyond the end of the matrix."""
    path = write_folder(tmp_path) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<one>", "<more>"])
    tokenizer.save(str(path))
    with pytest.raises(
        ValueError, match=r"token ids must be below the model's vocabulary size 260, got 261$"
    ):
        load_model(tmp_path)


def test_a_token_id_beyond_the_models_vocabulary_is_refused(tmp_path: Path) -> None:
    """There are few tokens, but one has the id 5,000,000: reading its embedding would crash the process."""
    path = write_folder(tmp_path) / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"]["q"] = 5_000_000
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(ValueError, match=r"token ids must be below .* 260, got 5000000$"):
        load_model(tmp_path)
