"""Text to token numbers and back, and conversations through the model's own chat template.

Sources: Hugging Face `tokenizers` (byte-level BPE, Radford et al. 2019) and its template conventions (jinja2
in a sandbox, `add_generation_prompt`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from .data import Conversation, Example, Message
from .files import read_json_object


def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def compile_template(template: str) -> jinja2.Template:
    try:
        return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template cannot be read: {error}") from None


class ChatTokenizer:
    """A tokenizer, a chat template and the token that ends a turn."""

    def __init__(self, tokenizer: Tokenizer, template: str, eos_token: str, bos_token: str) -> None:
        eos_id = tokenizer.token_to_id(eos_token)
        if eos_id is None:
            raise ValueError(f"the end-of-turn token {eos_token!r} must be in the vocabulary")
        self.tokenizer, self.eos_id = tokenizer, eos_id
        self.template = compile_template(template)
        self.special_texts = {"eos_token": eos_token, "bos_token": bos_token}
        if self.encode(eos_token + "a") != [eos_id, *self.encode("a")]:
            raise ValueError("a tokenizer that puts a space before a text is not supported")

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The text that the model reads; ValueError when the template refuses the messages."""
        try:
            return self.template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                raise_exception=refuse,
                **self.special_texts,
            )
        except Exception as error:  # a template is a program: whatever it does wrong
            raise ValueError(f"the chat template refuses the messages: {error}") from None

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens after which the model is to answer."""
        return self.encode(self.render(messages, add_generation_prompt=True))

    def encode_conversation(self, conversation: Conversation, mask_prompt: bool) -> Example:
        """The tokens up to the one that ends the last reply; the targets are that reply, or everything.

        Prompt and reply are tokenized apart, as they are when the model generates.
        """
        *question, _ = messages = conversation.messages
        try:
            prompt = self.render(question, add_generation_prompt=True)
            whole = self.render(messages, add_generation_prompt=False)
        except ValueError as error:
            raise ValueError(f"{conversation.where}: {error}") from None
        if not whole.startswith(prompt):
            raise ValueError(
                f"{conversation.where}: the chat template must render the conversation as the prompt "
                f"followed by the reply"
            )
        prompt_tokens, reply_tokens = self.encode(prompt), self.encode(whole[len(prompt) :])
        if self.eos_id not in reply_tokens:
            raise ValueError(
                f"{conversation.where}: the chat template must end a reply with "
                f"{self.special_texts['eos_token']!r}"
            )
        end = reply_tokens.index(self.eos_id) + 1
        marks = [not mask_prompt] * len(prompt_tokens) + [True] * end
        return Example(tuple(prompt_tokens + reply_tokens[:end]), tuple(marks))


def tokenizer_from_folder(folder: Path) -> ChatTokenizer:
    """`tokenizer.json` and `tokenizer_config.json` (or `chat_template.jinja`) of a Hugging Face folder."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{folder / 'tokenizer.json'}: not a readable tokenizer: {error}") from None
    path = folder / "tokenizer_config.json"
    config = read_json_object(path)
    separate = folder / "chat_template.jinja"
    template = separate.read_text("utf-8") if separate.is_file() else config.get("chat_template")
    if not isinstance(template, str):
        raise ValueError(f'{path}: must hold a "chat_template", or {separate.name} stand beside it')
    return ChatTokenizer(
        tokenizer, template, token_text(config.get("eos_token")), token_text(config.get("bos_token"))
    )


def token_text(value: Any) -> str:
    """A special token as `tokenizer_config.json` has it: a text, an object with "content", or null."""
    return str(value["content"] if isinstance(value, dict) else value or "")


def encode_all(
    tokenizer: ChatTokenizer,
    conversations: Sequence[Conversation],
    mask_prompt: bool,
    max_tokens: int,
) -> list[Example]:
    """Every conversation as an example of at most `max_tokens`; one left without a target is an error."""
    examples = []
    for conversation in conversations:
        whole = tokenizer.encode_conversation(conversation, mask_prompt)
        cut = Example(whole.tokens[:max_tokens], whole.is_target[:max_tokens])
        if not any(cut.is_target[1:]):
            raise ValueError(
                f"{conversation.where}: no target is left within the maximum of {max_tokens} tokens; "
                f"the example has {len(whole.tokens)}"
            )
        examples.append(cut)
    return examples
