"""Read the tokenizer of a Hugging Face folder: `tokenizer.json`, special tokens, chat template.

Source: the files that transformers writes: `tokenizer_config.json` with `eos_token`, `bos_token` and
`chat_template` (a text, a list of {"name", "template"} or texts by name), or the template in
`chat_template.jinja` and more in `additional_chat_templates/`; `generation_config.json` with more tokens that
end an answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ...disk.files import MAX_JSON_BYTES, one_line, read_json_object, read_text, require_file
from ...text.template_choice import TemplateChoice, replacement
from ...text.tokenizer import ChatTokenizer

OWN = TemplateChoice()  # the model's own template


def tokenizer_from_folder(folder: Path, choice: TemplateChoice = OWN) -> ChatTokenizer:
    """The tokenizer, with a chat template if there is one; ValueError names a file that is wrong."""
    require_file(folder / "tokenizer.json", MAX_JSON_BYTES)
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(
            f"{folder / 'tokenizer.json'}: not a readable tokenizer: {one_line(error)}"
        ) from None
    path = folder / "tokenizer_config.json"
    config = read_json_object(path)
    own, eos_ids = read_templates(folder, config), read_eos_ids(folder)
    templates = choice.choose(own)
    try:
        eos, bos = (token_text(config.get(name)) for name in ("eos_token", "bos_token"))
        chat = ChatTokenizer(tokenizer, templates or None, eos, bos, eos_ids)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    chat.replacement = replacement(own, templates)
    return chat


def token_text(value: Any) -> str:
    """The text of a special token, given as a text, an object with "content", or null."""
    text = value.get("content") if isinstance(value, dict) else value or ""
    if not isinstance(text, str):
        raise ValueError(f"a special token must be a text, got {value!r}")
    return text


def read_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name; separate files take precedence over the configuration."""
    found = config.get("chat_template")
    named = [{"name": "default", "template": found}] if isinstance(found, str) else found or []
    if isinstance(named, dict):
        named = [{"name": name, "template": text} for name, text in named.items()]
    try:
        templates = {str(entry["name"]): entry["template"] for entry in named}
        if not all(isinstance(text, str) for text in templates.values()):
            raise TypeError
    except (TypeError, KeyError, IndexError):
        raise ValueError(
            f'{folder / "tokenizer_config.json"}: "chat_template" must be a text, texts by name, or a list '
            f'of objects with the texts "name" and "template"'
        ) from None
    files = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").exists():
        files["default"] = folder / "chat_template.jinja"
    for name, file in files.items():
        templates[name] = read_text(file)
    return templates


def read_eos_ids(folder: Path) -> list[int]:
    """The ids of tokens that end an answer, if there is a `generation_config.json` that lists them."""
    path = folder / "generation_config.json"
    if not path.exists():
        return []
    value = read_json_object(path).get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(number, int) and number >= 0 for number in ids):
        raise ValueError(f'{path}: "eos_token_id" must be a token id or a list of them, got {value!r}')
    return ids
